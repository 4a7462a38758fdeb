package image

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

// contextDir makes a directory with these files: names and contents, one after the other.
func contextDir(t testing.TB, files ...string) string {
	t.Helper()
	dir := t.TempDir()
	for i := 0; i < len(files); i += 2 {
		putFile(t, dir, files[i], files[i+1])
	}
	return dir
}

func putFile(t testing.TB, dir, name, content string) {
	t.Helper()
	path := filepath.Join(dir, name)
	if err := errors.Join(os.MkdirAll(filepath.Dir(path), 0o755), os.WriteFile(path, []byte(content), 0o644)); err != nil {
		t.Fatal(err)
	}
}

func TestDockerignore(t *testing.T) {
	const file = "Dockerfile"
	for name, tt := range map[string]struct {
		files   []string
		ignored []string // a change of it changes nothing
		counted []string // a change of it does
	}{
		"nothing": {nil, nil, []string{".git/HEAD", "a", "sub/b.log"}},
		"its directory's": {
			[]string{".dockerignore", "# not these\n.git\n**/*.log\n/a\n"},
			[]string{".git/HEAD", ".git/refs/x", "a", "sub/b.log", "c.log"},
			[]string{"b", "sub/a", file, ".dockerignore"},
		},
		"everything but": {
			[]string{".dockerignore", "*\n!src\nsrc/*.log\n!src/keep.log\n"},
			[]string{".git/HEAD", "a", "src/x.log"},
			[]string{"src/a", "src/deep/a", "src/keep.log", file, ".dockerignore"},
		},
		"an exception with a wildcard": {
			[]string{".dockerignore", "doc\n!doc/**/*.md\n"},
			[]string{"doc/a", "doc/deep/a"},
			[]string{"doc/a.md", "doc/deep/a.md"},
		},
		"its own, before its directory's": {
			[]string{".dockerignore", "a\n", file + ".dockerignore", "b\n"},
			[]string{"b"},
			[]string{"a", file + ".dockerignore"},
		},
		"podman's": {
			[]string{".dockerignore", "a\n", ".containerignore", "b\n"},
			nil,
			[]string{"a", "b", ".dockerignore", ".containerignore"},
		},
		"podman's own": {
			[]string{".dockerignore", "a\n", file + ".containerignore", "b\n"},
			nil,
			[]string{"a", "b"},
		},
	} {
		t.Run(name, func(t *testing.T) {
			s := testStore(t)
			dir := contextDir(t, append([]string{file, "FROM scratch\n"}, tt.files...)...)
			key := func() string {
				t.Helper()
				k, err := s.buildKey(t.Context(), filepath.Join(dir, file), Want{})
				if err != nil {
					t.Fatal(err)
				}
				return k
			}
			for _, name := range append(tt.ignored, tt.counted...) {
				if b, err := os.ReadFile(filepath.Join(dir, name)); err == nil {
					putFile(t, dir, name, string(b)) // the same
				} else {
					putFile(t, dir, name, "before")
				}
			}
			before := key()
			for _, name := range tt.ignored {
				putFile(t, dir, name, "after")
				if key() != before {
					t.Errorf("%s counts", name)
				}
			}
			for _, name := range tt.counted {
				old, err := os.ReadFile(filepath.Join(dir, name))
				if err != nil {
					t.Fatal(err)
				}
				putFile(t, dir, name, string(old)+"\n# after\n")
				if key() == before {
					t.Errorf("%s does not count", name)
				}
				putFile(t, dir, name, string(old))
			}
		})
	}
}

// asNobody runs fn on a thread that may read what others may, and no more.
func asNobody(t *testing.T, fn func()) {
	t.Helper()
	done := make(chan struct{})
	go func() {
		defer close(done)
		if os.Geteuid() == 0 {
			runtime.LockOSThread() // for good: the thread ends with the goroutine
			if _, err := unix.SetfsuidRetUid(65534); err != nil {
				t.Error(err)
				return
			}
		}
		fn()
	}()
	<-done
}

func TestContextThatCannotBeRead(t *testing.T) {
	many := strings.Repeat("x\n", maxIgnore)
	for name, tt := range map[string]struct {
		files []string
		says  string // empty: it can
	}{
		"a file":               {[]string{"secret", "x"}, "secret: permission denied"},
		"a directory":          {[]string{"secret/in", "x"}, "secret: permission denied"},
		"an ignored file":      {[]string{"secret", "x", ".dockerignore", "secret"}, ""},
		"an ignored directory": {[]string{"secret/in", "x", ".dockerignore", "secret"}, ""},
		"a pattern":            {[]string{".dockerignore", "[a-"}, ".dockerignore: not a list of patterns"},
		"too many patterns":    {[]string{".dockerignore", many}, ".dockerignore: not a list of patterns: it has more than 1MiB"},
	} {
		t.Run(name, func(t *testing.T) {
			s, dir := testStore(t), contextDir(t, append([]string{"Dockerfile", "FROM scratch\n"}, tt.files...)...)
			_ = os.Chmod(filepath.Join(dir, "secret"), 0)
			defer os.Chmod(filepath.Join(dir, "secret"), 0o700)
			if err := errors.Join(os.Chmod(dir, 0o755), os.Chmod(filepath.Dir(dir), 0o755)); err != nil {
				t.Fatal(err)
			}
			asNobody(t, func() {
				_, err := s.buildKey(t.Context(), filepath.Join(dir, "Dockerfile"), Want{})
				if tt.says == "" {
					if err != nil {
						t.Error(err)
					}
					return
				}
				if err = explain(err, Want{Ref: dir}); !strings.Contains(fmt.Sprint(err), tt.says) {
					t.Errorf("%v, want %q", err, tt.says)
				}
				wantFault(t, err, "image.context")
			})
		})
	}
}

func TestTooManyFilesToBuildWith(t *testing.T) {
	wantFault(t, contextFault("/src", fmt.Errorf("look at /src: %w", errManyFiles)), "image.context", "more than 1000000 files")
}
