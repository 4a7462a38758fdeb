package app

import (
	"errors"
	"os"
	"path/filepath"
)

// replaceFile gives a private file new content as a whole. When it returns nil that survives a power cut; until then the old
// content stands. One process at a time does so for a path: the state directory's lock sees to it.
func replaceFile(path string, content []byte) (err error) {
	f, err := os.OpenFile(path+".new", os.O_WRONLY|os.O_CREATE|os.O_TRUNC, 0o600)
	if err != nil {
		return err
	}
	_, err = f.Write(content)
	if err = errors.Join(err, f.Sync(), f.Close()); err == nil {
		err = os.Rename(path+".new", path)
	}
	if err != nil {
		return errors.Join(err, os.Remove(path+".new"))
	}
	return syncDir(path)
}

// removeFile removes a file. When it returns nil the file stays gone after a power cut.
func removeFile(path string) error {
	if err := os.Remove(path); err != nil {
		return err
	}
	return syncDir(path)
}

// syncDir has on disk what is in the directory of path.
func syncDir(path string) error {
	dir, err := os.Open(filepath.Dir(path))
	if err != nil {
		return err
	}
	return errors.Join(dir.Sync(), dir.Close())
}
