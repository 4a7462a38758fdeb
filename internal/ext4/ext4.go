// Package ext4 mends what tar2ext4 leaves unfinished in the file systems it writes, so that e2fsck finds them clean.
//
// It knows file systems of that one shape: blocks of 4 KiB, descriptors of 32 bytes right after the first block. It must not
// write to any other, and it does not read or change what is in a file system.
package ext4

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
)

// Numbers and places below are those of the Linux kernel's documentation, filesystems/ext4.
const (
	blockSize      = 4096
	groupBlocks    = 8 * blockSize // what one block of bitmap covers
	descriptorSize = 32

	superAt       = 1024 // byte the superblock begins at
	superSize     = 1024
	superBlocks   = 0x04
	superLogBlock = 0x18 // block size: 1024 << this
	superPerGroup = 0x20 // blocks
	superInodes   = 0x28 // per group
	superMagic    = 0x38
	superIncompat = 0x60
	superWide     = 0x80 // of superIncompat: 64-bit block numbers, larger descriptors
	magic         = 0xEF53
	descInodeBits = 4 // in a descriptor: block of the group's inode bitmap
	descriptorsAt = blockSize
)

// PadInodeBitmaps marks as used the inodes that bitmaps have room for and groups do not have. tar2ext4 leaves them free,
// which no kernel minds, but e2fsck calls the file system damaged. It refuses a file system that does not have the shape
// tar2ext4 gives one, and then has written nothing.
func PadInodeBitmaps(f interface {
	io.ReaderAt
	io.WriterAt
},
) error {
	bitmaps, inodes, err := layout(f)
	if err != nil {
		return fmt.Errorf("pad inode bitmaps: %w", err)
	}
	padding := bytes.Repeat([]byte{0xff}, int(blockSize-inodes/8))
	for _, b := range bitmaps {
		if _, err := f.WriteAt(padding, int64(b)*blockSize+int64(inodes/8)); err != nil {
			return fmt.Errorf("pad inode bitmaps: %w", err)
		}
	}
	return nil
}

// layout returns the block of each group's inode bitmap, and how many inodes a group has.
func layout(f io.ReaderAt) (bitmaps []uint32, inodes uint32, err error) {
	le := binary.LittleEndian
	super := make([]byte, superSize)
	if _, err := f.ReadAt(super, superAt); err != nil {
		return nil, 0, fmt.Errorf("read superblock: %w", err)
	}
	blocks, perGroup := le.Uint32(super[superBlocks:]), le.Uint32(super[superPerGroup:])
	inodes = le.Uint32(super[superInodes:])
	switch {
	case le.Uint16(super[superMagic:]) != magic:
		return nil, 0, errors.New("not an ext4 file system")
	case le.Uint32(super[superLogBlock:]) != 2 || le.Uint32(super[superIncompat:])&superWide != 0:
		return nil, 0, errors.New("blocks or descriptors have another size")
	case blocks == 0 || perGroup != groupBlocks || inodes == 0 || inodes%8 != 0 || inodes > groupBlocks:
		return nil, 0, fmt.Errorf("%d blocks in groups of %d blocks and %d inodes", blocks, perGroup, inodes)
	}
	groups := (int64(blocks) + groupBlocks - 1) / groupBlocks
	descriptors := make([]byte, groups*descriptorSize) // 4 MiB at most: the numbers of blocks have 32 bits
	if _, err := f.ReadAt(descriptors, descriptorsAt); err != nil {
		return nil, 0, fmt.Errorf("read group descriptors: %w", err)
	}
	for g := range groups {
		at := le.Uint32(descriptors[g*descriptorSize+descInodeBits:])
		if int64(at)*blockSize < descriptorsAt+int64(len(descriptors)) || at >= blocks {
			return nil, 0, fmt.Errorf("inode bitmap of group %d in block %d of %d", g, at, blocks)
		}
		bitmaps = append(bitmaps, at)
	}
	return bitmaps, inodes, nil
}
