package image

import (
	"context"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"

	"golang.org/x/sys/unix"

	"flint"
	"flint/internal/inuse"
	"flint/internal/rootfs"
)

// fileName is what the file of that digest is called.
func fileName(digest string, format Format) string {
	return strings.TrimPrefix(digest, "sha256:") + "." + string(format)
}

// isNamed reports whether the file at path has the name of one with that digest.
func isNamed(path, digest string) bool {
	stem, suffix, _ := strings.Cut(filepath.Base(path), ".")
	return stem == strings.TrimPrefix(digest, "sha256:") && (suffix == string(Ext4) || suffix == string(Erofs))
}

// writeImage flattens layers into a file of the store's directory kind and returns its digest, path and size.
func (s *Store) writeImage(ctx context.Context, kind string, layers []rootfs.Layer, limit flint.Bytes, format Format) (digest, path string, size flint.Bytes, err error) {
	tmp, release, err := s.work()
	if err != nil {
		return "", "", 0, err
	}
	defer release()
	f, err := os.OpenFile(filepath.Join(tmp, "image"), os.O_RDWR|os.O_CREATE|os.O_EXCL, 0o644)
	if err != nil {
		return "", "", 0, fmt.Errorf("write image: %w", err)
	}
	defer f.Close()
	if err := s.fill(ctx, layers, limit, format, tmp, f); err != nil {
		return "", "", 0, err
	}
	end, err := f.Seek(0, io.SeekEnd)
	if err != nil {
		return "", "", 0, fmt.Errorf("write image: %w", err)
	}
	// Read again rather than summed while it was written: that is what others will find in the file.
	if digest, err = hashFile(ctx, f.Name()); err != nil {
		return "", "", 0, fmt.Errorf("read image: %w", err)
	}
	path = s.path(kind, fileName(digest, format))
	if err := s.publish(ctx, f, path); err != nil {
		return "", "", 0, err
	}
	return digest, path, flint.Bytes(end), nil
}

// fill writes layers into the empty file out, and leaves the disk what VMs need of it. What is in the layers' files waits in dir, in a
// file without a name.
func (s *Store) fill(ctx context.Context, layers []rootfs.Layer, limit flint.Bytes, format Format, dir string, out *os.File) error {
	contents, err := os.CreateTemp(dir, "contents")
	if err != nil {
		return fmt.Errorf("make room for contents: %w", err)
	}
	defer contents.Close()
	if err := os.Remove(contents.Name()); err != nil {
		return fmt.Errorf("make room for contents: %w", err)
	}
	return rootfs.Write(ctx, layers, limit, format, &guard{File: contents, spare: s.spare}, &guard{File: out, spare: s.spare})
}

// publish gives a finished file its name. It is on disk before it is seen. A file of that name is left alone if it has the
// content that its name says: VMs may be using it. Either is held before a GC can see that nobody uses it.
func (s *Store) publish(ctx context.Context, f *os.File, path string) error {
	if s.holdWhole(ctx, path) == nil {
		return nil
	}
	if err := inuse.Lock(f, unix.LOCK_SH); err != nil {
		return fmt.Errorf("publish image: %w", err)
	}
	if err := f.Chmod(0o644); err != nil {
		return fmt.Errorf("publish image: %w", err)
	}
	if err := f.Sync(); err != nil {
		return fmt.Errorf("publish image: %w", err)
	}
	if err := os.Rename(f.Name(), path); err != nil {
		return fmt.Errorf("publish image: %w", err)
	}
	if err := s.hold(path); err != nil {
		return fmt.Errorf("publish image: %w", err)
	}
	s.nameIsRight(path) // it was named by what was read from it
	return nil
}

// Scratch makes a new file at path, readable and writable by its owner only: an empty, sparse ext4 file system of exactly that size
// (rounded down to 4 KiB), which takes next to nothing of the disk. On error there is no file. An existing file is an error. The caller
// owns and removes the file.
func (s *Store) Scratch(path string, size flint.Bytes) error {
	f, err := os.OpenFile(path, os.O_RDWR|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return scratchFault(err)
	}
	err = rootfs.WriteScratch(f, size)
	if cerr := f.Close(); err == nil {
		err = cerr
	}
	if err != nil {
		os.Remove(path)
		return scratchFault(err)
	}
	return nil
}

func scratchFault(err error) error {
	if f := spaceFault(err, "make scratch disk"); f != nil {
		return f
	}
	return fmt.Errorf("make scratch disk: %w", err)
}
