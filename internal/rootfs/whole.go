package rootfs

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"math"
	"os"

	"flint"
)

// squashfsMagic is of a squashfs of version 4 (Documentation/filesystems/squashfs.rst of Linux; fs/squashfs/squashfs_fs.h).
const squashfsMagic = 0x73717368

// errNoFS is in what Whole returns of a file that holds no file system that a guest mounts.
var errNoFS = errors.New("it holds no ext4, erofs or squashfs file system")

// Whole reports what keeps a guest from mounting a file system that somebody else made: that it is not there, is cut short, or
// waits for its journal, which a read-only disk cannot have replayed.
func Whole(path string) error {
	f, err := os.Open(path)
	if err != nil {
		return err
	}
	defer f.Close()
	info, err := f.Stat()
	if err != nil {
		return err
	}
	var head [headSize]byte
	if n, err := f.ReadAt(head[:], 0); err != nil && (!errors.Is(err, io.EOF) || n < 96) {
		return errors.Join(errNoFS, err)
	}
	size, unclean := sizeOf(head)
	switch {
	case size == 0:
		return errNoFS
	case size > uint64(info.Size()):
		return &flint.Fault{
			Code: "image.file", What: fmt.Sprintf("use %s: it holds a file system of %s, and has only %s of it", path, flint.Bytes(min(size, math.MaxInt64)), flint.Bytes(info.Size())),
			Fix: "copy the file again, to its end", Kind: flint.ErrConfig,
		}
	case unclean:
		return &flint.Fault{
			Code: "image.file", What: fmt.Sprintf("use %s: its file system was not unmounted when it was copied, and VMs get it read-only", path),
			Fix: "e2fsck -p " + path, Kind: flint.ErrConfig,
		}
	}
	return nil
}

// superblockAt is where both ext4 and erofs have their superblock, and headSize what has to be read to see it.
const superblockAt, headSize = 1024, 2048

// Detect tells by the first 2 KiB of a file which file system it holds, as far as Write makes such; else, and of less, it is empty.
func Detect(head []byte) Format {
	if len(head) < headSize {
		return ""
	}
	sb := head[superblockAt:]
	switch {
	case binary.LittleEndian.Uint32(sb) == erofsMagic: // first: where an ext4 has its magic, it has a random number
		return Erofs
	case binary.LittleEndian.Uint16(sb[0x38:]) == ext4Magic:
		return Ext4
	}
	return ""
}

// sizeOf reads from a superblock how many bytes the file system has, 0 if there is none, and whether its journal has to be replayed.
func sizeOf(head [headSize]byte) (size uint64, unclean bool) {
	u32, u64 := binary.LittleEndian.Uint32, binary.LittleEndian.Uint64
	sb := head[superblockAt:]
	switch kind := Detect(head[:]); {
	case kind == Erofs: // fs/erofs/erofs_fs.h
		return times(uint64(u32(sb[0x24:])), uint64(sb[0xC])), false
	case kind == Ext4: // Documentation/filesystems/ext4, "The Super Block"
		const recover, bits64 = 0x4, 0x80
		incompatible, shift := u32(sb[0x60:]), uint64(u32(sb[0x18:]))
		blocks := uint64(u32(sb[0x4:]))
		if incompatible&bits64 != 0 {
			blocks |= uint64(u32(sb[0x150:])) << 32
		}
		return times(blocks, 10+shift), incompatible&recover != 0
	case u32(head[:]) == squashfsMagic:
		return max(u64(head[40:]), 1), false
	}
	return 0, false
}

// times is blocks of 2^shift bytes; what no file has becomes the most there is.
func times(blocks uint64, shift uint64) uint64 {
	if shift > 30 || blocks > math.MaxUint64>>shift {
		return math.MaxUint64
	}
	return max(blocks<<shift, 1)
}
