package firecracker

import (
	"errors"
	"fmt"
	"os"
	"strconv"
	"strings"
	"sync"

	"golang.org/x/sys/unix"
)

// place is an open directory: where a VMM's sockets and pipes are. Whoever owns it may be an enemy, so names in it are
// never followed where they lead. It is safe for concurrent use, with its closing too. The zero value is closed.
type place struct {
	mu sync.RWMutex
	f  *os.File
}

// open opens a directory.
func (p *place) open(dir string) error {
	fd, err := unix.Open(dir, unix.O_PATH|unix.O_DIRECTORY|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0)
	if err != nil {
		return fmt.Errorf("open %s: %w", dir, err)
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	p.f = os.NewFile(uintptr(fd), dir)
	return nil
}

// do calls f with the directory's descriptor, which is good until f returns. It returns os.ErrClosed once it is closed.
func (p *place) do(f func(fd int) error) error {
	p.mu.RLock()
	defer p.mu.RUnlock()
	if p.f == nil {
		return os.ErrClosed
	}
	return f(int(p.f.Fd()))
}

// openat opens a name in the directory, close-on-exec and following no link.
func (p *place) openat(name string, flags int) (fd int, err error) {
	err = p.do(func(dir int) error {
		fd, err = unix.Openat(dir, name, flags|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0)
		return err
	})
	if err != nil {
		return -1, fmt.Errorf("open %s: %w", name, err)
	}
	return fd, nil
}

// remove unlinks names; those that are not there do not matter.
func (p *place) remove(names ...string) error {
	var errs []error
	for _, name := range names {
		err := p.do(func(dir int) error { return unix.Unlinkat(dir, name, 0) })
		if err != nil && !errors.Is(err, unix.ENOENT) {
			errs = append(errs, fmt.Errorf("remove %s: %w", name, err))
		}
	}
	return errors.Join(errs...)
}

// seal takes the directory and the ones below it from whoever owns them: its user can go on using what is there, and can
// make, rename and remove nothing any more. Names are never followed where they lead.
func (p *place) seal(below ...string) error {
	// The top goes first: from then on the names in it stay what they are.
	err := p.do(func(dir int) error { return sealDir(dir) })
	for _, path := range below {
		if err != nil {
			return err
		}
		err = p.do(func(dir int) error {
			for _, name := range strings.Split(path, "/") {
				fd, err := unix.Openat(dir, name, unix.O_PATH|unix.O_DIRECTORY|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0)
				if err != nil {
					return fmt.Errorf("open %s: %w", path, err)
				}
				defer unix.Close(fd)
				dir = fd
			}
			return sealDir(dir)
		})
	}
	return err
}

func sealDir(dir int) error {
	if err := unix.Fchownat(dir, "", 0, 0, unix.AT_EMPTY_PATH); err != nil {
		return fmt.Errorf("take directory: %w", err)
	}
	// The descriptor is for the path only, so it is changed by way of its name in /proc.
	if err := unix.Chmod("/proc/self/fd/"+strconv.Itoa(dir), 0o755); err != nil {
		return fmt.Errorf("close directory to others: %w", err)
	}
	return nil
}

func (p *place) close() error {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.f == nil {
		return nil
	}
	err := p.f.Close()
	p.f = nil
	return err
}
