package durable

import (
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
)

func TestReplace(t *testing.T) {
	dir := t.TempDir()
	path := filepath.Join(dir, "note")
	for i, write := range []func(string, []byte) error{Replace, Swap, Replace} {
		want := strings.Repeat("content ", 3-i)
		if err := write(path, []byte(want)); err != nil {
			t.Fatal(err)
		}
		if got, err := os.ReadFile(path); err != nil || string(got) != want {
			t.Fatalf("it holds %q, %v", got, err)
		}
	}
	// What cannot be replaced.
	if err := os.MkdirAll(filepath.Join(dir, "dir", "full"), 0o700); err != nil {
		t.Fatal(err)
	}
	for _, write := range []func(string, []byte) error{Replace, Swap} {
		if err := write(filepath.Join(dir, "dir"), []byte("x")); err == nil {
			t.Fatal("a directory was replaced")
		}
	}
	if entries, err := os.ReadDir(dir); err != nil || len(entries) != 2 {
		t.Errorf("left beside them: %v, %v", entries, err)
	}
}

// TestSeveralWriters: no one fails, and who reads has what one of them wrote.
func TestSeveralWriters(t *testing.T) {
	path := filepath.Join(t.TempDir(), "note")
	text := func(n int) string { return strings.Repeat(string(rune('a'+n)), 1000*(n+1)) }
	var writers sync.WaitGroup
	for n := range 3 {
		writers.Go(func() {
			for range 200 {
				if err := Swap(path, []byte(text(n))); err != nil {
					t.Error(err)
				}
				if b, err := os.ReadFile(path); err != nil || !slices.Contains([]string{text(0), text(1), text(2)}, string(b)) {
					t.Errorf("it holds %d bytes, %v", len(b), err)
				}
			}
		})
	}
	writers.Wait()
}

func TestRemove(t *testing.T) {
	path := filepath.Join(t.TempDir(), "note")
	if err := Replace(path, nil); err != nil {
		t.Fatal(err)
	}
	if info, err := os.Stat(path); err != nil || info.Mode() != 0o600 {
		t.Fatalf("it is %v, %v", info, err)
	}
	if err := Remove(path); err != nil {
		t.Fatal(err)
	}
	if err := Remove(path); !os.IsNotExist(err) {
		t.Errorf("remove what is gone: %v", err)
	}
}

func TestSyncDir(t *testing.T) {
	if err := SyncDir("/proc/self"); err != nil {
		t.Errorf("a file system that cannot tell: %v", err)
	}
	if err := SyncDir(filepath.Join(t.TempDir(), "none")); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("no directory: %v", err)
	}
}

func TestClear(t *testing.T) {
	dir := t.TempDir()
	path := filepath.Join(dir, "note")
	kept := []string{"note", "note.12.new.json", "note.new", "note2.12.new", "note.x1.new"}
	for _, name := range append([]string{"note.12.new", "note.345.new"}, kept...) {
		if err := os.WriteFile(filepath.Join(dir, name), nil, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	if err := Clear(path); err != nil {
		t.Fatal(err)
	}
	entries, err := os.ReadDir(dir)
	if err != nil || len(entries) != len(kept) {
		t.Errorf("left: %v, %v", entries, err)
	}
	for _, name := range kept {
		if _, err := os.Stat(filepath.Join(dir, name)); err != nil {
			t.Errorf("another's is gone: %v", err)
		}
	}
	// What Swap leaves when it is cut is what Clear looks for.
	f, err := create(path)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if err := Clear(path); err != nil {
		t.Fatal(err)
	}
	if _, err := os.Stat(f.Name()); !os.IsNotExist(err) {
		t.Errorf("%s is left: %v", f.Name(), err)
	}
	if err := Clear(filepath.Join(dir, "none", "note")); err != nil {
		t.Errorf("where there is no directory: %v", err)
	}
}
