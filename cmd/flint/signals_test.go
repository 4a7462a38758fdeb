package main

import (
	"bytes"
	"strings"
	"syscall"
	"testing"
	"time"

	"flint"
	"flint/internal/api"
)

// send sends this program a signal and waits until is true.
func send(t *testing.T, sig syscall.Signal, c <-chan struct{}) {
	t.Helper()
	if err := syscall.Kill(syscall.Getpid(), sig); err != nil {
		t.Fatal(err)
	}
	select {
	case <-c:
	case <-time.After(time.Minute):
		t.Fatalf("nothing comes of %v", sig)
	}
}

func TestHangupReloadsAndASecondSignalHurries(t *testing.T) {
	s := newSignals()
	ctx, stop := s.watch(t.Context())
	defer stop()
	reload := s.takeReloads()
	send(t, syscall.SIGHUP, reload)
	if ctx.Err() != nil {
		t.Fatal("SIGHUP ends flint serve")
	}
	send(t, syscall.SIGTERM, ctx.Done())
	send(t, syscall.SIGINT, s.hurry)
	send(t, syscall.SIGHUP, reload)
}

func TestHangupEndsOtherCommands(t *testing.T) {
	ctx, stop := newSignals().watch(t.Context())
	defer stop()
	send(t, syscall.SIGHUP, ctx.Done())
}

func TestTablesOfHostsAndReloads(t *testing.T) {
	var b bytes.Buffer
	showHosts(&b, []api.Host{{
		Name: "h1\x1b[2J", State: api.HostDraining, Runners: make([]flint.Runner, 2), CPUs: api.Room{Free: 1, Of: 8},
		Memory: api.Room{Free: 1 << 30, Of: 1 << 34}, Reasons: []flint.Reason{flint.Because("host.draining", "it drains since 12:03, by a person")},
	}})
	for _, want := range []string{"draining        2     1 of 8  1GiB of 16GiB", "h1[2J: it drains since 12:03, by a person [host.draining]"} {
		if !strings.Contains(b.String(), want) {
			t.Errorf("%q is not in\n%s", want, &b)
		}
	}
	b.Reset()
	showReloaded(&b, api.Reloaded{
		Applied: []api.Change{{Key: "pools[b]", To: "given", Note: "starts when its image is ready"}},
		Restart: []api.Change{{Key: "state_dir", From: "/a", To: "/b"}},
	})
	for _, want := range []string{"pools[b]", "applied: starts when its image is ready", "state_dir", "needs a restart"} {
		if !strings.Contains(b.String(), want) {
			t.Errorf("%q is not in\n%s", want, &b)
		}
	}
	b.Reset()
	if showReloaded(&b, api.Reloaded{}); b.String() != "Nothing has changed.\n" {
		t.Errorf("no change is shown as %q", &b)
	}
}
