// Package rootfs makes the file systems that VMs have, and looks into those that others have made. It needs no root and mounts nothing.
//
// Write merges the layers of an image into one tree of files, the way an extractor works on a disk, but in memory, and lays that out as
// an ext4 or an erofs; WriteScratch makes an empty ext4. Look, Whole and Detect read file systems. Layers and file systems are
// hostile input: they are bounded and strictly parsed, and nothing in them can name a file outside the tree. The package must not know
// where layers come from, where images are kept, or a type of the container libraries; it makes, names and removes no files, and
// writes only to those it is handed open.
package rootfs

import (
	"context"
	"errors"
	"fmt"
	"io"

	"flint"
	"flint/internal/ext4"
)

// Format is a file system that Write makes.
type Format string

// The formats of Write.
const (
	Ext4  Format = "ext4"
	Erofs Format = "erofs"
)

// Version goes into every cache key of what Write made: change it when the same layers would give another file system.
func (f Format) Version() string {
	const version = "flint-flat-3"
	if f == Erofs {
		return version + "-erofs-2"
	}
	return version
}

// Bounds of what Write takes. There are more in tree.go.
const (
	// MaxFile bounds one file. tar2ext4 writes wrong extents for files above 42 GiB.
	MaxFile = 40 * flint.GiB
	// MaxEntries bounds the tar entries of all layers together. The largest public CI images have some 600,000.
	MaxEntries = 2_000_000
)

// MaxUnpacked bounds the uncompressed layers of a file system of at most limit: layers may hide each other's files, but a
// decompression bomb must end.
func MaxUnpacked(limit flint.Bytes) flint.Bytes { return 2*limit + flint.GiB }

// Why Write refuses layers, where a person can do something about it.
var (
	// ErrTooBig says that a file, or the file system, is larger than it may be.
	ErrTooBig = errors.New("larger than allowed")
	// ErrBudget says that all layers together have more of something than an image may have.
	ErrBudget = errors.New("more than an image may have")
	// ErrAttributes says that a file has more extended attributes than its file system, or Linux, has room for.
	ErrAttributes = errors.New("its extended attributes are too many or too large")
	// ErrLinks says that a file has more names, or a directory more directories in it, than ext4 can count.
	ErrLinks = errors.New("more names or subdirectories than ext4 can have")
)

// File is what Write works in: an *os.File, or one that also refuses to grow when its disk has other uses for the room.
type File interface {
	io.ReaderAt
	io.WriterAt
	Truncate(size int64) error
	Fd() uintptr // by which room that is no longer needed is given back to the disk
}

// Write merges layers, lowest first, into one file system of at most limit bytes, in the empty file out. What it writes depends on
// nothing but the layers. Every layer is read once: of its files only names and metadata are held in memory, their contents in another
// empty file, contents, until it is known which of them are left. That one is of no use afterwards; neither is out after an error.
func Write(ctx context.Context, layers []Layer, limit flint.Bytes, format Format, contents, out File) error {
	s := newSpool(contents)
	t, err := merge(ctx, layers, limit, s)
	if err != nil {
		return err
	}
	p, err := t.plan()
	if err != nil {
		return err
	}
	if format == Erofs {
		return p.writeErofs(ctx, s, limit, out)
	}
	if err := p.writeExt4(ctx, s, limit, out); err != nil {
		return err
	}
	err = ext4.PadInodeBitmaps(out)
	if err == nil {
		err = ext4.SortAttributes(out)
	}
	if err != nil {
		return fmt.Errorf("write image: %w", err)
	}
	return nil
}

// merge reads the layers: what they leave, and where in the spool it is.
func merge(ctx context.Context, layers []Layer, limit flint.Bytes, contents *spool) (*tree, error) {
	unpacked := int64(MaxUnpacked(limit))
	b := budget{entries: MaxEntries, text: maxText, stream: unpacked, content: unpacked}
	t := newTree()
	for i, l := range layers {
		entries, err := l.entries(ctx, &b, contents)
		if err != nil {
			return nil, fmt.Errorf("layer %d: %w", i, err)
		}
		if err := t.apply(ctx, entries); err != nil {
			return nil, fmt.Errorf("layer %d: %w", i, err)
		}
	}
	return t, contents.flush()
}
