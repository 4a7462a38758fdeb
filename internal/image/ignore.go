package image

import (
	"bytes"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/moby/patternmatcher"
	"github.com/moby/patternmatcher/ignorefile"

	"flint"
	"flint/internal/regular"
)

// maxIgnore bounds a .dockerignore file.
const maxIgnore = 1 << 20

// ignored tells which files below a Dockerfile's directory are no input of its build; nil: none.
type ignored struct {
	dir    string
	always []string // names that are an input, whatever is said of them
	match  *patternmatcher.PatternMatcher
}

// ignoredBy reads the Dockerfile's own .dockerignore, or else that of its directory, as docker does. Where there is a
// .containerignore everything counts: docker does not know it, and podman and buildah read it first.
func ignoredBy(file string) (*ignored, error) {
	dir := filepath.Dir(file)
	for _, path := range []string{file + ".containerignore", filepath.Join(dir, ".containerignore")} {
		if _, err := os.Lstat(path); err == nil {
			return nil, nil
		}
	}
	for _, path := range []string{file + ".dockerignore", filepath.Join(dir, ".dockerignore")} {
		match, err := readIgnore(path)
		if errors.Is(err, fs.ErrNotExist) {
			continue
		}
		if err != nil {
			return nil, contextFault(dir, fmt.Errorf("read %s: %w", path, err))
		}
		return &ignored{dir, []string{".", filepath.Base(file), filepath.Base(path)}, match}, nil
	}
	return nil, nil
}

func readIgnore(path string) (*patternmatcher.PatternMatcher, error) {
	b, err := regular.Read(path, maxIgnore)
	if errors.Is(err, fs.ErrNotExist) || errors.Is(err, fs.ErrPermission) {
		return nil, err
	}
	if err != nil {
		return nil, fmt.Errorf("%w: %w", errIgnore, err)
	}
	patterns, err := ignorefile.ReadAll(bytes.NewReader(b))
	if err != nil {
		return nil, fmt.Errorf("%w: %w", errIgnore, err)
	}
	match, err := patternmatcher.New(patterns)
	if err != nil {
		return nil, fmt.Errorf("%w: %w", errIgnore, err)
	}
	return match, nil
}

// errIgnore says that a .dockerignore is none.
var errIgnore = errors.New("not a list of patterns")

// leave returns visit for eachFile without what is ignored.
func (i *ignored) leave(visit func(path string, info fs.FileInfo) error) func(path string, info fs.FileInfo) error {
	if i == nil {
		return visit
	}
	return func(path string, info fs.FileInfo) error {
		rel, err := filepath.Rel(i.dir, path)
		if err != nil {
			return err
		}
		out := false
		if !slices.Contains(i.always, rel) {
			if out, err = i.match.MatchesOrParentMatches(rel); err != nil {
				return fmt.Errorf("%w: %w", errIgnore, err)
			}
		}
		switch {
		case !out:
			return visit(path, info)
		case info.IsDir() && !i.mayHold(rel):
			return fs.SkipDir
		}
		return nil
	}
}

// mayHold reports whether an exception may name something in an ignored directory.
func (i *ignored) mayHold(dir string) bool {
	return slices.ContainsFunc(i.match.Patterns(), func(p *patternmatcher.Pattern) bool {
		return p.Exclusion() && (strings.HasPrefix(p.String(), dir+"/") || strings.ContainsAny(p.String(), `*?[\`))
	})
}

// contextFault says what can be done about a directory of a Dockerfile that cannot be read.
func contextFault(dir string, err error) error {
	f := &flint.Fault{Code: "image.context", What: fmt.Sprintf("read what is built, %s", dir), Kind: flint.ErrConfig, Err: err}
	switch {
	case errors.Is(err, fs.ErrPermission):
		f.Kind, f.Fix = flint.ErrPermission, "let flint's user read it, or name it in .dockerignore if the build does not need it"
	case errors.Is(err, errManyFiles):
		f.Fix = "name in .dockerignore what the build does not need, or move the Dockerfile to a directory with what it needs"
	case errors.Is(err, errIgnore):
		f.Fix = "mend that file"
	default:
		return err
	}
	return f
}
