package ext4

import (
	"bytes"
	"cmp"
	"encoding/binary"
	"fmt"
	"io"
	"slices"
)

const (
	inodeAttrs = 0x68       // in an inode: block of its extended attributes
	attrsMagic = 0xEA020000 // a block of attributes begins with this
	attrsAt    = 32         // where in it the entries begin
	attrHead   = 16         // bytes of an entry before its name
)

// SortAttributes puts the entries of each block of extended attributes in the order that Linux looks for them in. tar2ext4 sorts them by a
// rule that contradicts itself, so that of more than twelve entries some may stand where Linux lists but does not find them.
// It refuses a file system that does not have the shape tar2ext4 gives one.
func SortAttributes(f interface {
	io.ReaderAt
	io.WriterAt
},
) error {
	l, err := readLayout(f)
	if err != nil {
		return fmt.Errorf("sort attributes: %w", err)
	}
	table := make([]byte, int(l.inodes)*inodeSize) // 8 MiB at most
	for n, g := range l.groups {
		if _, err := f.ReadAt(table, int64(g.table)*blockSize); err != nil {
			return fmt.Errorf("read inodes of group %d: %w", n, err)
		}
		for inode := range slices.Chunk(table, inodeSize) {
			at := binary.LittleEndian.Uint32(inode[inodeAttrs:])
			if at == 0 {
				continue
			}
			if !l.holds(at) {
				return fmt.Errorf("attributes in block %d of %d", at, l.blocks)
			}
			if err := sortBlock(f, int64(at)*blockSize); err != nil {
				return fmt.Errorf("attributes in block %d: %w", at, err)
			}
		}
	}
	return nil
}

// sortBlock sorts the entries of one block of attributes. Their values stay where they are.
func sortBlock(f interface {
	io.ReaderAt
	io.WriterAt
}, at int64,
) error {
	b := make([]byte, blockSize)
	if _, err := f.ReadAt(b, at); err != nil {
		return err
	}
	if binary.LittleEndian.Uint32(b) != attrsMagic {
		return fmt.Errorf("begins with %x", b[:4])
	}
	var entries [][]byte
	rest := b[attrsAt:]
	for len(rest) >= 4 && binary.LittleEndian.Uint32(rest) != 0 { // the end, as Linux tells it
		size := attrHead + (int(rest[0])+3)&^3
		if size > len(rest) {
			return fmt.Errorf("an entry of %d bytes where there are %d", size, len(rest))
		}
		entries, rest = append(entries, bytes.Clone(rest[:size])), rest[size:]
	}
	// By name space, then length, then name: ext4_xattr_block_find in Linux's fs/ext4/xattr.c.
	slices.SortFunc(entries, func(a, b []byte) int {
		return cmp.Or(cmp.Compare(a[1], b[1]), cmp.Compare(a[0], b[0]), bytes.Compare(a[attrHead:], b[attrHead:]))
	})
	sorted := bytes.Join(entries, nil)
	if bytes.Equal(b[attrsAt:attrsAt+len(sorted)], sorted) {
		return nil
	}
	_, err := f.WriteAt(sorted, at+attrsAt)
	return err
}
