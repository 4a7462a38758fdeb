package image

import (
	"archive/tar"
	"bufio"
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"maps"
	"slices"
	"time"

	"github.com/Microsoft/hcsshim/ext4/tar2ext4"

	"flint"
	"flint/internal/ext4"
)

// maxFile bounds one file. tar2ext4 writes wrong extents for files above 42 GiB.
const maxFile = 40 * flint.GiB

// flatVersion goes into every cache key: change it when the same layers would give another image.
const flatVersion = "flint-flat-3"

// errTooBig says that an image needs more than it may.
var errTooBig = errors.New("larger than allowed")

// flatten merges layers, lowest first, into one file system, written to the empty file out. What it writes depends on
// nothing but the layers. Every layer is read once: of its files only names and metadata are held in memory, their contents
// in a file in dir, until it is known which of them are left.
func flatten(ctx context.Context, layers []layer, limit flint.Bytes, format Format, dir string, out *guard) error {
	contents, err := newSpool(dir, out.spare)
	if err != nil {
		return err
	}
	defer contents.close()
	t, err := merge(ctx, layers, limit, contents)
	if err != nil {
		return err
	}
	p, err := t.plan()
	if err != nil {
		return err
	}
	if format == Erofs {
		return p.writeErofs(ctx, contents, limit, out)
	}
	if err := p.writeExt4(ctx, contents, limit, out); err != nil {
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

// writeExt4 writes the tree as an ext4 of at most limit bytes into the empty file out.
func (p *plan) writeExt4(ctx context.Context, contents *spool, limit flint.Bytes, out *guard) error {
	if p.ext4Size > int64(limit) {
		return tooBig(limit)
	}
	pr, pw := io.Pipe()
	emitted := make(chan error, 1)
	go func() {
		err := p.emit(ctx, contents, pw)
		pw.CloseWithError(err)
		emitted <- err
	}()
	file := &holes{f: out}
	// tar2ext4 keeps a bufio.Reader it is given; its own would be of 4 KiB.
	err := tar2ext4.ConvertTarToExt4(bufio.NewReaderSize(pr, chunk), file, tar2ext4.MaximumDiskSize(p.room()))
	// A converter that stops early must not leave the emitter waiting; nil gives it io.ErrClosedPipe.
	pr.CloseWithError(err)
	if emitErr := <-emitted; emitErr != nil && (err == nil || !errors.Is(emitErr, io.ErrClosedPipe)) {
		err = emitErr
	}
	if err != nil {
		return err
	}
	return file.finish()
}

// merge reads the layers: what they leave, and where in the spool it is.
func merge(ctx context.Context, layers []layer, limit flint.Bytes, contents *spool) (*tree, error) {
	b := budget{entries: maxEntries, text: maxText, stream: maxStream(limit), content: maxStream(limit)}
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

// plan is what is written, in this order: files without content, contents in the order of the layers, further names.
type plan struct {
	tree     *tree
	contents []*node       // regular files
	links    []furtherName // hard links
	ext4Size int64         // estimate, from above
}

type furtherName struct{ name, first *node }

// tooBig says that an image needs more than its limit.
func tooBig(limit flint.Bytes) error {
	return fmt.Errorf("%w: it needs more than %s", errTooBig, limit)
}

// plan decides what is written when.
func (t *tree) plan() (*plan, error) {
	p := &plan{tree: t, ext4Size: int64(2 * flint.MiB)}
	first := map[*inode]*node{}
	err := t.walk(func(_ string, n *node) error {
		if n.shared {
			if f := first[n.inode]; f != nil {
				p.links = append(p.links, furtherName{n, f})
				return nil
			}
			first[n.inode] = n
		}
		p.ext4Size += ext4Footprint(n)
		if n.kind == regular {
			p.contents = append(p.contents, n)
		}
		return nil
	})
	slices.SortFunc(p.contents, func(a, b *node) int { return cmp.Compare(a.at, b.at) })
	return p, err
}

// bare calls visit for the files without content, parents before what is in them.
func (p *plan) bare(visit func(path string, n *node) error) error {
	if err := visit(".", p.tree.root); err != nil {
		return err
	}
	further := map[*node]bool{}
	for _, l := range p.links {
		further[l.name] = true
	}
	return p.tree.walk(func(path string, n *node) error {
		if n.kind == regular || n.shared && further[n] {
			return nil
		}
		return visit(path, n)
	})
}

// ext4Footprint estimates, from above, the bytes an ext4 needs for a file: content, inode, directory, attributes.
func ext4Footprint(n *node) int64 {
	const block, inodeSize = 4096, 256
	const maxInInode = 59 // bytes of a link's target; tar2ext4's smallSymlinkSize
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
	if n.kind == symlink && len(n.target) > maxInInode {
		size += block
	}
	if len(n.xattrs) > 0 {
		size += block
	}
	return size
}

// room is the largest size the file system is laid out for. It only costs space for group descriptors; it is rounded so
// that small differences do not move every block.
func (p *plan) room() int64 {
	const step = int64(16 * flint.GiB)
	return (p.ext4Size + p.ext4Size/4 + step) / step * step
}

// emit writes the merged tree as one tar stream, once: what is written is forgotten, because what reads the stream keeps tables of as
// many files.
func (p *plan) emit(ctx context.Context, contents *spool, w io.Writer) error {
	if err := p.fitLinks(); err != nil {
		return err
	}
	buf := bufio.NewWriterSize(w, chunk)
	t := tar.NewWriter(buf)
	write := func(path string, n *node) error {
		if ctx.Err() != nil {
			return context.Cause(ctx)
		}
		if err := fitExt4(n.xattrs); err != nil {
			return fmt.Errorf("%q: %w", path, err)
		}
		return t.WriteHeader(header(path, n.inode))
	}
	if err := p.bare(write); err != nil {
		return fmt.Errorf("write stream: %w", err)
	}
	p.tree.root.forget()
	copies := make([]byte, chunk)
	for i, n := range p.contents {
		p.contents[i] = nil
		if err := write(n.path(), n); err != nil {
			return fmt.Errorf("write %q: %w", n.path(), err)
		}
		if _, err := io.CopyBuffer(t, contextReader{ctx, contents.section(n.at, n.size)}, copies); err != nil {
			return fmt.Errorf("copy %q: %w", n.path(), err)
		}
		contents.drop(n.at + n.size)
	}
	for _, l := range p.links {
		h := &tar.Header{Typeflag: tar.TypeLink, Name: l.name.path(), Linkname: l.first.path(), Format: tar.FormatPAX}
		if err := t.WriteHeader(h); err != nil {
			return fmt.Errorf("write %q: %w", h.Name, err)
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

// header describes an inode to tar2ext4.
func header(path string, n *inode) *tar.Header {
	h := &tar.Header{
		Typeflag: typeflags[n.kind],
		Name:     path,
		Linkname: n.target,
		Mode:     int64(n.mode),
		Uid:      int(n.uid),
		Gid:      int(n.gid),
		ModTime:  time.Unix(ext4Seconds(n.sec), int64(n.nsec)),
		Size:     n.size,
		Devmajor: int64(n.major),
		Devminor: int64(n.minor),
		Format:   tar.FormatPAX,
	}
	if n.kind == directory {
		h.Name += "/"
	}
	for _, name := range slices.Sorted(maps.Keys(n.xattrs)) {
		if h.PAXRecords == nil {
			h.PAXRecords = map[string]string{}
		}
		h.PAXRecords[xattrPrefix+name] = n.xattrs[name]
	}
	return h
}

// ext4Seconds is the time that tar2ext4 must be given to store sec. ext4 has the lower 32 bits as a signed number and how
// often 2^32 is to be added to it; tar2ext4 takes them for unsigned, which moves times before 1970 and after 2038.
func ext4Seconds(sec int64) int64 {
	epoch := (sec - int64(int32(sec))) >> 32
	return epoch<<32 + int64(uint32(sec))
}
