package kernel

import (
	"archive/tar"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path"
	"regexp"
	"strconv"
	"strings"
	"syscall"

	"flint"
	"flint/internal/regular"
)

// Bounds of what is unpacked. Ubuntu's generic kernel with all its modules has some 6,000 files and 600 MiB.
const (
	maxFiles    = 50_000
	maxUnpacked = 4 << 30
	maxConfig   = 4 << 20
)

func unpackFault(what string, err error) error {
	if errors.Is(err, context.Canceled) || errors.Is(err, context.DeadlineExceeded) {
		return fmt.Errorf("unpack %s: %w", what, err)
	}
	f := &flint.Fault{
		Code: "kernel.unpack", What: "unpack " + what, Err: err,
		Fix: "fetch the package again; if it persists, it is not a kernel package flint understands",
	}
	var system syscall.Errno
	switch {
	case errors.Is(err, fs.ErrPermission):
		f.Kind, f.Fix = flint.ErrPermission, "let the user flint runs as read it (Ubuntu keeps the kernels in /boot for root)"
	case errors.Is(err, fs.ErrNotExist):
		f.Kind, f.Fix = flint.ErrNotFound, "check the path"
	case errors.Is(err, regular.ErrOther), errors.Is(err, syscall.ENOTDIR):
		f.Kind, f.Fix = flint.ErrConfig, "check the path"
	case !errors.As(err, &system): // else it is this machine's fault, such as a disk's, and may go well the next time
		f.Kind = flint.ErrConfig
	}
	return f
}

// arMember is one file of an ar archive.
type arMember struct {
	name string
	size int64
}

// nextAr reads the header of the next member of an ar archive, whose magic has been read. io.EOF says there is none.
func nextAr(r io.Reader) (arMember, error) {
	var h [60]byte
	if _, err := io.ReadFull(r, h[:]); err != nil {
		if errors.Is(err, io.EOF) {
			return arMember{}, io.EOF
		}
		return arMember{}, fmt.Errorf("read ar header: %w", err)
	}
	if h[58] != '`' || h[59] != '\n' {
		return arMember{}, errors.New("read ar header: its end is not where it must be")
	}
	size, err := strconv.ParseUint(strings.TrimRight(string(h[48:58]), " "), 10, 40)
	if err != nil {
		return arMember{}, fmt.Errorf("read ar header: size %q is not a number", h[48:58])
	}
	name := strings.TrimSuffix(strings.TrimRight(string(h[:16]), " "), "/")
	return arMember{name, int64(size)}, nil
}

// debData returns the archive with a .deb's files, unpacked, and what to call when it is no longer needed.
func debData(r io.Reader) (io.Reader, func(), error) {
	magic := make([]byte, 8)
	if _, err := io.ReadFull(r, magic); err != nil || string(magic) != "!<arch>\n" {
		return nil, nil, errors.New("it is not a .deb: no ar archive")
	}
	for i := 0; ; i++ {
		m, err := nextAr(r)
		if errors.Is(err, io.EOF) || i > 16 {
			return nil, nil, errors.New("it is not a .deb: no member data.tar")
		}
		if err != nil {
			return nil, nil, err
		}
		if i == 0 && m.name != "debian-binary" {
			return nil, nil, fmt.Errorf("it is not a .deb: its first member is %q", m.name)
		}
		if base, _, _ := strings.Cut(m.name, ".tar"); base == "data" {
			return debTar(m, io.LimitReader(r, m.size))
		}
		if _, err := io.CopyN(io.Discard, r, m.size+m.size%2); err != nil {
			return nil, nil, fmt.Errorf("skip ar member %q: %w", m.name, err)
		}
	}
}

func debTar(m arMember, r io.Reader) (io.Reader, func(), error) {
	if m.name == "data.tar" {
		return r, func() {}, nil
	}
	return decompressor(r)
}

// What of a kernel package matters. The groups: the version, and the path inside the module tree.
var (
	vmlinuzPath = regexp.MustCompile(`^(?:boot/vmlinu[xz]-([^/]+)|(?:usr/)?lib/modules/([^/]+)/vmlinu[xz])$`)
	configPath  = regexp.MustCompile(`^(?:boot/config-([^/]+)|(?:usr/)?lib/modules/([^/]+)/config)$`)
	modulePath  = regexp.MustCompile(`^(?:usr/)?lib/modules/([^/]+)/((?:[^/]+/)*[^/]+)$`)
)

// unpacked is a kernel's files laid out in a working directory: vmlinuz, config and modules/.
type unpacked struct {
	root    *os.Root
	version string // of the module tree
	files   int
	bytes   int64
	kernel  bool
}

// Where an unpacked kernel's files are, relative to its root. depmod wants lib/modules/<version>, and some of its
// builds usr/lib/modules/<version>; the latter is a symbolic link.
const (
	workKernel = "vmlinuz"
	workConfig = "config"
	workTree   = "lib/modules"
)

// bounded is a reader of at most left bytes: also what is skipped costs time to unpack.
type bounded struct {
	r    io.Reader
	left int64
}

// Read implements io.Reader.
func (b *bounded) Read(p []byte) (int, error) {
	if b.left <= 0 {
		return 0, fmt.Errorf("it unpacks to more than %s", flint.Bytes(maxUnpacked))
	}
	n, err := b.r.Read(p[:min(int64(len(p)), b.left)])
	b.left -= int64(n)
	return n, err
}

// addDeb lays out the kernel files of a .deb.
func (u *unpacked) addDeb(ctx context.Context, r io.Reader) error {
	data, release, err := debData(r)
	if err != nil {
		return err
	}
	defer release()
	t := tar.NewReader(&bounded{data, maxUnpacked})
	for {
		h, err := t.Next()
		if errors.Is(err, io.EOF) {
			return nil
		}
		if err != nil {
			return fmt.Errorf("read data.tar: %w", err)
		}
		if err := ctx.Err(); err != nil {
			return err
		}
		if u.files++; u.files > maxFiles {
			return fmt.Errorf("more than %d files", maxFiles)
		}
		if h.Typeflag == tar.TypeReg {
			if err := u.add(path.Clean("/" + h.Name)[1:], h.Size, t); err != nil {
				return err
			}
		}
	}
}

// add lays out one file by its path in the package; those that do not matter are skipped.
func (u *unpacked) add(name string, size int64, r io.Reader) error {
	var to string
	if m := vmlinuzPath.FindStringSubmatch(name); m != nil {
		if size > maxKernel { // it is held in memory whole
			return fmt.Errorf("kernel of %s, at most %s", flint.Bytes(size), flint.Bytes(maxKernel))
		}
		to, u.kernel = workKernel, true
	} else if m := configPath.FindStringSubmatch(name); m != nil {
		if size > maxConfig {
			return fmt.Errorf("configuration of %d bytes", size)
		}
		to = workConfig
	} else if m := modulePath.FindStringSubmatch(name); m != nil && wantedModuleFile(m[2]) {
		if !releaseName.MatchString(m[1]) {
			return fmt.Errorf("%q is not a kernel version", m[1])
		}
		if u.version != "" && u.version != m[1] {
			return fmt.Errorf("modules of two versions, %s and %s", u.version, m[1])
		}
		u.version = m[1]
		to = path.Join(workTree, m[1], m[2])
	} else {
		return nil
	}
	if u.bytes += size; size < 0 || u.bytes > maxUnpacked {
		return fmt.Errorf("more than %s of files", flint.Bytes(maxUnpacked))
	}
	return u.write(to, r)
}

func (u *unpacked) write(to string, r io.Reader) error {
	if err := u.root.MkdirAll(path.Dir(to), 0o755); err != nil {
		return err
	}
	f, err := u.root.OpenFile(to, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o644)
	if err != nil {
		return err
	}
	_, err = io.Copy(f, r)
	return errors.Join(err, f.Close())
}

// wantedModuleFile tells modules and what depmod reads from the rest that lies in a module tree: links to the
// kernel's source, debug symbols, a copy of the kernel. The path is relative to the tree.
func wantedModuleFile(rel string) bool {
	dir, file := path.Split(rel)
	if dir == "" {
		return file == "modules.builtin" || file == "modules.builtin.modinfo" || file == "modules.order"
	}
	top, _, _ := strings.Cut(dir, "/")
	return top != "build" && top != "source" && moduleName(file) != ""
}
