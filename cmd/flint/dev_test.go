package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"sync"
	"testing"
	"time"

	"flint"
	"flint/internal/config"
)

// screen is what a command has written so far, while it goes on.
type screen struct {
	mu   sync.Mutex
	text bytes.Buffer
	more chan struct{}
}

func (s *screen) Write(p []byte) (int, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.text.Write(p)
	close(s.more)
	s.more = make(chan struct{})
	return len(p), nil
}

// until waits for text that matches.
func (s *screen) until(t *testing.T, pattern string) []string {
	t.Helper()
	re := regexp.MustCompile(pattern)
	deadline := time.After(5 * time.Minute)
	for {
		s.mu.Lock()
		found, all, more := re.FindStringSubmatch(s.text.String()), s.text.String(), s.more
		s.mu.Unlock()
		if found != nil {
			return found
		}
		select {
		case <-more:
		case <-deadline:
			t.Fatalf("%q did not come; there is:\n%s", pattern, all)
		}
	}
}

func TestDevLogKeepsTheEnd(t *testing.T) {
	var l devLog
	for i := range 3 * devLogKept / 10 {
		fmt.Fprintf(&l, "%9d\n", i)
	}
	if !bytes.HasSuffix(l.buf, fmt.Appendf(nil, "%9d\n", 3*devLogKept/10-1)) || len(l.buf) < devLogKept || len(l.buf) > 2*devLogKept {
		t.Errorf("%d bytes are kept, the last %q", len(l.buf), l.buf[len(l.buf)-10:])
	}
}

func TestDevGitHub(t *testing.T) {
	dir := t.TempDir()
	scenario, key := filepath.Join(dir, "scenario.txt"), filepath.Join(dir, "key.pem")
	for path, text := range map[string]string{
		scenario:                      "at 0s submit 2 jobs runs-on gpu taking 1s\nat 0s start fail requests 100%\n",
		filepath.Join(dir, "ci.yml"):  "on: workflow_dispatch\njobs: {hello: {runs-on: flint, steps: [{run: 'true'}]}}\n",
		filepath.Join(dir, "bad.yml"): "on: nothing\n",
	} {
		if err := os.WriteFile(path, []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	out := &screen{more: make(chan struct{})}
	c := newRoot(newSignals())
	c.SetArgs([]string{"dev", "github", "--listen", "127.0.0.1:0", "--key-file", key, "--scenario", scenario, "--seed", "3"})
	c.SetOut(out)
	c.SetErr(out)
	ended := make(chan error, 1)
	go func() { ended <- c.ExecuteContext(ctx) }() // received below
	url := out.until(t, `address +(http://127\.0\.0\.1:\d+)\n`)[1]
	out.until(t, `job queued +run \d+  job \(2\)`)
	out.until(t, `scenario +start fail requests 100%`)
	if info, err := os.Stat(key); err != nil || info.Mode().Perm() != 0o600 {
		t.Errorf("the key: %v, %v", info, err)
	}

	example := strings.ReplaceAll(out.until(t, `(?s)\n    (schema_version: 1\n.*?max: 2\})\n`)[1], "\n    ", "\n")
	cfg, err := config.Parse(filepath.Join(dir, "flint.yaml"), []byte(example), nil)
	if err == nil {
		err = cfg.ValidateServe()
	}
	if err != nil || cfg.GitHub.URL != url {
		t.Errorf("the example configuration is no good: %v\n%s", err, example)
	}

	resp, err := http.Get(url + "/api/v3/app")
	if err != nil {
		t.Fatal(err)
	}
	_ = resp.Body.Close()
	if resp.StatusCode < 500 {
		t.Errorf("a request that is to fail has status %d", resp.StatusCode)
	}
	submit := func(file string) (string, error) {
		var said bytes.Buffer
		c := newRoot(newSignals())
		c.SetArgs([]string{"dev", "github", "submit", "--url", url, filepath.Join(dir, file)})
		c.SetOut(&said)
		err := c.ExecuteContext(t.Context())
		return said.String(), err
	}
	if said, err := submit("ci.yml"); err != nil || !strings.HasPrefix(said, "run ") {
		t.Errorf("submit: %q, %v", said, err)
	}
	out.until(t, `job queued +run \d+  hello`)
	for _, file := range []string{"bad.yml", "none.yml"} {
		var fault *flint.Fault
		if _, err := submit(file); !errors.As(err, &fault) {
			t.Errorf("submit %s: %v", file, err)
		}
	}
	resp, err = http.Post(url+"/sim/runs", "text/plain", strings.NewReader("on: push"))
	if err != nil {
		t.Fatal(err)
	}
	_ = resp.Body.Close()
	if resp.StatusCode != http.StatusUnsupportedMediaType {
		t.Errorf("a form of another site is taken: %d", resp.StatusCode)
	}
	if resp, err = http.Get(url + "/sim/log"); err != nil {
		t.Fatal(err)
	}
	log, err := io.ReadAll(resp.Body)
	_ = resp.Body.Close()
	if err != nil || !bytes.Contains(log, []byte("private key")) || !bytes.Contains(log, []byte("start fail requests 100%")) {
		t.Errorf("the log read from afar: %q, %v", log, err)
	}

	cancel()
	if err := <-ended; exitCode(err) != exitInterrupted {
		t.Errorf("ended with %v", err)
	}
	out.until(t, `fail requests +1 ×`)
	out.until(t, `left: 3 open jobs, 0 registrations`)
	if _, err := os.Stat(key); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("the key is left: %v", err)
	}
}

func TestDevGitHubRefuses(t *testing.T) {
	dir := t.TempDir()
	mine := filepath.Join(dir, "notes.txt")
	if err := os.WriteFile(mine, []byte("at 0s dance\n"), 0o644); err != nil {
		t.Fatal(err)
	}
	for code, args := range map[string][]string{
		"scenario.syntax": {"--scenario", mine},
		"dev.file":        {"--scenario", filepath.Join(dir, "none")},
		"dev.key":         {"--key-file", mine},
		"dev.listen":      {"--listen", "192.0.2.1:1"},
		"usage":           {"now"},
	} {
		c := newRoot(newSignals())
		c.SetArgs(append([]string{"dev", "github", "--listen", "127.0.0.1:0"}, args...))
		c.SetOut(&bytes.Buffer{})
		var fault *flint.Fault
		if err := c.ExecuteContext(t.Context()); !errors.As(err, &fault) || fault.Code != code || fault.Fix == "" {
			t.Errorf("%v: %v, want %s", args, err, code)
		}
	}
	if b, err := os.ReadFile(mine); err != nil || string(b) != "at 0s dance\n" {
		t.Errorf("somebody's file is now %q, %v", b, err)
	}
}
