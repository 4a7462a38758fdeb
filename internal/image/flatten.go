package image

import (
	"archive/tar"
	"bufio"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"maps"
	"slices"
	"strings"

	"github.com/Microsoft/hcsshim/ext4/tar2ext4"

	"flint"
)

// maxFile bounds one file. tar2ext4 writes wrong extents for files above 42 GiB.
const maxFile = 40 * flint.GiB

// flatVersion goes into every digest and cache key: change it when the same layers would give another image.
const flatVersion = "flint-flat-1"

// errTooBig says that an image needs more than it may.
var errTooBig = errors.New("larger than allowed")

// flatten merges layers, lowest first, into one ext4 file system, written to w. It reads every layer twice: once to
// decide what is left of it, once to copy that, so nothing but names and metadata is held in memory. The digest returned
// is of the tar stream the file system was made from, which depends on nothing but the layers.
func flatten(ctx context.Context, layers []layer, limit flint.Bytes, w io.ReadWriteSeeker) (digest string, err error) {
	t, err := merge(ctx, layers, limit)
	if err != nil {
		return "", err
	}
	p, err := t.plan(len(layers), limit)
	if err != nil {
		return "", err
	}
	pr, pw := io.Pipe()
	sum := sha256.New()
	io.WriteString(sum, flatVersion)
	emitted := make(chan error, 1)
	go func() {
		err := p.emit(ctx, layers, maxStream(limit), io.MultiWriter(sum, pw))
		pw.CloseWithError(err)
		emitted <- err
	}()
	// tar2ext4 keeps a bufio.Reader it is given; its own would be of 4 KiB.
	err = tar2ext4.ConvertTarToExt4(bufio.NewReaderSize(pr, 1<<20), w, tar2ext4.MaximumDiskSize(p.room()))
	// A converter that stops early must not leave the emitter waiting; nil gives it io.ErrClosedPipe.
	pr.CloseWithError(err)
	if emitErr := <-emitted; emitErr != nil && (err == nil || !errors.Is(emitErr, io.ErrClosedPipe)) {
		err = emitErr
	}
	if err != nil {
		return "", err
	}
	return "sha256:" + hex.EncodeToString(sum.Sum(nil)), nil
}

// merge is the first pass.
func merge(ctx context.Context, layers []layer, limit flint.Bytes) (*tree, error) {
	b := budget{entries: maxEntries, text: maxText, stream: maxStream(limit)}
	t := newTree()
	for i, l := range layers {
		entries, err := l.entries(ctx, i, &b)
		if err != nil {
			return nil, fmt.Errorf("layer %d: %w", i, err)
		}
		if err := t.apply(entries); err != nil {
			return nil, fmt.Errorf("layer %d: %w", i, err)
		}
	}
	return t, nil
}

// plan is what the second pass writes, in this order: files without content, contents layer by layer, further names.
type plan struct {
	bare     []named          // directories, links, devices; parents before what is in them
	contents []map[int]*named // per layer, by the position of the entry
	links    []named          // hard links: target is a path written before
	bytes    int64            // estimate of what the file system needs
}

type named struct {
	path string
	*inode
	target string // of a hard link; empty otherwise
}

// plan decides what is written where, and refuses what would not fit.
func (t *tree) plan(layers int, limit flint.Bytes) (*plan, error) {
	p := &plan{contents: make([]map[int]*named, layers), bytes: int64(2 * flint.MiB)}
	for i := range p.contents {
		p.contents[i] = map[int]*named{}
	}
	p.bare = append(p.bare, named{path: ".", inode: t.root.inode})
	first := map[*inode]string{}
	err := t.walk(func(path string, n *node) error {
		if n.kind != directory {
			if target, ok := first[n.inode]; ok {
				p.links = append(p.links, named{path: path, inode: n.inode, target: target})
				return nil
			}
			first[n.inode] = path
		}
		if n.size > int64(maxFile) {
			return fmt.Errorf("%w: file %.256q has %s, at most %s can be stored", errTooBig, path, flint.Bytes(n.size), maxFile)
		}
		if p.bytes += footprint(n); p.bytes > int64(limit) {
			return fmt.Errorf("%w: it needs more than %s", errTooBig, limit)
		}
		f := named{path: path, inode: n.inode}
		if n.kind == regular {
			p.contents[n.layer][n.index] = &f
		} else {
			p.bare = append(p.bare, f)
		}
		return nil
	})
	return p, err
}

// footprint estimates, from above, the bytes ext4 needs for a file: content, inode, directory, attributes.
func footprint(n *node) int64 {
	const block, inodeSize = 4096, 256
	size := int64(inodeSize)
	if n.kind == regular {
		size += (n.size + block - 1) / block * block
	}
	if n.kind == directory {
		size += block
		for name := range n.kids {
			size += int64(len(name)) + 16 // an entry is 8 bytes and the name, in whole words; blocks end with a gap
		}
	}
	if n.kind == symlink && len(n.target) > 59 || len(n.xattrs) > 0 {
		size += block
	}
	return size
}

// room is the largest size the file system is laid out for. It only costs space for group descriptors; it is rounded so
// that small differences do not move every block.
func (p *plan) room() int64 {
	const step = int64(16 * flint.GiB)
	return (p.bytes + p.bytes/4 + step) / step * step
}

// emit is the second pass: the merged tree as one tar stream.
func (p *plan) emit(ctx context.Context, layers []layer, streamLimit int64, w io.Writer) error {
	buf := bufio.NewWriterSize(w, 1<<20)
	t := tar.NewWriter(buf)
	for i := range p.bare {
		if err := t.WriteHeader(p.bare[i].header()); err != nil {
			return fmt.Errorf("write %q: %w", p.bare[i].path, err)
		}
	}
	b := budget{stream: streamLimit}
	for i, l := range layers {
		left := len(p.contents[i])
		err := l.scan(ctx, &b, func(index int, h *tar.Header, content io.Reader) error {
			f := p.contents[i][index]
			if f == nil {
				return nil
			}
			left--
			return f.copyTo(t, contextReader{ctx, content})
		})
		if err == nil && left != 0 {
			err = errors.New("changed while it was read")
		}
		if err != nil {
			return fmt.Errorf("layer %d: %w", i, err)
		}
	}
	for i := range p.links {
		if err := t.WriteHeader(p.links[i].header()); err != nil {
			return fmt.Errorf("write %q: %w", p.links[i].path, err)
		}
	}
	if err := t.Close(); err != nil {
		return fmt.Errorf("end stream: %w", err)
	}
	if err := buf.Flush(); err != nil {
		return fmt.Errorf("end stream: %w", err)
	}
	return nil
}

func (f *named) copyTo(t *tar.Writer, content io.Reader) error {
	if err := t.WriteHeader(f.header()); err != nil {
		return fmt.Errorf("write %q: %w", f.path, err)
	}
	if n, err := io.Copy(t, content); err != nil {
		return fmt.Errorf("copy %q: %w", f.path, err)
	} else if n != f.size {
		return fmt.Errorf("copy %q: %d bytes instead of %d", f.path, n, f.size)
	}
	return nil
}

// contextReader ends a copy with its context. The holes of a sparse file are read without touching the layer.
type contextReader struct {
	ctx context.Context // of the one call this reader lives in
	r   io.Reader
}

func (c contextReader) Read(p []byte) (int, error) {
	if err := c.ctx.Err(); err != nil {
		return 0, context.Cause(c.ctx)
	}
	return c.r.Read(p)
}

var typeflags = [...]byte{
	regular: tar.TypeReg, directory: tar.TypeDir, symlink: tar.TypeSymlink,
	charDevice: tar.TypeChar, blockDevice: tar.TypeBlock, fifo: tar.TypeFifo,
}

func (f *named) header() *tar.Header {
	if f.target != "" {
		return &tar.Header{Typeflag: tar.TypeLink, Name: f.path, Linkname: f.target, Format: tar.FormatPAX}
	}
	h := &tar.Header{
		Typeflag: typeflags[f.kind],
		Name:     f.path,
		Linkname: f.inode.target,
		Mode:     f.mode,
		Uid:      f.uid,
		Gid:      f.gid,
		ModTime:  f.mtime,
		Size:     f.size,
		Devmajor: f.major,
		Devminor: f.minor,
		Format:   tar.FormatPAX,
	}
	if f.kind == directory && !strings.HasSuffix(h.Name, "/") {
		h.Name += "/"
	}
	for _, name := range slices.Sorted(maps.Keys(f.xattrs)) {
		if h.PAXRecords == nil {
			h.PAXRecords = map[string]string{}
		}
		h.PAXRecords[xattrPrefix+name] = f.xattrs[name]
	}
	return h
}
