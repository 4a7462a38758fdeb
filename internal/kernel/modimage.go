package kernel

import (
	"archive/tar"
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"time"

	"github.com/Microsoft/hcsshim/ext4/tar2ext4"
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
	return padInodeBitmaps(out)
}

// Places in an ext4 superblock, which lies at byte 1024, and in a group descriptor (the kernel's filesystems/ext4).
const (
	ext4Super          = 1024
	ext4Blocks         = 0x04
	ext4BlocksPerGroup = 0x20
	ext4InodesPerGroup = 0x28
	ext4DescInodes     = 0x04 // block of the group's inode bitmap
	ext4Block          = 4096 // all that tar2ext4 writes has blocks of this size, and descriptors of 32 bytes after block 0
	ext4DescSize       = 32
)

// padInodeBitmaps marks as used the inodes that bitmaps have room for and groups do not have. tar2ext4 leaves them
// free, which no kernel minds, but e2fsck calls the file system damaged.
func padInodeBitmaps(f *os.File) error {
	le := binary.LittleEndian
	super := make([]byte, 64)
	if _, err := f.ReadAt(super, ext4Super); err != nil {
		return err
	}
	blocks, perGroup, inodes := le.Uint32(super[ext4Blocks:]), le.Uint32(super[ext4BlocksPerGroup:]), le.Uint32(super[ext4InodesPerGroup:])
	if perGroup == 0 || inodes%8 != 0 || inodes > ext4Block*8 {
		return fmt.Errorf("pad inode bitmaps: groups of %d blocks and %d inodes", perGroup, inodes)
	}
	padding := bytes.Repeat([]byte{0xff}, int(ext4Block-inodes/8))
	for g := range (blocks + perGroup - 1) / perGroup {
		desc := make([]byte, ext4DescSize)
		if _, err := f.ReadAt(desc, ext4Block+int64(g)*ext4DescSize); err != nil {
			return err
		}
		at := int64(le.Uint32(desc[ext4DescInodes:]))
		if _, err := f.WriteAt(padding, at*ext4Block+int64(inodes/8)); err != nil {
			return err
		}
	}
	return nil
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
