// Package rootfstest is for tests of images: it packs layers, and asks others what is in a file system.
//
// Who is asked are the kernel, fsck and tar, which know nothing of flint: the package must not use flint's own readers and writers. Where
// one of them, or root, is not here, it skips the test and says why.
package rootfstest

import (
	"archive/tar"
	"bytes"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"slices"
	"testing"
	"time"
)

// Item is one tar entry of a layer.
type Item struct {
	Name, Content string
	Header        tar.Header // of it, but name and size; Typeflag 0: a regular file
}

// File is a regular file.
func File(name, content string) Item { return Item{Name: name, Content: content} }

// Dir is a directory.
func Dir(name string) Item {
	return Item{Name: name, Header: tar.Header{Typeflag: tar.TypeDir, Mode: 0o755}}
}

// Link is a hard link.
func Link(name, target string) Item {
	return Item{Name: name, Header: tar.Header{Typeflag: tar.TypeLink, Linkname: target}}
}

// Sym is a symbolic link.
func Sym(name, target string) Item {
	return Item{Name: name, Header: tar.Header{Typeflag: tar.TypeSymlink, Linkname: target}}
}

// Pack makes a layer's bytes.
func Pack(t testing.TB, items ...Item) []byte {
	t.Helper()
	var buf bytes.Buffer
	w := tar.NewWriter(&buf)
	for _, i := range items {
		h := i.Header
		h.Name, h.Size = i.Name, int64(len(i.Content))
		if h.Typeflag == 0 {
			h.Typeflag = tar.TypeReg
		}
		if h.Mode == 0 {
			h.Mode = 0o644
		}
		if h.ModTime.IsZero() {
			h.ModTime = time.Unix(1e9, 0)
		}
		if err := w.WriteHeader(&h); err != nil {
			t.Fatalf("%s: %v", i.Name, err)
		}
		if _, err := io.WriteString(w, i.Content); err != nil {
			t.Fatal(err)
		}
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	return buf.Bytes()
}

// SparseTars are the ways by which GNU tar writes a file with holes: arguments, by what people call the format.
func SparseTars() map[string][]string {
	return map[string][]string{
		"old GNU": {"--format=gnu"},
		"PAX 0.0": {"--format=posix", "--sparse-version=0.0"},
		"PAX 0.1": {"--format=posix", "--sparse-version=0.1"},
		"PAX 1.0": {"--format=posix", "--sparse-version=1.0"},
	}
}

// PackSparse packs what is in dir with GNU tar, holes as holes.
func PackSparse(t testing.TB, dir string, how []string, names ...string) []byte {
	t.Helper()
	args := append(slices.Clone(how), "--sparse", "--owner=0", "--group=0", "-C", dir, "-cf", "-")
	out, err := exec.Command("tar", append(args, names...)...).Output()
	if err != nil {
		if v, verr := exec.Command("tar", "--version").Output(); verr != nil || !bytes.Contains(v, []byte("GNU tar")) {
			t.Skip("needs GNU tar")
		}
		t.Fatal(err)
	}
	return out
}

// PutHoled makes a file of that size with a few bytes at each of some places.
func PutHoled(t testing.TB, path string, size int64, places ...int64) {
	t.Helper()
	f, err := os.Create(path)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	err = f.Truncate(size)
	for _, at := range places {
		_, werr := f.WriteAt(fmt.Appendf(nil, "data at %d", at), at)
		err = errors.Join(err, werr)
	}
	if err != nil {
		t.Fatal(err)
	}
}
