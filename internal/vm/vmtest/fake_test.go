package vmtest_test

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"testing"
	"testing/synctest"
	"time"

	"flint"
	"flint/internal/guest"
	"flint/internal/vm"
	"flint/internal/vm/vmtest"
)

func spec(t *testing.T, id string) vm.Spec {
	t.Helper()
	assets, dir := t.TempDir(), t.TempDir()
	for _, name := range []string{"vmlinux", "initrd", "base"} {
		if err := os.WriteFile(filepath.Join(assets, name), []byte(name), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	return vm.Spec{
		ID: id, Kernel: filepath.Join(assets, "vmlinux"), Initrd: filepath.Join(assets, "initrd"), CPUs: 1, Memory: 128 * flint.MiB,
		Drives: []vm.Drive{{ID: "base", Path: filepath.Join(assets, "base"), ReadOnly: true}}, Dir: dir,
	}
}

func TestFake(t *testing.T) {
	f, n := &vmtest.Fake{}, 0
	vmtest.Run(t, func(t *testing.T) (vm.Driver, vm.Spec) {
		n++
		return f, spec(t, fmt.Sprintf("fake-%d", n))
	})
	if f.Running() != 0 {
		t.Errorf("%d machines still run", f.Running())
	}
}

func TestFakeSlow(t *testing.T) {
	n := 0
	vmtest.Run(t, func(t *testing.T) (vm.Driver, vm.Spec) {
		n++
		return &vmtest.Fake{BootDelay: 100 * time.Millisecond}, spec(t, fmt.Sprintf("slow-%d", n))
	})
}

func TestNames(t *testing.T) {
	if vm.AgentPort != guest.Port || vm.AgentPortName != guest.SerialName {
		t.Errorf("vm says port %d, %q; guest says %d, %q", vm.AgentPort, vm.AgentPortName, guest.Port, guest.SerialName)
	}
}

func TestFakeFaults(t *testing.T) {
	t.Run("boot fails", func(t *testing.T) {
		why := errors.New("no more machines")
		f := &vmtest.Fake{FailBoot: why}
		if _, err := f.Boot(t.Context(), spec(t, "a")); !errors.Is(err, why) {
			t.Errorf("boot: %v", err)
		}
	})
	t.Run("never answers", func(t *testing.T) {
		s := spec(t, "a")
		synctest.Test(t, func(t *testing.T) {
			f := &vmtest.Fake{NeverAnswer: true}
			m, err := f.Boot(t.Context(), s)
			if err != nil {
				t.Fatal(err)
			}
			defer m.Close(t.Context())
			ctx, cancel := context.WithTimeout(t.Context(), time.Hour)
			defer cancel()
			conn, err := m.Dial(ctx, guest.Port)
			if err != nil {
				t.Fatal(err)
			}
			if _, err := guest.Attach(ctx, conn, guest.Options{}); !errors.Is(err, context.DeadlineExceeded) {
				t.Errorf("attach: %v", err)
			}
		})
	})
	t.Run("dies", func(t *testing.T) {
		s := spec(t, "a")
		synctest.Test(t, func(t *testing.T) {
			f := &vmtest.Fake{DieAfter: time.Minute}
			began := time.Now()
			m, err := f.Boot(t.Context(), s)
			if err != nil {
				t.Fatal(err)
			}
			if err := m.Wait(t.Context()); !errors.Is(err, vmtest.ErrCrash) || time.Since(began) != time.Minute {
				t.Errorf("wait: %v after %s", err, time.Since(began))
			}
			if err := m.Close(t.Context()); err != nil || f.Running() != 0 {
				t.Errorf("close: %v, %d machines run", err, f.Running())
			}
		})
	})
}

func TestFakeScript(t *testing.T) {
	s := spec(t, "a")
	synctest.Test(t, func(t *testing.T) {
		f := &vmtest.Fake{
			BootDelay: 3 * time.Second,
			Configure: func(c guest.Config) (guest.Configured, error) {
				return guest.Configured{Faults: []string{"hello " + c.Hostname}}, nil
			},
			Exec: func(ctx context.Context, c guest.Command, _ io.Reader, stdout, _ io.Writer) guest.Exit {
				io.WriteString(stdout, c.Args[0])
				<-ctx.Done()
				return guest.Exit{Code: 3}
			},
		}
		began := time.Now()
		m, err := f.Boot(t.Context(), s)
		if err != nil {
			t.Fatal(err)
		}
		defer m.Close(t.Context())
		conn, err := m.Dial(t.Context(), guest.Port)
		if err != nil {
			t.Fatal(err)
		}
		g, err := guest.Attach(t.Context(), conn, guest.Options{})
		if err != nil {
			t.Fatal(err)
		}
		defer g.Close()
		if took := time.Since(began); took < f.BootDelay {
			t.Errorf("the agent answered after %s", took)
		}
		done, err := g.Configure(t.Context(), guest.Config{Hostname: "h", MachineID: "00000000000000000000000000000000"})
		if err != nil || len(done.Faults) != 1 || done.Faults[0] != "hello h" {
			t.Errorf("configured %+v, %v", done, err)
		}
		ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
		defer cancel()
		if _, err := g.Exec(ctx, guest.Command{Args: []string{"forever"}}, guest.IO{}); !errors.Is(err, context.DeadlineExceeded) {
			t.Errorf("exec: %v", err)
		}
	})
}

func TestPatience(t *testing.T) {
	for text, want := range map[string]time.Duration{"": 2 * time.Minute, "5m": 5 * time.Minute} {
		t.Setenv("FLINT_TEST_PATIENCE", text)
		if got := vmtest.Patience(t); got != want {
			t.Errorf("%q: %s; want %s", text, got, want)
		}
	}
}
