package app

import (
	"testing"

	"flint"
	"flint/internal/config"
	"flint/internal/sched"
)

// TestPoolThatCouldStartNothing: GitHub gives such a scale set no job and does not say that any waits. A person is told all the
// same.
func TestPoolThatCouldStartNothing(t *testing.T) {
	c := newCoordinator(t, 1, func(cfg *config.Config) {
		cfg.Host.Memory = 0 // what the machine has: where it is configured, such a pool is refused
		cfg.Pools = append(cfg.Pools, config.Pool{Name: "big", Image: "unused", Max: 1, VM: config.Shape{CPUs: 1, Memory: flint.TiB, Disk: flint.GiB}})
	})
	c.serve(t, func() {
		wait(t, "only the pool that has no room is listed", func() bool {
			all, err := c.Explain(t.Context(), "")
			if err != nil {
				t.Fatal(err)
			}
			return len(all) == 1 && all[0].Pool == "big" && all[0].Reason.Code == "host.memory"
		})
	})
	if all := c.waiting(sched.Situation{}); all == nil || len(all) != 0 {
		t.Errorf("nothing waits: %#v; as JSON it must be a list", all)
	}
}
