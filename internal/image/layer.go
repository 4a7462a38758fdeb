package image

import (
	"archive/tar"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"hash"
	"io"
	"strings"
	"time"

	"flint"
)

// layer is a source of one layer's uncompressed tar stream, which can be read more than once.
type layer struct {
	open   func() (io.ReadCloser, error)
	diffID string // "sha256:…" of the uncompressed stream; empty: not known, not checked
}

// budget is what all layers of an image may use together.
type budget struct {
	entries int
	text    int
	stream  int64 // bytes of uncompressed tar
}

var errBudget = errors.New("more than an image may have")

// maxStream bounds the uncompressed layers of an image whose flattened size may be limit: layers may hide each other's
// files, but a decompression bomb must end.
func maxStream(limit flint.Bytes) int64 { return 2*int64(limit) + int64(flint.GiB) }

// entries reads the headers of a layer.
func (l layer) entries(ctx context.Context, number int, b *budget) ([]entry, error) {
	var list []entry
	err := l.scan(ctx, b, func(index int, h *tar.Header, _ io.Reader) error {
		if b.entries--; b.entries < 0 {
			return fmt.Errorf("%w: %d entries", errBudget, maxEntries)
		}
		e, text, err := parseEntry(h)
		if err != nil {
			return fmt.Errorf("entry %.256q: %w", h.Name, err)
		}
		if b.text -= text; b.text < 0 {
			return fmt.Errorf("%w: %d bytes of names and attributes", errBudget, maxText)
		}
		if e.kind == 0 {
			return nil
		}
		e.layer, e.index = number, index
		list = append(list, e)
		return nil
	})
	return list, err
}

// scan calls visit for every tar entry of the layer, in order, and checks the stream's digest at its end.
func (l layer) scan(ctx context.Context, b *budget, visit func(index int, h *tar.Header, content io.Reader) error) (err error) {
	rc, err := l.open()
	if err != nil {
		return fmt.Errorf("open layer: %w", err)
	}
	defer func() {
		if cerr := rc.Close(); err == nil && cerr != nil {
			err = fmt.Errorf("close layer: %w", cerr)
		}
	}()
	s := &stream{ctx: ctx, r: rc, left: &b.stream, sum: sha256.New()}
	t := tar.NewReader(s)
	for index := 0; ; index++ {
		h, err := t.Next()
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil && !errors.Is(err, tar.ErrInsecurePath) {
			return fmt.Errorf("read layer: %w", err)
		}
		if err := visit(index, h, t); err != nil {
			return err
		}
	}
	if _, err := io.Copy(io.Discard, s); err != nil {
		return fmt.Errorf("read layer: %w", err)
	}
	if got := "sha256:" + hex.EncodeToString(s.sum.Sum(nil)); l.diffID != "" && got != l.diffID {
		return fmt.Errorf("content of layer is %s, the image says %s", got, l.diffID)
	}
	return nil
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
		return 0, fmt.Errorf("%w: uncompressed layers", errBudget)
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
	name, err := cleanName(h.Name)
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
		mode:  h.Mode & 0o7777,
		uid:   h.Uid,
		gid:   h.Gid,
		mtime: clampTime(h.ModTime),
	}}
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
	case tar.TypeDir:
		e.kind = directory
	case tar.TypeSymlink:
		e.kind, e.target = symlink, h.Linkname
		if h.Linkname == "" || len(h.Linkname) > maxLink || strings.IndexByte(h.Linkname, 0) >= 0 {
			return fmt.Errorf("symbolic link to %.64q (%d bytes)", h.Linkname, len(h.Linkname))
		}
	case tar.TypeLink:
		target, err := cleanName(h.Linkname)
		if err != nil || target == "" {
			return fmt.Errorf("hard link to %.256q", h.Linkname)
		}
		e.kind, e.target = hardLink, target
	case tar.TypeChar, tar.TypeBlock:
		e.kind, e.major, e.minor = charDevice, h.Devmajor, h.Devminor
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
		if !ok || rest == "" || len(rest) > maxName || strings.HasPrefix(rest, "overlay.") {
			continue
		}
		if space != "user" && space != "security" && space != "trusted" {
			continue
		}
		if e.xattrs == nil {
			e.xattrs = map[string]string{}
		}
		e.xattrs[name] = v
	}
}

// cleanName makes a tar entry's name relative to the root, without empty components and ".". A ".." is refused: no tool
// writes it, and what it would mean differs from tool to tool.
func cleanName(name string) (string, error) {
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

// clampTime cuts a time to whole seconds within what ext4 can hold (34 bits from 1901).
func clampTime(t time.Time) time.Time {
	if t.IsZero() {
		return time.Unix(0, 0)
	}
	return time.Unix(min(max(t.Unix(), -1<<31), 1<<34-1<<31-1), 0)
}
