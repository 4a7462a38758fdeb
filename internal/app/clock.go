package app

import (
	"context"
	"time"
)

const (
	// clockLook is how often is looked whether the machine's clock was set.
	clockLook = 10 * time.Second
	// clockSlack is how far it may drift meanwhile: NTP slews at most 5 ms a look, and a leap second is one.
	clockSlack = 5 * time.Second
)

// watchClock says when somebody sets the machine's clock, until ctx ends. Flint counts no time by it, but who reads the
// log should know why its times jump, and programs that check certificates look at it.
func (a *App) watchClock(ctx context.Context, now func() time.Time) error {
	tick := time.NewTicker(clockLook)
	defer tick.Stop()
	last, wall := time.Now(), now()
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-tick.C:
		}
		t, w := time.Now(), now()
		if set := w.Sub(wall) - t.Sub(last); set.Abs() > clockSlack {
			a.log.Warn("the machine's clock was set, or the machine slept: times in the log and in the timelines of runners jump; "+
				"deadlines go on as before; check that it is right now", "by", set.Round(time.Second))
		}
		last, wall = t, w
	}
}

// timeOfDay is the machine's clock: what is left when the reading that nobody sets is stripped.
func timeOfDay() time.Time { return time.Now().Round(0) }
