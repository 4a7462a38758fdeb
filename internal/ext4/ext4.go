// Package ext4 mends what tar2ext4 leaves unfinished in the file systems it writes, so that e2fsck finds them clean.
//
// It knows file systems of that one shape: blocks of 4 KiB, descriptors of 32 bytes right after the first block. It must not
// write to any other, and it does not read or change what is in a file system's files.
package ext4

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"slices"
)

// Numbers and places below are those of the Linux kernel's documentation, filesystems/ext4.
const (
	blockSize      = 4096
	groupBlocks    = 8 * blockSize // what one block of bitmap covers
	descriptorSize = 32

	superAt        = 1024 // byte the superblock begins at
	superSize      = 1024
	superBlocks    = 0x04
	superLogBlock  = 0x18 // block size: 1024 << this
	superPerGroup  = 0x20 // blocks
	superInodes    = 0x28 // per group
	superMagic     = 0x38
	superIncompat  = 0x60
	superInodeSize = 0x58 // bytes of an inode
	inodeSize      = 256
	superWide      = 0x80 // of superIncompat: 64-bit block numbers, larger descriptors
	magic          = 0xEF53
	descInodeBits  = 4 // in a descriptor: block of the group's inode bitmap
	descInodes     = 8 // and of its inodes
	descriptorsAt  = blockSize
)

// PadInodeBitmaps marks as used the inodes that bitmaps have room for and groups do not have. tar2ext4 leaves them free,
// which no kernel minds, but e2fsck calls the file system damaged. It refuses a file system that does not have the shape
// tar2ext4 gives one, and then has written nothing.
func PadInodeBitmaps(f interface {
	io.ReaderAt
	io.WriterAt
},
) error {
	l, err := readLayout(f)
	if err != nil {
		return fmt.Errorf("pad inode bitmaps: %w", err)
	}
	padding := bytes.Repeat([]byte{0xff}, int(blockSize-l.inodes/8))
	for _, g := range l.groups {
		if _, err := f.WriteAt(padding, int64(g.bitmap)*blockSize+int64(l.inodes/8)); err != nil {
			return fmt.Errorf("pad inode bitmaps: %w", err)
		}
	}
	return nil
}

// layout is where things are.
type layout struct {
	groups        []group
	inodes        uint32 // in each group
	first, blocks uint32 // the first block behind the descriptors, the first behind the file system
}

// group says in which blocks a group has the bitmap of its inodes, and the inodes.
type group struct{ bitmap, table uint32 }

// holds reports whether a block may be one that descriptors or inodes name.
func (l layout) holds(block uint32) bool { return block >= l.first && block < l.blocks }

func readLayout(f io.ReaderAt) (l layout, err error) {
	le := binary.LittleEndian
	super := make([]byte, superSize)
	if _, err := f.ReadAt(super, superAt); err != nil {
		return layout{}, fmt.Errorf("read superblock: %w", err)
	}
	perGroup := le.Uint32(super[superPerGroup:])
	l.blocks, l.inodes = le.Uint32(super[superBlocks:]), le.Uint32(super[superInodes:])
	switch {
	case le.Uint16(super[superMagic:]) != magic:
		return layout{}, errors.New("not an ext4 file system")
	case le.Uint32(super[superLogBlock:]) != 2 || le.Uint32(super[superIncompat:])&superWide != 0 || le.Uint16(super[superInodeSize:]) != inodeSize:
		return layout{}, errors.New("blocks, inodes or descriptors have another size")
	case l.blocks == 0 || perGroup != groupBlocks || l.inodes == 0 || l.inodes%8 != 0 || l.inodes > groupBlocks:
		return layout{}, fmt.Errorf("%d blocks in groups of %d blocks and %d inodes", l.blocks, perGroup, l.inodes)
	}
	groups := (int64(l.blocks) + groupBlocks - 1) / groupBlocks
	descriptors := make([]byte, groups*descriptorSize) // 4 MiB at most: the numbers of blocks have 32 bits
	if _, err := f.ReadAt(descriptors, descriptorsAt); err != nil {
		return layout{}, fmt.Errorf("read group descriptors: %w", err)
	}
	l.first = uint32((descriptorsAt + len(descriptors) + blockSize - 1) / blockSize)
	for d := range slices.Chunk(descriptors, descriptorSize) {
		g := group{le.Uint32(d[descInodeBits:]), le.Uint32(d[descInodes:])}
		if !l.holds(g.bitmap) || !l.holds(g.table) {
			return layout{}, fmt.Errorf("inode bitmap and table of group %d in blocks %d and %d of %d", len(l.groups), g.bitmap, g.table, l.blocks)
		}
		l.groups = append(l.groups, g)
	}
	return l, nil
}
