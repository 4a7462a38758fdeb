package image

import (
	"log/slog"
	"os"
	"os/exec"
	"path/filepath"
	"testing"

	"flint"
)

func testStore(t testing.TB) *Store {
	t.Helper()
	s, err := Open(filepath.Join(t.TempDir(), "store"), slog.New(slog.DiscardHandler))
	if err != nil {
		t.Fatal(err)
	}
	return s
}

// fsck fails the test unless e2fsck finds nothing at all to say against the file system.
func fsck(t testing.TB, path string) {
	t.Helper()
	tool, err := exec.LookPath("e2fsck")
	if err != nil {
		t.Skip("needs e2fsck: sudo apt-get install e2fsprogs")
	}
	if out, err := exec.Command(tool, "-fn", path).CombinedOutput(); err != nil {
		t.Fatalf("e2fsck -fn: %v\n%s", err, out)
	}
}

func TestScratchIsSoundAtEverySize(t *testing.T) {
	s := testStore(t)
	for _, size := range []flint.Bytes{
		MinScratch, 64 * flint.MiB, 128 * flint.MiB, 128*flint.MiB + 4*flint.KiB, 129 * flint.MiB, 130*flint.MiB + 300*flint.KiB,
		flint.GiB, 10*flint.GiB + 12345, 64 * flint.GiB, 1000 * flint.GiB, 2 * flint.TiB,
	} {
		t.Run(size.String(), func(t *testing.T) {
			path := filepath.Join(t.TempDir(), "scratch")
			if err := s.Scratch(path, size); err != nil {
				t.Fatal(err)
			}
			info, err := os.Stat(path)
			if err != nil {
				t.Fatal(err)
			}
			if want := int64(size) / 4096 * 4096; info.Size() != want {
				t.Errorf("size %d, want %d", info.Size(), want)
			}
			fsck(t, path)
		})
	}
}
