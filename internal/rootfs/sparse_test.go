package rootfs

import (
	"crypto/sha256"
	"errors"
	"maps"
	"os"
	"path/filepath"
	"testing"

	"flint"
	"flint/internal/rootfs/rootfstest"
)

// TestSparseFilesInLayers has the holes of a layer's files come out as zeros, whichever way they were written.
func TestSparseFilesInLayers(t *testing.T) {
	dir := t.TempDir()
	rootfstest.PutHoled(t, filepath.Join(dir, "middle"), 3<<20, 0, 1<<20, 2<<20+4097)
	rootfstest.PutHoled(t, filepath.Join(dir, "end"), 1<<20+5, 17)
	rootfstest.PutHoled(t, filepath.Join(dir, "begin"), 1<<20+13, 1<<20) // "data at 1048576" ends behind what truncate gave
	rootfstest.PutHoled(t, filepath.Join(dir, "nothing"), 1<<20)
	var many []int64 // more than fit one header
	for i := range int64(100) {
		many = append(many, i*64<<10)
	}
	rootfstest.PutHoled(t, filepath.Join(dir, "many"), 7<<20, many...)
	names := []string{"middle", "end", "begin", "nothing", "many"}
	want := sumsIn(t, dir, names...)
	for how, args := range rootfstest.SparseTars() {
		b := rootfstest.PackSparse(t, dir, args, names...)
		if len(b) > 2<<20 {
			t.Skipf("needs a file system with holes: tar wrote %d bytes", len(b))
		}
		for _, format := range []Format{Ext4, Erofs} {
			t.Run(how+" to "+string(format), func(t *testing.T) {
				path := wrote(t, format, b)
				rootfstest.Fsck(t, path)
				root, _ := rootfstest.Mount(t, path, "ro")
				if got := sumsIn(t, root, names...); !maps.Equal(got, want) {
					t.Errorf("got  %x\nwant %x", got, want)
				}
			})
		}
	}
}

// sumsIn has the SHA-256 of files in a directory.
func sumsIn(t testing.TB, dir string, names ...string) map[string][sha256.Size]byte {
	t.Helper()
	sums := map[string][sha256.Size]byte{}
	for _, n := range names {
		b, err := os.ReadFile(filepath.Join(dir, n))
		if err != nil {
			t.Fatal(err)
		}
		sums[n] = sha256.Sum256(b)
	}
	return sums
}

// TestHostileHoles has layers of some KiB that say they hold a TiB, or more than an image may have in several files.
func TestHostileHoles(t *testing.T) {
	dir := t.TempDir()
	const tib = 1 << 40
	rootfstest.PutHoled(t, filepath.Join(dir, "huge"), tib, 0)
	if info, err := os.Stat(filepath.Join(dir, "huge")); err != nil || info.Size() < tib {
		t.Skipf("needs a file system with large files: %v", err)
	}
	rootfstest.PutHoled(t, filepath.Join(dir, "a"), 600<<20, 0)
	rootfstest.PutHoled(t, filepath.Join(dir, "b"), 600<<20, 0)
	for how, args := range rootfstest.SparseTars() {
		for what, names := range map[string][]string{"a TiB": {"huge"}, "more than the limit": {"a", "b"}} {
			t.Run(what+", "+how, func(t *testing.T) {
				_, err := writeLayers(t, Ext4, 16*flint.MiB, rootfstest.PackSparse(t, dir, args, names...))
				if !errors.Is(err, ErrTooBig) && !errors.Is(err, ErrBudget) {
					t.Error(err)
				}
			})
		}
	}
}
