package host

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"time"

	"flint"
	"flint/internal/guest"
)

const (
	// registerTime bounds how long GitHub is asked to register a runner.
	registerTime = 30 * time.Second
	// withdrawTime bounds how long GitHub is asked, at one go, whether a runner nobody needs has a job.
	withdrawTime = 30 * time.Second
	// askMin and askMax bound the pause before GitHub is asked again what it did not answer.
	askMin = time.Second
	askMax = time.Minute
)

// errIdle is why a runner ends that got no job. The scheduler does not hold it against the pool.
var errIdle = fmt.Errorf("%w: GitHub gave it no job", flint.ErrUnneeded)

// within is context.WithTimeoutCause, without a time-out where limit is zero.
func within(ctx context.Context, limit time.Duration, cause error) (context.Context, context.CancelFunc) {
	if limit <= 0 {
		return context.WithCancel(ctx)
	}
	return context.WithTimeoutCause(ctx, limit, cause)
}

// left is what of a limit is left that counts from begin, for within: at least a moment.
func left(limit time.Duration, begin time.Time) time.Duration {
	if limit <= 0 {
		return 0
	}
	return max(limit-time.Since(begin), 1)
}

// ended is the error of a work whose context ended for this cause: unless it says more, flint was told to stop.
func ended(cause error) error {
	if explained(cause) {
		return cause
	}
	return fmt.Errorf("%w: %w", flint.ErrStopped, cause)
}

// explained reports whether err says by its kind why a work ended.
func explained(err error) bool {
	for _, kind := range []error{flint.ErrUnneeded, flint.ErrTimeout, flint.ErrStopped, flint.ErrGuest} {
		if errors.Is(err, kind) {
			return true
		}
	}
	return false
}

// register makes GitHub know the runner. Its VM is up by now: asking again what GitHub may grant a moment later costs less than
// another VM.
func (l *life) register(ctx context.Context) (flint.Registration, error) {
	until := time.Now().Add(registerTime)
	for pause := askMin; ; pause = min(2*pause, askMax) {
		reg, err := l.h.c.GitHub.Register(ctx, l.snapshot())
		if err == nil || refusedForGood(err) || ctx.Err() != nil || time.Now().Add(pause).After(until) {
			return reg, err
		}
		l.log.Info("GitHub does not register the runner yet", "err", err)
		t := time.NewTimer(pause)
		select {
		case <-t.C:
		case <-ctx.Done():
			t.Stop()
		}
	}
}

// refusedForGood reports whether GitHub's answer stays the same until a person has done something.
func refusedForGood(err error) bool {
	for _, kind := range []error{flint.ErrConfig, flint.ErrPermission, flint.ErrConflict, flint.ErrNotFound, flint.ErrUsage} {
		if errors.Is(err, kind) {
			return true
		}
	}
	return false
}

// withdraw removes the registration of a runner nobody needs. An error means that it may have a job: GitHub says so, or
// does not answer.
func (l *life) withdraw(ctx context.Context) error {
	l.mu.Lock()
	id := l.rec.GitHubID
	l.mu.Unlock()
	err := ctx.Err()
	for wait := range backoff(ctx, withdrawTime) {
		if err = l.h.c.GitHub.Remove(ctx, l.id(), id); err == nil || errors.Is(err, flint.ErrConflict) {
			return err
		}
		wait()
	}
	return err
}

// yielding derives the context of the work with the agent: it ends with ctx, or with Stop, or because no job comes; but if
// nobody needs the runner any more it goes on when GitHub says that it has a job after all. Where the host detaches, the work
// ends by the end of the session with the agent.
func (l *life) yielding(ctx context.Context, agent *guest.Session) (context.Context, context.CancelFunc) {
	work, end := context.WithCancelCause(context.WithoutCancel(ctx))
	unhook := context.AfterFunc(ctx, func() {
		cause := context.Cause(ctx)
		if errors.Is(cause, flint.ErrUnneeded) {
			if err := l.withdraw(work); err != nil {
				l.log.Info("kept, though nobody seems to need it", "err", err)
				return
			}
		} else if l.h.detach(l) {
			return
		}
		end(ended(cause))
	})
	l.h.onStop(l, func() { _ = agent.Close() }, end) // never an error
	var watching sync.WaitGroup
	watching.Go(func() { l.watch(work, end) })
	return work, func() {
		unhook()
		l.h.onStop(l, nil, nil)
		end(context.Canceled)
		watching.Wait()
	}
}

// watch holds a registered runner to its deadlines until it has a job, and ends its work when it misses one. It returns when
// ctx ends.
func (l *life) watch(ctx context.Context, end context.CancelCauseFunc) {
	d := l.h.c.Deadlines
	l.mu.Lock()
	begin := l.began(flint.Registered)
	l.mu.Unlock()
	if d.Online > 0 {
		if !l.idle(ctx, left(d.Online, begin)) {
			return
		}
		if err := l.online(ctx); err != nil {
			l.endIdle(end, err)
			return
		}
	}
	if begin = begin.Add(d.Online); !l.adopted {
		begin = time.Now()
	}
	if d.Pickup <= 0 || !l.idle(ctx, left(d.Pickup, begin)) {
		return
	}
	for pause := askMin; ; pause = min(2*pause, askMax) {
		err := l.withdraw(ctx)
		switch {
		case err == nil:
			l.endIdle(end, errIdle)
			return
		case errors.Is(err, flint.ErrConflict):
			l.log.Info("kept: GitHub says that it has a job, though nobody told us which", "err", err)
			return
		case ctx.Err() == nil:
			l.log.Warn("no job came, and GitHub does not let go of the runner", "err", err)
		}
		if !l.idle(ctx, pause) {
			return
		}
	}
}

// idle waits for d and reports whether the runner still works then, and has no job as far as is known.
func (l *life) idle(ctx context.Context, d time.Duration) bool {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-t.C:
		return ctx.Err() == nil && !closed(l.taken)
	case <-l.taken:
	case <-ctx.Done():
	}
	return false
}

// endIdle ends the work unless GitHub has given the runner a job in the meantime.
func (l *life) endIdle(end context.CancelCauseFunc, cause error) {
	l.mu.Lock() // nobody notes a job between the look and the end
	defer l.mu.Unlock()
	if !closed(l.taken) {
		end(cause)
	}
}

// online asks whether GitHub sees the runner program, until it answers. It returns nil if it does, and if nobody wants to
// know any more.
func (l *life) online(ctx context.Context) error {
	l.mu.Lock()
	id := l.rec.GitHubID
	l.mu.Unlock()
	for pause := askMin; ; pause = min(2*pause, askMax) {
		s, err := l.h.c.GitHub.Status(ctx, l.id(), id)
		switch {
		case err == nil && (s.Online || s.Busy):
			return nil
		case err == nil:
			return l.offline(errors.New("GitHub says that it is offline"))
		case errors.Is(err, flint.ErrNotFound):
			// A runner that has done its job is forgotten too, and its program is about to end.
			if limit := l.h.c.Deadlines.Finish; limit > 0 && !l.idle(ctx, limit) {
				return nil
			}
			return l.offline(errors.New("GitHub does not know it"))
		case ctx.Err() == nil:
			l.log.Warn("GitHub does not say whether the runner is online", "err", err)
		}
		if !l.idle(ctx, pause) {
			return nil
		}
	}
}

func (l *life) offline(err error) error {
	return &flint.Fault{
		Code: "runner.offline", What: fmt.Sprintf("bring runner %s online within %s", l.id(), l.h.c.Deadlines.Online), Kind: flint.ErrGuest, Err: err,
		Fix: "its runner program never reached GitHub: read what it printed, and check from a VM of the pool (flint run) that GitHub's " +
			"names resolve and answer, that a proxy is set where one is needed, and that this machine's clock is right",
	}
}
