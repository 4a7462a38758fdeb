package app

import (
	"context"
	"encoding/json"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"testing"
	"time"

	"flint"
	"flint/internal/vm"
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
	if err := os.WriteFile(filepath.Join(c.dir, "runners"), nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if !c.leaves() {
		t.Error("the network is closed")
	}
	if err := c.openNetwork(t.Context()); err == nil || c.net != nil {
		t.Errorf("the network is opened: %v", err)
	}
}
