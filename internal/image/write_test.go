package image

import (
	"errors"
	"os"
	"path/filepath"
	"testing"

	"flint"
)

func TestScratchRefuses(t *testing.T) {
	s := testStore(t)
	for _, size := range []flint.Bytes{-1, 0, flint.MiB, 16 * flint.TiB} {
		path := filepath.Join(t.TempDir(), "scratch")
		var f *flint.Fault
		if err := s.Scratch(path, size); !errors.As(err, &f) || f.Code != "image.scratch" {
			t.Errorf("size %d: %v", size, err)
		}
		if _, err := os.Stat(path); !errors.Is(err, os.ErrNotExist) {
			t.Errorf("size %d: a file is left: %v", size, err)
		}
	}
	path := filepath.Join(t.TempDir(), "taken")
	if err := os.WriteFile(path, []byte("mine"), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := s.Scratch(path, flint.GiB); !errors.Is(err, os.ErrExist) {
		t.Errorf("existing file: %v", err)
	}
	if b, _ := os.ReadFile(path); string(b) != "mine" {
		t.Error("existing file was overwritten")
	}
}
