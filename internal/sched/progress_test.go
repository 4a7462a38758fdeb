package sched_test

import (
	"context"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"flint"
	"flint/internal/sched"
)

// stuck is a source that, once told to, answers no more.
type stuck struct {
	*source
	until atomic.Pointer[chan struct{}] // nil: it answers
}

func (s *stuck) Demand() []flint.Demand {
	if until := s.until.Load(); until != nil {
		<-*until
	}
	return s.source.Demand()
}

func TestPassedStandsStillWhenTheLoopDoes(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t, []flint.Pool{pool("a", 1)}, func(ctx context.Context, _ flint.Runner, _ func(flint.Phase)) error {
			<-ctx.Done()
			return nil
		})
		settle(time.Hour)
		if old := time.Since(r.loop.Passed()); old > sched.Interval {
			t.Errorf("an hour after the start the last pass is %s old", old)
		}
	})
	synctest.Test(t, func(t *testing.T) {
		s := &stuck{source: newSource()}
		l := sched.New(sched.Config{Pools: func() []flint.Pool { return nil }, Source: s})
		if !l.Passed().IsZero() {
			t.Error("a loop that does not run has passed")
		}
		ctx, cancel := context.WithCancel(t.Context())
		done := make(chan error)
		go func() { done <- l.Run(ctx) }()
		synctest.Wait()
		until := make(chan struct{})
		s.until.Store(&until)
		settle(time.Minute)
		if old := time.Since(l.Passed()); old < time.Minute {
			t.Errorf("the loop hangs for a minute, and its last pass is %s old", old)
		}
		close(until)
		settle(time.Second)
		if old := time.Since(l.Passed()); old > sched.Interval {
			t.Errorf("the loop goes on, and its last pass is %s old", old)
		}
		cancel()
		<-done
	})
}
