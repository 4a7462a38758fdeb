package image

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

// errNoFS is in what wholeFile returns of a file that holds no file system that a guest mounts.
var errNoFS = errors.New("it holds no ext4, erofs or squashfs file system")

// wholeFile reports what keeps a guest from mounting a file system that somebody else made: that it is not there, is cut short, or
// waits for its journal, which a read-only disk cannot have replayed.
func wholeFile(path string) error {
	f, err := os.Open(path)
	if err != nil {
		return err
	}
	defer f.Close()
	info, err := f.Stat()
	if err != nil {
		return err
	}
	var head [2048]byte
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

// sizeOf reads from a superblock how many bytes the file system has, 0 if there is none, and whether its journal has to be replayed.
func sizeOf(head [2048]byte) (size uint64, unclean bool) {
	u16, u32, u64 := binary.LittleEndian.Uint16, binary.LittleEndian.Uint32, binary.LittleEndian.Uint64
	sb := head[1024:]
	switch {
	case u32(sb) == erofsMagic: // where an ext4 has its magic it has a random number; fs/erofs/erofs_fs.h
		return times(uint64(u32(sb[0x24:])), uint64(sb[0xC])), false
	case u16(sb[0x38:]) == 0xEF53: // Documentation/filesystems/ext4, "The Super Block"
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
