package rootfs

import (
	"context"
	"debug/elf"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path"
	"strings"
)

const (
	maxLook  = 256 << 20 // bytes of an image that are read, those that are read again counted again
	maxSmall = 16 << 20  // bytes of a directory or a file that are read
)

// errLook says that an image makes finding a file too costly.
var errLook = errors.New("its directories are too large")

// glance is an image that is looked into. It ends with the context, and after maxLook bytes: directories of a hostile image may be large, and
// on the way of many a path.
type glance struct {
	ctx  context.Context // of the one call this lives in
	r    io.ReaderAt
	left int64
}

func newGlance(ctx context.Context, r io.ReaderAt) *glance { return &glance{ctx, r, maxLook} }

// take is called before so many bytes are read, or made of nothing: a directory may have holes.
func (g *glance) take(n int64) error {
	if g.ctx.Err() != nil {
		return context.Cause(g.ctx)
	}
	if g.left -= n; g.left < 0 {
		return errLook
	}
	return nil
}

// ReadAt implements io.ReaderAt.
func (g *glance) ReadAt(p []byte, at int64) (int, error) {
	if err := g.take(int64(len(p))); err != nil {
		return 0, err
	}
	return g.r.ReadAt(p, at)
}

// files is a file system that somebody else may have made. Who reads it trusts no number in it, and knows what it takes to find a file and
// read a small one.
type files interface {
	root() uint64
	inode(n uint64) (fileInode, error)
	// content reads a small file, directory or link.
	content(i fileInode) ([]byte, error)
	// child finds a name in a directory.
	child(dir fileInode, name string) (uint64, error)
}

// fileInode is a file.
type fileInode struct {
	mode  uint16
	flags uint32
	size  int64
	block [60]byte // in ext4: extents, or the target of a short link
	// In erofs: where the blocks and the tail are.
	first, tail int64
}

// The few types of files that matter here.
const typeMask, typeDir, typeFile, typeLink = 0xf000, 0x4000, 0x8000, 0xa000

// openFiles finds out what file system an image is.
func openFiles(r *glance) (files, error) {
	e, err := openErofs(r) // first, as in Detect
	if errors.Is(err, errErofs) {
		return openExt4(r)
	}
	return e, err
}

// findFile follows a path from the root, through symbolic links.
func findFile(e files, file string) (fileInode, error) {
	links, at := 0, "/"
	here, err := e.inode(e.root())
	if err != nil {
		return fileInode{}, err
	}
	rest := strings.Split(path.Clean("/" + file)[1:], "/")
	for len(rest) > 0 && rest[0] != "" {
		if here.mode&typeMask != typeDir {
			return fileInode{}, fs.ErrNotExist
		}
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
		if links++; links > maxHops {
			return fileInode{}, fs.ErrNotExist
		}
		to := string(target)
		if !path.IsAbs(to) {
			to = path.Join(at, to)
		}
		rest = strings.Split(path.Join(append([]string{"/", to}, rest[1:]...)...)[1:], "/")
		at = "/"
		if here, err = e.inode(e.root()); err != nil {
			return fileInode{}, err
		}
	}
	return here, nil
}

// Contents is what Look looks for.
type Contents struct {
	OS      string `json:"os,omitempty"`   // PRETTY_NAME of its os-release
	Shell   bool   `json:"shell"`          // /bin/sh
	Arch    string `json:"arch,omitempty"` // that its /bin/sh is made for, as GOARCH names it; empty where that is no program
	Libc    string `json:"libc"`           // glibc, musl or none
	Systemd bool   `json:"systemd"`        // as its init
	Docker  bool   `json:"docker"`         // dockerd
	Runner  bool   `json:"runner"`         // the user
}

// Look looks into the file system in a file. Its error is not nil where the file system is none it can read, or made to make that too costly.
func Look(ctx context.Context, file string) (Contents, error) {
	f, err := os.Open(file)
	if err != nil {
		return Contents{}, fmt.Errorf("look into image: %w", err)
	}
	defer f.Close()
	c, err := lookInto(newGlance(ctx, f))
	if err != nil {
		return c, fmt.Errorf("look into image: %w", err)
	}
	return c, nil
}

func lookInto(r *glance) (c Contents, err error) {
	e, err := openFiles(r)
	if err != nil {
		return c, err
	}
	has := func(paths ...string) bool {
		for _, p := range paths {
			_, ferr := findFile(e, p)
			if ferr == nil {
				return true
			}
			if !errors.Is(ferr, fs.ErrNotExist) {
				err = fmt.Errorf("look for %s: %w", p, ferr)
			}
		}
		return false
	}
	read := func(p string) string {
		i, ferr := findFile(e, p)
		if ferr != nil || i.mode&typeMask != typeFile { // has tells other errors
			return ""
		}
		b, ferr := e.content(i)
		if ferr != nil {
			err = fmt.Errorf("read %s: %w", p, ferr)
		}
		return string(b)
	}
	c.Shell = has("/bin/sh")
	c.Arch = archOf(read("/bin/sh"))
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
	c.Runner = strings.Contains("\n"+read("/etc/passwd"), "\nrunner:")
	for line := range strings.Lines(read("/etc/os-release")) {
		if v, ok := strings.CutPrefix(line, "PRETTY_NAME="); ok {
			c.OS = strings.Trim(strings.TrimSpace(v), `"'`)
		}
	}
	return c, err
}

// archOf says what machine a program is for, in Go's words where there are any; empty: it is no program.
func archOf(program string) string {
	const machineAt = 18 // e_machine, elf(5)
	if len(program) < machineAt+2 || program[:len(elf.ELFMAG)] != elf.ELFMAG {
		return ""
	}
	var order binary.ByteOrder = binary.LittleEndian
	if elf.Data(program[elf.EI_DATA]) == elf.ELFDATA2MSB {
		order = binary.BigEndian
	}
	switch m := elf.Machine(order.Uint16([]byte(program[machineAt : machineAt+2]))); m {
	case elf.EM_X86_64:
		return "amd64"
	case elf.EM_AARCH64:
		return "arm64"
	case elf.EM_386:
		return "386"
	default:
		return strings.ToLower(strings.TrimPrefix(m.String(), "EM_"))
	}
}
