package host_test

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"flint"
	"flint/internal/host"
	"flint/internal/vm"
	"flint/internal/vm/vmtest"
)

// TestLostVMSaysWhy: how the VMM ended is known a moment after its agent's silence, and is the better half of the truth.
func TestLostVMSaysWhy(t *testing.T) {
	oom := &flint.Fault{Code: "some.oom", What: "keep the VM within its memory", Err: vm.ErrMemory, Fix: "give it more"}
	for name, tt := range map[string]struct {
		fake *vmtest.Fake
		code string
		says string
		fix  string
		oom  bool
	}{
		"panic at work": {
			fake: &vmtest.Fake{DieAfter: time.Second, Death: errors.New("the guest's kernel panicked"), Exec: untilSignal},
			code: "vm.lost", says: "the guest's kernel panicked", fix: "the end of the guest's console",
		},
		"killed for memory": {
			fake: &vmtest.Fake{DieAfter: time.Second, Death: oom, Exec: untilSignal},
			code: "vm.lost", says: "killed for memory", fix: "give it more", oom: true,
		},
		"no console": {
			fake: &vmtest.Fake{DieAfter: time.Second, NoConsole: true, Exec: untilSignal},
			code: "vm.lost", says: "fake VMM died", fix: "firecracker.serial: true",
		},
		"panic on the way": {
			fake: &vmtest.Fake{DieAfter: time.Second, BootDelay: time.Hour, Death: errors.New("the guest's kernel panicked")},
			code: "vm.boot", says: "the guest's kernel panicked", fix: "the end of the guest's console",
		},
		"silent, with a console": {
			fake: &vmtest.Fake{NeverAnswer: true}, code: "vm.boot", says: "timed out after 20s", fix: "longer vm.boot_timeout",
		},
		"silent, without a console": {
			fake: &vmtest.Fake{NeverAnswer: true, NoConsole: true}, code: "vm.boot", says: "timed out after 20s", fix: "firecracker.serial: true",
		},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				w := newWorld(t, tt.fake)
				res, err := w.host().Run(t.Context(), flint.Runner{ID: host.NewID("flint-", "pool"), Pool: "pool"})
				var fault *flint.Fault
				if !errors.As(err, &fault) || fault.Code != tt.code || !errors.Is(err, flint.ErrGuest) {
					t.Fatalf("it ended with %v; want %s", err, tt.code)
				}
				if !strings.Contains(err.Error(), tt.says) || !strings.Contains(res.Reason.Text, tt.says) || res.OOM != tt.oom {
					t.Errorf("error %v, reason %v, out of memory %v; want %q", err, res.Reason, res.OOM, tt.says)
				}
				if !strings.Contains(fault.Fix, tt.fix) {
					t.Errorf("the fix is %q; want %q", fault.Fix, tt.fix)
				}
				w.nothingLeft()
			})
		})
	}
}

// hanging is a driver whose VMMs stay when their guests are gone, until they are killed; their only console is a log.
type hanging struct{ *vmtest.Fake }

type hung struct{ vm.Machine }

func (d hanging) Boot(ctx context.Context, s vm.Spec) (vm.Machine, error) {
	m, err := d.Fake.Boot(ctx, s)
	return hung{m}, err
}

func (hung) Wait(ctx context.Context) error {
	<-ctx.Done()
	return fmt.Errorf("wait: %w", ctx.Err())
}

func (hung) Console() []byte { return nil }

func (hung) Log() []byte { return []byte("what the VMM said") }

func TestSilentVMMIsGivenUp(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t, &vmtest.Fake{DieAfter: time.Second, Exec: untilSignal})
		w.config.Driver = hanging{w.fake}
		start := time.Now()
		res, err := w.host().Run(t.Context(), flint.Runner{ID: host.NewID("flint-", "pool"), Pool: "pool"})
		if err == nil || !strings.Contains(err.Error(), "its VMM still runs") || time.Since(start) > 10*time.Second {
			t.Errorf("after %s: %v", time.Since(start), err)
		}
		if res.Console != "what the VMM said" {
			t.Errorf("the console is %q", res.Console)
		}
		w.nothingLeft()
	})
}
