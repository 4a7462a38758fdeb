// Package inuse tells processes that share a cache which of its files others use, so that only the rest is removed.
//
// Who uses a file or directory holds a shared lock on it (flock(2)), which ends with the process; who wants to remove it
// must get the lock to itself. Nothing is decided by times or by process ids. The package must not remove anything, and
// must not know what the files are for. It also tells what they take of the disk.
package inuse

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"time"

	"golang.org/x/sys/unix"
)

// Hold keeps what is at path from whoever calls Seize, until the file it returns is closed or the process ends. The error is
// fs.ErrNotExist where nothing is there (any more). Who has seized it makes Hold wait.
func Hold(path string) (*os.File, error) {
	for {
		f, err := os.Open(path)
		if err != nil {
			return nil, err
		}
		if err := Lock(f, unix.LOCK_SH); err != nil {
			return nil, errors.Join(fmt.Errorf("lock %s: %w", path, err), f.Close())
		}
		if IsAt(f, path) {
			return f, nil
		}
		if err := f.Close(); err != nil { // removed or replaced in between
			return nil, err
		}
	}
}

// Seize opens what is at path for its removal: nil where anybody holds it or has it open, and where nothing is there.
// Closing the file lets go of it.
func Seize(path string) (*os.File, error) {
	f, err := os.Open(path)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	err = Lock(f, unix.LOCK_EX|unix.LOCK_NB)
	switch {
	case errors.Is(err, unix.EWOULDBLOCK):
		return nil, f.Close()
	case err != nil:
		return nil, errors.Join(fmt.Errorf("lock %s: %w", path, err), f.Close())
	case !IsAt(f, path) || openElsewhere(f):
		return nil, f.Close()
	}
	return f, nil
}

// Wait takes the exclusive lock of the file at path, which it makes where there is none, as soon as nobody has it, as long as ctx lasts. If
// it has to wait it calls told, once. Closing the file lets go of the lock; so does the end of the process.
func Wait(ctx context.Context, path string, told func()) (*os.File, error) {
	const first, most = 5 * time.Millisecond, 250 * time.Millisecond
	for wait := first; ; {
		f, err := os.OpenFile(path, os.O_RDWR|os.O_CREATE, 0o600)
		if err != nil {
			return nil, fmt.Errorf("open lock: %w", err)
		}
		err = Lock(f, unix.LOCK_EX|unix.LOCK_NB)
		if err == nil && IsAt(f, path) {
			return f, nil
		}
		f.Close()
		if err == nil { // removed or replaced in between
			continue
		}
		if !errors.Is(err, unix.EWOULDBLOCK) {
			return nil, fmt.Errorf("lock %s: %w", path, err)
		}
		if wait == first {
			told()
		}
		select {
		case <-ctx.Done():
			return nil, context.Cause(ctx)
		case <-time.After(wait):
		}
		wait = min(2*wait, most)
	}
}

// Open reports whether anybody has the file at path open. It is for files that nobody opens without holding their
// directory, which the caller has seized.
func Open(path string) (bool, error) {
	f, err := os.Open(path)
	if err != nil {
		return false, err
	}
	defer f.Close()
	return openElsewhere(f), nil
}

// openElsewhere reports whether a file is open beside f: VMs outlive the process that locked their files. The kernel
// grants a write lease, which is given back at once, only to the one who has a file open. Where it knows no leases, as for
// directories, the lock alone decides. A file that it refuses to tell of, because another user owns it, counts as open.
func openElsewhere(f *os.File) bool {
	if info, err := f.Stat(); err != nil || !info.Mode().IsRegular() {
		return false
	}
	if _, err := unix.FcntlInt(f.Fd(), unix.F_SETLEASE, unix.F_WRLCK); err != nil {
		return errors.Is(err, unix.EAGAIN) || errors.Is(err, unix.EACCES) || errors.Is(err, unix.EPERM)
	}
	_, _ = unix.FcntlInt(f.Fd(), unix.F_SETLEASE, unix.F_UNLCK) // it ends with f at the latest
	return false
}

// IsAt reports whether f is what path names now.
func IsAt(f *os.File, path string) bool {
	is, err := f.Stat()
	if err != nil {
		return false
	}
	at, err := os.Lstat(path)
	return err == nil && os.SameFile(is, at)
}

// Lock is flock(2), gone on with after a signal.
func Lock(f *os.File, how int) error {
	for {
		if err := unix.Flock(int(f.Fd()), how); !errors.Is(err, unix.EINTR) {
			return err
		}
	}
}
