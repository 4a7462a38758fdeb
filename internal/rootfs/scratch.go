package rootfs

import (
	"bytes"
	"crypto/rand"
	"encoding/binary"
	"fmt"

	"flint"
)

// The sizes of an empty file system. The upper one is what 32-bit block numbers reach.
const (
	minScratch = 16 * flint.MiB
	maxScratch = 16*flint.TiB - 128*flint.MiB
)

// Numbers and on-disk forms below are those of the Linux kernel's fs/ext4/ext4.h and its documentation,
// filesystems/ext4 ("Data Structures and Algorithms").
const (
	ext4Magic      = 0xEF53
	ext4Block      = 4096
	groupBlocks    = 8 * ext4Block // what one block of bitmap covers: 128 MiB
	groupInodes    = 8192          // one per 16 KiB, as mkfs.ext4 has by default
	ext4Inode      = 256
	tableBlocks    = groupInodes * ext4Inode / ext4Block
	groupOverhead  = 2 + tableBlocks // bitmaps and inode table, at the start of every group but the first
	descriptorSize = 32
	rootInode      = 2
	firstInode     = 11 // those below are reserved; lost+found is the first
	lostFoundLen   = 4  // blocks, so that fsck finds room without allocating

	inodeUninit = 1 // bg_flags: inode bitmap and table were never written
	blockUninit = 2 // the block bitmap was never written
	tableZeroed = 4 // the inode table reads as zeros; here because it is a hole
)

// scratchLayout is where things are.
type scratchLayout struct {
	blocks      uint32
	groups      uint32
	descriptors uint32 // blocks of group descriptors, after the superblock's
	firstMeta   uint32 // block bitmap of group 0, then its inode bitmap and table
	rootBlock   uint32
	lostFound   uint32
	used        uint32 // blocks of group 0 in use, all at its start
}

func layoutScratch(size flint.Bytes) (scratchLayout, error) {
	if size < minScratch || size > maxScratch {
		return scratchLayout{}, &flint.Fault{
			Code: "image.scratch", What: fmt.Sprintf("make a disk of %s", size),
			Fix: fmt.Sprintf("choose a size from %s to %s", minScratch, maxScratch), Kind: flint.ErrConfig,
		}
	}
	l := scratchLayout{blocks: uint32(size / ext4Block)}
	// A last group too small for its own tables is left out.
	if rest := l.blocks % groupBlocks; l.blocks > groupBlocks && rest < groupOverhead+64 {
		l.blocks -= rest
	}
	l.groups = (l.blocks + groupBlocks - 1) / groupBlocks
	l.descriptors = (l.groups*descriptorSize + ext4Block - 1) / ext4Block
	l.firstMeta = 1 + l.descriptors
	l.rootBlock = l.firstMeta + groupOverhead
	l.lostFound = l.rootBlock + 1
	l.used = l.lostFound + lostFoundLen
	return l, nil
}

// inGroup is how many blocks group g has; the last one may have fewer.
func (l scratchLayout) inGroup(g uint32) uint32 {
	return min(groupBlocks, l.blocks-g*groupBlocks)
}

// groupMeta is the first block of group g's bitmaps and table.
func (l scratchLayout) groupMeta(g uint32) uint32 {
	if g == 0 {
		return l.firstMeta
	}
	return g * groupBlocks
}

// WriteScratch makes an empty ext4 file system of exactly that size (rounded down to 4 KiB) in the empty file out. It has no journal:
// what a scratch disk holds is thrown away, not recovered. It takes milliseconds and a few hundred KiB of disk whatever the size,
// because only the superblock, the group descriptors and the first group are written: all other groups are marked uninitialised,
// which the kernel takes as empty and never zeroes. A size that no such file system can have is a *flint.Fault.
func WriteScratch(out File, size flint.Bytes) error {
	l, err := layoutScratch(size)
	if err != nil {
		return err
	}
	if err := out.Truncate(int64(size) / ext4Block * ext4Block); err != nil {
		return err
	}
	var id [32]byte // the file system's UUID, then the seed of its directory hashes
	rand.Read(id[:])
	id[6], id[8] = id[6]&0x0f|0x40, id[8]&0x3f|0x80 // a version 4 UUID

	descriptors, free := l.groupDescriptors(id[:16])
	blocks := map[uint32][]byte{
		0:               l.superblock(id, free),
		1:               descriptors,
		l.firstMeta:     bitmap(l.used, l.inGroup(0)),
		l.firstMeta + 1: bitmap(firstInode, groupInodes),
		l.firstMeta + 2: l.inodes(),
		l.rootBlock:     append(directoryBlock(rootInode, rootInode, "lost+found", firstInode), directoryBlock(firstInode, rootInode, "", 0)...),
		l.lostFound + 1: bytes.Repeat(directoryBlock(0, 0, "", 0), lostFoundLen-1),
	}
	if last := l.groups - 1; last > 0 {
		// fsck wants the last group's block bitmap written, because it covers blocks that are not there.
		blocks[l.groupMeta(last)] = bitmap(groupOverhead, l.inGroup(last))
	}
	for n, b := range blocks {
		if _, err := out.WriteAt(b, int64(n)*ext4Block); err != nil {
			return err
		}
	}
	return nil
}

// groupDescriptors returns the table of group descriptors and the number of free blocks.
func (l scratchLayout) groupDescriptors(uuid []byte) (table []byte, free uint32) {
	table = make([]byte, l.groups*descriptorSize)
	le := binary.LittleEndian
	crc := newCRC()
	seed := crc.update(0xFFFF, uuid)
	for g := range l.groups {
		d := table[g*descriptorSize:][:descriptorSize]
		meta := l.groupMeta(g)
		le.PutUint32(d[0x0:], meta)   // block bitmap
		le.PutUint32(d[0x4:], meta+1) // inode bitmap
		le.PutUint32(d[0x8:], meta+2) // inode table
		used, usedInodes, dirs, flags := uint32(groupOverhead), uint32(0), uint16(0), uint16(inodeUninit|blockUninit|tableZeroed)
		if g == 0 {
			used, usedInodes, dirs, flags = l.used, firstInode, 2, tableZeroed
		} else if g == l.groups-1 {
			flags = inodeUninit | tableZeroed
		}
		free += l.inGroup(g) - used
		le.PutUint16(d[0xC:], uint16(l.inGroup(g)-used))
		le.PutUint16(d[0xE:], uint16(groupInodes-usedInodes))
		le.PutUint16(d[0x10:], dirs)
		le.PutUint16(d[0x12:], flags)
		le.PutUint16(d[0x1C:], uint16(groupInodes-usedInodes)) // inodes never used, at the table's end
		var number [4]byte
		le.PutUint32(number[:], g)
		le.PutUint16(d[0x1E:], crc.update(crc.update(seed, number[:]), d[:0x1E]))
	}
	return table, free
}

// superblock returns block 0, which the superblock stands in.
func (l scratchLayout) superblock(id [32]byte, freeBlocks uint32) []byte {
	const (
		compat   = 0x8 | 0x20 | 0x200             // ext_attr, dir_index, sparse_super2 (with no backup at all)
		incompat = 0x2 | 0x40                     // filetype, extents
		roCompat = 0x2 | 0x8 | 0x10 | 0x20 | 0x40 // large_file, huge_file, gdt_csum, dir_nlink, extra_isize
	)
	block := make([]byte, ext4Block)
	b := block[superblockAt:]
	le := binary.LittleEndian
	for at, v := range map[int]uint32{
		0x00:  l.groups * groupInodes,
		0x04:  l.blocks,
		0x0C:  freeBlocks,
		0x10:  l.groups*groupInodes - firstInode,
		0x18:  2, // block size 1024 << 2
		0x1C:  2, // cluster size, the same
		0x20:  groupBlocks,
		0x24:  groupBlocks, // clusters per group
		0x28:  groupInodes,
		0x4C:  1, // revision with dynamic inode sizes
		0x54:  firstInode,
		0x5C:  compat,
		0x60:  incompat,
		0x64:  roCompat,
		0x100: 0x4 | 0x8,  // default mount options: user_xattr, acl
		0x160: 0x1,        // flags: directory hashes take bytes as signed, as on x86; it only has to stay the same
		0x268: firstInode, // lost+found
	} {
		le.PutUint32(b[at:], v)
	}
	for at, v := range map[int]uint16{
		0x36:  0xFFFF, // never ask for a check after so many mounts
		0x38:  ext4Magic,
		0x3A:  1, // cleanly unmounted
		0x3C:  1, // on errors: continue
		0x58:  ext4Inode,
		0x15C: 32, // extra bytes all inodes have
		0x15E: 32, // and new ones want
	} {
		le.PutUint16(b[at:], v)
	}
	copy(b[0x68:], id[:16]) // UUID
	copy(b[0xEC:], id[16:]) // seed of the directory hash
	b[0xFC] = 1             // directory hash: half MD4
	return block
}

// inodes returns the start of the inode table: the reserved inodes, the root and lost+found.
func (l scratchLayout) inodes() []byte {
	table := make([]byte, ext4Block)
	put := func(number int, mode, links uint16, start, blocks uint32) {
		b := table[(number-1)*ext4Inode:]
		le := binary.LittleEndian
		le.PutUint16(b[0x0:], mode)
		le.PutUint32(b[0x4:], blocks*ext4Block) // size
		le.PutUint16(b[0x1A:], links)
		le.PutUint32(b[0x1C:], blocks*ext4Block/512) // in sectors
		le.PutUint32(b[0x20:], 0x80000)              // has extents
		le.PutUint16(b[0x28:], 0xF30A)               // extent header: magic,
		le.PutUint16(b[0x2A:], 1)                    // entries,
		le.PutUint16(b[0x2C:], 4)                    // room for entries
		le.PutUint16(b[0x38:], uint16(blocks))       // the extent: length,
		le.PutUint32(b[0x3C:], start)                // first block
		le.PutUint16(b[0x80:], 32)                   // extra bytes used
	}
	put(rootInode, 0o40755, 3, l.rootBlock, 1)
	put(firstInode, 0o40700, 2, l.lostFound, lostFoundLen)
	return table
}

// bitmap returns a block of bits of which the first used are set, and those from size on, which stand for nothing.
func bitmap(used, size uint32) []byte {
	b := make([]byte, ext4Block)
	for i := range uint32(groupBlocks) {
		if i < used || i >= size {
			b[i/8] |= 1 << (i % 8)
		}
	}
	return b
}

// directoryBlock returns a directory's block with ".", ".." and one more name, or an empty one when self is 0.
func directoryBlock(self, parent uint32, name string, inode uint32) []byte {
	b := make([]byte, ext4Block)
	le := binary.LittleEndian
	at, last := 0, 0
	put := func(n uint32, name string) {
		length := (8 + len(name) + 3) &^ 3
		le.PutUint32(b[at:], n)
		le.PutUint16(b[at+4:], uint16(length))
		b[at+6] = byte(len(name))
		if n != 0 {
			b[at+7] = 2 // a directory
		}
		copy(b[at+8:], name)
		at, last = at+length, at
	}
	if self == 0 {
		put(0, "")
	} else {
		put(self, ".")
		put(parent, "..")
	}
	if name != "" {
		put(inode, name)
	}
	le.PutUint16(b[last+4:], uint16(ext4Block-last)) // the last entry takes what is left
	return b
}

// crcTable holds, for each byte, its CRC-16 with polynomial 0x8005, reflected: what group descriptors are checked by.
type crcTable [256]uint16

func newCRC() *crcTable {
	var t crcTable
	for i := range t {
		crc := uint16(i)
		for range 8 {
			if crc&1 != 0 {
				crc = crc>>1 ^ 0xA001
			} else {
				crc >>= 1
			}
		}
		t[i] = crc
	}
	return &t
}

func (t *crcTable) update(crc uint16, p []byte) uint16 {
	for _, b := range p {
		crc = crc>>8 ^ t[byte(crc)^b]
	}
	return crc
}
