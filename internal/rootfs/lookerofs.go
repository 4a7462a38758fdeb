package rootfs

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"io/fs"

	"golang.org/x/sys/unix"
)

// erofsReader reads an erofs: inodes of both forms whose content is not compressed. Numbers and places are those of the kernel's
// fs/erofs/erofs_fs.h.
type erofsReader struct {
	r     *glance
	block int64
	first uint64
	table int64 // of inodes
}

var errErofs = errors.New("not an erofs this can read")

// openErofs reads a superblock.
func openErofs(r *glance) (*erofsReader, error) {
	var sb [128]byte
	if _, err := r.ReadAt(sb[:], superblockAt); err != nil {
		return nil, fmt.Errorf("read superblock: %w", err)
	}
	le := binary.LittleEndian
	shift := sb[12]
	if le.Uint32(sb[:]) != erofsMagic || shift < 9 || shift > 16 {
		return nil, errErofs
	}
	e := &erofsReader{r: r, block: 1 << shift, first: uint64(le.Uint16(sb[14:]))}
	e.table = int64(le.Uint32(sb[40:])) * e.block
	return e, nil
}

func (e *erofsReader) root() uint64 { return e.first }

func (e *erofsReader) inode(n uint64) (i fileInode, err error) {
	if n > 1<<40 {
		return i, errErofs
	}
	at := e.table + int64(n)*erofsSlot
	var b [erofsInode]byte
	if _, err := e.r.ReadAt(b[:32], at); err != nil {
		return i, err
	}
	le := binary.LittleEndian
	form := le.Uint16(b[:])
	i.mode, i.flags = le.Uint16(b[4:]), uint32(form>>1&7)
	i.size, i.first = int64(le.Uint32(b[8:])), int64(le.Uint32(b[16:]))*e.block
	i.tail = at + 32
	if form&1 != 0 { // the extended form
		i.size, i.tail = int64(le.Uint64(b[8:])), at+erofsInode
	}
	if n := int64(le.Uint16(b[2:])); n > 0 {
		i.tail += erofsXattrs + 4*(n-1)
	}
	return i, nil
}

// content reads a small file, directory or link: its blocks, or all but the last one, which then stands behind the inode.
func (e *erofsReader) content(i fileInode) ([]byte, error) {
	const plain, inline = 0, 2
	if i.flags != plain && i.flags != inline || i.size < 0 || i.size > maxSmall || i.mode&typeMask == typeLink && i.size > unix.PathMax {
		return nil, errErofs
	}
	if err := e.r.take(i.size); err != nil {
		return nil, err
	}
	out := make([]byte, i.size)
	blocks := i.size
	if i.flags == inline && blocks > 0 {
		blocks = (i.size - 1) / e.block * e.block
	}
	if _, err := e.r.ReadAt(out[:blocks], i.first); err != nil {
		return nil, err
	}
	_, err := e.r.ReadAt(out[blocks:], i.tail)
	return out, err
}

func (e *erofsReader) child(dir fileInode, name string) (uint64, error) {
	b, err := e.content(dir)
	if err != nil {
		return 0, err
	}
	le := binary.LittleEndian
	for len(b) >= erofsDirent {
		block := b[:min(e.block, int64(len(b)))]
		b = b[len(block):]
		count := int(le.Uint16(block[8:])) / erofsDirent // the first name stands behind the last entry
		if count*erofsDirent > len(block) {
			return 0, errErofs
		}
		for n := range count {
			d := block[n*erofsDirent:]
			begin, end := int(le.Uint16(d[8:])), len(block)
			if n+1 < count {
				end = int(le.Uint16(d[erofsDirent+8:]))
			}
			if begin > end || end > len(block) {
				return 0, errErofs
			}
			is, _, _ := bytes.Cut(block[begin:end], []byte{0})
			if string(is) == name {
				return le.Uint64(d), nil
			}
		}
	}
	return 0, fs.ErrNotExist
}
