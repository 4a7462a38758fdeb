package image

import (
	"context"
	"errors"
	"fmt"
	"os"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"flint"
)

// What is left of a disk where nobody says otherwise: so much, or one part in so many of a small one.
const (
	leaveFree      = flint.GiB
	leaveFreeShare = 20
)

// spare is what an image that is being made leaves of the disk, because the disks of VMs that run grow on it, too.
type spare struct {
	leave  func(disk flint.Bytes) flint.Bytes    // by the disk's size; nil: leaveFree, or a share of it
	statfs func(fd int, st *unix.Statfs_t) error // nil: that of the kernel
}

// LeaveFree sets how much of a disk of a given size stays free when an image is made or pulled; else it is 1 GiB, or a twentieth of a small
// disk. It is called before anything else is done with the store, and leave at any time then.
func (s *Store) LeaveFree(leave func(disk flint.Bytes) flint.Bytes) { s.spare.leave = leave }

// check looks at the disk of an open file. Its error is unix.ENOSPC where no more is to be written.
func (s spare) check(f *os.File) error {
	statfs, leave := s.statfs, s.leave
	if statfs == nil {
		statfs = unix.Fstatfs
	}
	if leave == nil {
		leave = func(disk flint.Bytes) flint.Bytes { return min(leaveFree, disk/leaveFreeShare) }
	}
	var st unix.Statfs_t
	if err := statfs(int(f.Fd()), &st); err != nil {
		return fmt.Errorf("look at the disk: %w", err)
	}
	free, total := flint.Bytes(st.Bavail)*flint.Bytes(st.Bsize), flint.Bytes(st.Blocks)*flint.Bytes(st.Bsize)
	if least := leave(total); free < least {
		return fmt.Errorf("write an image: %s are free, and %s of the disk's %s are for VMs: %w", free, least, total, unix.ENOSPC)
	}
	return nil
}

// whileRoom runs do with a context that ends when the disk of dir has no more room for images: for what other programs write.
func (s *Store) whileRoom(ctx context.Context, dir string, do func(context.Context) error) error {
	f, err := os.Open(dir)
	if err != nil {
		return fmt.Errorf("look at the disk: %w", err)
	}
	defer f.Close()
	if err := s.spare.check(f); err != nil {
		return err
	}
	ctx, end := context.WithCancelCause(ctx)
	var watch sync.WaitGroup
	defer watch.Wait()
	defer end(nil)
	watch.Go(func() {
		tick := time.NewTicker(lookAfter)
		defer tick.Stop()
		for {
			select {
			case <-ctx.Done():
				return
			case <-tick.C:
				if err := s.spare.check(f); err != nil {
					end(err)
				}
			}
		}
	})
	return do(ctx)
}

// guard is a file that is written only as long as there is room on its disk.
type guard struct {
	*os.File
	spare spare
	left  int64 // bytes until it looks again
}

// lookAfter is how long another program may write between two looks. The fastest disks take some GiB in that time.
const lookAfter = time.Second

// lookEvery is how many bytes are written until a guard looks again.
const lookEvery = 64 << 20

// room is called before so many bytes are written. Its error is unix.ENOSPC.
func (g *guard) room(n int) error {
	if g.left -= int64(n); g.left > 0 {
		return nil
	}
	g.left = lookEvery
	return g.spare.check(g.File)
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
