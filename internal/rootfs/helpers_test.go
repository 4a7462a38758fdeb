package rootfs

import (
	"bytes"
	"io"
	"os"
	"path/filepath"
	"testing"

	"flint"
	"flint/internal/rootfs/rootfstest"
)

// The short names of what layers are made of.
type item = rootfstest.Item

var (
	file, dir, link, sym = rootfstest.File, rootfstest.Dir, rootfstest.Link, rootfstest.Sym
	pack                 = rootfstest.Pack
)

func layerOf(b []byte) Layer {
	return Layer{Open: func() (io.ReadCloser, error) { return io.NopCloser(bytes.NewReader(b)), nil }}
}

// newFile makes an empty file for the length of the test.
func newFile(t testing.TB, name string) *os.File {
	t.Helper()
	f, err := os.Create(filepath.Join(t.TempDir(), name))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { f.Close() })
	return f
}

func testSpool(t testing.TB) *spool {
	t.Helper()
	return newSpool(newFile(t, "contents"))
}

// writeLayers writes layers to a file system in a new file, whose name ends in what it is.
func writeLayers(t testing.TB, format Format, limit flint.Bytes, layers ...[]byte) (path string, err error) {
	t.Helper()
	var ls []Layer
	for _, b := range layers {
		ls = append(ls, layerOf(b))
	}
	out, contents := newFile(t, "image."+string(format)), newFile(t, "contents")
	defer out.Close() // and not at the end of a benchmark: they may be large
	defer contents.Close()
	if err := os.Remove(contents.Name()); err != nil {
		t.Fatal(err)
	}
	return out.Name(), Write(t.Context(), ls, limit, format, contents, out)
}

// wrote is writeLayers of layers that nothing is wrong with.
func wrote(t testing.TB, format Format, layers ...[]byte) (path string) {
	t.Helper()
	path, err := writeLayers(t, format, flint.GiB, layers...)
	if err != nil {
		t.Fatal(err)
	}
	return path
}
