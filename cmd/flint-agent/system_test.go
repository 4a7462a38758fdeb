package main

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
	"testing/synctest"
	"time"
)

func TestSettle(t *testing.T) {
	for name, c := range map[string]struct {
		after, want time.Duration // when systemd is up, and how long the agent waits
	}{
		"up already": {0, 0},
		"up later":   {3 * time.Second, 3 * time.Second},
		"never up":   {time.Hour, 40 * time.Second},
	} {
		synctest.Test(t, func(t *testing.T) {
			s := &system{up: filepath.Join(t.TempDir(), "up")}
			come := func() {
				if err := os.WriteFile(s.up, nil, 0o600); err != nil {
					t.Error(err)
				}
			}
			if c.after == 0 {
				come()
			} else {
				defer time.AfterFunc(c.after, come).Stop()
			}
			begin := time.Now()
			err := s.settle(t.Context(), 40*time.Second)
			if took := time.Since(begin); took < c.want || took > c.want+100*time.Millisecond {
				t.Errorf("%s: waited %v", name, took)
			}
			if late := c.after > 40*time.Second; late != (err != nil) || late && !strings.Contains(err.Error(), "after 40s") {
				t.Errorf("%s: %v", name, err)
			}
		})
	}
}
