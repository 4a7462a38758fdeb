package rootfs

import (
	"archive/tar"
	"bufio"
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"hash"
	"io"
	"strings"
	"time"

	"flint"
)

// Layer is a source of one layer's uncompressed tar stream, with whiteouts as OCI images have them.
type Layer struct {
	Open   func() (io.ReadCloser, error) // called once
	DiffID string                        // "sha256:…" of the uncompressed stream; empty: not known, not checked
}

// budget is what all layers of an image may use together.
type budget struct {
	entries int
	text    int
	stream  int64 // bytes of uncompressed tar
	content int64 // bytes of files; a sparse one may have more than the tar
}

// entries reads a layer: its headers, and the contents of its files into the spool.
func (l Layer) entries(ctx context.Context, b *budget, contents *spool) ([]entry, error) {
	var list []entry
	err := l.scan(ctx, b, func(h *tar.Header, content io.Reader) error {
		if b.entries--; b.entries < 0 {
			return fmt.Errorf("%w: %d entries", ErrBudget, MaxEntries)
		}
		e, text, err := parseEntry(h)
		if err != nil {
			return fmt.Errorf("entry %.256q: %w", h.Name, err)
		}
		if b.text -= text; b.text < 0 {
			return fmt.Errorf("%w: %d bytes of names and attributes", ErrBudget, maxText)
		}
		if e.kind == 0 {
			return nil
		}
		if e.kind == regular {
			if b.content -= e.size; b.content < 0 {
				return fmt.Errorf("%w: content of files", ErrBudget)
			}
			if e.at, err = contents.put(contextReader{ctx, content}, e.size); err != nil {
				return fmt.Errorf("copy %.256q: %w", h.Name, err)
			}
		}
		list = append(list, e)
		return nil
	})
	return list, err
}

// scan calls visit for every tar entry of the layer, in order, and checks the stream's digest at its end. The layer is
// decompressed and summed while its entries are worked on.
func (l Layer) scan(ctx context.Context, b *budget, visit func(h *tar.Header, content io.Reader) error) (err error) {
	rc, err := l.Open()
	if err != nil {
		return fmt.Errorf("open layer: %w", err)
	}
	defer func() {
		if cerr := rc.Close(); err == nil && cerr != nil {
			err = fmt.Errorf("close layer: %w", cerr)
		}
	}()
	s := &stream{ctx: ctx, r: rc, left: &b.stream, sum: sha256.New()}
	ahead, ended := readAhead(s)
	defer func() {
		ahead.Close()
		<-ended
	}()
	r := bufio.NewReaderSize(ahead, chunk)
	t := tar.NewReader(r)
	for {
		h, err := t.Next()
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil && !errors.Is(err, tar.ErrInsecurePath) {
			return fmt.Errorf("read layer: %w", err)
		}
		if err := visit(h, t); err != nil {
			return err
		}
	}
	if _, err := io.Copy(io.Discard, r); err != nil {
		return fmt.Errorf("read layer: %w", err)
	}
	<-ended
	if got := fmt.Sprintf("sha256:%x", s.sum.Sum(nil)); l.DiffID != "" && got != l.DiffID {
		return fmt.Errorf("content of layer is %s, the image says %s", got, l.DiffID)
	}
	return nil
}

// chunk is how much is handed from one stage of the work to the next at once.
const chunk = 256 << 10

// readAhead reads r in a goroutine of its own, which ends with r or when ahead is closed.
func readAhead(r io.Reader) (ahead *io.PipeReader, ended <-chan struct{}) {
	pr, pw := io.Pipe()
	end := make(chan struct{})
	go func() {
		defer close(end)
		// Nothing but Read and Write: a reader's own WriteTo would hand on smaller pieces.
		_, err := io.CopyBuffer(struct{ io.Writer }{pw}, struct{ io.Reader }{r}, make([]byte, chunk))
		pw.CloseWithError(err)
	}()
	return pr, end
}

// stream reads a layer: it ends with the context, counts against the budget and sums what it reads.
type stream struct {
	ctx  context.Context // of the one call this reader lives in
	r    io.Reader
	left *int64
	sum  hash.Hash
}

func (s *stream) Read(p []byte) (int, error) {
	if err := s.ctx.Err(); err != nil {
		return 0, context.Cause(s.ctx)
	}
	n, err := s.r.Read(p)
	if *s.left -= int64(n); *s.left < 0 {
		return 0, fmt.Errorf("%w: uncompressed layers", ErrBudget)
	}
	s.sum.Write(p[:n])
	return n, err
}

const (
	whiteoutPrefix = ".wh."         // OCI image specification, layer.md, "Whiteouts"
	opaqueName     = ".wh..wh..opq" // same, "Opaque Whiteout"
	metaPrefix     = ".wh..wh."     // names AUFS kept for itself
	xattrPrefix    = "SCHILY.xattr."
)

// parseEntry checks one tar header and returns it with the bytes of text it holds. An entry without kind is to be
// skipped.
func parseEntry(h *tar.Header) (e entry, text int, err error) {
	text = len(h.Name) + len(h.Linkname)
	for k, v := range h.PAXRecords {
		text += len(k) + len(v)
	}
	if h.Typeflag == tar.TypeXGlobalHeader {
		return entry{}, text, nil
	}
	name, err := CleanName(h.Name)
	if err != nil {
		return entry{}, text, err
	}
	dir, base := splitPath(name)
	for c := range components(dir) {
		if strings.HasPrefix(c, metaPrefix) {
			return entry{}, text, nil
		}
		if strings.HasPrefix(c, whiteoutPrefix) {
			return entry{}, text, errors.New("below a whiteout")
		}
	}
	if strings.HasPrefix(base, whiteoutPrefix) {
		return whiteoutEntry(dir, base), text, nil
	}
	e = entry{name: name, inode: inode{
		mode: uint16(h.Mode & 0o7777),
		uid:  uint32(h.Uid),
		gid:  uint32(h.Gid),
	}}
	e.setTime(h.ModTime)
	if h.Uid < 0 || h.Gid < 0 || int64(h.Uid) > 1<<32-2 || int64(h.Gid) > 1<<32-2 {
		return entry{}, text, fmt.Errorf("owner %d:%d is not a Linux user and group", h.Uid, h.Gid)
	}
	if err := e.setKind(h); err != nil {
		return entry{}, text, err
	}
	e.setXattrs(h.PAXRecords)
	return e, text, nil
}

func whiteoutEntry(dir, base string) entry {
	switch {
	case base == opaqueName:
		return entry{name: dir, inode: inode{kind: opaque}}
	case strings.HasPrefix(base, metaPrefix), base == whiteoutPrefix, base == whiteoutPrefix+".", base == whiteoutPrefix+"..":
		return entry{}
	}
	name := strings.TrimPrefix(base, whiteoutPrefix)
	if dir != "" {
		name = dir + "/" + name
	}
	return entry{name: name, inode: inode{kind: whiteout}}
}

// setKind fills in what depends on the entry's type.
func (e *entry) setKind(h *tar.Header) error {
	switch h.Typeflag {
	case tar.TypeReg, '\x00', tar.TypeCont, tar.TypeGNUSparse:
		e.kind, e.size = regular, h.Size
		if h.Size < 0 {
			return fmt.Errorf("size %d", h.Size)
		}
		if h.Size > int64(MaxFile) {
			return fmt.Errorf("%w: it has %s, at most %s can be stored", ErrTooBig, flint.Bytes(h.Size), MaxFile)
		}
	case tar.TypeDir:
		e.kind = directory
	case tar.TypeSymlink:
		e.kind, e.target = symlink, h.Linkname
		if h.Linkname == "" || len(h.Linkname) > maxLink || strings.IndexByte(h.Linkname, 0) >= 0 {
			return fmt.Errorf("symbolic link to %.64q (%d bytes)", h.Linkname, len(h.Linkname))
		}
	case tar.TypeLink:
		target, err := CleanName(h.Linkname)
		if err != nil || target == "" {
			return fmt.Errorf("hard link to %.256q", h.Linkname)
		}
		e.kind, e.target = hardLink, target
	case tar.TypeChar, tar.TypeBlock:
		e.kind, e.major, e.minor = charDevice, uint16(h.Devmajor), uint32(h.Devminor)
		if h.Typeflag == tar.TypeBlock {
			e.kind = blockDevice
		}
		// Bounds of Linux's dev_t: 12 bits major, 20 bits minor.
		if h.Devmajor < 0 || h.Devmajor >= 1<<12 || h.Devminor < 0 || h.Devminor >= 1<<20 {
			return fmt.Errorf("device number %d:%d", h.Devmajor, h.Devminor)
		}
		if h.Devmajor == 0 && h.Devminor == 0 {
			e.kind = 0 // to the guest's overlay this would be a whiteout
		}
	case tar.TypeFifo:
		e.kind = fifo
	default:
		return fmt.Errorf("type %q is not one an image may hold", h.Typeflag)
	}
	return nil
}

// setXattrs keeps the extended attributes that mean the same on ext4 in the guest. ACLs (system.) have another form on
// disk than in a tar; overlay's own attributes would steer the guest's overlay.
func (e *entry) setXattrs(pax map[string]string) {
	for k, v := range pax {
		name, ok := strings.CutPrefix(k, xattrPrefix)
		space, rest, _ := strings.Cut(name, ".")
		if !ok || rest == "" || len(name) > maxName || strings.HasPrefix(rest, "overlay.") {
			continue
		}
		if spaces[space] == 0 {
			continue
		}
		if e.xattrs == nil {
			e.xattrs = map[string]string{}
		}
		e.xattrs[name] = v
	}
}

// CleanName makes a tar entry's name relative to the root, without empty components and ".". A ".." is refused: no tool
// writes it, and what it would mean differs from tool to tool.
func CleanName(name string) (string, error) {
	if len(name) > maxPath {
		return "", fmt.Errorf("path of %d bytes", len(name))
	}
	if strings.IndexByte(name, 0) >= 0 {
		return "", errors.New("NUL in the name")
	}
	parts := make([]string, 0, 16)
	for c := range strings.SplitSeq(name, "/") {
		switch {
		case c == "" || c == ".":
			continue
		case c == "..":
			return "", errors.New("\"..\" in the name")
		case len(c) > maxName:
			return "", fmt.Errorf("name of %d bytes", len(c))
		}
		parts = append(parts, c)
	}
	return strings.Join(parts, "/"), nil
}

// Bounds of the times that the file system is given: ext4 stores 34 bits of seconds from 1901, and the highest of them not
// through tar2ext4.
const (
	minTime = -1 << 31
	maxTime = 0x27fffffff // in the year 2310
)

// setTime keeps a modification time within what ext4 can hold.
func (e *entry) setTime(t time.Time) {
	if t.IsZero() {
		return
	}
	e.sec = min(max(t.Unix(), minTime), maxTime)
	if e.sec == t.Unix() {
		e.nsec = uint32(t.Nanosecond())
	}
}
