package app

import (
	"os"
	"path/filepath"
	"testing"
)

func TestReplaceFile(t *testing.T) {
	path := filepath.Join(t.TempDir(), "note")
	// What a process left that died on the way.
	if err := os.WriteFile(path+".new", []byte("a longer text, cut o"), 0o600); err != nil {
		t.Fatal(err)
	}
	for _, want := range []string{"one", "two"} {
		if err := replaceFile(path, []byte(want)); err != nil {
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
	if err := replaceFile(dir, []byte("x")); err == nil {
		t.Fatal("a directory was replaced")
	}
	if _, err := os.Stat(dir + ".new"); !os.IsNotExist(err) {
		t.Errorf("left beside it: %v", err)
	}
}
