// Package durable replaces and removes small files as a whole: whoever reads one, and whoever finds it after a crash, has the old content
// or the new one.
//
// The package must not know what the files mean, and knows nothing of who else writes them: of several writers the last one wins.
package durable

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"syscall"
)

// suffix is what the name of the file ends with that new content is written to, beside the old one. A crash may leave it, for Clear.
const suffix = ".new"

// Replace gives the file at path, mode 0600, new content as a whole. When it returns nil the new content survives a power cut; until
// then the old content stands.
func Replace(path string, content []byte) error {
	if err := replace(path, content, (*os.File).Sync); err != nil {
		return err
	}
	return SyncDir(filepath.Dir(path))
}

// Swap is Replace without the wait for the disk: the new content survives the death of every process. After a power cut the file may
// hold the old content, the new one, or nothing.
func Swap(path string, content []byte) error {
	return replace(path, content, func(*os.File) error { return nil })
}

func replace(path string, content []byte, settle func(*os.File) error) (err error) {
	f, err := create(path)
	if err != nil {
		return err
	}
	_, err = f.Write(content)
	if err == nil {
		err = settle(f)
	}
	if err = errors.Join(err, f.Close()); err == nil {
		err = os.Rename(f.Name(), path)
	}
	if err != nil {
		return errors.Join(err, os.Remove(f.Name()))
	}
	return nil
}

// create makes the file, mode 0600, that becomes the one at path.
func create(path string) (*os.File, error) {
	return os.CreateTemp(filepath.Dir(path), filepath.Base(path)+".*"+suffix)
}

// Clear removes what crashes have left of writing the file at path. Nobody may write it meanwhile.
func Clear(path string) error {
	dir, base := filepath.Split(path)
	entries, err := os.ReadDir(filepath.Clean(dir))
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	for _, e := range entries {
		rest, begins := strings.CutPrefix(e.Name(), base+".")
		number, ends := strings.CutSuffix(rest, suffix)
		if !begins || !ends || strings.Trim(number, "0123456789") != "" {
			continue
		}
		if err := os.Remove(filepath.Join(dir, e.Name())); err != nil {
			return err
		}
	}
	return nil
}

// Remove removes a file. When it returns nil the file stays gone after a power cut.
func Remove(path string) error {
	if err := os.Remove(path); err != nil {
		return err
	}
	return SyncDir(filepath.Dir(path))
}

// SyncDir has on disk which names a directory holds. A file system that cannot tell, as some over a network, does so by itself.
func SyncDir(dir string) error {
	f, err := os.Open(dir)
	if err != nil {
		return fmt.Errorf("sync directory: %w", err)
	}
	err = f.Sync()
	if errors.Is(err, syscall.EINVAL) {
		err = nil
	}
	if err = errors.Join(err, f.Close()); err != nil {
		return fmt.Errorf("sync directory: %w", err)
	}
	return nil
}
