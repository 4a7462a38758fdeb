package host_test

import (
	"context"
	"errors"
	"io"
	"os"
	"path/filepath"
	"testing"

	"flint"
	"flint/internal/guest"
	"flint/internal/host"
	"flint/internal/vm/vmtest"
)

// TestDetachLeavesRunnersThatWork lets go of a VM whose runner GitHub knows: it works on, and everything it has stays.
func TestDetachLeavesRunnersThatWork(t *testing.T) {
	working, killed := make(chan struct{}), make(chan struct{})
	w := newWorld(t, runner(t, func(ctx context.Context, out io.Writer) guest.Exit {
		io.WriteString(out, "Listening for Jobs\n")
		close(working)
		<-ctx.Done()
		close(killed)
		return guest.Exit{}
	}))
	h := w.host()
	ctx, cancel := context.WithCancel(t.Context())
	ended := make(chan error, 1)
	id := host.NewID("flint-", "pool")
	go func() {
		_, err := h.Run(ctx, flint.Runner{ID: id, Pool: "pool"})
		ended <- err
	}()
	<-working
	// It may know its credential before the host knows that it does; with a job nobody doubts it.
	if err := h.Note(t.Context(), flint.JobEvent{Kind: flint.JobStarted, Runner: id, Job: flint.Job{Name: "build"}}); err != nil {
		t.Error(err)
	}
	h.Detach()
	if r := h.State().Refuses; r.Code != "host.stopping" {
		t.Errorf("a host that stops refuses with %+v", r)
	}
	cancel()
	h.Stop()
	if err := <-ended; !errors.Is(err, host.ErrDetached) || !errors.Is(err, flint.ErrStopped) {
		t.Errorf("it ended with %v", err)
	}
	select {
	case <-killed:
		t.Error("its program was ended")
	default:
	}
	if _, ok := w.github.registered[id]; !ok || w.fake.Running() != 1 || w.ports != 1 {
		t.Errorf("registrations %v, %d VMs, %d ports", w.github.registered, w.fake.Running(), w.ports)
	}
	if _, err := os.Stat(filepath.Join(w.dir, id, "runner.json")); err != nil {
		t.Error(err)
	}
	if !h.LetGo() || host.New(w.config).LetGo() {
		t.Error("it does not know what it let go of")
	}
	if err := h.Sweep(t.Context()); err != nil || w.fake.Running() != 1 {
		t.Errorf("a sweep beside it: %v, %d VMs", err, w.fake.Running())
	}
	// What GitHub says while the last message is on its way is still written down.
	if err := h.Note(t.Context(), flint.JobEvent{Kind: flint.JobStarted, Runner: id, Job: flint.Job{Name: "build"}}); err != nil {
		t.Error(err)
	}
	w.fake.Crash(id)
	<-killed
}

// TestDetachEndsRunnersThatGitHubDoesNotKnow leaves nothing that nobody needs.
func TestDetachEndsRunnersThatGitHubDoesNotKnow(t *testing.T) {
	w := newWorld(t, &vmtest.Fake{NeverAnswer: true})
	ctx, cancel := context.WithCancel(t.Context())
	ended := make(chan error, 1)
	booting := make(chan struct{})
	attach := w.config.Attach
	w.config.Attach = func(ctx context.Context, id string) (host.Port, error) {
		defer close(booting)
		return attach(ctx, id)
	}
	h := host.New(w.config)
	if err := h.Sweep(t.Context()); err != nil {
		t.Fatal(err)
	}
	go func() {
		_, err := h.Run(ctx, flint.Runner{ID: host.NewID("flint-", "pool"), Pool: "pool"})
		ended <- err
	}()
	<-booting
	h.Detach()
	cancel()
	h.Stop()
	if err := <-ended; !errors.Is(err, flint.ErrStopped) || errors.Is(err, host.ErrDetached) {
		t.Errorf("it ended with %v", err)
	}
	w.nothingLeft()
}
