package image

import (
	"errors"
	"os"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"

	"golang.org/x/sys/unix"

	"flint"
)

// ofDisk pretends that every file is on a disk of that size with so much free.
func ofDisk(free, total flint.Bytes) func(int, *unix.Statfs_t) error {
	return func(_ int, st *unix.Statfs_t) error {
		*st = unix.Statfs_t{Bsize: 4096, Bavail: uint64(free / 4096), Blocks: uint64(total / 4096)}
		return nil
	}
}

func TestSpare(t *testing.T) {
	tenth := func(disk flint.Bytes) flint.Bytes { return disk / 10 }
	nothing := func(flint.Bytes) flint.Bytes { return 0 }
	for _, tt := range []struct {
		free, total flint.Bytes
		leave       func(flint.Bytes) flint.Bytes
		full        bool
	}{
		{100 * flint.GiB, 200 * flint.GiB, nil, false},
		{flint.GiB, 200 * flint.GiB, nil, false},
		{flint.GiB - 4096, 200 * flint.GiB, nil, true},
		{600 * flint.MiB, 10 * flint.GiB, nil, false}, // a twentieth is 512 MiB
		{500 * flint.MiB, 10 * flint.GiB, nil, true},
		{20 * flint.GiB, 200 * flint.GiB, tenth, false},
		{20*flint.GiB - 4096, 200 * flint.GiB, tenth, true},
		{4096, 200 * flint.GiB, nothing, false},
	} {
		err := spare{tt.leave, ofDisk(tt.free, tt.total)}.check(os.Stdin)
		if full := errors.Is(err, unix.ENOSPC); full != tt.full || err != nil && !full {
			t.Errorf("%s of %s are free: %v", tt.free, tt.total, err)
		}
	}
}

// TestImagesLeaveWhatTheStoreIsTold: as much as that is at the time.
func TestImagesLeaveWhatTheStoreIsTold(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "layout")
	writeLayout(t, dir, "", testImage(t, pack(t, file("f", "1"))))
	for _, format := range []Format{Ext4, Erofs} {
		s := testStore(t)
		s.spare.statfs = ofDisk(30*flint.GiB, 100*flint.GiB)
		share := flint.Bytes(40)
		s.LeaveFree(func(disk flint.Bytes) flint.Bytes { return disk * share / 100 })
		_, err := s.Base(t.Context(), Want{Ref: dir, Format: format})
		var f *flint.Fault
		if !errors.As(err, &f) || f.Code != "image.space" || !strings.Contains(err.Error(), "30GiB are free, and 40GiB of the disk's 100GiB are for VMs") {
			t.Errorf("%s: %v", format, err)
		}
		wantEmptyTmp(t, s)
		share = 20
		wantBase(t, s, Want{Ref: dir, Format: format})
	}
}

// TestBuildersLeaveWhatTheStoreIsTold: a builder that would take it is ended, and what it made goes.
func TestBuildersLeaveWhatTheStoreIsTold(t *testing.T) {
	s, made := testStore(t), filepath.Join(t.TempDir(), "made")
	writeLayout(t, made, "", testImage(t, pack(t, file("f", "1"))))
	script := strings.ReplaceAll(fakeBuildah, "$FAKE_LAYOUT", made)
	log := fakeTool(t, "buildah", strings.Replace(script, "echo STEP 1;", `echo STEP 1; [ -e "$log.grow" ] && sleep 60;`, 1))
	if err := os.WriteFile(log+".grow", nil, 0o600); err != nil {
		t.Fatal(err)
	}
	var grown atomic.Bool
	s.spare.statfs = func(fd int, st *unix.Statfs_t) error {
		if grown.Load() {
			return ofDisk(900*flint.MiB, 100*flint.GiB)(fd, st)
		}
		return ofDisk(50*flint.GiB, 100*flint.GiB)(fd, st)
	}
	dir := dockerfileDir(t, "FROM scratch\n")
	_, err := s.Base(t.Context(), Want{Ref: dir, Progress: func(m flint.Milestone) {
		if m.Line == "STEP 1" {
			grown.Store(true)
		}
	}})
	var f *flint.Fault
	if !errors.As(err, &f) || f.Code != "image.space" || !strings.Contains(err.Error(), "900MiB are free, and 1GiB of the disk's 100GiB are for VMs") {
		t.Errorf("a builder that fills the disk: %v", err)
	}
	wantEmptyTmp(t, s)
	if _, err := s.Base(t.Context(), Want{Ref: dir}); !errors.As(err, &f) || f.Code != "image.space" {
		t.Errorf("a builder on a full disk: %v", err)
	}
	grown.Store(false)
	if err := os.Remove(log + ".grow"); err != nil {
		t.Fatal(err)
	}
	wantBase(t, s, Want{Ref: dir})
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
	if g.left = 0; !errors.Is(g.spare.check(f), unix.ENOSPC) {
		t.Errorf("%d MiB were written, and it is not full", written)
	}
	if _, err := g.Write([]byte("x")); !errors.Is(err, unix.ENOSPC) {
		t.Errorf("one more byte: %v", err)
	}
}
