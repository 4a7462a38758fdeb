package host

import (
	"context"
	"errors"
	"log/slog"
	"testing"
	"testing/synctest"
	"time"

	"flint"
)

// TestOverdueBeforeThereIsWork: GitHub says that the job of an adopted runner is over, and its agent answers only after the time
// its program has left. That the program goes on must end the work all the same.
func TestOverdueBeforeThereIsWork(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		h := New(Config{Dir: t.TempDir(), Deadlines: Deadlines{Finish: time.Second}, Log: slog.New(slog.DiscardHandler)})
		l := newLife(h, flint.Runner{ID: "flint-a", Timeline: flint.Timeline{}}, Supply{})
		if err := l.record(); err != nil {
			t.Fatal(err)
		}
		if err := l.note(flint.JobEvent{Kind: flint.JobCompleted, Runner: "flint-a"}); err != nil {
			t.Fatal(err)
		}
		<-time.After(2 * time.Second) // it fires, and there is nothing to end
		work, end := context.WithCancelCause(t.Context())
		defer end(nil)
		h.onStop(l, nil, end)
		l.expectEnd()
		<-time.After(time.Millisecond)
		synctest.Wait()
		if err := context.Cause(work); !errors.Is(err, flint.ErrTimeout) {
			t.Errorf("the work ended with %v", err)
		}
	})
}
