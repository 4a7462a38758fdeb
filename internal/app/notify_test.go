package app

import (
	"context"
	"log/slog"
	"net"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"golang.org/x/sys/unix"

	"flint"
	"flint/internal/host"
	"flint/internal/sched"
)

// manager is the service manager's end of NOTIFY_SOCKET.
type manager struct{ *net.UnixConn }

func newManager(t *testing.T) manager {
	t.Helper()
	path := filepath.Join(t.TempDir(), "notify")
	conn, err := net.ListenUnixgram("unixgram", &net.UnixAddr{Name: path, Net: "unixgram"})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = conn.Close() })
	t.Setenv("NOTIFY_SOCKET", path)
	return manager{conn}
}

// heard is everything that was said since, without waiting for more.
func (m manager) heard(t *testing.T) string {
	t.Helper()
	raw, err := m.SyscallConn()
	if err != nil {
		t.Fatal(err)
	}
	var all strings.Builder
	buf := make([]byte, 4096)
	if err := raw.Control(func(fd uintptr) {
		for {
			n, _, err := unix.Recvfrom(int(fd), buf, unix.MSG_DONTWAIT)
			if err != nil {
				return
			}
			all.Write(buf[:n])
			all.WriteByte('\n')
		}
	}); err != nil {
		t.Fatal(err)
	}
	return all.String()
}

// quiet is a source without jobs. hold stops whoever asks it.
type quiet struct{ hold chan struct{} }

func (q *quiet) Demand() []flint.Demand {
	select {
	case q.hold <- struct{}{}:
		<-q.hold
	default:
	}
	return nil
}
func (q *quiet) Changed() <-chan struct{} { return nil }
func (q *quiet) Capacity(string, int)     {}

func TestWatchdogIsFedWhileTheSchedulerMakesProgress(t *testing.T) {
	m := newManager(t)
	t.Setenv("WATCHDOG_USEC", "20000000")
	synctest.Test(t, func(t *testing.T) {
		var log strings.Builder
		a := &App{log: slog.New(slog.NewTextHandler(&log, nil)), host: host.New(host.Config{Name: "h1"})}
		q := &quiet{hold: make(chan struct{})}
		loop := sched.New(sched.Config{Pools: func() []flint.Pool { return nil }, Source: q})
		ctx, end := context.WithCancel(t.Context())
		told, stop := context.WithCancel(ctx)
		ended := make(chan error, 2)
		go func() { ended <- loop.Run(told) }()
		go func() { ended <- a.heartbeat(ctx, told, loop) }()
		wait := func(d time.Duration) string {
			var said string
			for range d / time.Second {
				time.Sleep(time.Second)
				synctest.Wait()
				said += m.heard(t) // the socket holds few datagrams
			}
			return said
		}
		if said := wait(time.Second); !strings.HasPrefix(said, "READY=1\n") || !strings.Contains(said, "STATUS=0 runners, 0 with a job") || !strings.Contains(said, "WATCHDOG=1") {
			t.Errorf("at the start it says %q", said)
		}
		if n := strings.Count(wait(time.Minute), "WATCHDOG=1"); n < 10 {
			t.Errorf("fed %d times in a minute, with a watchdog of 20 s", n)
		}
		<-q.hold // the scheduler hangs
		wait(stalledAfter + sched.Interval)
		if said := wait(time.Minute); strings.Contains(said, "WATCHDOG=1") {
			t.Errorf("a scheduler that hangs for more than %s is not noticed: %q", stalledAfter, said)
		}
		if n := strings.Count(log.String(), "the scheduler stands still"); n != 1 {
			t.Errorf("it is logged %d times\n%s", n, &log)
		}
		q.hold <- struct{}{}
		if said := wait(10 * time.Second); !strings.Contains(said, "WATCHDOG=1") || !strings.Contains(log.String(), "the scheduler goes on") {
			t.Errorf("it goes on, and %q is said\n%s", said, &log)
		}
		stop()
		if said := wait(time.Second); !strings.HasPrefix(said, "STOPPING=1\n") {
			t.Errorf("at the end it says %q", said)
		}
		if said := wait(10 * time.Minute); strings.Count(said, "WATCHDOG=1") < 100 {
			t.Errorf("the watchdog would end it while its runners end: %q", said)
		}
		end()
		for range 2 {
			if err := <-ended; err != nil {
				t.Error(err)
			}
		}
	})
}

func TestStartThatTakesLongAsksForTime(t *testing.T) {
	m := newManager(t)
	a := &App{log: slog.New(slog.DiscardHandler)}
	p := a.progressTo(nil)
	p.Step("image ./images/demo")
	for range 8 { // the socket holds few datagrams
		p.Report(flint.Milestone{Step: "image ./images/demo", Line: "a line of its output"})
	}
	said := m.heard(t)
	if !strings.Contains(said, "EXTEND_TIMEOUT_USEC=300000000") || !strings.Contains(said, "STATUS=preparing: image ./images/demo") {
		t.Errorf("it says %q", said)
	}
	if n := strings.Count(said, "EXTEND"); n > 1 {
		t.Errorf("it asks %d times", n)
	}
}

func TestReloadIsToldWithItsTime(t *testing.T) {
	m := newManager(t)
	a := &App{log: slog.New(slog.DiscardHandler)}
	if _, err := a.Reload(t.Context()); err == nil {
		t.Fatal("a configuration of nowhere is reloaded")
	}
	if said := m.heard(t); !regexp.MustCompile(`^RELOADING=1\nMONOTONIC_USEC=[1-9][0-9]+\nREADY=1\n$`).MatchString(said) {
		t.Errorf("it says %q", said)
	}
}

func TestWithoutAServiceManagerNothingIsSaid(t *testing.T) {
	t.Setenv("NOTIFY_SOCKET", "")
	var log strings.Builder
	a := &App{log: slog.New(slog.NewTextHandler(&log, nil))}
	a.notifyReady()
	t.Setenv("NOTIFY_SOCKET", filepath.Join(t.TempDir(), "nobody"))
	if a.notifyReady(); strings.Count(log.String(), "\n") != 1 {
		t.Errorf("log %q; want one line on the socket nobody reads", &log)
	}
}
