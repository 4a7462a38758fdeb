package runnersoft

import (
	"archive/tar"
	"bytes"
	"compress/gzip"
	"io"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"
)

func TestImport(t *testing.T) {
	s := Open(Config{Dir: t.TempDir(), Log: slog.New(slog.DiscardHandler)})
	named := "actions-runner-linux-" + s.arch + "-2.335.0.tar.gz"
	good := archive(t, "2.335.0")
	day := time.Date(2026, 11, 3, 0, 0, 0, 0, time.UTC)
	for name, tt := range map[string]struct {
		file    string
		content []byte
		given   File
		code    string
	}{
		"as it is":             {file: named, content: good},
		"with its digest":      {file: named, content: good, given: File{SHA256: "sha256:" + strings.ToUpper(sha(good)), Released: day}},
		"by another name":      {file: "x.tgz", content: good, given: File{Version: "v2.335.0"}},
		"wrong digest":         {file: named, content: good, given: File{SHA256: sha(nil)}, code: "runner.digest"},
		"no version":           {file: "x.tgz", content: good, code: "runner.number"},
		"bad version":          {file: "x.tgz", content: good, given: File{Version: "../x"}, code: "runner.number"},
		"another architecture": {file: "actions-runner-linux-arm-2.335.0.tar.gz", content: good, code: "runner.arch"},
		"another system":       {file: "actions-runner-osx-" + s.arch + "-2.335.0.tar.gz", content: good, code: "runner.arch"},
		"truncated":            {file: named, content: good[:len(good)-20], code: "runner.archive"},
		"damaged":              {file: named, content: append(append(slices.Clone(good[:len(good)/2]), 1, 2, 3), good[len(good)/2+3:]...), code: "runner.archive"},
		"no archive":           {file: named, content: []byte("hello"), code: "runner.archive"},
		"empty":                {file: named, content: pack(t), code: "runner.archive"},
		"no file":              {file: "", given: File{Version: "2.335.0"}, code: "runner.archive"},
	} {
		t.Run(name, func(t *testing.T) {
			a := tt.given
			a.Path = filepath.Join(t.TempDir(), "nowhere")
			if tt.file != "" {
				a.Path = filepath.Join(t.TempDir(), tt.file)
				if err := os.WriteFile(a.Path, tt.content, 0o600); err != nil {
					t.Fatal(err)
				}
			}
			s := Open(Config{Dir: t.TempDir(), Log: s.cfg.Log})
			for range 2 { // the second takes the place of the first
				got, err := s.Import(t.Context(), a, nil)
				if tt.code != "" {
					if faultCode(err) != tt.code {
						t.Errorf("%s: %v", faultCode(err), err)
					}
					continue
				}
				if err != nil || got.Version != "2.335.0" || !got.Current || !got.Released.Equal(a.Released) {
					t.Errorf("%+v, %v", got, err)
				}
			}
			if tt.code != "" {
				if all, err := s.List(); err != nil || len(all) != 0 {
					t.Errorf("%v, %v", all, err)
				}
			}
			left := slices.DeleteFunc(content(t, s), func(n string) bool { return n == "lock" || n == "2.335.0" || n == "current" })
			if len(left) > 0 {
				t.Errorf("left: %v", left)
			}
		})
	}
}

// TestHostileArchives: none gets out of its directory, and none leaves anything.
func TestHostileArchives(t *testing.T) {
	outside := t.TempDir()
	for name, more := range map[string][]file{
		"absolute":               {{name: outside + "/x"}},
		"dots":                   {{name: "../x"}},
		"dots inside":            {{name: "bin/../../x"}},
		"absolute link":          {{name: "l", kind: tar.TypeSymlink, link: outside}},
		"link out":               {{name: "bin/l", kind: tar.TypeSymlink, link: "../.."}},
		"through a link":         {{name: "l", kind: tar.TypeSymlink, link: "bin"}, {name: "l/../../x"}},
		"link by links":          {{name: "p/q/r", kind: tar.TypeDir}, {name: "p/q/r/up", kind: tar.TypeSymlink, link: "../.."}, {name: "f", kind: tar.TypeSymlink, link: "p/q/r/up/../.."}},
		"file behind such links": {{name: "p/q/r", kind: tar.TypeDir}, {name: "p/q/r/up", kind: tar.TypeSymlink, link: "../.."}, {name: "f", kind: tar.TypeSymlink, link: "p/q/r/up/../.."}, {name: "f/x"}},
		"hard link out":          {{name: "h", kind: tar.TypeLink, link: "../../etc/passwd"}},
		"hard link to a link":    {{name: "l", kind: tar.TypeSymlink, link: "bin"}, {name: "h", kind: tar.TypeLink, link: "l"}},
		"hard link to nothing":   {{name: "h", kind: tar.TypeLink, link: "nothing"}},
		"device":                 {{name: "d", kind: tar.TypeChar}},
		"block device":           {{name: "d", kind: tar.TypeBlock}},
		"fifo":                   {{name: "d", kind: tar.TypeFifo}},
		"a file twice":           {{name: "run.sh"}},
		"a file over a link":     {{name: "l", kind: tar.TypeSymlink, link: "run.sh"}, {name: "l", content: "x"}},
		"a directory over file":  {{name: "run.sh", kind: tar.TypeDir}},
		"its own start":          {{name: "start", content: "#!/bin/sh\n"}},
		"its own version":        {{name: "version", kind: tar.TypeSymlink, link: "run.sh"}},
		"deep":                   {{name: strings.Repeat("d/", maxDepth+1) + "x"}},
		"long":                   {{name: strings.Repeat("d", maxName+1)}},
	} {
		t.Run(name, func(t *testing.T) {
			s := Open(Config{Dir: filepath.Join(t.TempDir(), "store"), Log: slog.New(slog.DiscardHandler)})
			path := filepath.Join(t.TempDir(), "x.tgz")
			if err := os.WriteFile(path, archive(t, "2.335.0", more...), 0o600); err != nil {
				t.Fatal(err)
			}
			_, err := s.Import(t.Context(), File{Path: path, Version: "2.335.0"}, nil)
			if faultCode(err) != "runner.archive" {
				t.Errorf("%s: %v", faultCode(err), err)
			}
			if n := content(t, s); !slices.Equal(n, []string{"lock"}) {
				t.Errorf("left in the store: %v", n)
			}
			for _, dir := range []string{outside, filepath.Dir(s.cfg.Dir)} {
				if entries, _ := os.ReadDir(dir); len(entries) > 1 || dir == outside && len(entries) > 0 {
					t.Errorf("left outside: %v", entries)
				}
			}
		})
	}
}

func TestBombsAreBounded(t *testing.T) {
	u := unpacker{left: 10}
	if err := u.file("x", &tar.Header{Name: "x", Size: 11}, nil); err == nil {
		t.Error("more than is left is unpacked")
	}
}

func FuzzUnpack(f *testing.F) {
	for _, more := range [][]file{
		nil,
		{{name: "l", kind: tar.TypeSymlink, link: "bin"}, {name: "h", kind: tar.TypeLink, link: "run.sh"}},
		{{name: "p/q/up", kind: tar.TypeSymlink, link: ".."}, {name: "f", kind: tar.TypeSymlink, link: "p/q/up/../.."}, {name: "f/x"}},
	} {
		z, err := gzip.NewReader(bytes.NewReader(archive(f, "2.335.0", more...)))
		if err != nil {
			f.Fatal(err)
		}
		seed, err := io.ReadAll(z)
		if err != nil {
			f.Fatal(err)
		}
		f.Add(seed)
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		parent := t.TempDir()
		dir := filepath.Join(parent, "in")
		if err := os.Mkdir(dir, 0o755); err != nil {
			t.Fatal(err)
		}
		var z bytes.Buffer
		w := gzip.NewWriter(&z) // the tar is what is worth changing
		_, _ = w.Write(b)
		_ = w.Close()
		_ = unpack(t.Context(), &z, dir)
		if entries, _ := os.ReadDir(parent); len(entries) != 1 {
			t.Errorf("written outside: %v", entries)
		}
	})
}
