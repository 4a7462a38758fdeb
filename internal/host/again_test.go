package host_test

import (
	"context"
	"errors"
	"io"
	"net"
	"testing"
	"testing/synctest"
	"time"

	"flint"
	"flint/internal/guest"
	"flint/internal/host"
	"flint/internal/vm"
	"flint/internal/vm/vmtest"
)

// TestJobGoesOnWhenItsAgentHangsUp: an agent that has not heard of flint for long hangs up; its VM and its job are well.
func TestJobGoesOnWhenItsAgentHangsUp(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		id := host.NewID("flint-", "pool")
		w := newWorld(t, nil)
		w.fake = runner(t, func(_ context.Context, out io.Writer) guest.Exit {
			for _, word := range []string{"one\n", "two\n", "three\n"} {
				_, _ = io.WriteString(out, word)
				time.Sleep(time.Second) // it has been given all its input by then
				if !w.fake.HangUp(id) {
					t.Error("nobody talks with the agent")
				}
				time.Sleep(9 * time.Second)
			}
			return guest.Exit{Code: 3}
		})
		w.config.Driver = w.fake
		res, err := w.host().Run(t.Context(), flint.Runner{ID: id, Pool: "pool"})
		if err != nil || res.Output != "one\ntwo\nthree\n" || res.ExitCode != 3 {
			t.Errorf("its program ended with %d, %v, after %q", res.ExitCode, err, res.Output)
		}
		w.nothingLeft()
	})
}

// deaf is a driver whose guests answer the first call only.
type deaf struct{ *vmtest.Fake }

type deafened struct {
	vm.Machine
	called bool
}

func (d deaf) Boot(ctx context.Context, s vm.Spec) (vm.Machine, error) {
	m, err := d.Fake.Boot(ctx, s)
	return &deafened{Machine: m}, err
}

func (m *deafened) Dial(ctx context.Context, port uint32) (net.Conn, error) {
	if m.called {
		ours, _ := net.Pipe()
		return ours, nil
	}
	m.called = true
	return m.Machine.Dial(ctx, port)
}

// TestCallingAnAgentAgainEnds: one that stays silent is lost in the end, and a host that detaches waits for none.
func TestCallingAnAgentAgainEnds(t *testing.T) {
	for name, tt := range map[string]struct {
		detach bool
		took   time.Duration
	}{"silent": {took: 25 * time.Second}, "detached": {detach: true, took: 10 * time.Second}} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				id := host.NewID("flint-", "pool")
				w := newWorld(t, nil)
				w.fake = runner(t, func(ctx context.Context, _ io.Writer) guest.Exit {
					<-ctx.Done()
					return guest.Exit{}
				})
				w.config.Driver = deaf{w.fake}
				h := w.host()
				defer time.AfterFunc(4*time.Second, func() { w.fake.HangUp(id) }).Stop()
				if tt.detach {
					defer time.AfterFunc(9*time.Second, func() { h.Detach(); h.Stop() }).Stop()
				}
				start := time.Now()
				_, err := h.Run(t.Context(), flint.Runner{ID: id, Pool: "pool"})
				var fault *flint.Fault
				if lost := errors.As(err, &fault) && fault.Code == "vm.lost"; lost == tt.detach || errors.Is(err, host.ErrDetached) != tt.detach {
					t.Errorf("it ended with %v", err)
				}
				if took := time.Since(start); took > tt.took {
					t.Errorf("it took %s", took)
				}
				if tt.detach {
					w.fake.Crash(id)
					return
				}
				w.nothingLeft()
			})
		})
	}
}
