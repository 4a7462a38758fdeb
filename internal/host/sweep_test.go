package host_test

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"flint"
	"flint/internal/guest"
	"flint/internal/host"
	"flint/internal/vm/vmtest"
)

func TestRegistrationThatGitHubKeepsStaysOnRecord(t *testing.T) {
	synctest.Test(t, registrationThatStays) // in fake time: GitHub is asked again for 10 s
}

func registrationThatStays(t *testing.T) {
	w := newWorld(t, runner(t, func(context.Context, io.Writer) guest.Exit { return guest.Exit{} }))
	h := w.host()
	w.github.setBusy(true)
	if _, err := h.Run(t.Context(), flint.Runner{ID: host.NewID("flint-", "pool"), Pool: "pool"}); !errors.Is(err, flint.ErrConflict) {
		t.Fatalf("the registration that stayed is not reported: %v", err)
	}
	if left, err := h.Leftovers(); err != nil || len(left) != 1 {
		t.Fatalf("its record is not kept: %v, %v", left, err)
	}
	w.github.setBusy(false)
	w.host() // the next start sweeps
	w.nothingLeft()
}

func TestSweepUndoesADeadDaemonsRunners(t *testing.T) {
	w := newWorld(t, &vmtest.Fake{})
	vmm := exec.Command("sleep", "1000")
	if err := vmm.Start(); err != nil {
		t.Fatal(err)
	}
	stat, err := os.ReadFile(filepath.Join("/proc", itoa(vmm.Process.Pid), "stat"))
	if err != nil {
		t.Fatal(err)
	}
	started := strings.Fields(string(stat[strings.LastIndexByte(string(stat), ')')+1:]))[19]
	w.github.registered["flint-a"], w.github.registered["flint-torn"] = 5, 6
	// A VMM whose daemon died before it wrote the pid down: only its command line names it.
	shell, err := exec.LookPath("sh")
	if err != nil {
		t.Fatal(err)
	}
	b, err := os.ReadFile(shell)
	if err != nil {
		t.Fatal(err)
	}
	reading := func(program, id string) *exec.Cmd {
		program = filepath.Join(t.TempDir(), program)
		if err := os.WriteFile(program, b, 0o755); err != nil {
			t.Fatal(err)
		}
		cmd := exec.Command(program, "-c", "read line", "sh", "-name", id)
		stdin, err := cmd.StdinPipe()
		if err == nil {
			err = cmd.Start()
		}
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { _ = stdin.Close() }) // which ends it
		return cmd
	}
	w.config.VMMs, w.config.Prefix = []string{"my-vmm"}, "flint-mine-"
	nameless := []*exec.Cmd{
		reading("qemu-system-x86_64", "flint-nameless"), reading("firecracker-v1.13.1-x86_64", "flint-nameless"), reading("my-vmm", "flint-nameless"),
		reading("qemu-system-x86_64", "flint-mine-orphan"), // somebody removed its record
	}
	// A person's, with a runner's name behind the same word, and another flint's VM.
	others := []*exec.Cmd{reading("find", "flint-nameless"), reading("qemu-system-x86_64", "flint-other")}
	record := func(id, content string) {
		if err := os.MkdirAll(filepath.Join(w.dir, id), 0o700); err != nil {
			t.Fatal(err)
		}
		if content == "" {
			return
		}
		if err := os.WriteFile(filepath.Join(w.dir, id, "runner.json"), []byte(content), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	record("flint-a", `{"version":1,"runner":{"id":"flint-a","pool":"p","phase":"registered"},"pid":`+itoa(vmm.Process.Pid)+`,"start":`+started+`,"github_id":5,"register":true}`)
	// The pid of this test with another start time: a process that came after the VMM's end. It must live.
	record("flint-b", `{"version":1,"runner":{"id":"flint-b","phase":"booting"},"pid":`+itoa(os.Getpid())+`,"start":1}`)
	record("flint-torn", `{"version":1,"runner":{"id":"fl`)
	record("flint-future", `{"version":2,"runner":{"id":"flint-future"}}`)
	record("flint-early", "")
	record("flint-nameless", `{"version":1,"runner":{"id":"flint-nameless","phase":"preparing"}}`)
	w.host()
	if err := vmm.Wait(); err == nil || !strings.Contains(err.Error(), "killed") {
		t.Errorf("the VMM ended with %v", err)
	}
	for _, vmm := range nameless {
		if err := vmm.Wait(); err == nil || !strings.Contains(err.Error(), "killed") {
			t.Errorf("%s, which no record names, ended with %v", vmm.Path, err)
		}
	}
	for _, other := range others {
		if err := other.Process.Signal(syscall.Signal(0)); err != nil {
			t.Errorf("somebody else's program: %v", err)
		}
	}
	w.nothingLeft()
	aside, err := os.ReadDir(filepath.Join(filepath.Dir(w.dir), "damaged"))
	if err != nil || len(aside) != 2 {
		t.Errorf("set aside: %v, %v; want the torn and the future record", aside, err)
	}
}

// TestSweepTellsOfLostJobs: the daemon died under jobs, and so do their VMs.
func TestSweepTellsOfLostJobs(t *testing.T) {
	for name, tt := range map[string]struct {
		phase     string
		job       string
		bend      func(*fakeGitHub)
		concluded bool
		lost      string // what is told
		logged    string
	}{
		"under a job":           {phase: "running", job: `{"id":"7","name":"build","repository":"acme/hello","run_id":3}`, lost: "flint-a of pool had build of acme/hello", logged: "job lost"},
		"GitHub is silent":      {phase: "running", job: `{"name":"build"}`, bend: func(g *fakeGitHub) { g.silent = 1 }, lost: "flint-a of pool had build of ", logged: "job lost"},
		"GitHub holds on to it": {phase: "running", job: `{"name":"build"}`, bend: func(g *fakeGitHub) { g.busy = true }, lost: "flint-a of pool had build of ", logged: "job lost"},
		"its job was over":      {phase: "running", job: `{"name":"build"}`, bend: func(g *fakeGitHub) { delete(g.registered, "flint-a") }, logged: "was over"},
		"GitHub had said":       {phase: "running", job: `{"name":"build"}`, concluded: true},
		"its end had begun":     {phase: "finishing", job: `{"name":"build"}`},
		"it had no job":         {phase: "registered", job: "null"},
	} {
		t.Run(name, func(t *testing.T) {
			w := newWorld(t, &vmtest.Fake{})
			w.github.registered["flint-a"] = 5
			if tt.bend != nil {
				tt.bend(w.github)
			}
			var log bytes.Buffer
			w.config.Log = slog.New(slog.NewTextHandler(&log, nil))
			var told []string
			w.config.Lost = func(r flint.Runner, job flint.Job) {
				told = append(told, r.ID+" of "+r.Pool+" had "+job.Name+" of "+job.Repository)
			}
			if err := os.MkdirAll(filepath.Join(w.dir, "flint-a"), 0o700); err != nil {
				t.Fatal(err)
			}
			record := `{"version":1,"runner":{"id":"flint-a","pool":"pool","phase":"` + tt.phase + `","job":` + tt.job + `},"github_id":5,"register":true,"concluded":` + strconv.FormatBool(tt.concluded) + `}`
			if err := os.WriteFile(filepath.Join(w.dir, "flint-a", "runner.json"), []byte(record), 0o600); err != nil {
				t.Fatal(err)
			}
			for range 3 { // what cannot be undone yet is tried again, and told of once
				_ = host.New(w.config).Sweep(t.Context())
			}
			if got := strings.Join(told, ", "); got != tt.lost {
				t.Errorf("told %q; want %q", got, tt.lost)
			}
			if n := strings.Count(log.String(), tt.logged); tt.logged != "" && n != 1 || tt.lost != "" && !strings.Contains(log.String(), "level=ERROR") {
				t.Errorf("%d times %q in the log:\n%s", n, tt.logged, &log)
			}
			w.github.setBusy(false)
			w.host()
			w.nothingLeft()
		})
	}
	t.Run("without GitHub", func(t *testing.T) { // Recover's way: whoever knows GitHub sweeps again, and tells
		w := newWorld(t, &vmtest.Fake{})
		w.config.GitHub = nil
		w.config.Lost = func(r flint.Runner, _ flint.Job) { t.Errorf("told of %s", r.ID) }
		if err := os.MkdirAll(filepath.Join(w.dir, "flint-a"), 0o700); err != nil {
			t.Fatal(err)
		}
		record := `{"version":1,"runner":{"id":"flint-a","phase":"running","job":{"name":"build"}},"register":true}`
		if err := os.WriteFile(filepath.Join(w.dir, "flint-a", "runner.json"), []byte(record), 0o600); err != nil {
			t.Fatal(err)
		}
		if err := host.New(w.config).Sweep(t.Context()); err == nil {
			t.Error("the registration that stays is not reported")
		}
	})
}

func itoa(n int) string {
	b, _ := json.Marshal(n)
	return string(b)
}

// TestDamagedRecordsAreFew: what is set aside for a person does not grow for ever.
func TestDamagedRecordsAreFew(t *testing.T) {
	w := newWorld(t, &vmtest.Fake{})
	aside := filepath.Join(filepath.Dir(w.dir), "damaged")
	for i := range 40 {
		if err := os.MkdirAll(filepath.Join(aside, fmt.Sprintf("flint-%02d.%d", 99-i, 1_000_000+i)), 0o700); err != nil {
			t.Fatal(err)
		}
	}
	dir := filepath.Join(w.dir, "flint-now")
	if err := errors.Join(os.MkdirAll(dir, 0o700), os.WriteFile(filepath.Join(dir, "runner.json"), []byte("{"), 0o600)); err != nil {
		t.Fatal(err)
	}
	w.github.setBusy(true)
	var log bytes.Buffer
	w.config.Log = slog.New(slog.NewTextHandler(&log, nil))
	if err := host.New(w.config).Sweep(t.Context()); !errors.Is(err, flint.ErrConflict) || !strings.Contains(log.String(), "a job it may have had is lost") {
		t.Errorf("while GitHub holds on to it: %v\n%s", err, &log)
	}
	w.github.setBusy(false)
	if err := host.New(w.config).Sweep(t.Context()); err != nil {
		t.Error(err)
	}
	entries, err := os.ReadDir(aside)
	if err != nil || len(entries) != 32 {
		t.Fatalf("%d are kept, %v", len(entries), err)
	}
	if last := entries[len(entries)-1].Name(); !strings.HasPrefix(last, "flint-now.") || entries[0].Name() != "flint-60.1000039" {
		t.Errorf("the newest are not kept: %s … %s", entries[0].Name(), last)
	}
}

// TestLossOfAJobThatIsHeardOfLate: the machine lost power before flint heard that the runner had a job.
func TestLossOfAJobThatIsHeardOfLate(t *testing.T) {
	w := newWorld(t, &vmtest.Fake{})
	w.github.registered["flint-a"], w.github.busy = 5, true
	told := 0
	w.config.Lost = func(_ flint.Runner, job flint.Job) {
		if told++; job.Name != "build" {
			t.Errorf("lost is %+v", job)
		}
	}
	dir := filepath.Join(w.dir, "flint-a")
	content := `{"version":1,"runner":{"id":"flint-a","pool":"pool","phase":"registered"},"boot":"another","github_id":5,"register":true}`
	if err := errors.Join(os.MkdirAll(dir, 0o700), os.WriteFile(filepath.Join(dir, "runner.json"), []byte(content), 0o600)); err != nil {
		t.Fatal(err)
	}
	h := host.New(w.config)
	if err := h.Sweep(t.Context()); err == nil || told != 0 {
		t.Fatalf("first sweep: %v, told %d times", err, told)
	}
	note(t, h, flint.JobStarted, "flint-a")
	note(t, h, flint.JobStarted, "flint-b") // which nobody knows
	if n := h.Abandoned()["pool"]; n != 1 {
		t.Errorf("%d jobs are abandoned", n)
	}
	note(t, h, flint.JobCompleted, "flint-a")
	w.github.busy = false
	if err := h.Sweep(t.Context()); err != nil || told != 1 {
		t.Errorf("second sweep: %v, told %d times", err, told)
	}
	w.nothingLeft()
}

// TestStuckVMMHoldsUpNoOther: what cannot be killed now is left for later, and the rest is undone.
func TestStuckVMMHoldsUpNoOther(t *testing.T) {
	group := filepath.Join("/sys/fs/cgroup/freezer", fmt.Sprintf("flint-test-%d", os.Getpid()))
	if err := os.Mkdir(group, 0o755); err != nil {
		t.Skipf("needs root and the freezer of cgroup v1, under which no process can be killed: %v", err)
	}
	set := func(file, value string) {
		t.Helper()
		if err := os.WriteFile(filepath.Join(group, file), []byte(value), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	w := newWorld(t, &vmtest.Fake{})
	stuck, other := w.orphan("flint-a", nil), w.orphan("flint-b", nil)
	t.Cleanup(func() {
		set("freezer.state", "THAWED")
		for stuck() {
			runtime.Gosched() // it was killed
		}
		_ = os.Remove(group)
	})
	var rec struct{ PID int }
	b, err := os.ReadFile(filepath.Join(w.dir, "flint-a", "runner.json"))
	if err = errors.Join(err, json.Unmarshal(b, &rec)); err != nil {
		t.Fatal(err)
	}
	set("tasks", itoa(rec.PID))
	set("freezer.state", "FROZEN")
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	h := host.New(w.config)
	all := h.State().Free
	if err := h.Sweep(ctx); err == nil || !strings.Contains(err.Error(), "flint-a: end its VMM") || ctx.Err() != nil {
		t.Errorf("sweep: %v, %v", err, ctx.Err())
	}
	if free := h.State().Free; free.CPUs != all.CPUs-1 || free.Memory >= all.Memory {
		t.Errorf("%+v is free of %+v: what has not ended is not counted", free, all)
	}
	if !stuck() || other() {
		t.Errorf("VMMs live: %v, %v", stuck(), other())
	}
	if entries, err := os.ReadDir(w.dir); err != nil || len(entries) != 1 || entries[0].Name() != "flint-a" {
		t.Errorf("left: %v, %v", entries, err)
	}
	set("freezer.state", "THAWED")
	if err := h.Sweep(ctx); err != nil || h.State().Free != all {
		t.Errorf("thawed: %v, %+v is free of %+v", err, h.State().Free, all)
	}
}

// TestRecordThatIsNoFileIsSetAside: nothing waits for somebody to write to it.
func TestRecordThatIsNoFileIsSetAside(t *testing.T) {
	w := newWorld(t, &vmtest.Fake{})
	dir := filepath.Join(w.dir, "flint-a")
	if err := errors.Join(os.MkdirAll(dir, 0o700), syscall.Mkfifo(filepath.Join(dir, "runner.json"), 0o600)); err != nil {
		t.Fatal(err)
	}
	if ids, err := host.Survivors(w.dir); len(ids) != 0 || err != nil {
		t.Errorf("survivors: %v, %v", ids, err)
	}
	w.host()
	w.nothingLeft()
}
