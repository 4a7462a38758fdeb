package tool_test

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"flint/internal/tool"
)

func sh(t testing.TB, script string, args ...string) tool.Tool {
	t.Helper()
	path, err := tool.Find("sh")
	if err != nil {
		t.Fatal(err)
	}
	return tool.Tool{Path: path, Args: append([]string{"-c", script, "sh"}, args...)}
}

func TestEnviron(t *testing.T) {
	keep := []string{
		"PATH=/bin", "HOME=/root", "http_proxy=a", "HTTP_PROXY=b", "https_proxy=c", "HTTPS_PROXY=d", "no_proxy=e", "NO_PROXY=f",
		"ALL_PROXY=g", "APT_CONFIG=h", "GOPROXY=i", "LC_ALL=C", "XDG_RUNTIME_DIR=/run", "REGISTRY_AUTH_FILE=j", "TMPDIR=/var/tmp",
	}
	drop := []string{"GITHUB_TOKEN=x", "FLINT_GITHUB_PRIVATE_KEY=x", "AWS_SECRET_ACCESS_KEY=x", "SSH_AUTH_SOCK=x", "LD_PRELOAD=x", "GOFLAGS=x", "GOENV=x", "proxy=x", ""}
	if got := tool.Environ(slices.Concat(drop, keep, drop)); !slices.Equal(got, keep) {
		t.Errorf("kept %q, want %q", got, keep)
	}
}

func TestRun(t *testing.T) {
	t.Setenv("FLINT_SECRET", "hush")
	t.Setenv("HTTP_PROXY", "http://proxy.example")
	var said []string
	c := sh(t, `printf 'one\rtwo\n\npart'; env >&2`)
	c.Dir, c.Env = t.TempDir(), []string{"ADDED=1"}
	c.Line = func(line string) { said = append(said, line) }
	if err := c.Run(t.Context()); err != nil {
		t.Fatal(err)
	}
	all := strings.Join(said, "\n")
	for _, want := range []string{"one\ntwo\n", "ADDED=1", "HTTP_PROXY=http://proxy.example"} {
		if !strings.Contains(all, want) {
			t.Errorf("%q is missing in %q", want, all)
		}
	}
	if strings.Contains(all, "hush") {
		t.Error("the program saw all of our environment")
	}

	err := sh(t, "for i in $(seq 100); do echo line $i; done; exit 3", "sub").Run(t.Context())
	var failed *tool.Error
	var exit *exec.ExitError
	if !errors.As(err, &failed) || !errors.As(err, &exit) || exit.ExitCode() != 3 {
		t.Fatalf("got %v", err)
	}
	if n := len(failed.Tail); n != 40 || failed.Tail[n-1] != "line 100" {
		t.Errorf("the error carries %d lines: %q", n, failed.Tail)
	}
}

func TestNameOfAFailure(t *testing.T) {
	for want, args := range map[string][]string{
		"false build": {"--root", "/x", "build", "."},
		"false sub":   {"sub"},
		"false":       {"--version"},
	} {
		path, err := tool.Find("false")
		if err != nil {
			t.Skip("needs the program false")
		}
		var failed *tool.Error
		if err := (tool.Tool{Path: path, Args: args}).Run(t.Context()); !errors.As(err, &failed) || failed.Name != want {
			t.Errorf("got %v, want the name %q", err, want)
		}
	}
}

func TestOutput(t *testing.T) {
	out, err := sh(t, "echo result; echo progress >&2").Output(t.Context())
	if err != nil || string(out) != "result\n" {
		t.Errorf("got %q, %v", out, err)
	}
	_, err = sh(t, "echo result; echo reason >&2; exit 3").Output(t.Context())
	if failed := new(tool.Error); !errors.As(err, &failed) || !slices.Equal(failed.Tail, []string{"reason"}) {
		t.Errorf("got %v", err)
	}
	if _, err := sh(t, "head -c 5000000 /dev/zero").Output(t.Context()); err == nil || !strings.Contains(err.Error(), "of output") {
		t.Errorf("got %v", err)
	}
}

func TestFind(t *testing.T) {
	if _, err := tool.Find("no-such-program-anywhere"); !errors.Is(err, exec.ErrNotFound) {
		t.Errorf("got %v", err)
	}
	dir := t.TempDir()
	t.Setenv("PATH", dir)
	own := filepath.Join(dir, "own")
	if err := os.WriteFile(own, []byte("#!/bin/sh\n"), 0o755); err != nil {
		t.Fatal(err)
	}
	if got, err := tool.Find("own"); err != nil || got != own {
		t.Errorf("got %q, %v", got, err)
	}
	if got, err := tool.Find("chroot"); err == nil && !strings.HasPrefix(got, "/usr/sbin/") && !strings.HasPrefix(got, "/sbin/") {
		t.Errorf("chroot is at %q", got)
	}
}

// TestEndsWithItsContext: a program that waits for a child for ever, and that child.
func TestEndsWithItsContext(t *testing.T) {
	ctx, cancel := context.WithCancelCause(t.Context())
	defer cancel(nil)
	why := errors.New("enough")
	child := ""
	c := sh(t, "sleep 1000 & echo $!; wait")
	c.Line = func(line string) {
		child = line
		cancel(why)
	}
	err := c.Run(ctx)
	if !errors.Is(err, why) {
		t.Errorf("got %v", err)
	}
	wantEnd(t, child)
}

// wantEnd waits for the end of a process that was sent a signal.
func wantEnd(t *testing.T, pid string) {
	t.Helper()
	for range 1200 {
		b, err := os.ReadFile("/proc/" + pid + "/stat")
		if err != nil || strings.Contains(string(b), ") Z ") {
			return
		}
		<-time.After(50 * time.Millisecond)
	}
	t.Error("the child still runs")
}

// TestEndsWithItsParent kills a process, this test's program again, that runs a program.
func TestEndsWithItsParent(t *testing.T) {
	const again = "FLINT_TEST_PARENT"
	if os.Getenv(again) != "" {
		c := sh(t, "echo child $$; exec sleep 1000")
		c.Line = func(line string) { fmt.Println(line) }
		t.Fatal(c.Run(t.Context()))
	}
	parent := exec.Command(os.Args[0], "-test.run=^"+t.Name()+"$")
	parent.Env = append(os.Environ(), again+"=1")
	out, err := parent.StdoutPipe()
	if err == nil {
		err = parent.Start()
	}
	if err != nil {
		t.Fatal(err)
	}
	defer parent.Wait()
	child := ""
	for lines := bufio.NewScanner(out); child == "" && lines.Scan(); {
		if pid, ok := strings.CutPrefix(lines.Text(), "child "); ok {
			child = pid
		}
	}
	if err := parent.Process.Kill(); err != nil || child == "" {
		t.Fatalf("child %q, %v", child, err)
	}
	wantEnd(t, child)
}

// TestOutlivesOtherThreads: threads of ours that end, as those do that were in a network namespace, take no program with them.
func TestOutlivesOtherThreads(t *testing.T) {
	var programs, threads sync.WaitGroup
	stop := make(chan struct{})
	threads.Go(func() {
		for {
			select {
			case <-stop:
				return
			default:
			}
			threads.Add(1)
			go func() {
				runtime.LockOSThread() // and never unlocked
				threads.Done()
			}()
			runtime.Gosched()
		}
	})
	for range 50 {
		programs.Go(func() {
			if err := sh(t, "sleep 0.5").Run(t.Context()); err != nil {
				t.Error(err)
			}
		})
	}
	programs.Wait()
	close(stop)
	threads.Wait()
}
