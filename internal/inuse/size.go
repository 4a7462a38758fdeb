package inuse

import (
	"errors"
	"io/fs"
	"path/filepath"
	"syscall"

	"flint"
)

// OnDisk is what a file, or a directory with all in it, takes of the disk. With an error it is what was seen until then.
func OnDisk(path string) (flint.Bytes, error) {
	var sum flint.Bytes
	err := filepath.WalkDir(path, func(p string, d fs.DirEntry, err error) error {
		if errors.Is(err, fs.ErrNotExist) && p != path {
			return nil // removed while we looked
		}
		if err != nil {
			return err
		}
		info, err := d.Info()
		if err != nil {
			return nil
		}
		if st, ok := info.Sys().(*syscall.Stat_t); ok {
			sum += flint.Bytes(st.Blocks * 512) // stat(2) counts in these
		}
		return nil
	})
	return sum, err
}
