package image

import (
	"log/slog"
	"path/filepath"
	"testing"

	"flint/internal/rootfs/rootfstest"
)

// The short names of what layers are made of.
type item = rootfstest.Item

var (
	file, dir, link = rootfstest.File, rootfstest.Dir, rootfstest.Link
	pack            = rootfstest.Pack
)

func testStore(t testing.TB) *Store {
	t.Helper()
	s, err := Open(filepath.Join(t.TempDir(), "store"), slog.New(slog.DiscardHandler))
	if err != nil {
		t.Fatal(err)
	}
	return s
}
