package runnersoft

import (
	"archive/tar"
	"bufio"
	"compress/gzip"
	"context"
	"debug/elf"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path"
	"path/filepath"
	"strings"

	"flint"
)

// Bounds of an archive. GitHub's has some 10,000 files and 700 MiB.
const (
	maxEntries  = 200_000
	maxUnpacked = 4 * flint.GiB
	maxName     = 1024 // bytes
	maxDepth    = 64
)

// unpack writes a .tar.gz below dir, which is there and empty. Whatever the archive says, nothing outside is written or linked
// to, files belong to us, and nobody else can write them.
func unpack(ctx context.Context, r io.Reader, dir string) error {
	root, err := os.OpenRoot(dir)
	if err != nil {
		return err
	}
	defer root.Close()
	z, err := gzip.NewReader(bufio.NewReaderSize(reader{ctx, r}, 1<<20))
	if err != nil {
		return fmt.Errorf("it is no .tar.gz: %w", err)
	}
	u := unpacker{root: root, left: int64(maxUnpacked)}
	t := tar.NewReader(z)
	for {
		h, err := t.Next()
		if err == io.EOF {
			break
		}
		if err != nil {
			return fmt.Errorf("it is damaged: %w", err)
		}
		if u.entries++; u.entries > maxEntries {
			return fmt.Errorf("it has more than %d entries", maxEntries)
		}
		if err := u.entry(h, t); err != nil {
			return err
		}
	}
	// What follows the tar belongs to the file and its checksum.
	if n, err := io.Copy(io.Discard, io.LimitReader(z, u.left+1)); err != nil || n > u.left {
		return fmt.Errorf("it is damaged behind its last entry: %w", errors.Join(err))
	}
	return u.checkLinks()
}

type unpacker struct {
	root    *os.Root
	left    int64 // bytes that may still be unpacked
	entries int
	links   []string
}

func (u *unpacker) entry(h *tar.Header, content io.Reader) error {
	if h.Typeflag == tar.TypeXGlobalHeader {
		return nil
	}
	name := path.Clean(h.Name)
	switch {
	case len(h.Name) > maxName || strings.Count(name, "/") >= maxDepth || strings.ContainsRune(h.Name, 0):
		return fmt.Errorf("%.100q has no name one can use", h.Name)
	case !filepath.IsLocal(name):
		return fmt.Errorf("%.100q leads out of its directory", h.Name)
	case name == ".":
		return nil // the directory itself, which is there
	}
	if err := u.root.MkdirAll(path.Dir(name), 0o755); err != nil {
		return fmt.Errorf("make directory of %.100q: %w", h.Name, err)
	}
	switch h.Typeflag {
	case tar.TypeDir:
		err := u.root.Mkdir(name, 0o755)
		if info, serr := u.root.Lstat(name); errors.Is(err, fs.ErrExist) && serr == nil && info.IsDir() {
			err = nil
		}
		return entryError(h, err)
	case tar.TypeReg:
		return entryError(h, u.file(name, h, content))
	case tar.TypeSymlink:
		if len(h.Linkname) > maxName || !filepath.IsLocal(path.Join(path.Dir(name), h.Linkname)) || path.IsAbs(h.Linkname) {
			return fmt.Errorf("link %.100q leads out of its directory, to %.100q", h.Name, h.Linkname)
		}
		u.links = append(u.links, name)
		return entryError(h, u.root.Symlink(h.Linkname, name))
	case tar.TypeLink:
		target := path.Clean(h.Linkname)
		if !filepath.IsLocal(target) {
			return fmt.Errorf("link %.100q leads out of its directory, to %.100q", h.Name, h.Linkname)
		}
		if info, err := u.root.Lstat(target); err != nil || !info.Mode().IsRegular() {
			return fmt.Errorf("link %.100q is to no file: %.100q", h.Name, h.Linkname)
		}
		return entryError(h, u.root.Link(target, name))
	}
	return fmt.Errorf("%.100q is neither a file, a directory nor a link (type %q)", h.Name, h.Typeflag)
}

func entryError(h *tar.Header, err error) error {
	if err == nil {
		return nil
	}
	return fmt.Errorf("unpack %.100q: %w", h.Name, err)
}

func (u *unpacker) file(name string, h *tar.Header, content io.Reader) (err error) {
	if u.left -= h.Size; u.left < 0 {
		return fmt.Errorf("it has more than %s unpacked", maxUnpacked)
	}
	mode := fs.FileMode(0o644)
	if h.Mode&0o111 != 0 {
		mode = 0o755
	}
	f, err := u.root.OpenFile(name, os.O_CREATE|os.O_EXCL|os.O_WRONLY, mode)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, f.Close()) }()
	if err := f.Chmod(mode); err != nil { // whatever the umask
		return err
	}
	_, err = io.Copy(f, content)
	return err
}

// checkLinks follows every symbolic link as a reader would: through other links one may lead further than its text says.
func (u *unpacker) checkLinks() error {
	for _, name := range u.links {
		if _, err := u.root.Stat(name); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return fmt.Errorf("link %.100q leads out of its directory: %w", name, err)
		}
	}
	return nil
}

// checkRunner says what is wrong with an unpacked runner.
func checkRunner(dir, arch string) error {
	for _, ours := range []string{startFile, versionFile} {
		if _, err := os.Lstat(filepath.Join(dir, ours)); err == nil {
			return fmt.Errorf("it has a file %q of its own, where flint puts one", ours)
		}
	}
	path := filepath.Join(dir, filepath.FromSlash(listener))
	info, err := os.Lstat(path)
	if err != nil || !info.Mode().IsRegular() || info.Mode()&0o111 == 0 {
		return fmt.Errorf("it has no program %s", listener)
	}
	f, err := elf.Open(path)
	if err != nil {
		return nil // a script may stand in for it
	}
	defer f.Close()
	want := map[string]elf.Machine{"x64": elf.EM_X86_64, "arm64": elf.EM_AARCH64}[arch]
	if f.Machine != want {
		return fmt.Errorf("its %s is for %s, and this machine is %s", listener, f.Machine, arch)
	}
	return nil
}
