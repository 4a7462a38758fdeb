package image

import (
	"os"
	"time"

	"flint/internal/inuse"
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
