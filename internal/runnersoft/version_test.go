package runnersoft

import (
	"errors"
	"os"
	"path/filepath"
	"slices"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"flint/internal/regular"
)

func TestVersionOfTheSoftware(t *testing.T) {
	day := time.Date(2026, 11, 3, 0, 0, 0, 0, time.UTC)
	for text, want := range map[string]struct {
		version  string
		released time.Time
		fails    bool
	}{
		"":                               {},
		"2.330.0\n":                      {version: "2.330.0"},
		"v2.330.0\r\n2026-11-03\r\nmore": {version: "2.330.0", released: day},
		"2.330.0\n03.11.2026\n":          {fails: true},
		"github.com/ChristopherHX/github-act-runner v0.13.0\n": {}, // as the demo's has it
		string(versionText("2.330.0", day.Add(23*time.Hour))):  {version: "2.330.0", released: day},
	} {
		dir := t.TempDir()
		if err := os.WriteFile(filepath.Join(dir, "version"), []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		s, err := Read(dir)
		if s.Version != want.version || !s.Released.Equal(want.released) ||
			(err != nil) != want.fails || err != nil && faultCode(err) != "runner.version" {
			t.Errorf("%q: %+v, %v", text, s, err)
		}
	}
	dir := t.TempDir()
	if err := unix.Mkfifo(filepath.Join(dir, "version"), 0o600); err != nil {
		t.Fatal(err)
	}
	if s, err := Read(dir); !errors.Is(err, regular.ErrOther) { // and it was not waited for
		t.Errorf("a pipe: %+v, %v", s, err)
	}
	if s, err := Read(t.TempDir()); err != nil || s != (Software{}) {
		t.Errorf("no file: %+v, %v", s, err)
	}
}

func TestVersionsAreOrderedByTheirNumbers(t *testing.T) {
	got := slices.SortedFunc(slices.Values([]string{"2.335.0", "10.0.0", "2.99.10", "none", "2.335.10", "2.335.9"}), compare)
	if want := []string{"none", "2.99.10", "2.335.0", "2.335.9", "2.335.10", "10.0.0"}; !slices.Equal(got, want) {
		t.Errorf("%v, want %v", got, want)
	}
}
