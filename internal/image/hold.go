package image

import (
	"context"
	"errors"
	"fmt"
	"io"
	"math"
	"os"
	"path/filepath"
	"sync"
	"time"

	"flint/internal/digest"
	"flint/internal/inuse"
)

// hold is what this process uses of a store: an open file with a shared lock, which ends with the process.
type hold struct {
	f *os.File
	// kept says that a GC was told to keep it. One that is no longer told so lets go.
	kept bool

	checking sync.Mutex
	whole    bool // the content was compared with the name, by this process
}

// hold keeps what is at path from every GC, those of other processes too, and records that it was used now. The error is
// fs.ErrNotExist where nothing is there (any more).
func (s *Store) hold(path string) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if h := s.held[path]; h != nil {
		if inuse.IsAt(h.f, path) {
			s.used(path)
			return nil
		}
		h.f.Close()
		delete(s.held, path)
	}
	f, err := inuse.Hold(path)
	if err != nil {
		return err
	}
	s.held[path] = &hold{f: f}
	s.used(path)
	return nil
}

// Keep holds files of the store that are still held, or at least there. What Base or Drive returned may have been let go since, by a
// GC that was told what was needed then. Paths elsewhere, and empty ones, are not the store's to keep.
func (s *Store) Keep(paths ...string) error {
	for _, path := range paths {
		if dir := filepath.Dir(path); dir != s.path(baseDir) && dir != s.path(driveDir) {
			continue
		}
		if err := s.hold(path); err != nil {
			return fmt.Errorf("keep image: %w", err)
		}
	}
	return nil
}

// errDamaged says that a file is not what its name says, and is out of the way now.
var errDamaged = errors.New("damaged")

// damagedSuffix is what the name of a damaged file ends with. GC removes it like any other that nobody uses.
const damagedSuffix = ".damaged"

// check compares a held file with its name, which is the digest of its content, when this process uses it for the first
// time. One that a crash, a disk or a person has damaged is set aside, and the error is errDamaged.
func (s *Store) check(ctx context.Context, path string) error {
	s.mu.Lock()
	h := s.held[path]
	s.mu.Unlock()
	if h == nil {
		return fmt.Errorf("check %s: nobody holds it", path)
	}
	h.checking.Lock()
	defer h.checking.Unlock()
	if h.whole {
		return nil
	}
	sum, err := digest.Reader(ctx, io.NewSectionReader(h.f, 0, math.MaxInt64))
	if err != nil {
		return fmt.Errorf("check %s: %w", path, err)
	}
	if isNamed(path, sum) {
		h.whole = true
		return nil
	}
	aside := path + damagedSuffix
	s.log.Warn("an image is damaged: its content has another digest than when it was made; it is set aside and made again",
		"path", path, "digest", sum, "aside", aside)
	if inuse.IsAt(h.f, path) { // else another process was quicker
		if err := os.Rename(path, aside); err != nil {
			return fmt.Errorf("set aside damaged image: %w", err)
		}
	}
	return fmt.Errorf("%w: %s", errDamaged, path)
}

// nameIsRight says that a held file needs no check.
func (s *Store) nameIsRight(path string) {
	s.mu.Lock()
	h := s.held[path]
	s.mu.Unlock()
	if h == nil {
		return
	}
	h.checking.Lock()
	defer h.checking.Unlock()
	h.whole = true
}

// holdWhole holds a file and checks it.
func (s *Store) holdWhole(ctx context.Context, path string) error {
	if err := s.hold(path); err != nil {
		return err
	}
	return s.check(ctx, path)
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
