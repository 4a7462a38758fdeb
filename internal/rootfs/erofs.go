package rootfs

import (
	"bufio"
	"cmp"
	"context"
	"encoding/binary"
	"fmt"
	"io"
	"math"
	"slices"

	"golang.org/x/sys/unix"

	"flint"
)

// Numbers and places below are those of the Linux kernel's fs/erofs/erofs_fs.h and of its Documentation/filesystems/erofs.rst. The
// file system written here is a plain one: blocks of 4 KiB, nothing compressed, every inode of the extended form.
const (
	erofsBlock  = 4096
	erofsMagic  = 0xE0F5E1E2
	erofsSlot   = 32 // inodes stand at multiples of this, which number them
	erofsInode  = 64
	erofsDirent = 12
	erofsXattrs = 12 // the header before an inode's attributes

	// An inode's i_format: its form in bit 0, and from bit 1 on where its content is.
	erofsExtended = 1
	erofsPlain    = 0 << 1 // in blocks
	erofsInline   = 2 << 1 // behind the inode, if it is less than a block
)

// erofsFile is an inode of the file system being written.
type erofsFile struct {
	*node         // its first name
	nid    uint64 // place in the table of inodes, in slots
	links  uint32
	block  uint32 // where its content begins
	size   int64  // of it
	inline bool   // its content stands behind the inode
}

// erofsWriter lays a merged tree out: the superblock's block, the table of inodes, directories and symbolic links, contents.
type erofsWriter struct {
	files []*erofsFile // in the order of their inodes, the root first
	of    map[*inode]*erofsFile
	slots uint64 // so far
	next  int64  // block
}

// writeErofs writes the tree as a read-only erofs of at most limit bytes into the empty file out.
func (p *plan) writeErofs(ctx context.Context, contents *spool, limit flint.Bytes, out File) error {
	w := &erofsWriter{of: map[*inode]*erofsFile{}}
	if err := w.number(p.tree); err != nil {
		return err
	}
	w.place(p.contents)
	if w.next > min(int64(limit)/erofsBlock, math.MaxUint32) {
		return tooBig(limit)
	}
	file := &holes{f: out}
	buf := bufio.NewWriterSize(file, chunk)
	buf.Write(w.superblock())
	if err := w.table(ctx, contents, buf); err != nil {
		return err
	}
	for _, f := range w.files {
		if f.kind != regular && !f.inline {
			buf.Write(w.content(f))
			pad(buf, f.size)
		}
	}
	for _, n := range p.contents {
		if !w.of[n.inode].inline {
			if err := copyContent(ctx, contents, n, buf); err != nil {
				return err
			}
			pad(buf, n.size)
		}
		contents.drop(n.at + n.size)
	}
	if err := buf.Flush(); err != nil { // a bufio.Writer keeps its first error
		return fmt.Errorf("write erofs: %w", err)
	}
	return file.finish()
}

// copyContent copies a file's content out of the spool.
func copyContent(ctx context.Context, contents *spool, n *node, out *bufio.Writer) error {
	// The buffer reads from the spool itself, whole chunks of it.
	if _, err := io.Copy(out, contextReader{ctx, contents.section(n.at, n.size)}); err != nil {
		return fmt.Errorf("copy %q: %w", n.path(), err)
	}
	return nil
}

// pad fills the block that something of that size ends in.
func pad(w *bufio.Writer, size int64) {
	if rest := size % erofsBlock; rest != 0 {
		w.Write(zeroBlock[:erofsBlock-rest])
	}
}

// number gives every inode its place in the table, and counts its names.
func (w *erofsWriter) number(t *tree) error {
	if err := w.add(t.root); err != nil {
		return err
	}
	return t.walk(func(path string, n *node) error {
		if f := w.of[n.inode]; f != nil {
			f.links++
			return nil
		}
		if n.kind == directory {
			w.of[n.parent.inode].links++ // its ".."
		}
		if err := w.add(n); err != nil {
			return fmt.Errorf("%q: %w", path, err)
		}
		return nil
	})
}

func (w *erofsWriter) add(n *node) error {
	f := &erofsFile{node: n, links: 1, size: n.inode.size}
	switch n.kind {
	case directory:
		f.links = 2
		f.size = direntsSize(n)
	case symlink:
		f.size = int64(len(n.target))
	}
	attributes, err := erofsAttributes(n.xattrs)
	if err != nil {
		return err
	}
	w.files, w.of[n.inode] = append(w.files, f), f
	w.stand(f, erofsInode+int64(len(attributes)))
	return nil
}

// stand gives an inode, which has head bytes with its attributes, its place, and decides whether its content stands behind it. Such
// content must not go over the end of a block, and that of a symbolic link must be in one block with inode and attributes: the
// kernel's fs/erofs/data.c and inode.c refuse others. So all of it stands in one block, the next one if need be. Where what
// that leaves unused costs as much as a block for the content, the content has one. The last part of a larger content could
// stand there too; docs/decisions/0004 says why it does not.
func (w *erofsWriter) stand(f *erofsFile, head int64) {
	gap := int64(0)
	if left := erofsBlock - int64(w.slots)*erofsSlot%erofsBlock; head+f.size > left {
		gap = left
	}
	if f.size > 0 && head+f.size <= erofsBlock && gap+f.size < erofsBlock {
		f.inline = true
		w.slots += uint64(gap) / erofsSlot
		head += f.size
	}
	f.nid = w.slots
	w.slots += uint64(head+erofsSlot-1) / erofsSlot
}

// place gives every content its blocks, in the order it is written.
func (w *erofsWriter) place(contents []*node) {
	w.next = 1 + blocks(int64(w.slots)*erofsSlot)
	give := func(f *erofsFile) {
		if f.size > 0 && !f.inline {
			f.block = uint32(w.next)
			w.next += blocks(f.size)
		}
	}
	for _, f := range w.files {
		if f.kind != regular {
			give(f)
		}
	}
	for _, n := range contents {
		give(w.of[n.inode])
	}
}

func blocks(size int64) int64 { return (size + erofsBlock - 1) / erofsBlock }

func (w *erofsWriter) superblock() []byte {
	b := make([]byte, erofsBlock)
	s, le := b[superblockAt:], binary.LittleEndian
	le.PutUint32(s, erofsMagic)
	s[12] = 12 // block size 1 << this
	// The root's number has 16 bits: it is the first, 0.
	le.PutUint64(s[16:], uint64(len(w.files)))
	le.PutUint32(s[36:], uint32(w.next))
	le.PutUint32(s[40:], 1) // block of the table of inodes
	return b
}

// table writes the inodes, each with what stands behind it.
func (w *erofsWriter) table(ctx context.Context, contents *spool, out *bufio.Writer) error {
	var at int64
	for _, f := range w.files {
		if ctx.Err() != nil {
			return context.Cause(ctx)
		}
		begin := int64(f.nid) * erofsSlot
		out.Write(zeroBlock[:begin-at])
		b := w.inode(f)
		out.Write(b)
		at = begin + int64(len(b))
		if !f.inline {
			continue
		}
		at += f.size
		if f.kind != regular {
			out.Write(w.content(f))
		} else if err := copyContent(ctx, contents, f.node, out); err != nil {
			return err
		}
	}
	pad(out, at)
	return nil
}

// content is what a directory or a symbolic link holds; other files that are not regular hold nothing.
func (w *erofsWriter) content(f *erofsFile) []byte {
	switch f.kind {
	case directory:
		return w.directory(f)
	case symlink:
		return []byte(f.target)
	}
	return nil
}

// inode returns an inode with its attributes.
func (w *erofsWriter) inode(f *erofsFile) []byte {
	attributes, _ := erofsAttributes(f.xattrs) // add has refused those that have none
	b := make([]byte, erofsInode+len(attributes))
	le := binary.LittleEndian
	format := uint16(erofsExtended | erofsPlain)
	if f.inline {
		format = erofsExtended | erofsInline
	}
	le.PutUint16(b, format)
	if len(attributes) > 0 {
		le.PutUint16(b[2:], uint16((len(attributes)-erofsXattrs)/4+1))
	}
	mode := f.mode | erofsModes[f.kind]
	place := f.block
	switch f.kind {
	case symlink:
		mode |= 0o777
	case charDevice, blockDevice:
		// The kernel's new_encode_dev.
		place = f.minor&0xff | uint32(f.major)<<8 | f.minor&^0xff<<12
	}
	le.PutUint16(b[4:], mode)
	le.PutUint64(b[8:], uint64(f.size))
	le.PutUint32(b[16:], place)
	le.PutUint32(b[20:], uint32(f.nid)) // for stat in 32 bits
	le.PutUint32(b[24:], f.uid)
	le.PutUint32(b[28:], f.gid)
	le.PutUint64(b[32:], uint64(f.sec))
	le.PutUint32(b[40:], f.nsec)
	le.PutUint32(b[44:], f.links)
	copy(b[erofsInode:], attributes)
	return b
}

var (
	erofsModes = [...]uint16{
		regular: unix.S_IFREG, directory: unix.S_IFDIR, symlink: unix.S_IFLNK,
		charDevice: unix.S_IFCHR, blockDevice: unix.S_IFBLK, fifo: unix.S_IFIFO,
	}
	erofsTypes = [...]byte{regular: 1, directory: 2, charDevice: 3, blockDevice: 4, fifo: 5, symlink: 7}
)

// erofsAttributes is what stands behind an inode that has attributes: a header, and each with name and value, in whole words.
func erofsAttributes(xattrs map[string]string) ([]byte, error) {
	if len(xattrs) == 0 {
		return nil, nil
	}
	list, err := attributesOf(xattrs)
	if err != nil {
		return nil, err
	}
	b := make([]byte, erofsXattrs)
	for _, a := range list {
		// An inode counts their words in 16 bits.
		if len(a.value) > 1<<16-1 || len(b) > 1<<17 {
			return nil, fmt.Errorf("%w for erofs", ErrAttributes)
		}
		b = append(b, byte(len(a.name)), a.space)
		b = binary.LittleEndian.AppendUint16(b, uint16(len(a.value)))
		b = append(append(b, a.name...), a.value...)
		for len(b)%4 != 0 {
			b = append(b, 0)
		}
	}
	return b, nil
}

// dirent is a name in a directory. Names are in byte order, "." and ".." among them.
type dirent struct {
	name string
	node *node
}

func dirents(n *node) []dirent {
	list := []dirent{{".", n}, {"..", n.parent}}
	for name, kid := range n.kids {
		list = append(list, dirent{name, kid})
	}
	slices.SortFunc(list, func(a, b dirent) int { return cmp.Compare(a.name, b.name) })
	return list
}

// direntBlocks cuts a directory's names into blocks and says what the last of them takes.
func direntBlocks(n *node) (blocks [][]dirent, last int64) {
	list := dirents(n)
	begin := 0
	for i, d := range list {
		size := int64(erofsDirent + len(d.name))
		if last+size > erofsBlock {
			blocks, begin, last = append(blocks, list[begin:i]), i, 0
		}
		last += size
	}
	return append(blocks, list[begin:]), last
}

func direntsSize(n *node) int64 {
	blocks, last := direntBlocks(n)
	return int64(len(blocks)-1)*erofsBlock + last
}

// directory returns a directory's content: in each block the entries, then their names.
func (w *erofsWriter) directory(f *erofsFile) []byte {
	blocks, _ := direntBlocks(f.node)
	b := make([]byte, f.size)
	for i, block := range blocks {
		b := b[i*erofsBlock:]
		at := len(block) * erofsDirent
		for j, d := range block {
			e := b[j*erofsDirent:]
			binary.LittleEndian.PutUint64(e, w.of[d.node.inode].nid)
			binary.LittleEndian.PutUint16(e[8:], uint16(at))
			e[10] = erofsTypes[d.node.kind]
			at += copy(b[at:], d.name)
		}
	}
	return b
}
