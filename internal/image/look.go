package image

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path"
	"strings"

	"golang.org/x/sys/unix"
)

// ext4Reader reads an ext4 file system that somebody else may have made: it trusts no number in it. It knows what it takes to find
// a file and read a small one: extents, directories as lists, symbolic links. The layout is that of the kernel's
// Documentation/filesystems/ext4.
type ext4Reader struct {
	r                   io.ReaderAt
	block               int64
	perGroup, inodes    uint32
	inodeSize, descSize int64
	table               int64 // of group descriptors
}

// fileInode is a file as ext4Reader has it.
type fileInode struct {
	mode  uint16
	flags uint32
	size  int64
	block [60]byte // extents, or the target of a short link
}

const (
	maxSmall = 16 << 20 // bytes of a directory or a file that are read
	maxLinks = 40       // followed on a path, as Linux does
)

// The few types of files and flags that matter here.
const (
	typeMask, typeDir, typeFile, typeLink = 0xf000, 0x4000, 0x8000, 0xa000
	flagExtents                           = 0x80000
)

var errExt4 = errors.New("not an ext4 file system this can read")

// openExt4 reads a superblock.
func openExt4(r io.ReaderAt) (*ext4Reader, error) {
	var sb [1024]byte
	if _, err := r.ReadAt(sb[:], 1024); err != nil {
		return nil, fmt.Errorf("read superblock: %w", err)
	}
	u16, u32 := binary.LittleEndian.Uint16, binary.LittleEndian.Uint32
	e := &ext4Reader{r: r, inodes: u32(sb[0:]), perGroup: u32(sb[0x28:]), inodeSize: int64(u16(sb[0x58:])), descSize: 32}
	shift := u32(sb[0x18:])
	if u16(sb[0x38:]) != 0xEF53 || shift > 6 || e.perGroup == 0 || e.inodeSize < 128 || e.inodeSize > 4096 {
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

func (e *ext4Reader) inode(n uint32) (i fileInode, err error) {
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

// child finds a name in a directory.
func (e *ext4Reader) child(dir fileInode, name string) (uint32, error) {
	if dir.mode&typeMask != typeDir {
		return 0, fs.ErrNotExist
	}
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
			return n, nil
		}
		b = b[size:]
	}
	return 0, fs.ErrNotExist
}

// find follows a path from the root, through symbolic links.
func (e *ext4Reader) find(file string) (fileInode, error) {
	const root = 2
	links, at := 0, "/"
	here, err := e.inode(root)
	if err != nil {
		return fileInode{}, err
	}
	rest := strings.Split(path.Clean("/" + file)[1:], "/")
	for len(rest) > 0 && rest[0] != "" {
		n, err := e.child(here, rest[0])
		if err != nil {
			return fileInode{}, err
		}
		next, err := e.inode(n)
		if err != nil {
			return fileInode{}, err
		}
		if next.mode&typeMask != typeLink {
			at, rest, here = path.Join(at, rest[0]), rest[1:], next
			continue
		}
		target, err := e.content(next)
		if err != nil {
			return fileInode{}, err
		}
		if links++; links > maxLinks {
			return fileInode{}, fs.ErrNotExist
		}
		to := string(target)
		if !path.IsAbs(to) {
			to = path.Join(at, to)
		}
		rest = strings.Split(path.Join(append([]string{"/", to}, rest[1:]...)...)[1:], "/")
		at = "/"
		if here, err = e.inode(root); err != nil {
			return fileInode{}, err
		}
	}
	return here, nil
}

// Contents is what flint looks for in an image.
type Contents struct {
	OS      string `json:"os,omitempty"` // PRETTY_NAME of its os-release
	Shell   bool   `json:"shell"`        // /bin/sh
	Libc    string `json:"libc"`         // glibc, musl or none
	Systemd bool   `json:"systemd"`      // as its init
	Docker  bool   `json:"docker"`       // dockerd
	Runner  bool   `json:"runner"`       // the user
}

// BasePath returns where a base image is that the store keeps.
func (s *Store) BasePath(digest string) (string, bool) {
	for _, format := range []Format{Ext4, Erofs} {
		if file := s.path(baseDir, fileName(digest, format)); isRegular(file) {
			return file, true
		}
	}
	return "", false
}

// Look looks into a base image. Its error is not nil where the file system is none it can read.
func Look(file string) (c Contents, err error) {
	f, err := os.Open(file)
	if err != nil {
		return c, fmt.Errorf("look into image: %w", err)
	}
	defer f.Close()
	e, err := openExt4(f)
	if err != nil {
		return c, fmt.Errorf("look into image: %w", err)
	}
	has := func(paths ...string) bool {
		for _, p := range paths {
			_, ferr := e.find(p)
			if ferr == nil {
				return true
			}
			if !errors.Is(ferr, fs.ErrNotExist) {
				err = fmt.Errorf("look into image for %s: %w", p, ferr)
			}
		}
		return false
	}
	read := func(p string) string {
		i, ferr := e.find(p)
		if ferr != nil || i.mode&typeMask != typeFile {
			return ""
		}
		b, _ := e.content(i)
		return string(b)
	}
	c.Shell = has("/bin/sh")
	switch {
	case has("/lib64/ld-linux-x86-64.so.2", "/lib/ld-linux-aarch64.so.1"):
		c.Libc = "glibc"
	case has("/lib/ld-musl-x86_64.so.1", "/lib/ld-musl-aarch64.so.1"):
		c.Libc = "musl"
	default:
		c.Libc = "none"
	}
	c.Systemd = has("/lib/systemd/systemd") && has("/sbin/init")
	c.Docker = has("/usr/bin/dockerd", "/usr/sbin/dockerd", "/usr/local/bin/dockerd")
	c.Runner = strings.HasPrefix(read("/etc/passwd"), "runner:") || strings.Contains(read("/etc/passwd"), "\nrunner:")
	for line := range strings.Lines(read("/etc/os-release")) {
		if v, ok := strings.CutPrefix(line, "PRETTY_NAME="); ok {
			c.OS = strings.Trim(strings.TrimSpace(v), `"'`)
		}
	}
	return c, err
}
