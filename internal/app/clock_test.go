package app

import (
	"bytes"
	"context"
	"log/slog"
	"strings"
	"testing"
	"testing/synctest"
	"time"
)

func TestClockThatIsSetIsSaid(t *testing.T) {
	for name, tc := range map[string]struct {
		set  time.Duration
		want string
	}{
		"an hour forwards": {time.Hour, "by=1h0m0s"},
		"an hour back":     {-time.Hour, "by=-1h0m0s"},
		"a leap second":    {time.Second, ""},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				var log bytes.Buffer
				a := &App{log: slog.New(slog.NewTextHandler(&log, nil))}
				at := time.Now().Add(time.Minute + time.Millisecond)
				ctx, stop := context.WithTimeout(t.Context(), 3*time.Minute)
				defer stop()
				err := a.watchClock(ctx, func() time.Time {
					now := timeOfDay()
					if time.Now().After(at) {
						now = now.Add(tc.set)
					}
					return now
				})
				if err != nil {
					t.Error(err)
				}
				if said := log.String(); strings.Count(said, "was set") != min(1, len(tc.want)) || !strings.Contains(said, tc.want) {
					t.Errorf("want %q once, and nothing else:\n%s", tc.want, said)
				}
			})
		})
	}
}
