// Package durable replaces and removes small files so that a crash, or a power cut, leaves the old content or the new one: nothing
// between.
//
// One writer at a time for a path: whoever owns the directory sees to that. The package must not know what the files mean.
package durable

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
)

// suffix names the file beside path that the new content is written to. One that a crash left is overwritten by the next writer.
const suffix = ".new"

// Replace gives the file at path, mode 0600, new content as a whole. When it returns nil the new content survives a power cut; until
// then the old content stands.
func Replace(path string, content []byte) error {
	if err := replace(path, content, (*os.File).Sync); err != nil {
		return err
	}
	return SyncDir(filepath.Dir(path))
}

// Swap is Replace without the wait for the disk: the new content survives the death of every process, and a power cut may lose it.
func Swap(path string, content []byte) error {
	return replace(path, content, func(*os.File) error { return nil })
}

func replace(path string, content []byte, settle func(*os.File) error) (err error) {
	f, err := os.OpenFile(path+suffix, os.O_WRONLY|os.O_CREATE|os.O_TRUNC, 0o600)
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
	if errors.Is(err, fs.ErrInvalid) {
		err = nil
	}
	if err = errors.Join(err, f.Close()); err != nil {
		return fmt.Errorf("sync directory: %w", err)
	}
	return nil
}
