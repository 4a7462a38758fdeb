package host_test

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"flint"
	"flint/internal/host"
	"flint/internal/vm/vmtest"
)

// TestFullAndReadOnlyDisk runs a runner where its record cannot be written: it says so, holds nothing, and the next one
// runs once there is room.
func TestFullAndReadOnlyDisk(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("needs root: it mounts a small tmpfs")
	}
	disk := t.TempDir()
	const options = "size=1m,nr_inodes=64"
	if err := unix.Mount("tmpfs", disk, "tmpfs", 0, options); err != nil {
		t.Skipf("needs to mount a tmpfs: %v", err)
	}
	defer unix.Unmount(disk, unix.MNT_DETACH)
	w := newWorld(t, &vmtest.Fake{})
	w.dir = filepath.Join(disk, "runners")
	w.config.Dir = w.dir
	h := w.host()
	full := filepath.Join(disk, "full")
	for _, step := range []struct {
		why         string
		spoil, mend func() error
	}{
		{"no space left on device", func() error {
			if err := os.WriteFile(full, make([]byte, 2<<20), 0o600); !errors.Is(err, unix.ENOSPC) {
				return fmt.Errorf("the disk is not full: %w", err)
			}
			return nil
		}, func() error { return os.Remove(full) }},
		{"no space left on device", func() error { // of inodes
			for i := 0; ; i++ {
				if err := os.Mkdir(filepath.Join(disk, fmt.Sprint("dir", i)), 0o700); errors.Is(err, unix.ENOSPC) {
					return nil
				} else if err != nil {
					return err
				}
			}
		}, func() error {
			dirs, err := filepath.Glob(filepath.Join(disk, "dir*"))
			for _, d := range dirs {
				err = errors.Join(err, os.Remove(d))
			}
			return err
		}},
		{
			"read-only", func() error { return unix.Mount("tmpfs", disk, "tmpfs", unix.MS_REMOUNT|unix.MS_RDONLY, options) },
			func() error { return unix.Mount("tmpfs", disk, "tmpfs", unix.MS_REMOUNT, options) },
		},
	} {
		if err := step.spoil(); err != nil {
			t.Fatal(err)
		}
		_, err := h.Run(t.Context(), flint.Runner{ID: host.NewID("flint-", "a"), Pool: "a"})
		var f *flint.Fault
		if !errors.As(err, &f) || f.Code != "host.space" || !strings.Contains(err.Error(), step.why) {
			t.Errorf("%s: got %v", step.why, err)
		}
		w.nothingLeft()
		if free := h.State().Free; free.CPUs != 4 {
			t.Errorf("%s: %d CPUs are free of 4", step.why, free.CPUs)
		}
		if err := step.mend(); err != nil {
			t.Fatal(err)
		}
	}
}
