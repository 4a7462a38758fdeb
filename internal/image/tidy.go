package image

import (
	"errors"
	"io/fs"
	"os"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"flint/internal/inuse"
)

// memory is how long is remembered what a file or a directory held: what is forgotten too early is read again. Why an image could not be
// had is remembered for a day, as who still wants it tries again every hour.
const memory = 30 * day

// tidy removes what each new content of a source adds and nobody asks for again: locks that are free, and old records that name no
// image of the store.
func (s *Store) tidy() {
	err := errors.Join(s.each(lockDir, s.dropLock), s.each(recordDir, s.dropRecord))
	if err != nil && !errors.Is(err, unix.EROFS) {
		s.log.Warn("remove old locks and records of the image store", "err", err)
	}
}

// each calls visit for everything in a directory of the store. What another process removes meanwhile is no error.
func (s *Store) each(dir string, visit func(name, path string) error) error {
	entries, err := os.ReadDir(s.path(dir))
	for _, e := range entries {
		if verr := visit(e.Name(), s.path(dir, e.Name())); !errors.Is(verr, fs.ErrNotExist) {
			err = errors.Join(err, verr)
		}
	}
	return err
}

// dropLock removes a lock that is free. Those with names of their own are few, and stay.
func (s *Store) dropLock(name, path string) error {
	if name == workLock || name == builderLock {
		return nil
	}
	f, err := inuse.Seize(path)
	if f == nil {
		return err
	}
	defer f.Close()
	return os.Remove(path)
}

// dropRecord removes an old record that is not of an image: forget does that.
func (s *Store) dropRecord(name, path string) error {
	info, err := os.Lstat(path)
	if err != nil {
		return err
	}
	age := time.Since(info.ModTime())
	if strings.HasPrefix(name, failurePrefix) && age >= day {
		return os.Remove(path)
	}
	if age < memory {
		return nil
	}
	b, err := os.ReadFile(path)
	if err != nil {
		return err
	}
	if !strings.HasPrefix(string(b), `"`) { // no digest of a file or a directory
		return nil
	}
	return os.Remove(path)
}
