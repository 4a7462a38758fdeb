package image

import (
	"errors"
	"os"
	"path/filepath"
	"testing"

	"golang.org/x/sys/unix"

	"flint"
)

func TestTooFull(t *testing.T) {
	for _, tt := range []struct {
		free, total flint.Bytes
		want        bool
	}{
		{100 * flint.GiB, 200 * flint.GiB, false},
		{flint.GiB, 200 * flint.GiB, false},
		{flint.GiB - 4096, 200 * flint.GiB, true},
		{600 * flint.MiB, 10 * flint.GiB, false}, // a twentieth is 512 MiB
		{500 * flint.MiB, 10 * flint.GiB, true},
	} {
		st := unix.Statfs_t{Bsize: 4096, Bavail: uint64(tt.free / 4096), Blocks: uint64(tt.total / 4096)}
		if got := tooFull(st); got != tt.want {
			t.Errorf("%s of %s are free: %v", tt.free, tt.total, got)
		}
	}
}

// TestImagesLeaveRoom: what is written to a disk ends before the disk is full.
func TestImagesLeaveRoom(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("needs root: mounts a tmpfs")
	}
	dir := t.TempDir()
	if err := unix.Mount("tmpfs", dir, "tmpfs", 0, "size=256M"); err != nil {
		t.Skipf("needs to mount a tmpfs: %v", err)
	}
	defer unix.Unmount(dir, 0)
	f, err := os.Create(filepath.Join(dir, "image"))
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	g, chunk := &guard{File: f}, make([]byte, 1<<20)
	written := 0
	for err == nil {
		_, err = g.Write(chunk)
		written++
	}
	if !errors.Is(err, unix.ENOSPC) || spaceFault(err, "make an image") == nil {
		t.Errorf("after %d MiB: %v", written, err)
	}
	// It looks each 64 MiB, so the last look before the end finds it full or the disk does.
	var st unix.Statfs_t
	if err := unix.Statfs(dir, &st); err != nil {
		t.Fatal(err)
	}
	if g.left = 0; !tooFull(st) {
		t.Errorf("%d MiB were written, and it is not full", written)
	}
	if _, err := g.Write([]byte("x")); !errors.Is(err, unix.ENOSPC) {
		t.Errorf("one more byte: %v", err)
	}
}
