package durable

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
)

func TestReplace(t *testing.T) {
	path := filepath.Join(t.TempDir(), "note")
	// What a process left that died on the way.
	if err := os.WriteFile(path+suffix, []byte("a longer text, cut o"), 0o600); err != nil {
		t.Fatal(err)
	}
	for i, write := range []func(string, []byte) error{Replace, Swap, Replace} {
		want := strings.Repeat("content ", 3-i)
		if err := write(path, []byte(want)); err != nil {
			t.Fatal(err)
		}
		if got, err := os.ReadFile(path); err != nil || string(got) != want {
			t.Fatalf("it holds %q, %v", got, err)
		}
	}
	// Where it cannot be replaced, nothing is left beside it.
	dir := filepath.Join(t.TempDir(), "dir")
	if err := os.MkdirAll(filepath.Join(dir, "full"), 0o700); err != nil {
		t.Fatal(err)
	}
	for _, write := range []func(string, []byte) error{Replace, Swap} {
		if err := write(dir, []byte("x")); err == nil {
			t.Fatal("a directory was replaced")
		}
		if _, err := os.Stat(dir + suffix); !os.IsNotExist(err) {
			t.Errorf("left beside it: %v", err)
		}
	}
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
