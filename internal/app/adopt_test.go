package app

import (
	"context"
	"encoding/json"
	"errors"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"testing"
	"time"

	"flint"
	"flint/internal/host"
	"flint/internal/vm"
	"flint/internal/vm/vmtest"
)

// TestStopWhileStartingEndsNoVM: who is told to stop before it has adopted the VMs of an earlier process leaves them.
func TestStopWhileStartingEndsNoVM(t *testing.T) {
	c := newRig(t, 1)
	c.opt.Outlive = true
	sleep := exec.CommandContext(t.Context(), "sleep", "60")
	if err := sleep.Start(); err != nil {
		t.Fatal(err)
	}
	ended := make(chan struct{})
	go func() {
		_ = sleep.Wait()
		close(ended)
	}()
	defer func() {
		_ = sleep.Process.Kill()
		<-ended
	}()
	start, err := vm.ProcessStart(sleep.Process.Pid)
	if err != nil {
		t.Fatal(err)
	}
	record, err := json.Marshal(map[string]any{
		"version": 1, "pid": sleep.Process.Pid, "start": start, "shape": flint.Shape{CPUs: 1, Memory: flint.MiB},
		"runner": flint.Runner{ID: "flint-a", Pool: "flint", Phase: flint.Running, Timeline: flint.Timeline{flint.Registered: time.Now()}},
	})
	dir := filepath.Join(c.dir, "runners", "flint-a")
	if err = errors.Join(err, os.MkdirAll(dir, 0o700)); err == nil {
		err = os.WriteFile(filepath.Join(dir, "runner.json"), record, 0o600)
	}
	if err != nil {
		t.Fatal(err)
	}
	ctx, stop := context.WithCancel(t.Context())
	stop()
	if err := c.Connect(ctx); !errors.Is(err, context.Canceled) {
		t.Errorf("connect: %v", err)
	}
	if err := c.Close(t.Context()); err != nil {
		t.Error(err)
	}
	if is, err := vm.ProcessStart(sleep.Process.Pid); err != nil || is != start {
		t.Errorf("the VMM was ended: %v", err)
	}
	if left, err := c.survivors(); len(left) != 1 || err != nil || !c.leaves() {
		t.Errorf("left to the next process: %q, %v", left, err)
	}
}

// TestUnreadableRecordsLeaveTheNetwork: where the records cannot be listed, VMs may live that need it.
func TestUnreadableRecordsLeaveTheNetwork(t *testing.T) {
	c := newRig(t, 1)
	c.opt.Outlive = true
	if c.leaves() {
		t.Error("there is nothing to leave")
	}
	err := os.MkdirAll(c.dir, 0o755)
	if err == nil {
		err = os.WriteFile(filepath.Join(c.dir, "runners"), nil, 0o600)
	}
	if err != nil {
		t.Fatal(err)
	}
	if !c.leaves() {
		t.Error("the network is closed")
	}
	if err := c.openNetwork(t.Context()); err == nil || c.net != nil {
		t.Errorf("the network is opened: %v", err)
	}
}

// heir finds that every VM of an earlier process has ended.
type heir struct{ *vmtest.Fake }

func (heir) Adopt(context.Context, vm.Spec, int, uint64) (vm.Machine, error) {
	return nil, flint.ErrNotFound
}

// away is a GitHub that never answers.
type away struct{}

func (away) RoundTrip(r *http.Request) (*http.Response, error) {
	<-r.Context().Done()
	return nil, r.Context().Err()
}

// TestAdoptedVMsDoNotWaitForGitHub: what is left of another runner is asked for in vain meanwhile.
func TestAdoptedVMsDoNotWaitForGitHub(t *testing.T) {
	c := newRig(t, 1)
	c.opt.Outlive, c.driver, c.transport = true, heir{c.fake}, away{}
	c.reattach = func(context.Context, string) (host.Port, error) { return host.Port{}, flint.ErrNotFound }
	for id, record := range map[string]string{
		"flint-a": `{"version":1,"runner":{"id":"flint-a","phase":"running"},"shape":{"CPUs":1},"exit":{}}`,
		"flint-b": `{"version":1,"runner":{"id":"flint-b","phase":"booting"},"register":true}`,
	} {
		dir := filepath.Join(c.dir, "runners", id)
		if err := errors.Join(os.MkdirAll(dir, 0o700), os.WriteFile(filepath.Join(dir, "runner.json"), []byte(record), 0o600)); err != nil {
			t.Fatal(err)
		}
	}
	ended := make(chan string, 1)
	c.opt.Result = func(res flint.Result, _ error) { ended <- res.Runner.ID }
	ctx, stop := context.WithCancel(t.Context())
	connected := make(chan error, 1)
	go func() { connected <- c.Connect(ctx) }()
	select {
	case id := <-ended:
		if id != "flint-a" {
			t.Errorf("%s ended", id)
		}
	case err := <-connected:
		t.Errorf("GitHub was waited for: %v", err)
		connected <- err
	}
	stop()
	if err := errors.Join(<-connected, c.Close(t.Context())); err != nil {
		t.Error(err)
	}
}
