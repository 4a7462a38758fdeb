package image

import (
	"bufio"
	"cmp"
	"context"
	"encoding/binary"
	"fmt"
	"io"
	"slices"

	"golang.org/x/sys/unix"
)

// Numbers and places below are those of the Linux kernel's fs/erofs/erofs_fs.h. The file system written here is the plainest of
// its kind: blocks of 4 KiB, nothing compressed, every inode of the extended form, every content in blocks of its own.
const (
	erofsBlock   = 4096
	erofsMagic   = 0xE0F5E1E2
	erofsSuperAt = 1024
	erofsSlot    = 32 // inodes stand at multiples of this, which number them
	erofsInode   = 64
	erofsExtents = 1 // i_format: extended inode, flat plain content
	erofsDirent  = 12
	erofsXattrs  = 12 // the header before an inode's attributes
)

// erofsFile is an inode of the file system being written.
type erofsFile struct {
	*node        // its first name
	nid   uint64 // place in the table of inodes, in slots
	links uint32
	block uint32 // where its content begins
	size  int64
}

// erofsWriter lays a merged tree out: the superblock's block, the table of inodes, directories and symbolic links, contents.
type erofsWriter struct {
	files []*erofsFile // in the order of their inodes, the root first
	of    map[*inode]*erofsFile
	slots uint64 // so far
	next  uint32 // block
}

// writeErofs writes the tree as a read-only erofs into the empty file out.
func (p *plan) writeErofs(ctx context.Context, contents *spool, out *guard) error {
	w := &erofsWriter{of: map[*inode]*erofsFile{}}
	if err := w.number(p.tree); err != nil {
		return err
	}
	w.place(p.contents)
	file := &holes{f: out}
	buf := bufio.NewWriterSize(file, chunk)
	buf.Write(w.superblock())
	for _, f := range w.files {
		buf.Write(w.inode(f))
	}
	pad(buf, int64(w.slots)*erofsSlot)
	for _, f := range w.files {
		switch f.kind {
		case directory:
			buf.Write(w.directory(f))
			pad(buf, f.size)
		case symlink:
			buf.WriteString(f.target)
			pad(buf, f.size)
		}
	}
	copies := make([]byte, chunk)
	for _, n := range p.contents {
		if _, err := io.CopyBuffer(struct{ io.Writer }{buf}, contextReader{ctx, contents.section(n.at, n.size)}, copies); err != nil {
			return fmt.Errorf("copy %q: %w", n.path(), err)
		}
		pad(buf, n.size)
		contents.drop(n.at + n.size)
	}
	if err := buf.Flush(); err != nil { // a bufio.Writer keeps its first error
		return fmt.Errorf("write erofs: %w", err)
	}
	return file.finish()
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
	f := &erofsFile{node: n, nid: w.slots, links: 1, size: n.inode.size}
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
	w.slots += (erofsInode + uint64(len(attributes)) + erofsSlot - 1) / erofsSlot
	return nil
}

// place gives every content its blocks, in the order it is written.
func (w *erofsWriter) place(contents []*node) {
	blocks := func(size int64) uint32 { return uint32((size + erofsBlock - 1) / erofsBlock) }
	w.next = 1 + blocks(int64(w.slots)*erofsSlot)
	for _, f := range w.files {
		if f.kind == directory || f.kind == symlink {
			f.block = w.next
			w.next += blocks(f.size)
		}
	}
	for _, n := range contents {
		w.of[n.inode].block = w.next
		w.next += blocks(n.size)
	}
}

func (w *erofsWriter) superblock() []byte {
	b := make([]byte, erofsBlock)
	s, le := b[erofsSuperAt:], binary.LittleEndian
	le.PutUint32(s, erofsMagic)
	s[12] = 12 // block size 1 << this
	// The root's number has 16 bits: it is the first, 0.
	le.PutUint64(s[16:], uint64(len(w.files)))
	le.PutUint32(s[36:], w.next)
	le.PutUint32(s[40:], 1) // block of the table of inodes
	return b
}

// inode returns an inode with its attributes, in whole slots.
func (w *erofsWriter) inode(f *erofsFile) []byte {
	attributes, _ := erofsAttributes(f.xattrs) // add has refused those that have none
	b := make([]byte, (erofsInode+len(attributes)+erofsSlot-1)/erofsSlot*erofsSlot)
	le := binary.LittleEndian
	le.PutUint16(b, erofsExtents)
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
			return nil, fmt.Errorf("%w for erofs", errAttributes)
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
