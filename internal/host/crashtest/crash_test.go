// Package crashtest cuts the life of a runner at every step by the death of the process that runs it, starts the process
// again, and looks for what is lost and what is left.
//
// The process is this test's own program; its VMs are Firecracker's doubles, which are processes and outlive it, and for a
// sample of the steps real ones under QEMU. It must not
// know how a host does what it does: only what is on the machine and at GitHub afterwards counts.
package crashtest

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync/atomic"
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
	os.Exit(fctest.Main(func(dir string) int {
		doubles = dir
		return m.Run()
	}))
}

// newWorld makes a machine with nothing on it.
func newWorld(t *testing.T) world {
	t.Helper()
	w := world{Dir: t.TempDir(), Firecracker: fctest.Install(t, doubles, fctest.Options{}).Firecracker}
	w.furnish(t)
	for _, name := range []string{"kernel", "initrd", "base"} {
		if err := os.WriteFile(filepath.Join(w.Dir, name), []byte("\x7fELF"+strings.Repeat("x", 1020)), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	return w
}

// furnish makes the world's directories, and ends what VMs are left in the end.
func (w world) furnish(t *testing.T) {
	t.Helper()
	for _, dir := range []string{w.runners(), w.ports(), w.registrations(), w.jobs(), w.results()} {
		if err := os.Mkdir(dir, 0o700); err != nil {
			t.Fatal(err)
		}
	}
	t.Cleanup(func() {
		for _, pid := range w.vmms(t) {
			t.Errorf("VMM %d is left", pid)
			_ = unix.Kill(pid, unix.SIGKILL)
		}
	})
}

// run runs the daemon on the world: with a number it dies at that step, and with an id it begins a runner of it. It returns the
// steps it went through and whether it died.
func (w world) run(t *testing.T, id string, cut int) (steps []string, died bool) {
	t.Helper()
	cmd, log := w.daemon(t, t.Context(), id, cut)
	defer log.Close()
	err := cmd.Run()
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

// daemon is the process, ready to begin, and its log, which is the caller's.
func (w world) daemon(t *testing.T, ctx context.Context, id string, cut int) (*exec.Cmd, *os.File) {
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
	cmd := exec.CommandContext(ctx, self)
	cmd.Env = append(os.Environ(), worldEnv+"="+string(arg))
	// A file: a pipe would be waited for as long as a VMM had it.
	log, err := os.OpenFile(filepath.Join(w.Dir, "log"), os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o600)
	if err != nil {
		t.Fatal(err)
	}
	cmd.Stdout, cmd.Stderr = log, log
	return cmd, log
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
		if b, err := os.ReadFile(file); err == nil && w.isVMM(string(b)) {
			var pid int
			if _, err := fmt.Sscanf(file, "/proc/%d/", &pid); err != nil {
				t.Fatal(err)
			}
			pids = append(pids, pid)
		}
	}
	return pids
}

// isVMM reports whether a command line is that of a VMM of this world.
func (w world) isVMM(cmdline string) bool {
	if w.Assets != "" {
		return strings.Contains(cmdline, "\x00-name\x00"+qemuID()+"\x00")
	}
	return strings.HasPrefix(cmdline, w.Firecracker+"\x00--id\x00")
}

// result is how a runner ended.
func (w world) result(t *testing.T, id string) flint.Result {
	t.Helper()
	var res flint.Result
	b, err := os.ReadFile(filepath.Join(w.results(), id))
	if err == nil {
		err = json.Unmarshal(b, &res)
	}
	if err != nil {
		t.Errorf("no result: %v\n%s", err, w.log())
	}
	return res
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
			first, died := w.run(t, id, cut+1)
			if !died {
				t.Skip("it did not get there this time")
			}
			began := time.Now()
			again, _ := w.run(t, "", 0)
			if strings.Contains(strings.Join(again, "\n"), "adopted") {
				adopted++
				t.Logf("adopted; over after %s", time.Since(began).Round(time.Millisecond))
			}
			w.check(t, id)
			if job, err := readJob(w, id); err == nil && job != "" && !slices.Contains(first, "erase record") {
				w.result(t, id)
			}
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
	w.result(t, id)
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

// TestDetach stops the process in order in the middle of the job, and kills it at each step of that.
func TestDetach(t *testing.T) {
	var steps []string
	for cut := 0; cut == 0 || cut <= len(steps); cut++ {
		name := "whole"
		if cut > 0 {
			name = fmt.Sprintf("%02d %s", cut, steps[cut-1])
		}
		t.Run(name, func(t *testing.T) {
			w, id := newWorld(t), fmt.Sprintf("flint-left-%d-%d", os.Getpid(), cut)
			w.run(t, id, atCount)
			w.Detach = true // the second one adopts, and lets go again
			went, _ := w.run(t, "", cut)
			if cut == 0 {
				steps = went
				if !slices.Contains(went, "detached") || len(w.vmms(t)) != 1 {
					t.Errorf("steps %q, VMMs %v", went, w.vmms(t))
				}
			}
			w.Detach = false
			w.run(t, "", 0)
			w.check(t, id)
			if w.result(t, id); t.Failed() {
				t.Log(w.log())
			}
		})
	}
}

// TestProgramEndedMeanwhile collects the exit and the output of a program that ended while nobody was there.
func TestProgramEndedMeanwhile(t *testing.T) {
	w, id := newWorld(t), fmt.Sprintf("flint-late-%d", os.Getpid())
	w.run(t, id, atCount)
	<-time.After(2 * 10 * time.Millisecond * lines) // it may also end a little later: then this proves less, but nothing wrong
	w.run(t, "", 0)
	w.check(t, id)
	w.result(t, id)
}

// age makes a runner's record look older.
func (w world) age(t *testing.T, id string, by time.Duration) {
	t.Helper()
	path := filepath.Join(w.runners(), id, "runner.json")
	b, err := os.ReadFile(path)
	var rec map[string]any
	if err == nil {
		err = json.Unmarshal(b, &rec)
	}
	if err != nil {
		t.Fatal(err)
	}
	line := rec["runner"].(map[string]any)["timeline"].(map[string]any)
	for phase, at := range line {
		began, err := time.Parse(time.RFC3339Nano, at.(string))
		if err != nil {
			t.Fatal(err)
		}
		line[phase] = began.Add(-by)
	}
	since := rec["began"].(map[string]any)
	for phase, at := range since {
		since[phase] = int64(at.(float64)) - by.Nanoseconds()
	}
	if b, err = json.Marshal(rec); err == nil {
		err = os.WriteFile(path, b, 0o600)
	}
	if err != nil {
		t.Fatal(err)
	}
}

// failJob has GitHub give the job up, which it does by itself after minutes, and let go of the registration.
func (w world) failJob(t *testing.T, id string) {
	t.Helper()
	if err := os.WriteFile(filepath.Join(w.jobs(), id), []byte("failed"), 0o600); err != nil {
		t.Fatal(err)
	}
}

// TestDeadlinesCountFromTheBegin ends a job whose time was up before the process was there again.
func TestDeadlinesCountFromTheBegin(t *testing.T) {
	w, id := newWorld(t), fmt.Sprintf("flint-old-%d", os.Getpid())
	w.run(t, id, atCount)
	w.age(t, id, 2*jobTime)
	w.failJob(t, id)
	w.run(t, "", 0)
	if res := w.result(t, id); res.Reason.Code != "runner.time_limit" || res.Lost {
		t.Errorf("it ended with %+v, lost %v", res.Reason, res.Lost)
	}
	if pids := w.vmms(t); len(pids) > 0 {
		t.Errorf("VMMs left: %v", pids)
	}
}

// TestVMThatCannotBeAdopted is ended, and its job is called lost.
func TestVMThatCannotBeAdopted(t *testing.T) {
	for name, harm := range map[string]func(world, string) error{
		"port is gone": func(w world, id string) error { return os.Remove(filepath.Join(w.ports(), id)) },
		"VMM is gone":  func(w world, _ string) error { return unix.Kill(w.vmms(t)[0], unix.SIGKILL) },
		"record is damaged": func(w world, id string) error {
			return os.WriteFile(filepath.Join(w.runners(), id, "runner.json"), []byte("{"), 0o600)
		},
	} {
		t.Run(name, func(t *testing.T) {
			w, id := newWorld(t), fmt.Sprintf("flint-harmed-%d", os.Getpid())
			w.run(t, id, atCount)
			if err := harm(w, id); err != nil {
				t.Fatal(err)
			}
			w.failJob(t, id)
			w.run(t, "", 0)
			lost, err := filepath.Glob(filepath.Join(w.results(), id+".lost"))
			if told := len(lost) == 1; err != nil || told != (name != "record is damaged") {
				t.Errorf("told of the loss: %v, %v\n%s", told, err, w.log())
			}
			if err := os.RemoveAll(filepath.Join(w.results(), id+".lost")); err != nil {
				t.Fatal(err)
			}
			w.check(t, id)
		})
	}
}

// TestRandomCuts kills process after process at moments nobody chose, under load. FLINT_TEST_CUTS says how many lives.
func TestRandomCuts(t *testing.T) {
	count := 6
	if n, err := strconv.Atoi(os.Getenv("FLINT_TEST_CUTS")); err == nil {
		count = n
	}
	seed := uint64(time.Now().UnixNano())
	if n, err := strconv.ParseUint(os.Getenv("FLINT_TEST_SEED"), 10, 64); err == nil {
		seed = n
	}
	t.Logf("FLINT_TEST_CUTS=%d FLINT_TEST_SEED=%d", count, seed)
	var kills atomic.Int64
	t.Run("lives", func(t *testing.T) {
		for n := range count {
			t.Run(strconv.Itoa(n), func(t *testing.T) {
				w := newWorld(t) // all of them first: a program cannot be run while a process that another life forks has it open
				t.Parallel()
				cutAtRandom(t, w, rand.New(rand.NewPCG(seed, uint64(n))), fmt.Sprintf("flint-random-%d-%d", os.Getpid(), n), &kills)
			})
		}
	})
	t.Logf("%d lives, %d processes killed", count, kills.Load())
}

// cutAtRandom has one runner of up to four processes that die, and one that does not.
func cutAtRandom(t *testing.T, w world, r *rand.Rand, id string, kills *atomic.Int64) {
	begin := id
	for range 1 + r.IntN(4) {
		ctx, cancel := context.WithTimeout(t.Context(), time.Duration(r.IntN(250))*time.Millisecond)
		cmd, log := w.daemon(t, ctx, begin, 0)
		_ = cmd.Run()
		cancel()
		log.Close()
		if cmd.ProcessState == nil {
			continue // its time was up before it began
		}
		if begin = ""; !cmd.ProcessState.Success() {
			kills.Add(1)
		}
	}
	w.run(t, "", 0)
	if w.check(t, id); t.Failed() {
		t.Log(w.log())
	}
}
