package qemu

import (
	"bytes"
	"context"
	"errors"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"flint"
	"flint/internal/vm"
)

// Forget lets go of QEMU as the end of this process would: see vmtest.
func (m *machine) Forget() { m.disconnect() }

// adopted boots a fake QEMU and adopts it. Forgotten says whether its first master lets go of it before.
func adopted(t *testing.T, id string, forgotten bool) (m vm.Machine, first *machine, s vm.Spec) {
	t.Helper()
	d, s := fakeDriver(t, id)
	booted, err := d.Boot(patiently(t), s)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = booted.Close(context.Background()) })
	first = booted.(*machine)
	if forgotten {
		first.Forget()
	}
	pid, start := first.Process()
	if m, err = d.Adopt(patiently(t), vm.Spec{ID: s.ID, Dir: s.Dir}, pid, start); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = m.Close(context.Background()) })
	return m, first, s
}

func TestAdoptedEnds(t *testing.T) {
	for id, want := range map[string]string{ // "" is no error
		"guest-reset":      "",
		"guest-panic":      "kernel panicked",
		"panics":           "kernel panicked",
		"host-signal":      `"host-signal"`,
		"silent":           "without giving a reason",
		"reset-then-fails": "", // its parent alone knows better
	} {
		t.Run(id, func(t *testing.T) {
			m, _, s := adopted(t, "later-"+id, true)
			err := m.Wait(patiently(t))
			if want == "" && err != nil || want != "" && (err == nil || !strings.Contains(err.Error(), want)) {
				t.Errorf("got %v, want %q", err, want)
			}
			if peak := m.(vm.Usage).PeakMemory(); peak < flint.MiB || peak > flint.GiB {
				t.Errorf("peak memory %s", peak)
			}
			if err := m.Close(t.Context()); err != nil {
				t.Errorf("close: %v", err)
			}
			empty(t, s.Dir)
		})
	}
}

// TestAdoptOrphan adopts from a process that really died, whose child is nobody's by then.
func TestAdoptOrphan(t *testing.T) {
	const id = "later-quits"
	dir, pid, start := orphan(t, id)
	d, _ := fakeDriver(t, id)
	m, err := d.Adopt(patiently(t), vm.Spec{ID: id, Dir: dir}, pid, start)
	if err != nil {
		t.Fatal(err)
	}
	if err := m.Close(t.Context()); err != nil {
		t.Errorf("close: %v", err)
	}
	if err := m.Wait(t.Context()); err != nil {
		t.Errorf("wait: %v", err)
	}
	if p, err := vm.OpenProcess(pid, start); !errors.Is(err, flint.ErrNotFound) {
		t.Errorf("process %d: %v, %v", pid, p, err)
	}
	empty(t, dir)
}

func TestAdoptedIsClosed(t *testing.T) {
	for _, id := range []string{"quits", "stubborn"} {
		t.Run(id, func(t *testing.T) {
			m, first, s := adopted(t, "later-"+id, true)
			ctx, cancel := context.WithCancel(t.Context())
			defer cancel()
			if id == "stubborn" {
				cancel() // by force at once
			}
			if err := m.Close(ctx); err != nil {
				t.Errorf("close: %v", err)
			}
			if err := m.Wait(t.Context()); err != nil {
				t.Errorf("wait: %v", err)
			}
			if err := first.Wait(patiently(t)); err == nil {
				t.Error("the first master, who has nothing of its monitor, knows how it ended")
			}
			if id == "quits" && first.proc.cmd.ProcessState.ExitCode() != 0 {
				t.Errorf("it did not end by itself: %s", first.proc.cmd.ProcessState)
			}
			empty(t, s.Dir)
		})
	}
}

func TestAdoptedIsKilled(t *testing.T) {
	m, _, _ := adopted(t, "later-quits", true)
	pid, _ := m.(vm.Process).Process()
	if err := unix.Kill(pid, unix.SIGKILL); err != nil {
		t.Fatal(err)
	}
	if err := m.Wait(patiently(t)); err == nil || !strings.Contains(err.Error(), "without giving a reason") {
		t.Errorf("wait: %v", err)
	}
}

// TestAdoptWithoutMonitor adopts a QEMU whose monitor is another's: it can be ended, but not asked.
func TestAdoptWithoutMonitor(t *testing.T) {
	t.Run("closed", func(t *testing.T) {
		var log bytes.Buffer
		d, s := fakeDriver(t, "quits")
		d.log = slog.New(slog.NewTextHandler(&log, nil))
		first, err := d.Boot(patiently(t), s)
		if err != nil {
			t.Fatal(err)
		}
		defer first.Close(t.Context())
		pid, start := first.(vm.Process).Process()
		m, err := d.Adopt(patiently(t), s, pid, start)
		if err != nil {
			t.Fatal(err)
		}
		if err := m.Close(t.Context()); err != nil {
			t.Errorf("close: %v", err)
		}
		empty(t, s.Dir)
		if !strings.Contains(log.String(), "does not answer") || !strings.Contains(log.String(), "adopted a VM") {
			t.Errorf("log: %s", log.String())
		}
	})
	t.Run("killed", func(t *testing.T) {
		m, _, _ := adopted(t, "quits", false)
		pid, _ := m.(vm.Process).Process()
		if err := unix.Kill(pid, unix.SIGKILL); err != nil {
			t.Fatal(err)
		}
		if err := m.Wait(patiently(t)); err == nil || !strings.Contains(err.Error(), "how cannot be told") {
			t.Errorf("wait: %v", err)
		}
	})
}

func TestAdoptGivesUp(t *testing.T) {
	d, s := fakeDriver(t, "quits")
	m, err := d.Boot(patiently(t), s)
	if err != nil {
		t.Fatal(err)
	}
	defer m.Close(t.Context())
	pid, start := m.(vm.Process).Process()
	for name, within := range map[string]time.Duration{"before": 0, "meanwhile": 20 * time.Millisecond} {
		ctx, cancel := context.WithTimeout(t.Context(), within)
		if m, err := d.Adopt(ctx, s, pid, start); !errors.Is(err, context.DeadlineExceeded) {
			t.Errorf("context over %s: adopted %v, %v", name, m, err)
		}
		cancel()
	}
	// Sockets of a VM that lives, taken away by somebody: that is no VM that is gone.
	elsewhere := vm.Spec{ID: s.ID, Dir: t.TempDir()}
	if m, err := d.Adopt(t.Context(), elsewhere, pid, start); err == nil || errors.Is(err, flint.ErrNotFound) {
		t.Errorf("without sockets: adopted %v, %v", m, err)
	}
	for _, name := range socketNames() {
		if _, err := os.Stat(filepath.Join(s.Dir, name)); err != nil {
			t.Errorf("a failed adoption took its socket: %v", err)
		}
	}
	if unix.Kill(pid, 0) != nil {
		t.Error("a failed adoption killed it")
	}
	dies := make(chan error, 1)
	go func() {
		_, err := d.Adopt(patiently(t), s, pid, start)
		dies <- err
	}()
	if err := unix.Kill(pid, unix.SIGKILL); err != nil {
		t.Fatal(err)
	}
	if err := <-dies; !errors.Is(err, flint.ErrNotFound) {
		t.Errorf("it died during the adoption: %v", err)
	}
}

func TestNamed(t *testing.T) {
	for line, want := range map[string]bool{
		"/usr/bin/qemu\x00-name\x00a\x00-nodefaults\x00": true,
		"/usr/bin/qemu\x00-name\x00ab\x00-nodefaults":    false,
		"/usr/bin/qemu\x00-append\x00-name\x00a\x00":     false,
		"-name\x00a\x00":             false,
		"qemu\x00-name\x00a":         false,
		"qemu\x00-name":              false,
		"":                           false,
		"qemu -name a\x00\x00\x00":   false,
		"qemu\x00-name\x00\x00x\x00": false,
	} {
		id := "a"
		if strings.Contains(line, "-name\x00\x00") {
			id = ""
		}
		if got := named([]byte(line), id); got != want {
			t.Errorf("%q: %v", line, got)
		}
	}
}
