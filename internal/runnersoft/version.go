package runnersoft

import (
	"errors"
	"fmt"
	"io/fs"
	"path/filepath"
	"strings"
	"time"

	"flint"
	"flint/internal/regular"
)

// maxVersion bounds a version file, of which two lines count.
const maxVersion = 1 << 20

// isVersion reports whether text is how GitHub numbers its runner.
func isVersion(text string) bool {
	_, ok := flint.ParseVersion(text)
	return ok
}

// compare orders versions; what is none comes first.
func compare(a, b string) int {
	x, _ := flint.ParseVersion(a)
	y, _ := flint.ParseVersion(b)
	return x.Compare(y)
}

// Read reads the file `version` of a directory with runner software: the version in its first line, and in the second the day it was
// released (2026-11-03); it tells nothing else. Both may be missing, and software that is not GitHub's says what it likes: its version is then
// not known.
func Read(dir string) (Software, error) {
	path := filepath.Join(dir, versionFile)
	b, err := regular.Read(path, maxVersion)
	if errors.Is(err, fs.ErrNotExist) {
		return Software{}, nil
	}
	if err != nil {
		return Software{}, fmt.Errorf("read the version of the runner software, %s: %w", path, err)
	}
	first, rest, _ := strings.Cut(string(b), "\n")
	version := strings.TrimPrefix(strings.TrimSpace(first), "v")
	if !isVersion(version) {
		return Software{}, nil // it is another's program, which GitHub does not know by its age
	}
	s := Software{Version: version}
	second, _, _ := strings.Cut(rest, "\n")
	if second = strings.TrimSpace(second); second != "" {
		if s.Released, err = time.Parse(time.DateOnly, second); err != nil {
			return Software{}, &flint.Fault{
				Code: "runner.version", What: "read " + path, Kind: flint.ErrConfig, Err: err,
				Fix: "write the version in its first line and the day of its release in the second, such as 2026-11-03",
			}
		}
	}
	return s, nil
}

// versionText is the content of a version file.
func versionText(version string, released time.Time) []byte {
	text := version + "\n"
	if !released.IsZero() {
		text += released.UTC().Format(time.DateOnly) + "\n"
	}
	return []byte(text)
}
