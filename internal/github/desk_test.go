package github

import (
	"bytes"
	"context"
	"fmt"
	"log/slog"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"flint"
)

// desk is a client with a far end, and what it persisted and logged.
type desk struct {
	*Client
	far    *far
	log    lockedBuffer
	mu     sync.Mutex
	events []flint.JobEvent
	fail   int // so many calls of Events fail
}

type lockedBuffer struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (l *lockedBuffer) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.Write(p)
}

func (l *lockedBuffer) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.String()
}

func newDesk(t testing.TB, f *far, change func(*Config)) *desk {
	t.Helper()
	d := &desk{far: f}
	cfg := Config{
		Accounts: []Account{{URL: f.base + "/acme", AppID: "Iv1.app", PrivateKey: testPEM()}},
		Owner:    "test-host", Prefix: "flint-", StateDir: t.TempDir(),
		Pools: []flint.Pool{{Name: "flint", Max: 4}}, Log: slog.New(slog.NewTextHandler(&d.log, nil)), Transport: f,
		Events: func(_ context.Context, e flint.JobEvent) error {
			d.mu.Lock()
			defer d.mu.Unlock()
			f.note(fmt.Sprintf("event %d of %s", e.Kind, e.Runner))
			if d.fail > 0 {
				d.fail--
				return fmt.Errorf("disk full")
			}
			d.events = append(d.events, e)
			return nil
		},
	}
	if change != nil {
		change(&cfg)
	}
	c, err := New(cfg)
	if err != nil {
		t.Fatal(err)
	}
	c.jitter = func() float64 { return 0 }
	d.Client = c
	t.Cleanup(func() {
		for _, secret := range []string{secretPAT, secretInst, secretReg, secretQueue, secretJIT, "PRIVATE KEY"} {
			if strings.Contains(d.log.String(), secret) {
				t.Errorf("the log holds %s:\n%s", secret, d.log.String())
			}
		}
	})
	return d
}

// start runs the client; the returned function stops it and waits.
func (d *desk) start(t testing.TB) (stop func()) {
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error)
	go func() { done <- d.Run(ctx) }()
	stop = sync.OnceFunc(func() {
		cancel()
		if err := <-done; err != nil {
			t.Errorf("Run returned %v", err)
		}
	})
	t.Cleanup(stop)
	return stop
}

// settle lets time pass inside a bubble and waits until everybody has done what there is to do.
func settle(d time.Duration) {
	time.Sleep(d)
	synctest.Wait()
}

// since returns the log entries after the first occurrence of what.
func (f *far) since(what string) []string {
	f.mu.Lock()
	defer f.mu.Unlock()
	i := slices.Index(f.log, what)
	return slices.Clone(f.log[max(0, i):])
}
