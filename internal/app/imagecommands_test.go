package app

import (
	"errors"
	"os"
	"path/filepath"
	"testing"

	"golang.org/x/sys/unix"

	"flint"
	"flint/internal/image"
)

// TestCopyImageThatCannotBeWritten: the disk is not the state directory's, so the fault says whose it is.
func TestCopyImageThatCannotBeWritten(t *testing.T) {
	dir := t.TempDir()
	b := image.Base{Path: filepath.Join(dir, "base")}
	if err := os.WriteFile(b.Path, make([]byte, 1<<20), 0o600); err != nil {
		t.Fatal(err)
	}
	wantOutputFault := func(to string, why error) {
		t.Helper()
		err := CopyImage(b, to)
		if f := new(flint.Fault); !errors.As(err, &f) || f.Code != "image.output" || f.Fix == "" || !errors.Is(err, why) {
			t.Errorf("%v, want image.output because of %v", err, why)
		}
		if left, err := filepath.Glob(filepath.Join(filepath.Dir(to), "*.new")); len(left) > 0 || err != nil {
			t.Errorf("left: %v, %v", left, err)
		}
	}
	wantOutputFault(filepath.Join(b.Path, "copy"), unix.ENOTDIR)

	if os.Geteuid() != 0 {
		t.Skip("needs root for the rest: it mounts a small tmpfs")
	}
	small := filepath.Join(dir, "small")
	if err := errors.Join(os.Mkdir(small, 0o700), unix.Mount("tmpfs", small, "tmpfs", 0, "size=64k")); err != nil {
		t.Skipf("needs to mount a tmpfs: %v", err)
	}
	defer unix.Unmount(small, unix.MNT_DETACH)
	wantOutputFault(filepath.Join(small, "copy"), unix.ENOSPC)
}
