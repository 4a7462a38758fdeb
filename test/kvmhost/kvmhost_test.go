package main

import (
	"bytes"
	"context"
	"errors"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"
)

// fake makes an emulator of a shell script, to which the host's serial ports are descriptors 3, 4 and 5.
func fake(t *testing.T, script string) options {
	t.Helper()
	path := filepath.Join(t.TempDir(), "qemu")
	if err := os.WriteFile(path, []byte("#!/bin/sh\n"+script), 0o755); err != nil {
		t.Fatal(err)
	}
	return options{qemu: path, timeout: time.Minute, silence: time.Minute, memory: "1G", cpus: 1}
}

func TestScriptsOutputAndExitCodeComeThrough(t *testing.T) {
	o := fake(t, "echo booting >&3; echo beat >&5; printf 'one\\ntwo' >&4; echo 'exit 42' >&5")
	var out, log bytes.Buffer
	code, err := bootTwice(t.Context(), o, image{}, "job", &out, &log)
	if code != 42 || err != nil || out.String() != "one\ntwo" || log.Len() != 0 {
		t.Errorf("code %d, %v, output %q, log %q", code, err, &out, &log)
	}
}

func TestHostThatEndsEarlyIsExplained(t *testing.T) {
	o := fake(t, `echo 'Kernel panic' >&3
echo "exit x" >&5; echo "exit 256" >&5; echo "exit" >&5
echo "warning: TCG doesn't support requested feature: x" >&2; echo "no such device" >&2; exit 1`)
	var log bytes.Buffer
	_, err := bootTwice(t.Context(), o, image{}, "job", io.Discard, &log)
	if err == nil || !strings.Contains(err.Error(), "no such device") || strings.Contains(err.Error(), "TCG") {
		t.Errorf("error %v", err)
	}
	if !strings.Contains(log.String(), "    Kernel panic\n") {
		t.Errorf("log %q lacks the console", &log)
	}
}

func TestSilentHostIsStartedOnceMore(t *testing.T) {
	for name, c := range map[string]struct {
		second string // what the second start does
		code   int
		err    error
		starts string
	}{
		"then it works":           {"echo 'exit 3' >&5", 3, nil, "xx"},
		"then it is silent again": {"exec sleep 60", 0, errSilent, "xx"},
	} {
		t.Run(name, func(t *testing.T) {
			starts := filepath.Join(t.TempDir(), "starts")
			o := fake(t, "printf x >>"+starts+"\n[ $(cat "+starts+") = x ] && exec sleep 60\n"+c.second)
			o.silence = 5 * time.Second // a slow machine's script has begun by then, and one that says something has said it
			code, err := bootTwice(t.Context(), o, image{}, "job", io.Discard, io.Discard)
			if code != c.code || !errors.Is(err, c.err) {
				t.Errorf("code %d, %v", code, err)
			}
			if got, _ := os.ReadFile(starts); string(got) != c.starts {
				t.Errorf("started %d times", len(got))
			}
		})
	}
}

func TestExitCodesOfOurOwn(t *testing.T) {
	o := fake(t, "exec sleep 60")
	o.timeout = time.Millisecond
	if _, err := bootTwice(t.Context(), o, image{}, "job", io.Discard, io.Discard); !errors.Is(err, errTime) {
		t.Errorf("time is up: %v", err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := bootTwice(ctx, o, image{}, "job", io.Discard, io.Discard); !errors.Is(err, context.Canceled) {
		t.Errorf("interrupted: %v", err)
	}
}

func TestOnlySilenceCountsAsFrozen(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		h := host{options: options{silence: time.Minute}}
		signs := make(chan struct{})
		start := time.Now()
		done := make(chan error, 1)
		go func() {
			_, err := h.watch(t.Context(), signs, nil, nil)
			done <- err
		}()
		for range 5 {
			time.Sleep(59 * time.Second)
			signs <- struct{}{}
		}
		if err := <-done; !errors.Is(err, errSilent) {
			t.Errorf("error %v", err)
		}
		if took, want := time.Since(start), 5*59*time.Second+time.Minute; took != want {
			t.Errorf("given up after %s, want %s", took, want)
		}
	})
}

func TestParse(t *testing.T) {
	dir := t.TempDir()
	script, text := filepath.Join(dir, "script"), filepath.Join(dir, "text")
	if err := errors.Join(os.WriteFile(script, []byte("#!/bin/sh\n"), 0o644), os.WriteFile(text, []byte("echo\n"), 0o644)); err != nil {
		t.Fatal(err)
	}
	o, err := parse([]string{"--timeout", "2m", "--systemd", "--add", text, "--add", text + ":a/b", script, "--not-ours", "x"}, io.Discard)
	if err != nil {
		t.Fatal(err)
	}
	if !o.systemd || o.timeout != 2*time.Minute || o.script != script || !slices.Equal(o.args, []string{"--not-ours", "x"}) ||
		!slices.Equal(o.add, []addition{{text, "text"}, {text, "a/b"}}) {
		t.Errorf("options %+v", o)
	}
	for args, want := range map[string][]bool{"": {true, false}, "--reboots": {false, false}, "--network": {true, true}} {
		o, err := parse(append(strings.Fields(args), script), io.Discard)
		if err != nil {
			t.Fatal(err)
		}
		got := (&host{options: o}).arguments()
		if ends, network := slices.Contains(got, "-no-reboot"), slices.Contains(got, "-netdev"); ends != want[0] || network != want[1] {
			t.Errorf("%q: a reboot ends it: %v, network: %v", args, ends, network)
		}
	}
	for name, args := range map[string][]string{
		"no script":               {},
		"absent script":           {dir + "/absent"},
		"not a script":            {text},
		"a directory":             {dir},
		"no time":                 {"--timeout", "0s", script},
		"absent addition":         {"--add", dir + "/absent", script},
		"addition elsewhere":      {"--add", text + ":../x", script},
		"addition at the root":    {"--add", text + ":/x", script},
		"addition over our own":   {"--add", text + ":.kvmhost/job", script},
		"addition over all of it": {"--add", text + ":.", script},
		"unknown flag":            {"--no-such-flag", script},
	} {
		if _, err := parse(args, io.Discard); err == nil {
			t.Errorf("%s: taken", name)
		}
	}
}

func TestArgumentsSurviveTheShell(t *testing.T) {
	args := []string{"plain", "two words", "it's", `$(id) "x" \`, "", "*"}
	out, err := exec.Command("sh", "-c", `set -- `+quote(args)+`; for a; do printf '%s\0' "$a"; done`).Output()
	if err != nil {
		t.Fatal(err)
	}
	if got := strings.Split(strings.TrimSuffix(string(out), "\x00"), "\x00"); !slices.Equal(got, args) {
		t.Errorf("got %q", got)
	}
}

func TestJobDriveHoldsWhatWasAdded(t *testing.T) {
	debugfs, err := lookPath("debugfs")
	if err != nil {
		t.Skipf("needs e2fsprogs: %v", err)
	}
	dir := t.TempDir()
	tree := filepath.Join(dir, "tree")
	if err := errors.Join(
		os.MkdirAll(filepath.Join(tree, "sub"), 0o755),
		os.WriteFile(filepath.Join(tree, "sub", "file"), []byte("content"), 0o644),
		os.Symlink("file", filepath.Join(tree, "sub", "link")),
		os.Symlink("tree/sub/file", filepath.Join(dir, "alias")),
		os.WriteFile(filepath.Join(dir, "script"), []byte("#!/bin/sh\nexit 3\n"), 0o644),
		os.Mkdir(filepath.Join(dir, "work"), 0o755),
	); err != nil {
		t.Fatal(err)
	}
	drive, err := makeJob(t.Context(), options{
		script: filepath.Join(dir, "script"), systemd: true,
		add: []addition{{tree, "deep/tree"}, {filepath.Join(dir, "alias"), "alias"}},
	}, filepath.Join(dir, "work"))
	if err != nil {
		t.Fatal(err)
	}
	for request, want := range map[string]string{
		"cat /deep/tree/sub/file":  "content",
		"cat /alias":               "content", // what a link names, not the link
		"cat /.kvmhost/script":     "#!/bin/sh\nexit 3\n",
		"stat /deep/tree/sub/link": `Fast link dest: "file"`,
		"stat /.kvmhost/script":    "Mode:  0755",
		"stat /.kvmhost/systemd":   "Type: regular",
	} {
		out, err := exec.Command(debugfs, "-R", request, drive).Output()
		if err != nil || !strings.Contains(string(out), want) {
			t.Errorf("%s: %q, %v", request, out, err)
		}
	}
}

func TestWhatKilledRunsLeftIsRemoved(t *testing.T) {
	cache := t.TempDir()
	long := time.Now().Add(-time.Hour)
	for _, name := range []string{"run-dead", "run-alive", "run-young", "image-1"} {
		dir := filepath.Join(cache, name)
		if err := errors.Join(os.Mkdir(dir, 0o700), os.WriteFile(filepath.Join(dir, "job.ext4"), nil, 0o600), os.Chtimes(dir, long, long)); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.Chtimes(filepath.Join(cache, "run-young"), time.Time{}, time.Now()); err != nil {
		t.Fatal(err)
	}
	alive := tryLock(filepath.Join(cache, "run-alive"))
	if alive == nil {
		t.Fatal("cannot lock")
	}
	defer alive.Close()
	dir, done, err := scratchDir(cache)
	if err != nil {
		t.Fatal(err)
	}
	if tryLock(dir) != nil {
		t.Error("another run would take this one's directory for dead")
	}
	done()
	var left []string
	entries, err := os.ReadDir(cache)
	for _, e := range entries {
		left = append(left, e.Name())
	}
	if err != nil || !slices.Equal(left, []string{"image-1", "run-alive", "run-young"}) {
		t.Errorf("left %v, %v", left, err)
	}
}

// TestSuiteWantsEverythingToRun calls test-kvm's function as the host does, with scripts for test binaries.
func TestSuiteWantsEverythingToRun(t *testing.T) {
	script, err := os.ReadFile("test-kvm")
	if err != nil {
		t.Fatal(err)
	}
	_, function, _ := strings.Cut(string(script), "\nsuite() {\n")
	function, _, found := strings.Cut(function, "\n}\n")
	if !found {
		t.Fatal("test-kvm has no function suite")
	}
	for name, c := range map[string]struct {
		says string
		exit string
		good bool
	}{
		"all pass":        {"--- PASS: TestA (0.1s)\n    --- PASS: TestA/Life (0.1s)\n--- PASS: TestB (0.1s)\n", "0", true},
		"one skips":       {"--- PASS: TestA (0.1s)\n--- SKIP: TestB (0.1s)\n", "0", false},
		"a part skips":    {"--- PASS: TestA (0.1s)\n    --- SKIP: TestA/Adopt (0.1s)\n--- PASS: TestB (0.1s)\n", "0", false},
		"one is missing":  {"--- PASS: TestA (0.1s)\n", "0", false},
		"the binary says": {"--- PASS: TestA (0.1s)\n--- PASS: TestB (0.1s)\n", "1", false},
	} {
		t.Run(name, func(t *testing.T) {
			dir := t.TempDir()
			binary := "#!/bin/sh\nprintf %b '" + c.says + "'\nexit " + c.exit + "\n"
			if err := os.WriteFile(filepath.Join(dir, "x.test"), []byte(binary), 0o755); err != nil {
				t.Fatal(err)
			}
			cmd := exec.CommandContext(t.Context(), "bash", "-c", "suite() {\n"+strings.ReplaceAll(function, "/job/tests", dir)+"\n}\nsuite x.test TestA TestB")
			cmd.Env = append(os.Environ(), "TMPDIR="+dir)
			if out, err := cmd.CombinedOutput(); (err == nil) != c.good {
				t.Errorf("%v: %s", err, out)
			}
		})
	}
}
