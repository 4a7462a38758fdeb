package image

import (
	"errors"
	"fmt"
	"os"

	"golang.org/x/sys/unix"

	"flint"
)

// What an image that is being made leaves of the disk, because the disks of VMs that run grow on it, too: so much, or one part in
// so many of a small one.
const (
	leaveFree      = flint.GiB
	leaveFreeShare = 20
)

// guard is a file that is written only as long as there is room on its disk.
type guard struct {
	*os.File
	left int64 // bytes until it looks again
}

// lookEvery is how many bytes are written until a guard looks again.
const lookEvery = 64 << 20

// room is called before so many bytes are written. Its error is unix.ENOSPC.
func (g *guard) room(n int) error {
	if g.left -= int64(n); g.left > 0 {
		return nil
	}
	g.left = lookEvery
	var st unix.Statfs_t
	if err := unix.Fstatfs(int(g.Fd()), &st); err != nil {
		return fmt.Errorf("look at the disk: %w", err)
	}
	if tooFull(st) {
		return fmt.Errorf("write an image: less than %s, or one part in %d, is free: %w", leaveFree, leaveFreeShare, unix.ENOSPC)
	}
	return nil
}

// tooFull reports whether what is left of a disk is for VMs.
func tooFull(st unix.Statfs_t) bool {
	free, total := flint.Bytes(st.Bavail)*flint.Bytes(st.Bsize), flint.Bytes(st.Blocks)*flint.Bytes(st.Bsize)
	return free < min(leaveFree, total/leaveFreeShare)
}

// Write implements io.Writer.
func (g *guard) Write(p []byte) (int, error) {
	if err := g.room(len(p)); err != nil {
		return 0, err
	}
	return g.File.Write(p)
}

// WriteAt implements io.WriterAt.
func (g *guard) WriteAt(p []byte, at int64) (int, error) {
	if err := g.room(len(p)); err != nil {
		return 0, err
	}
	return g.File.WriteAt(p, at)
}

// spaceFault is the fault of an error that a full or read-only disk gave; nil for every other, and for one that is it already.
func spaceFault(err error, what string) *flint.Fault {
	var f *flint.Fault
	if errors.As(err, &f) && f.Code == "image.space" {
		return nil
	}
	return flint.SpaceFault("image.space", what, "the image store", err)
}
