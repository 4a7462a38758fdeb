package host_test

import (
	"context"
	"encoding/json"
	"errors"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"syscall"
	"testing"
	"time"

	"flint"
	"flint/internal/host"
	"flint/internal/vm"
	"flint/internal/vm/vmtest"
)

// heirs is a driver that adopts as it is told.
type heirs struct {
	*vmtest.Fake
	adopt func(ctx context.Context, id string) (vm.Machine, error)
}

// Adopt implements vm.Adopter.
func (h heirs) Adopt(ctx context.Context, s vm.Spec, _ int, _ uint64) (vm.Machine, error) {
	return h.adopt(ctx, s.ID)
}

// orphan writes the record of a runner with a job, whose VMM is a process that does nothing. change bends it. It returns
// what reports whether the process lives.
func (w *world) orphan(id string, change map[string]any) (lives func() bool) {
	w.t.Helper()
	sleep := exec.CommandContext(w.t.Context(), "sleep", "60")
	if err := sleep.Start(); err != nil {
		w.t.Fatal(err)
	}
	ended := make(chan struct{})
	go func() {
		_ = sleep.Wait()
		close(ended)
	}()
	w.t.Cleanup(func() {
		_ = sleep.Process.Kill()
		<-ended
	})
	start, err := vm.ProcessStart(sleep.Process.Pid)
	if err != nil {
		w.t.Fatal(err)
	}
	rec := map[string]any{
		"version": 1, "pid": sleep.Process.Pid, "start": start, "register": true, "github_id": 1, "shape": flint.Shape{CPUs: 1, Memory: flint.MiB},
		"runner": flint.Runner{
			ID: id, Pool: "pool", Phase: flint.Running, Job: &flint.Job{Name: "build"},
			Timeline: flint.Timeline{flint.Registered: time.Now(), flint.Running: time.Now()},
		},
	}
	for k, v := range change {
		rec[k] = v
	}
	b, err := json.Marshal(rec)
	if err == nil {
		err = os.MkdirAll(filepath.Join(w.dir, id), 0o700)
	}
	if err == nil {
		err = os.WriteFile(filepath.Join(w.dir, id, "runner.json"), b, 0o600)
	}
	if err != nil {
		w.t.Fatal(err)
	}
	w.github.registered[id] = 1
	return func() bool {
		is, err := vm.ProcessStart(sleep.Process.Pid)
		return err == nil && is == start
	}
}

// TestStopUnderAdoptionEndsNoVM: a process that is told to stop while it starts leaves every VM as it was.
func TestStopUnderAdoptionEndsNoVM(t *testing.T) {
	for name, early := range map[string]bool{"before the first": true, "at the first": false} {
		t.Run(name, func(t *testing.T) {
			w := newWorld(t, &vmtest.Fake{})
			one, two := w.orphan("flint-a", nil), w.orphan("flint-b", nil)
			ctx, stop := context.WithCancel(t.Context())
			if early {
				stop()
			}
			tried := 0
			w.config.Driver = heirs{w.fake, func(ctx context.Context, _ string) (vm.Machine, error) {
				tried++
				stop()
				return nil, ctx.Err()
			}}
			closed := 0
			w.config.Reattach = func(context.Context, string) (host.Port, error) {
				return host.Port{Close: func(context.Context) error { closed++; return nil }}, nil
			}
			h := host.New(w.config)
			if err := h.Adopt(ctx); !errors.Is(err, context.Canceled) {
				t.Errorf("adopt: %v", err)
			}
			if !one() || !two() || closed != 0 || tried > 1 {
				t.Errorf("VMMs live: %v, %v; %d ports closed, %d adoptions tried", one(), two(), closed, tried)
			}
			if left, err := host.Survivors(w.dir); err != nil || len(left) != 2 {
				t.Errorf("left to the next process: %q", left)
			}
		})
	}
}

// TestAdoptionIsTriedAgain: what fails for a moment does not end a VM.
func TestAdoptionIsTriedAgain(t *testing.T) {
	w := newWorld(t, &vmtest.Fake{})
	lives := w.orphan("flint-a", nil)
	found, tried, closed := 0, 0, 0
	w.config.Driver = heirs{w.fake, func(context.Context, string) (vm.Machine, error) {
		if tried++; tried == 1 {
			return nil, syscall.EMFILE
		}
		return standIn{}, nil
	}}
	w.config.Reattach = func(context.Context, string) (host.Port, error) {
		if found++; found == 1 {
			return host.Port{}, syscall.ENOBUFS
		}
		return host.Port{Close: func(context.Context) error { closed++; return nil }}, nil
	}
	h := host.New(w.config)
	if err := errors.Join(h.Adopt(t.Context()), h.Sweep(t.Context())); err != nil {
		t.Error(err)
	}
	if s := h.State(); !lives() || len(s.Runners) != 1 || found != 2 || tried != 2 || closed != 0 {
		t.Errorf("lives %v, runners %+v; port sought %d times, VMM %d times, %d ports closed", lives(), s.Runners, found, tried, closed)
	}
}

// standIn is the machine of an adopted VM whose guest nobody talks to.
type standIn struct{ vm.Machine }

// Close implements vm.Machine.
func (standIn) Close(context.Context) error { return nil }

// TestProcessOfAnotherBootIsNoVMM: the pid and the start time of a record may be anybody's after a reboot.
func TestProcessOfAnotherBootIsNoVMM(t *testing.T) {
	w := newWorld(t, &vmtest.Fake{})
	lives := w.orphan("flint-a", map[string]any{"boot": "7f2c3ac7-0e5b-4b92-a2a1-5b5fbd5c3a11"})
	w.config.Driver = heirs{w.fake, func(_ context.Context, id string) (vm.Machine, error) {
		t.Errorf("%s is adopted", id)
		return nil, flint.ErrNotFound
	}}
	told := 0
	w.config.Lost = func(flint.Runner, flint.Job) { told++ }
	if left, err := host.Survivors(w.dir); err != nil || len(left) != 0 {
		t.Errorf("survivors: %q", left)
	}
	h := host.New(w.config)
	if err := errors.Join(h.Adopt(t.Context()), h.Sweep(t.Context())); err != nil {
		t.Error(err)
	}
	if !lives() {
		t.Error("a process that is no VMM was killed")
	}
	if told != 1 {
		t.Errorf("the job's loss was told %d times", told)
	}
	w.nothingLeft()
}

// TestProcessOfThisBootIsTheVMM proves the test above: without the mark of another boot the process is taken for the VMM.
func TestProcessOfThisBootIsTheVMM(t *testing.T) {
	w := newWorld(t, &vmtest.Fake{})
	lives := w.orphan("flint-a", nil)
	if err := host.New(w.config).Sweep(t.Context()); err != nil {
		t.Error(err)
	}
	if lives() {
		t.Error("the VMM lives")
	}
	w.nothingLeft()
}

// hangsUp is the machine of an adopted VM whose agent ends every conversation at once.
type hangsUp struct {
	standIn
	dialed *int
}

// Dial implements vm.Machine.
func (m hangsUp) Dial(context.Context, uint32) (net.Conn, error) {
	*m.dialed++
	ours, agents := net.Pipe()
	return ours, agents.Close()
}

// Wait implements vm.Machine.
func (hangsUp) Wait(context.Context) error { return nil }

// TestAgentIsCalledAgain: an agent that hangs up may have taken us for the process before us, and is called again.
func TestAgentIsCalledAgain(t *testing.T) {
	w := newWorld(t, &vmtest.Fake{})
	w.orphan("flint-a", nil)
	dialed := 0
	w.config.Driver = heirs{w.fake, func(context.Context, string) (vm.Machine, error) { return hangsUp{dialed: &dialed}, nil }}
	w.config.Reattach = func(context.Context, string) (host.Port, error) {
		return host.Port{Close: func(context.Context) error { return nil }}, nil
	}
	h := host.New(w.config)
	if err := h.Adopt(t.Context()); err != nil {
		t.Fatal(err)
	}
	var lost error
	h.Resume(t.Context(), func(_ flint.Result, err error) { lost = err })
	var fault *flint.Fault
	if !errors.As(lost, &fault) || fault.Code != "vm.lost" || dialed < 2 {
		t.Errorf("called %d times, ended with %v", dialed, lost)
	}
}
