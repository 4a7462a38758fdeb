package rootfs

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io/fs"

	"golang.org/x/sys/unix"
)

// ext4Reader reads an ext4 file system: extents, directories as lists, symbolic links. The layout is that of the kernel's
// Documentation/filesystems/ext4.
type ext4Reader struct {
	r                   *glance
	block               int64
	perGroup, inodes    uint32
	inodeSize, descSize int64
	table               int64 // of group descriptors
}

// flagExtents says that an inode has its blocks as extents.
const flagExtents = 0x80000

var errExt4 = errors.New("not an ext4 file system this can read")

// openExt4 reads a superblock.
func openExt4(r *glance) (*ext4Reader, error) {
	var sb [1024]byte
	if _, err := r.ReadAt(sb[:], superblockAt); err != nil {
		return nil, fmt.Errorf("read superblock: %w", err)
	}
	u16, u32 := binary.LittleEndian.Uint16, binary.LittleEndian.Uint32
	e := &ext4Reader{r: r, inodes: u32(sb[0:]), perGroup: u32(sb[0x28:]), inodeSize: int64(u16(sb[0x58:])), descSize: 32}
	shift := u32(sb[0x18:])
	if u16(sb[0x38:]) != ext4Magic || shift > 6 || e.perGroup == 0 || e.inodeSize < 128 || e.inodeSize > 4096 {
		return nil, errExt4
	}
	e.block = 1024 << shift
	const bits64 = 0x80
	if u32(sb[0x60:])&bits64 != 0 {
		if e.descSize = int64(u16(sb[0xFE:])); e.descSize < 64 || e.descSize > 1024 {
			return nil, errExt4
		}
	}
	e.table = (int64(u32(sb[0x14:])) + 1) * e.block
	return e, nil
}

func (e *ext4Reader) root() uint64 { return 2 }

func (e *ext4Reader) inode(number uint64) (i fileInode, err error) {
	n := uint32(number) // child has it from 32 bits
	if n == 0 || n > e.inodes {
		return i, errExt4
	}
	group, index := int64((n-1)/e.perGroup), int64((n-1)%e.perGroup)
	desc := make([]byte, e.descSize)
	if _, err := e.r.ReadAt(desc, e.table+group*e.descSize); err != nil {
		return i, err
	}
	at := uint64(binary.LittleEndian.Uint32(desc[8:]))
	if len(desc) >= 64 {
		at |= uint64(binary.LittleEndian.Uint32(desc[0x28:])) << 32
	}
	if at > 1<<40 {
		return i, errExt4
	}
	var b [128]byte
	if _, err := e.r.ReadAt(b[:], int64(at)*e.block+index*e.inodeSize); err != nil {
		return i, err
	}
	i.mode, i.flags = binary.LittleEndian.Uint16(b[0:]), binary.LittleEndian.Uint32(b[0x20:])
	i.size = int64(binary.LittleEndian.Uint32(b[4:])) | int64(binary.LittleEndian.Uint32(b[0x6C:])&0x7fff)<<32
	copy(i.block[:], b[0x28:])
	return i, nil
}

// content reads a small file, directory or link.
func (e *ext4Reader) content(i fileInode) ([]byte, error) {
	if i.mode&typeMask == typeLink && i.size < int64(len(i.block)) {
		return i.block[:i.size], nil
	}
	if i.size < 0 || i.size > maxSmall || i.flags&flagExtents == 0 || i.mode&typeMask == typeLink && i.size > unix.PathMax {
		return nil, errExt4
	}
	if err := e.r.take(i.size); err != nil {
		return nil, err
	}
	out := make([]byte, i.size)
	const maxNodes = 4096
	nodes, left := 0, i.size // no block of a sound file is read twice
	var walk func(node []byte, depth int) error
	walk = func(node []byte, depth int) error {
		u16, u32 := binary.LittleEndian.Uint16, binary.LittleEndian.Uint32
		if nodes++; nodes > maxNodes || u16(node) != 0xF30A || int(u16(node[6:])) != depth && depth >= 0 || u16(node[6:]) > 5 {
			return errExt4
		}
		depth = int(u16(node[6:]))
		for n := range int(u16(node[2:])) {
			if 12*n+24 > len(node) {
				return errExt4
			}
			x := node[12+12*n:]
			if depth > 0 {
				child := make([]byte, e.block)
				if _, err := e.r.ReadAt(child, (int64(u32(x[4:]))|int64(u16(x[8:]))<<32)*e.block); err != nil {
					return err
				}
				if err := walk(child, depth-1); err != nil {
					return err
				}
				continue
			}
			at, size := int64(u32(x))*e.block, int64(u16(x[4:]))*e.block
			if at >= i.size || u16(x[4:]) > 32768 { // more than that: not written yet
				continue
			}
			part := out[at:min(i.size, at+size)]
			if left -= int64(len(part)); left < 0 {
				return errExt4
			}
			if _, err := e.r.ReadAt(part, (int64(u32(x[8:]))|int64(u16(x[6:]))<<32)*e.block); err != nil {
				return err
			}
		}
		return nil
	}
	return out, walk(i.block[:], -1)
}

func (e *ext4Reader) child(dir fileInode, name string) (uint64, error) {
	b, err := e.content(dir)
	if err != nil {
		return 0, err
	}
	for len(b) >= 8 {
		n, size, length := binary.LittleEndian.Uint32(b), int(binary.LittleEndian.Uint16(b[4:])), int(b[6])
		if size < 8 || size > len(b) || 8+length > size {
			return 0, errExt4
		}
		if n != 0 && string(b[8:8+length]) == name {
			return uint64(n), nil
		}
		b = b[size:]
	}
	return 0, fs.ErrNotExist
}
