package app

import (
	"context"
	"slices"
	"testing"
	"testing/synctest"
	"time"
)

// TestSweepsComeSoonerWhereSomethingIsLeft: in steps that double after each that was in vain, and at leisure after a clean one.
func TestSweepsComeSoonerWhereSomethingIsLeft(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		ctx, cancel := context.WithCancel(t.Context())
		clean := []bool{false, false, false, false, false, true, false, false, true, true}
		var waits []time.Duration
		last := time.Now()
		regularly(ctx, nil, func(context.Context) bool {
			waits = append(waits, time.Since(last))
			last = time.Now()
			if len(waits) == len(clean) {
				cancel()
			}
			return clean[len(waits)-1]
		})
		s, m := time.Second, time.Minute
		want := []time.Duration{30 * s, m, 2 * m, 4 * m, 5 * m, 5 * m, 5 * m, 30 * s, m, 5 * m}
		if !slices.Equal(waits, want) {
			t.Errorf("waited %v, want %v", waits, want)
		}
	})
}

// TestSweepComesSoonAfterARunnerLeftSomething: and not later because more do.
func TestSweepComesSoonAfterARunnerLeftSomething(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		ctx, cancel := context.WithCancel(t.Context())
		left := make(chan struct{}, 1)
		say := func(after time.Duration) { time.AfterFunc(after, func() { left <- struct{}{} }) }
		var waits []time.Duration
		last := time.Now()
		regularly(ctx, left, func(context.Context) bool {
			waits = append(waits, time.Since(last))
			last = time.Now()
			switch len(waits) {
			case 1:
				say(time.Minute)
				say(80 * time.Second)
				say(89 * time.Second)
			case 2:
				say(295 * time.Second)
			case 3:
				cancel()
			}
			return true
		})
		if want := []time.Duration{30 * time.Second, 90 * time.Second, 5 * time.Minute}; !slices.Equal(waits, want) {
			t.Errorf("waited %v, want %v", waits, want)
		}
	})
}
