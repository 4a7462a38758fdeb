// Package e2e runs the real programs, in a network namespace of its own, and boots real VMs.
package e2e

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/creack/pty"
)

// rig is a network namespace with the built flint in it.
type rig struct {
	t                      *testing.T
	program, state, assets string
	netns                  string
	root                   string // of the repository
	vms                    []string
}

func newRig(t *testing.T) *rig {
	t.Helper()
	r := &rig{t: t, program: os.Getenv("FLINT_TEST_PROGRAM"), state: os.Getenv("FLINT_TEST_STATE"), assets: os.Getenv("FLINT_TEST_ASSETS")}
	if r.program == "" || r.state == "" || r.assets == "" {
		t.Skip("needs what make test prepares: FLINT_TEST_PROGRAM, FLINT_TEST_STATE and FLINT_TEST_ASSETS")
	}
	if os.Getuid() != 0 {
		t.Skip("needs root: network namespaces and taps")
	}
	root, err := filepath.Abs("../..")
	if err != nil {
		t.Fatal(err)
	}
	r.root = root
	// Instances of its own, the caches of the state directory given: whatever else runs on this machine is not in the way.
	own, err := os.MkdirTemp("", "flint-e2e-")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = os.RemoveAll(own) })
	for _, cache := range []string{"images", "kernels", "demo-runner", "go"} {
		if err := os.Symlink(filepath.Join(r.state, cache), filepath.Join(own, cache)); err != nil {
			t.Fatal(err)
		}
	}
	r.state = own
	r.netns = fmt.Sprintf("flint-e2e-%d", os.Getpid())
	r.command("ip", "netns", "add", r.netns)
	t.Cleanup(func() { r.command("ip", "netns", "del", r.netns) })
	r.command("ip", "-n", r.netns, "link", "set", "lo", "up")
	return r
}

func (r *rig) command(name string, args ...string) string {
	r.t.Helper()
	out, err := exec.Command(name, args...).CombinedOutput()
	if err != nil {
		r.t.Fatalf("%s %s: %v\n%s", name, strings.Join(args, " "), err, out)
	}
	return string(out)
}

// flint is the program with arguments and extra environment, ready to start inside the namespace.
func (r *rig) flint(ctx context.Context, env []string, args ...string) *exec.Cmd {
	cmd := exec.CommandContext(ctx, "ip", append([]string{"netns", "exec", r.netns, r.program}, args...)...)
	cmd.Dir = r.root
	cmd.Env = append(os.Environ(), env...)
	// On a disk that is almost full it would remove images that other tests boot from, or boot none.
	cmd.Env = append(cmd.Env, "FLINT_STATE_DIR="+r.state, "FLINT_HOST_MIN_FREE=1MiB")
	cmd.Env = append(cmd.Env, "NO_PROXY=*", "no_proxy=*") // this machine's proxy is not in the namespace
	// Not -9: flint gives back what it holds.
	cmd.Cancel = func() error { return cmd.Process.Signal(syscall.SIGTERM) }
	cmd.WaitDelay = 5 * time.Minute
	return cmd
}

// nothingLeft looks with other tools than flint's own.
func (r *rig) nothingLeft(instance string) {
	r.t.Helper()
	if links := strings.TrimSpace(r.command("ip", "-n", r.netns, "-br", "link")); strings.Count(links, "\n") != 0 || !strings.HasPrefix(links, "lo") {
		// Some kernels give every namespace fallback devices, which are down and not flint's.
		for line := range strings.Lines(links) {
			if strings.HasPrefix(line, "flint") || strings.HasPrefix(line, "fl") {
				r.t.Errorf("link left: %s", line)
			}
		}
	}
	if tables := r.command("ip", "netns", "exec", r.netns, "nft", "list", "tables"); tables != "" {
		r.t.Errorf("tables left: %s", tables)
	}
	if pids := strings.TrimSpace(r.command("ip", "netns", "pids", r.netns)); pids != "" {
		args, _ := exec.Command("ps", "-o", "pid,ppid,stat,etime,args", "-p", strings.Join(strings.Fields(pids), ",")).CombinedOutput()
		r.t.Errorf("processes left in the namespace: %s\n%s", pids, args)
	}
	for _, id := range r.vms {
		if pid := vmm(r.t, id); pid != "" {
			r.t.Errorf("VMM of %s left: process %s", id, pid)
		}
	}
	entries, err := os.ReadDir(filepath.Join(r.state, instance, "runners"))
	if err != nil && !errors.Is(err, os.ErrNotExist) {
		r.t.Fatal(err)
	}
	for _, e := range entries {
		r.t.Errorf("runner's directory left: %s", e.Name())
	}
}

// vmm returns the process whose command line names the VM, or "".
func vmm(t *testing.T, id string) string {
	t.Helper()
	files, err := filepath.Glob("/proc/[0-9]*/cmdline")
	if err != nil {
		t.Fatal(err)
	}
	for _, file := range files {
		if cmdline, err := os.ReadFile(file); err == nil && bytes.Contains(cmdline, []byte("-name\x00"+id+"\x00")) {
			return filepath.Base(filepath.Dir(file))
		}
	}
	return ""
}

// running waits for a runner of the instance whose VMM runs, remembers it for nothingLeft, and returns its id and process.
func (r *rig) running(instance string) (id string, pid int) {
	r.t.Helper()
	records, err := filepath.Glob(filepath.Join(r.state, instance, "runners", "*", "runner.json"))
	if err != nil || len(records) == 0 {
		r.t.Fatalf("records of %s: %v, %v", instance, records, err)
	}
	for _, path := range records {
		id = filepath.Base(filepath.Dir(path))
		found := vmm(r.t, id)
		if found == "" {
			r.t.Fatalf("no process is named %s: looking for what is left would find nothing", id)
		}
		if pid, err = strconv.Atoi(found); err != nil {
			r.t.Fatal(err)
		}
		r.vms = append(r.vms, id)
	}
	return id, pid
}

// watched collects output and tells when a pattern has appeared.
type watched struct {
	mu   sync.Mutex
	buf  bytes.Buffer
	more chan struct{}
}

func newWatched() *watched { return &watched{more: make(chan struct{}, 1)} }

func (w *watched) Write(p []byte) (int, error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	select {
	case w.more <- struct{}{}:
	default:
	}
	return w.buf.Write(p)
}

func (w *watched) String() string {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.buf.String()
}

func (w *watched) until(t *testing.T, pattern string) string {
	t.Helper()
	re := regexp.MustCompile(pattern)
	deadline := time.After(5 * time.Minute) // for what comes in seconds on an idle machine
	for {
		if m := re.FindString(w.String()); m != "" {
			return m
		}
		select {
		case <-w.more:
		case <-deadline:
			t.Fatalf("%q did not appear in\n%s", pattern, w)
		}
	}
}

func exitCode(t *testing.T, err error) int {
	t.Helper()
	var exit *exec.ExitError
	switch {
	case err == nil:
		return 0
	case errors.As(err, &exit):
		return exit.ExitCode()
	}
	t.Fatal(err)
	return -1
}

func (r *rig) demo(args ...string) []string {
	return append([]string{"demo", "--image", filepath.Join(r.assets, "base.ext4")}, args...)
}

func TestDemoRunsAWorkflowAndLeavesNothing(t *testing.T) {
	r := newRig(t)
	out, err := r.flint(t.Context(), nil, r.demo()...).CombinedOutput()
	if code := exitCode(t, err); code != 0 {
		t.Fatalf("exit %d\n%s", code, out)
	}
	for _, want := range []string{"Hello from flint-", "user     runner, uid 1001", "104729", "ms since queued", "nothing is left", "workflow: success"} {
		if !bytes.Contains(out, []byte(want)) {
			t.Errorf("%q is not shown", want)
		}
	}
	t.Logf("%s", out)
	r.nothingLeft("demo")
}

func TestDemoFailsOnPurpose(t *testing.T) {
	r := newRig(t)
	out, err := r.flint(t.Context(), nil, r.demo("--fail")...).CombinedOutput()
	if code := exitCode(t, err); code != 1 {
		t.Fatalf("exit %d\n%s", code, out)
	}
	for _, want := range []string{"want 104723, got 104729", "This is the failure that was asked for", "workflow: failure", "nothing is left"} {
		if !bytes.Contains(out, []byte(want)) {
			t.Errorf("%q is not shown in\n%s", want, out)
		}
	}
	r.nothingLeft("demo")
}

func TestInterruptedDemoLeavesNothing(t *testing.T) {
	for name, moment := range map[string]string{"while VMs boot": "check +│ queued", "while jobs run": "Look at the machine"} {
		t.Run(name, func(t *testing.T) {
			r := newRig(t)
			cmd, out := r.flint(t.Context(), nil, r.demo()...), newWatched()
			cmd.Stdout, cmd.Stderr = out, out
			if err := cmd.Start(); err != nil {
				t.Fatal(err)
			}
			out.until(t, moment)
			if err := cmd.Process.Signal(os.Interrupt); err != nil {
				t.Fatal(err)
			}
			if code := exitCode(t, cmd.Wait()); code != 130 {
				t.Errorf("exit %d, want 130\n%s", code, out)
			}
			if !strings.Contains(out.String(), "nothing is left") {
				t.Errorf("it does not say that nothing is left:\n%s", out)
			}
			r.nothingLeft("demo")
		})
	}
}

func (r *rig) run(args ...string) []string {
	return append([]string{"run", "--image", filepath.Join(r.assets, "base.ext4")}, args...)
}

func TestRunHandsOnTheExitCode(t *testing.T) {
	r := newRig(t)
	cmd := r.flint(t.Context(), nil, r.run("-i", "-e", "COLOUR=blue", "--", "sh", "-c", "cat; echo $COLOUR; pwd; exit 7")...)
	cmd.Stdin = strings.NewReader("from outside\n")
	out, err := cmd.Output()
	if code := exitCode(t, err); code != 7 || string(out) != "from outside\nblue\n/work\n" {
		t.Fatalf("exit %d, output %q", code, out)
	}
	r.nothingLeft("run0")
}

func TestRunWithATerminalThatIsResized(t *testing.T) {
	r := newRig(t)
	cmd := r.flint(t.Context(), nil, r.run("-it", "--", "sh", "-c", "stty size; trap 'stty size; exit 5' WINCH; echo waiting; while :; do sleep 0.2; done")...)
	term, err := pty.StartWithSize(cmd, &pty.Winsize{Cols: 91, Rows: 23})
	if err != nil {
		t.Fatal(err)
	}
	defer term.Close()
	out := newWatched()
	copied := make(chan struct{})
	go func() {
		defer close(copied)
		buf := make([]byte, 4096)
		for {
			n, err := term.Read(buf)
			_, _ = out.Write(buf[:n])
			if err != nil {
				return
			}
		}
	}()
	out.until(t, "23 91\r\nwaiting")
	if err := pty.Setsize(term, &pty.Winsize{Cols: 120, Rows: 40}); err != nil {
		t.Fatal(err)
	}
	out.until(t, "40 120")
	if code := exitCode(t, cmd.Wait()); code != 5 {
		t.Errorf("exit %d, want 5\n%s", code, out)
	}
	<-copied
	r.nothingLeft("run0")
}

func TestVMKilledInTheMiddle(t *testing.T) {
	r := newRig(t)
	cmd, out := r.flint(t.Context(), nil, r.run("--", "sh", "-c", "echo working; sleep 1000")...), newWatched()
	cmd.Stdout, cmd.Stderr = out, out
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	out.until(t, "working")
	_, pid := r.running("run0")
	if err := syscall.Kill(pid, syscall.SIGKILL); err != nil {
		t.Fatal(err)
	}
	if code := exitCode(t, cmd.Wait()); code != 125 {
		t.Errorf("exit %d, want 125", code)
	}
	if !strings.Contains(out.String(), "[vm.lost]") || !strings.Contains(out.String(), "fix:") {
		t.Errorf("the loss is not explained:\n%s", out)
	}
	r.nothingLeft("run0")
}

// started runs `flint run` until its command says that it works.
func (r *rig) started() (*exec.Cmd, *watched) {
	r.t.Helper()
	cmd, out := r.flint(r.t.Context(), nil, r.run("--", "sh", "-c", "echo working; sleep 1000")...), newWatched()
	cmd.Stdout, cmd.Stderr = out, out
	if err := cmd.Start(); err != nil {
		r.t.Fatal(err)
	}
	out.until(r.t, "working")
	return cmd, out
}

func TestDaemonsKilledInTheMiddleAreUndoneByTheNext(t *testing.T) {
	r := newRig(t)
	first, _ := r.started()
	second, _ := r.started() // has an instance of its own
	r.running("run0")
	r.running("run1")
	for _, cmd := range []*exec.Cmd{first, second} {
		if err := cmd.Process.Kill(); err != nil {
			t.Fatal(err)
		}
		if err := cmd.Wait(); err == nil {
			t.Fatal("flint survived SIGKILL")
		}
	}
	next, err := r.flint(t.Context(), nil, r.run("--", "true")...).CombinedOutput()
	if code := exitCode(t, err); code != 0 {
		t.Fatalf("the next run: exit %d\n%s", code, next)
	}
	r.nothingLeft("run0")
	r.nothingLeft("run1")
}

func TestHangUpAndBrokenPipeLeaveNothing(t *testing.T) {
	t.Run("hang-up", func(t *testing.T) {
		r := newRig(t)
		cmd, out := r.started()
		r.running("run0")
		if err := cmd.Process.Signal(syscall.SIGHUP); err != nil {
			t.Fatal(err)
		}
		if code := exitCode(t, cmd.Wait()); code != 130 {
			t.Errorf("exit %d, want 130\n%s", code, out)
		}
		r.nothingLeft("run0")
	})
	t.Run("broken pipe", func(t *testing.T) {
		r := newRig(t)
		cmd := r.flint(t.Context(), nil, r.run("--", "sh", "-c", "while :; do echo line; sleep 0.1; done")...)
		stdout, err := cmd.StdoutPipe()
		if err != nil {
			t.Fatal(err)
		}
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		if _, err := stdout.Read(make([]byte, 5)); err != nil {
			t.Fatal(err)
		}
		r.running("run0")
		if err := stdout.Close(); err != nil {
			t.Fatal(err)
		}
		if code := exitCode(t, cmd.Wait()); code != 130 {
			t.Errorf("exit %d, want 130", code)
		}
		r.nothingLeft("run0")
	})
}

func TestVMThatNeverAnswers(t *testing.T) {
	r := newRig(t)
	hang := filepath.Join(t.TempDir(), "hang")
	build := exec.Command("go", "build", "-o", hang, "./hang")
	build.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := build.CombinedOutput(); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	env := []string{"FLINT_VM_AGENT=" + hang, "FLINT_VM_BOOT_TIMEOUT=20s"}
	out, err := r.flint(t.Context(), env, r.run("--", "true")...).CombinedOutput()
	if code := exitCode(t, err); code != 124 {
		t.Errorf("exit %d, want 124", code)
	}
	for _, want := range []string{"[vm.boot]", "timed out after 20s", "hang: here I am, and here I stay", "fix:"} {
		if !bytes.Contains(out, []byte(want)) {
			t.Errorf("%q is not shown in\n%s", want, out)
		}
	}
	r.nothingLeft("run0")
}

func TestBadInputSaysWhatToDo(t *testing.T) {
	r := newRig(t)
	dir := t.TempDir()
	file := func(name, content string) string {
		path := filepath.Join(dir, name)
		if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(path, []byte(content), 0o644); err != nil {
			t.Fatal(err)
		}
		return path
	}
	for name, tt := range map[string]struct {
		args []string
		env  []string
		code int
		want []string
	}{
		"unknown key": {
			args: []string{"serve", "--config", file("a.yaml", "schema_version: 1\ngithub:\n  organisation: acme\n")},
			code: 3, want: []string{`line 3, column 3: unknown key "organisation" in github; did you mean "organization"?`, "fix:"},
		},
		"no image": {
			args: []string{"run", "--image", filepath.Join(dir, "nowhere") + "/", "--", "true"},
			code: 125, want: []string{"[image.missing]", "there is no such file or directory", "fix:"},
		},
		"Dockerfile that fails": {
			args: []string{"run", "--image", filepath.Dir(file("broken/Dockerfile", "FROM scratch\nCOPY nothing /\n")), "--", "true"},
			code: 125, want: []string{"[image.build]", "nothing", "fix:"},
		},
		"no QEMU": {
			args: r.run("--", "true"), env: []string{"FLINT_VM_QEMU=/nowhere/qemu"},
			code: 125, want: []string{"[qemu.missing]", "/nowhere/qemu", "fix:"},
		},
		"no agent": {
			args: r.run("--", "true"), env: []string{"FLINT_VM_AGENT=/nowhere/agent"},
			code: 125, want: []string{"[agent.missing]", "fix:"},
		},
		"workflow with an action": {
			args: []string{"demo", "--workflow", file("w.yml", "on: push\njobs:\n  a:\n    runs-on: flint\n    steps:\n      - uses: actions/checkout@v4\n")},
			code: 2, want: []string{"w.yml:6:", "actions/checkout@v4", "fix:"},
		},
		"no workflow": {
			args: []string{"demo", "--workflow", filepath.Join(dir, "no.yml")},
			code: 5, want: []string{"[workflow.missing]", "fix:"},
		},
		"no command":      {args: []string{"run"}, code: 125, want: []string{"no command to run"}},
		"unknown command": {args: []string{"bogus"}, code: 2, want: []string{`unknown command "bogus"`}},
	} {
		t.Run(name, func(t *testing.T) {
			out, err := r.flint(t.Context(), tt.env, tt.args...).CombinedOutput()
			if code := exitCode(t, err); code != tt.code {
				t.Errorf("exit %d, want %d", code, tt.code)
			}
			for _, want := range tt.want {
				if !bytes.Contains(out, []byte(want)) {
					t.Errorf("%q is not shown", want)
				}
			}
			t.Logf("%s", out)
		})
	}
	r.nothingLeft("run0")
	r.nothingLeft("demo")
}
