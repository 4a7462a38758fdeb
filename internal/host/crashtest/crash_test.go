// Package crashtest cuts the life of a runner at every step by the death of the process that runs it, starts the process
// again, and looks for what is lost and what is left.
//
// The process is this test's own program; its VMs are Firecracker's doubles, which are processes and outlive it. It must not
// know how a host does what it does: only what is on the machine and at GitHub afterwards counts.
package crashtest

import (
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"flint"
	"flint/internal/vm/firecracker/fctest"
)

// doubles is where TestMain has built the doubles.
var doubles string

func TestMain(m *testing.M) {
	if os.Getenv(worldEnv) != "" {
		if err := daemon(); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
		os.Exit(0)
	}
	dir, err := os.MkdirTemp("", "flint-crashtest")
	if err == nil {
		err = fctest.Build(dir)
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
	doubles = dir
	code := m.Run()
	os.RemoveAll(dir)
	os.Exit(code)
}

// newWorld makes a machine with nothing on it.
func newWorld(t *testing.T) world {
	t.Helper()
	w := world{Dir: t.TempDir(), Firecracker: fctest.Install(t, doubles, fctest.Options{}).Firecracker}
	for _, dir := range []string{w.runners(), w.ports(), w.registrations(), w.jobs(), w.results()} {
		if err := os.Mkdir(dir, 0o700); err != nil {
			t.Fatal(err)
		}
	}
	for _, name := range []string{"kernel", "initrd", "base"} {
		if err := os.WriteFile(filepath.Join(w.Dir, name), []byte("\x7fELF"+strings.Repeat("x", 1020)), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	t.Cleanup(func() {
		for _, pid := range w.vmms(t) {
			t.Errorf("VMM %d is left", pid)
			_ = unix.Kill(pid, unix.SIGKILL)
		}
	})
	return w
}

// run runs the daemon on the world: with a number it dies at that step, and with an id it begins a runner of it. It returns the
// steps it went through and whether it died.
func (w world) run(t *testing.T, id string, cut int) (steps []string, died bool) {
	t.Helper()
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	w.Begin, w.Cut = id, cut
	arg, err := json.Marshal(w)
	if err != nil {
		t.Fatal(err)
	}
	if err := os.Remove(w.trace()); err != nil && !errors.Is(err, fs.ErrNotExist) {
		t.Fatal(err)
	}
	cmd := exec.CommandContext(t.Context(), self)
	cmd.Env = append(os.Environ(), worldEnv+"="+string(arg))
	// A file: a pipe would be waited for as long as a VMM had it.
	log, err := os.OpenFile(filepath.Join(w.Dir, "log"), os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o600)
	if err != nil {
		t.Fatal(err)
	}
	defer log.Close()
	cmd.Stdout, cmd.Stderr = log, log
	err = cmd.Run()
	died = cmd.ProcessState != nil && cmd.ProcessState.Sys().(interface{ Signaled() bool }).Signaled()
	if err != nil && !died {
		t.Fatalf("daemon: %v\n%s", err, w.log())
	}
	b, err := os.ReadFile(w.trace())
	if err != nil {
		t.Fatalf("trace: %v\n%s", err, w.log())
	}
	return strings.Split(strings.TrimSpace(string(b)), "\n"), died
}

func (w world) log() string {
	b, _ := os.ReadFile(filepath.Join(w.Dir, "log"))
	return string(b)
}

// vmms are the VMMs of this world that run.
func (w world) vmms(t *testing.T) []int {
	t.Helper()
	files, err := filepath.Glob("/proc/[0-9]*/cmdline")
	if err != nil {
		t.Fatal(err)
	}
	var pids []int
	for _, file := range files {
		if b, err := os.ReadFile(file); err == nil && strings.HasPrefix(string(b), w.Firecracker+"\x00") {
			var pid int
			if _, err := fmt.Sscanf(file, "/proc/%d/", &pid); err != nil {
				t.Fatal(err)
			}
			pids = append(pids, pid)
		}
	}
	return pids
}

// check looks for what is left, and for the job. Whether GitHub gave it one, GitHub knows.
func (w world) check(t *testing.T, id string) {
	t.Helper()
	for _, dir := range []string{w.runners(), w.ports(), w.registrations()} {
		entries, err := os.ReadDir(dir)
		if err != nil {
			t.Fatal(err)
		}
		for _, e := range entries {
			t.Errorf("left in %s: %s", filepath.Base(dir), e.Name())
		}
	}
	if pids := w.vmms(t); len(pids) > 0 {
		t.Errorf("VMMs left: %v", pids)
	}
	job, err := readJob(w, id)
	if err != nil {
		t.Fatal(err)
	}
	if lost, err := filepath.Glob(filepath.Join(w.results(), id+".lost")); err != nil || len(lost) > 0 {
		t.Errorf("the job is called lost")
	}
	if job == "started" {
		t.Errorf("the job is neither running nor over")
	}
	b, err := os.ReadFile(filepath.Join(w.results(), id))
	if errors.Is(err, fs.ErrNotExist) {
		return // it died when all was over, or before there was a job
	}
	if err != nil {
		t.Fatal(err)
	}
	var res flint.Result
	if err := json.Unmarshal(b, &res); err != nil {
		t.Fatal(err)
	}
	if job == "" {
		return // stopped before its program
	}
	var want strings.Builder
	fmt.Fprintln(&want, "Listening")
	for n := range lines {
		fmt.Fprintf(&want, "count %d\n", n+1)
	}
	fmt.Fprintln(&want, "over")
	if res.Output != want.String() || res.ExitCode != exitOfJob || res.Conclusion != "succeeded" {
		t.Errorf("exit %d, conclusion %q, output %q", res.ExitCode, res.Conclusion, res.Output)
	}
}

// TestEveryStep kills the process that begins a runner at each step of the runner's life.
func TestEveryStep(t *testing.T) {
	steps, died := walk(t, 0)
	if died || len(steps) < 20 {
		t.Fatalf("a life without a cut: died %v, steps %q", died, steps)
	}
	t.Logf("%d steps: %s", len(steps), strings.Join(steps, ", "))
	adopted := 0
	for cut := range steps {
		t.Run(fmt.Sprintf("%02d %s", cut+1, steps[cut]), func(t *testing.T) {
			w, id := newWorld(t), fmt.Sprintf("flint-cut-%d-%d", os.Getpid(), cut)
			if _, died := w.run(t, id, cut+1); !died {
				t.Skip("it did not get there this time")
			}
			began := time.Now()
			again, _ := w.run(t, "", 0)
			if strings.Contains(strings.Join(again, "\n"), "adopted") {
				adopted++
				t.Logf("adopted; over after %s", time.Since(began).Round(time.Millisecond))
			}
			w.check(t, id)
			if t.Failed() {
				t.Logf("%q\n%s", again, w.log())
			}
		})
	}
	if adopted < 3 {
		t.Errorf("%d of %d lives were gone on with", adopted, len(steps))
	}
}

// walk is a whole life without a cut.
func walk(t *testing.T, cut int) ([]string, bool) {
	t.Helper()
	w, id := newWorld(t), fmt.Sprintf("flint-whole-%d", os.Getpid())
	steps, died := w.run(t, id, cut)
	w.check(t, id)
	if _, err := os.Stat(filepath.Join(w.results(), id)); err != nil {
		t.Errorf("no result: %v\n%s", err, w.log())
	}
	return steps, died
}

// TestEveryStepOfAdoption kills the process that goes on with a runner at each step of that, and the one after it no more.
func TestEveryStepOfAdoption(t *testing.T) {
	w, id := newWorld(t), fmt.Sprintf("flint-heir-%d", os.Getpid())
	w.run(t, id, atCount)
	steps, died := w.run(t, "", 0)
	w.check(t, id)
	if died || len(steps) < 6 {
		t.Fatalf("an adoption without a cut: died %v, steps %q", died, steps)
	}
	t.Logf("%d steps: %s", len(steps), strings.Join(steps, ", "))
	for cut := range steps {
		t.Run(fmt.Sprintf("%02d %s", cut+1, steps[cut]), func(t *testing.T) {
			w, id := newWorld(t), fmt.Sprintf("flint-heir-%d-%d", os.Getpid(), cut)
			w.run(t, id, atCount)
			if _, died := w.run(t, "", cut+1); !died {
				t.Skip("it did not get there this time")
			}
			again, _ := w.run(t, "", 0)
			w.check(t, id)
			if t.Failed() {
				t.Logf("%q\n%s", again, w.log())
			}
		})
	}
}
