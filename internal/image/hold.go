package image

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"time"

	"golang.org/x/sys/unix"
)

// hold is what this process uses of a store: an open file with a shared lock, which ends with the process.
type hold struct {
	f *os.File
	// kept says that a GC was told to keep it. One that is no longer told so lets go.
	kept bool
}

// hold keeps what is at path from every GC, those of other processes too, and records that it was used now. The error is
// fs.ErrNotExist where nothing is there (any more).
func (s *Store) hold(path string) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if h := s.held[path]; h != nil {
		if isAt(h.f, path) {
			s.used(path)
			return nil
		}
		h.f.Close()
		delete(s.held, path)
	}
	for {
		f, err := os.Open(path)
		if err != nil {
			return err
		}
		// Whoever has the lock to himself is about to remove it, which is quick.
		if err := flock(f, unix.LOCK_SH); err != nil {
			f.Close()
			return fmt.Errorf("lock %s: %w", path, err)
		}
		if isAt(f, path) {
			s.held[path] = &hold{f: f}
			s.used(path)
			return nil
		}
		f.Close() // removed or replaced in between
	}
}

// letGo gives up what GCs were told to keep and are no longer. What was never named is about to be used.
func (s *Store) letGo(keep func(path string) bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for path, h := range s.held {
		switch {
		case keep(path):
			h.kept = true
		case h.kept:
			h.f.Close()
			delete(s.held, path)
		}
	}
}

// used records the time as that of the last use: it is the modification time, which nothing else reads.
func (s *Store) used(path string) {
	if err := os.Chtimes(path, time.Time{}, time.Now()); err != nil {
		s.log.Debug("record the use of an image", "err", err)
	}
}

// seize opens what is at path for removal: false where anybody uses it. Closing the file lets go of it.
func seize(path string) (*os.File, bool, error) {
	f, err := os.Open(path)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, false, nil
	}
	if err != nil {
		return nil, false, err
	}
	err = flock(f, unix.LOCK_EX|unix.LOCK_NB)
	if errors.Is(err, unix.EWOULDBLOCK) || err == nil && (!isAt(f, path) || openElsewhere(f)) {
		f.Close()
		return nil, false, nil
	}
	if err != nil {
		f.Close()
		return nil, false, fmt.Errorf("lock %s: %w", path, err)
	}
	return f, true, nil
}

// openElsewhere reports whether a file is open beside f: VMs outlive the flint that locked their images. The kernel grants
// a write lease, which is given back at once, only to the one who has a file open. Where it knows no leases the lock decides.
func openElsewhere(f *os.File) bool {
	if info, err := f.Stat(); err != nil || !info.Mode().IsRegular() {
		return false
	}
	if _, err := unix.FcntlInt(f.Fd(), unix.F_SETLEASE, unix.F_WRLCK); err != nil {
		return errors.Is(err, unix.EAGAIN)
	}
	_, _ = unix.FcntlInt(f.Fd(), unix.F_SETLEASE, unix.F_UNLCK) // it ends with f at the latest
	return false
}

// isAt reports whether f is what path names now.
func isAt(f *os.File, path string) bool {
	is, err := f.Stat()
	if err != nil {
		return false
	}
	at, err := os.Lstat(path)
	return err == nil && os.SameFile(is, at)
}

// flock is flock(2), gone on with after a signal.
func flock(f *os.File, how int) error {
	for {
		if err := unix.Flock(int(f.Fd()), how); !errors.Is(err, unix.EINTR) {
			return err
		}
	}
}
