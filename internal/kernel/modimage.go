package kernel

import (
	"archive/tar"
	"bytes"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"time"

	"github.com/Microsoft/hcsshim/ext4/tar2ext4"

	"flint/internal/ext4"
)

// writeModulesImage writes a read-only ext4 file system with the content of tree.
func writeModulesImage(out *os.File, tree fs.FS) error {
	t, err := newTarStream(tree)
	if err != nil {
		return err
	}
	defer t.close()
	// Room for every file's last, partly filled block, for the inodes, and for the bitmaps.
	most := t.bytes + int64(len(t.paths))*8192 + 64<<20
	if err := tar2ext4.ConvertTarToExt4(t, out, tar2ext4.MaximumDiskSize(most)); err != nil {
		return err
	}
	return ext4.PadInodeBitmaps(out)
}

// tarStream is a file tree as a tar stream, in order of path, all owned by root and as old as the epoch, made while it
// is read.
type tarStream struct {
	tree  fs.FS
	paths []string
	bytes int64 // sum of the files' sizes
	buf   bytes.Buffer
	w     *tar.Writer
	file  fs.File // being copied; nil between files
	next  int
	ended bool
}

func newTarStream(tree fs.FS) (*tarStream, error) {
	t := &tarStream{tree: tree}
	t.w = tar.NewWriter(&t.buf)
	err := fs.WalkDir(tree, ".", func(p string, d fs.DirEntry, err error) error {
		if err != nil || p == "." {
			return err
		}
		if !d.IsDir() && !d.Type().IsRegular() {
			return fmt.Errorf("%s is a %v", p, d.Type())
		}
		info, err := d.Info()
		if err != nil {
			return err
		}
		if !d.IsDir() {
			t.bytes += info.Size()
		}
		t.paths = append(t.paths, p)
		return nil
	})
	return t, err
}

// Read implements io.Reader.
func (t *tarStream) Read(p []byte) (int, error) {
	for t.buf.Len() == 0 {
		if t.ended {
			return 0, io.EOF
		}
		if err := t.fill(); err != nil {
			return 0, err
		}
	}
	return t.buf.Read(p)
}

// fill puts the next piece of the stream into the buffer.
func (t *tarStream) fill() error {
	if t.file != nil {
		_, err := io.CopyN(t.w, t.file, 1<<18)
		if errors.Is(err, io.EOF) {
			err = t.closeFile()
		}
		return err
	}
	if t.next == len(t.paths) {
		t.ended = true
		return t.w.Close()
	}
	p := t.paths[t.next]
	t.next++
	f, err := t.tree.Open(p)
	if err != nil {
		return err
	}
	t.file = f
	info, err := f.Stat()
	if err != nil {
		return err
	}
	h := &tar.Header{Name: p, Mode: 0o644, Size: info.Size(), Typeflag: tar.TypeReg, ModTime: time.Unix(0, 0)}
	if info.IsDir() {
		h.Name, h.Mode, h.Size, h.Typeflag = p+"/", 0o755, 0, tar.TypeDir
		if err := t.closeFile(); err != nil {
			return err
		}
	}
	return t.w.WriteHeader(h)
}

func (t *tarStream) closeFile() error {
	f := t.file
	t.file = nil
	return f.Close()
}

func (t *tarStream) close() {
	if t.file != nil {
		_ = t.closeFile() // read only
	}
}
