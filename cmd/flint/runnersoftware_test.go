package main

import (
	"archive/tar"
	"bytes"
	"compress/gzip"
	"encoding/json"
	"errors"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"testing"
	"time"
)

// runnerFile makes a release's archive, with a program that does nothing.
func runnerFile(t *testing.T, version string) string {
	t.Helper()
	var b bytes.Buffer
	z := gzip.NewWriter(&b)
	w := tar.NewWriter(z)
	const program = "#!/bin/sh\n"
	err := w.WriteHeader(&tar.Header{Name: "bin/Runner.Listener", Typeflag: tar.TypeReg, Mode: 0o755, Size: int64(len(program))})
	_, werr := w.Write([]byte(program))
	if err := errors.Join(err, werr, w.Close(), z.Close()); err != nil {
		t.Fatal(err)
	}
	arch := map[string]string{"amd64": "x64", "arm64": "arm64"}[runtime.GOARCH]
	path := filepath.Join(t.TempDir(), "actions-runner-linux-"+arch+"-"+version+".tar.gz")
	if err := os.WriteFile(path, b.Bytes(), 0o600); err != nil {
		t.Fatal(err)
	}
	return path
}

func TestRunnerSoftware(t *testing.T) {
	state := t.TempDir()
	do := func(want int, args ...string) string {
		return flintSays(t, want, append([]string{"runner-software", "--state-dir", state}, args...)...)
	}
	if out := do(0, "ls"); !strings.HasPrefix(out, "None is there") {
		t.Errorf("%q", out)
	}
	if out := do(0, "ls", "--json"); out != "[]\n" {
		t.Errorf("%q", out)
	}
	do(0, "import", runnerFile(t, "2.334.0"), "--released", "2026-10-01")
	if out := do(0, "import", runnerFile(t, "2.335.0")); !strings.Contains(out, "2.335.0 is current") {
		t.Errorf("%q", out)
	}
	do(0, "import", runnerFile(t, "2.334.0")) // its day stays known
	do(0, "import", runnerFile(t, "2.335.0"))
	do(2, "import", runnerFile(t, "2.335.0"), "--released", time.Now().AddDate(0, 0, 2).Format(time.DateOnly))
	do(5, "import", filepath.Join(state, "nowhere.tar.gz"))
	do(3, "import", "/dev/zero", "--version", "2.335.0")
	do(2, "import")
	do(2, "import", runnerFile(t, "2.335.0"), "--released", "soon")
	do(1, "import", runnerFile(t, "2.335.0"), "--sha256", strings.Repeat("0", 64))
	lines := strings.Split(strings.TrimSpace(do(0, "ls")), "\n")
	if len(lines) != 3 || !strings.HasPrefix(lines[0], "version  arch") || !strings.HasPrefix(lines[1], "  2.335.0") || !strings.HasSuffix(lines[1], "current") || !strings.Contains(lines[2], "2026-10-01") || !strings.Contains(lines[2], " days") {
		t.Errorf("%q", lines)
	}
	var list []struct {
		Version string `json:"version"`
		Age     *int   `json:"age_days"`
		Current bool   `json:"current"`
	}
	if err := json.Unmarshal([]byte(do(0, "ls", "--json")), &list); err != nil || len(list) != 2 || !list[0].Current || list[0].Age != nil || list[1].Age == nil {
		t.Errorf("%+v, %v", list, err)
	}
	t.Setenv("FLINT_RUNNER_VERSION", "2.335.0")
	do(8, "rm", "2.335.0")
	t.Setenv("FLINT_RUNNER_VERSION", "")
	do(5, "rm", "2.333.0")
	do(2, "rm")
	do(0, "rm", "2.335.0")
	if out := do(0, "ls"); !strings.Contains(out, "2.334.0") || !strings.Contains(out, "current") {
		t.Errorf("what is left is not current: %q", out)
	}
	do(2, "pull", "newest")
	do(2, "pull", "2.334.0", "2.335.0")
	t.Setenv("FLINT_RUNNER_RELEASES", "http://127.0.0.1:1")
	do(1, "pull")
}
