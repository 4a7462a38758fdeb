package app

import (
	"context"
	"fmt"
	"maps"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/coreos/go-systemd/v22/daemon"
	"golang.org/x/sys/unix"

	"flint"
	"flint/internal/sched"
)

const (
	// beatEvery is how often the scheduler's progress is looked at, and the service manager told, unless its watchdog wants
	// to hear of us more often.
	beatEvery = 5 * time.Second
	// stalledAfter is how old the scheduler's last pass may be.
	stalledAfter = 6 * sched.Interval
	// extension is how much time the service manager is asked for while long work goes on.
	extension = 5 * time.Minute
	// progressEvery is the least time between two requests for more of it.
	progressEvery = 10 * time.Second
)

// notifier tells the service manager (systemd's NOTIFY_SOCKET) how flint is. Without one it says nothing.
type notifier struct {
	mu     sync.Mutex
	status string    // the last that was sent; guarded by mu
	asked  time.Time // when more time was last asked for; guarded by mu
	failed bool      // a notice was lost, and that is logged; guarded by mu
}

// notify sends lines of sd_notify(3).
func (a *App) notify(lines ...string) {
	_, err := daemon.SdNotify(false, strings.Join(lines, "\n"))
	a.notifier.mu.Lock()
	defer a.notifier.mu.Unlock()
	if err != nil && !a.notifier.failed {
		a.log.Warn("the service manager cannot be told how flint is", "err", err)
	}
	a.notifier.failed = err != nil
}

func (a *App) notifyReady() { a.notify(daemon.SdNotifyReady) }

func (a *App) notifyReloading() {
	var now unix.Timespec
	_ = unix.ClockGettime(unix.CLOCK_MONOTONIC, &now) // it always exists
	a.notify(daemon.SdNotifyReloading, fmt.Sprintf("MONOTONIC_USEC=%d", now.Nano()/1000))
}

func extend(d time.Duration) string { return fmt.Sprintf("EXTEND_TIMEOUT_USEC=%d", d.Microseconds()) }

// progressTo tells the service manager of long work beside p, so that a start that makes images is neither silent nor taken
// for one that hangs.
func (a *App) progressTo(p flint.Progress) flint.Progress {
	return func(m flint.Milestone) {
		p.Report(m)
		now := time.Now()
		a.notifier.mu.Lock()
		due := now.Sub(a.notifier.asked) >= progressEvery || m.Line == "" && !m.Done
		if due {
			a.notifier.asked = now
		}
		a.notifier.mu.Unlock()
		switch {
		case !due:
		case m.Step == "":
			a.notify(extend(extension))
		default:
			a.notify(extend(extension), "STATUS="+oneLine("preparing: "+m.Step))
		}
	}
}

// heartbeat says that flint is ready, and then how it is, until ctx ends; that it stops, when told has ended. The watchdog is
// fed as long as the scheduler makes progress.
func (a *App) heartbeat(ctx, told context.Context, loop *sched.Loop) error {
	every := beatEvery
	watchdog, err := daemon.SdWatchdogEnabled(false)
	if err != nil {
		a.log.Warn("the service manager's watchdog is not understood", "err", err)
	}
	if watchdog > 0 {
		every = min(every, watchdog/4)
	}
	tick := time.NewTicker(every)
	defer tick.Stop()
	start, stalled := time.Now(), false
	stopping := told.Done()
	a.notifyReady()
	for {
		var lines []string
		switch old := age(loop.Passed(), start); {
		case told.Err() != nil: // the loop ends; how long that may take is the service manager's to decide
			lines = append(lines, daemon.SdNotifyWatchdog)
		case old > stalledAfter:
			if !stalled {
				a.log.Error("the scheduler stands still; the watchdog is not fed any more", "since", old.Round(time.Second))
			}
			stalled = true
		default:
			if stalled {
				a.log.Warn("the scheduler goes on")
			}
			stalled = false
			lines = append(lines, daemon.SdNotifyWatchdog)
		}
		if a.drain.Stopping() && told.Err() == nil {
			lines = append(lines, daemon.SdNotifyStopping, extend(extension))
		}
		if status := a.status(loop.Waiting(), stalled); a.notifier.news(status) {
			lines = append(lines, "STATUS="+status)
		}
		if len(lines) > 0 {
			a.notify(lines...)
		}
		select {
		case <-tick.C:
		case <-stopping:
			stopping = nil
			a.notify(daemon.SdNotifyStopping)
		case <-ctx.Done():
			return nil
		}
	}
}

// age is how long ago the scheduler passed, or else flint began to serve.
func age(passed, start time.Time) time.Duration {
	if passed.IsZero() {
		passed = start
	}
	return time.Since(passed)
}

// news reports whether a status is another one than before.
func (n *notifier) news(status string) bool {
	n.mu.Lock()
	defer n.mu.Unlock()
	old := n.status
	n.status = status
	return status != old
}

// status is one line on what runs and what waits.
func (a *App) status(waiting map[string]flint.Reason, stalled bool) string {
	s := a.host.State()
	running := 0
	for _, r := range s.Runners {
		if r.Phase == flint.Running {
			running++
		}
	}
	line := fmt.Sprintf("%d runners, %d with a job", len(s.Runners), running)
	if stalled {
		line = "the scheduler stands still; " + line
	}
	if !s.Refuses.IsZero() {
		line += "; takes no new one: " + s.Refuses.Text
	}
	for _, pool := range slices.Sorted(maps.Keys(waiting)) {
		line += "; jobs wait: " + waiting[pool].Text
	}
	return oneLine(line)
}

// maxStatus bounds the line, in bytes.
const maxStatus = 500

func oneLine(s string) string {
	s = strings.Join(strings.Fields(s), " ")
	if len(s) > maxStatus {
		s = strings.ToValidUTF8(s[:maxStatus], "") + "…"
	}
	return s
}
