package kernel

import (
	"bufio"
	"bytes"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"strings"
)

// File types of cpio's mode field.
const (
	cpioDir  = 0o040000
	cpioFile = 0o100000
	cpioChar = 0o020000
)

// cpioWriter writes an initramfs in the "newc" format (the kernel's driver-api/early-userspace/buffer-format). All
// times are zero and owners root, so that equal content gives equal bytes.
type cpioWriter struct {
	w     *bufio.Writer
	inode int
	err   error
}

// entry writes one file. The device is for character devices.
func (c *cpioWriter) entry(name string, mode uint32, data []byte, major, minor int) {
	c.inode++
	c.header(c.inode, name, mode, len(data), major, minor)
	c.padded(data)
}

func (c *cpioWriter) header(inode int, name string, mode uint32, size, major, minor int) {
	if c.err != nil {
		return
	}
	links := 1
	if mode&^0o7777 == cpioDir {
		links = 2
	}
	// magic, inode, mode, uid, gid, links, mtime, size, device, device of the node, length of the name, checksum
	h := fmt.Sprintf("070701%08x%08x%08x%08x%08x%08x%08x%08x%08x%08x%08x%08x%08x%s\x00",
		inode, mode, 0, 0, links, 0, size, 0, 0, major, minor, len(name)+1, 0, name)
	c.padded([]byte(h))
}

// padded writes b and zeroes up to a multiple of four.
func (c *cpioWriter) padded(b []byte) {
	if c.err != nil {
		return
	}
	if _, c.err = c.w.Write(b); c.err == nil && len(b)%4 != 0 {
		_, c.err = c.w.Write(make([]byte, 4-len(b)%4))
	}
}

func (c *cpioWriter) close() error {
	c.header(0, "TRAILER!!!", 0, 0, 0, 0)
	if c.err != nil {
		return c.err
	}
	return c.w.Flush()
}

// writeInitramfs writes the initramfs: the agent as /init, its mount points, a console for its first words, and the
// boot modules with their order under /modules.
func writeInitramfs(w io.Writer, agent []byte, modules fs.FS) error {
	c := &cpioWriter{w: bufio.NewWriterSize(w, 1<<16)}
	c.entry("dev", cpioDir|0o755, nil, 0, 0)
	c.entry("dev/console", cpioChar|0o600, nil, 5, 1)
	c.entry("init", cpioFile|0o755, agent, 0, 0)
	c.entry("modules", cpioDir|0o755, nil, 0, 0)
	files, err := fs.ReadDir(modules, ".")
	if err != nil {
		return err
	}
	for _, f := range files {
		b, err := fs.ReadFile(modules, f.Name())
		if err != nil {
			return err
		}
		c.entry("modules/"+f.Name(), cpioFile|0o644, b, 0, 0)
	}
	c.entry("proc", cpioDir|0o755, nil, 0, 0)
	c.entry("sys", cpioDir|0o755, nil, 0, 0)
	return c.close()
}

// isWholeInitramfs reports whether the file at path ends as writeInitramfs ends one.
func isWholeInitramfs(path string) bool {
	f, err := os.Open(path)
	if err != nil {
		return false
	}
	defer f.Close()
	var end bytes.Buffer
	c := &cpioWriter{w: bufio.NewWriter(&end)}
	info, err := f.Stat()
	if errors.Join(err, c.close()) != nil {
		return false
	}
	tail := make([]byte, end.Len())
	_, err = f.ReadAt(tail, info.Size()-int64(len(tail)))
	return err == nil && bytes.Equal(tail, end.Bytes())
}

// orderFile is the list, in the directory of the boot modules, of what to load: a line per module, its file and, if it
// has one, its group.
const orderFile = "order"

// saveBootModules copies the boot modules of a module tree, decompressed, and their order into the cached kernel to.
func saveBootModules(from *os.Root, tree string, to *os.Root, order []bootModule) error {
	if err := to.Mkdir(bootDir, 0o755); err != nil {
		return err
	}
	var list strings.Builder
	for _, m := range order {
		b, err := readModule(from, tree+"/"+m.path)
		if err != nil {
			return fmt.Errorf("read module %s: %w", m.path, err)
		}
		if err := to.WriteFile(bootDir+"/"+m.file(), b, 0o644); err != nil {
			return err
		}
		list.WriteString(strings.TrimSpace(m.file()+" "+m.group) + "\n")
	}
	return to.WriteFile(bootDir+"/"+orderFile, []byte(list.String()), 0o644)
}
