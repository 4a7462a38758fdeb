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
		regularly(ctx, func(context.Context) bool {
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
