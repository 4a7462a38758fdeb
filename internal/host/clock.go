package host

import (
	"time"

	"golang.org/x/sys/unix"

	"flint"
)

// bootTime is the time since the machine started, sleep included. Unlike the machine's clock nobody sets it (CLOCK_BOOTTIME of
// clock_gettime(2)).
func bootTime() time.Duration {
	var ts unix.Timespec
	if err := unix.ClockGettime(unix.CLOCK_BOOTTIME, &ts); err != nil {
		return 0 // never: the kernel has had it since 2.6.39
	}
	return time.Duration(ts.Nano())
}

// enter notes that a phase begins, unless the runner is past it already.
func (h *Host) enter(r *record, p flint.Phase) {
	if p > r.Runner.Phase {
		r.Runner.Phase = p
	}
	if !r.Runner.Timeline[p].IsZero() {
		return
	}
	if r.Runner.Timeline == nil {
		r.Runner.Timeline = flint.Timeline{}
	}
	if r.Began == nil {
		r.Began = map[flint.Phase]time.Duration{}
	}
	r.Runner.Timeline[p], r.Began[p] = time.Now(), h.c.BootTime()
}

// began is when a phase began, to count from. Where an earlier process has seen that, the time of day it wrote down does not tell:
// the clock may have been set since. The caller holds l.mu.
func (l *life) began(p flint.Phase) time.Time {
	since, ok := l.rec.Began[p]
	if !l.adopted || !ok || l.rec.Boot != bootID() {
		return l.rec.Runner.Timeline[p]
	}
	return time.Now().Add(since - l.h.c.BootTime())
}
