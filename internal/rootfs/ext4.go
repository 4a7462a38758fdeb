package rootfs

import (
	"archive/tar"
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"maps"
	"slices"
	"time"

	"github.com/Microsoft/hcsshim/ext4/tar2ext4"

	"flint"
)

// writeExt4 writes the tree as an ext4 of at most limit bytes into the empty file out.
func (p *plan) writeExt4(ctx context.Context, contents *spool, limit flint.Bytes, out File) error {
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
