package host

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"strings"
	"time"

	"flint"
	"flint/internal/vm"
)

// releaseTime bounds the release of everything a runner held.
const releaseTime = time.Minute

// conclusionTime is how long a runner whose VM is gone waits for GitHub's word on its job. It usually comes first.
const conclusionTime = 2 * time.Second

// end releases everything and says how the runner ended. If something could not be released, what Sweep needs to try
// again stays on disk.
func (l *life) end(ctx context.Context, err error) (flint.Result, error) {
	if errors.Is(err, ErrDetached) {
		return l.leave(err)
	}
	if l.recorded {
		uerr := l.update(false, func(r *record) {
			l.h.enter(r, flint.Finishing)
			r.Ending = err != nil
		})
		if uerr != nil {
			l.log.Warn("the record lags behind", "phase", flint.Finishing, "err", uerr)
		}
	}
	l.result.Lost = l.lost(err)
	l.result.Console = strings.ToValidUTF8(string(l.console()), "\uFFFD")
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), releaseTime)
	defer cancel()
	if l.output != nil {
		_ = l.output.close() // what it has is in memory, too
	}
	leftover := l.release(ctx)
	if p, ok := l.machine.(vm.Process); ok && leftover != nil {
		pid, start := p.Process()
		l.h.noteStuck(l.id(), l.shape, process{pid, start}.lives())
	}
	if m, ok := l.machine.(vm.Metrics); ok {
		l.result.VMM = m.Metrics()
	}
	if u, ok := l.machine.(vm.Usage); ok {
		l.result.PeakMemory = u.PeakMemory()
	}
	l.mu.Lock()
	l.h.enter(&l.rec, flint.Gone)
	registered := l.rec.Register
	if l.overdue != nil {
		l.overdue.Stop()
	}
	l.mu.Unlock()
	l.h.mu.Lock()
	l.released = true
	l.h.mu.Unlock()
	if (err == nil || l.result.Lost) && registered {
		l.awaitConclusion(ctx)
	}
	l.h.bury(l, leftover != nil && registered)

	l.mu.Lock()
	defer l.mu.Unlock()
	l.result.Timeline = maps.Clone(l.rec.Runner.Timeline)
	l.result.Runner = l.rec.Runner
	l.result.Runner.Timeline = l.result.Timeline
	l.result.Conclusion = l.conclusion
	if l.output != nil {
		l.result.Output = strings.ToValidUTF8(string(l.output.Bytes()), "\uFFFD")
	}
	l.result.Lost = l.result.Lost && !closed(l.concluded)
	l.result.Reason = l.why(err)
	return l.result, errors.Join(err, leftover)
}

// lost reports whether the runner ended under a job that GitHub has not concluded, without anybody's having ended it. It is
// logged at once: GitHub itself notices only when it has heard nothing for minutes.
func (l *life) lost(err error) bool {
	for _, kind := range []error{flint.ErrUnneeded, flint.ErrStopped, flint.ErrTimeout} {
		if errors.Is(err, kind) {
			return false
		}
	}
	l.mu.Lock()
	job := l.rec.Runner.Job
	l.mu.Unlock()
	if job == nil || closed(l.concluded) || err == nil && l.result.Signal == "" {
		return false
	}
	l.log.Error("its VM ended under its job", "job", job.Name, "repository", job.Repository, "run", job.RunID)
	return true
}

// release undoes every step. The record goes last, and only if nothing else is left for Sweep to undo.
func (l *life) release(ctx context.Context) error {
	if err := l.undo.Run(ctx); err != nil {
		l.log.Warn("not everything could be released; flint tries again every few minutes", "err", err)
		return fmt.Errorf("%w: %w", flint.ErrRelease, err)
	}
	if !l.recorded {
		return nil
	}
	l.mu.Lock() // nobody writes the record meanwhile
	defer l.mu.Unlock()
	l.erased = true
	return l.h.erase(l.dir)
}

// awaitConclusion gives GitHub's word on the job, which comes by another way than the end of its VM, a moment to arrive.
func (l *life) awaitConclusion(ctx context.Context) {
	ctx, cancel := context.WithTimeout(ctx, conclusionTime)
	defer cancel()
	select {
	case <-l.concluded:
	case <-ctx.Done():
	}
}
