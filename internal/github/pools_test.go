package github

import (
	"testing"
	"time"

	"flint"
)

// TestPoolsThatComeAndGo while the client runs.
func TestPoolsThatComeAndGo(t *testing.T) {
	bubble(t, nil, func(t *testing.T, d *desk, stop func()) {
		settle(10 * time.Second)
		reg, err := d.Register(t.Context(), one)
		if err != nil {
			t.Fatal(err)
		}

		// What is not GitHub's to know leaves the session as it is; what is wrong changes nothing.
		if err := d.SetPools([]flint.Pool{{Name: "flint", Max: 9}}); err != nil {
			t.Fatal(err)
		}
		if err := d.SetPools([]flint.Pool{{Name: "other"}, {Name: "third", Labels: []string{"OTHER"}}}); code(err) != "github.pool" {
			t.Errorf("two pools of one label: %v", err)
		}
		settle(time.Minute)
		if opened, closed := d.far.count("POST sessions"), d.far.count("DELETE sessions"); opened != 1 || closed != 0 {
			t.Errorf("%d sessions opened, %d deleted, for nothing", opened, closed)
		}
		if got := d.Demand(); len(got) != 1 || got[0].Pool != "flint" {
			t.Errorf("demand %+v", got)
		}

		if err := d.SetPools([]flint.Pool{{Name: "other", Max: 1}}); err != nil {
			t.Fatal(err)
		}
		settle(10 * time.Second)
		if opened, closed := d.far.count("POST sessions"), d.far.count("DELETE sessions"); opened != 2 || closed != 1 {
			t.Errorf("%d sessions opened, %d deleted; want 2, 1", opened, closed)
		}
		if got := d.Demand(); len(got) != 1 || got[0].Pool != "other" {
			t.Errorf("demand %+v", got)
		}
		if w := d.Waiting(); len(w) != 0 {
			t.Errorf("waiting: %v", w)
		}
		d.Capacity("flint", 3) // the scheduler may be late
		if _, err := d.Register(t.Context(), flint.Runner{ID: "flint-x", Pool: "flint"}); err == nil {
			t.Error("a runner of a pool that is gone is registered")
		}
		if err := d.Remove(t.Context(), one.ID, reg.GitHubID); err != nil || len(d.far.agents) != 0 {
			t.Errorf("remove a runner of a pool that is gone: %v, left %v", err, d.far.agents)
		}
		stop()
		if closed := d.far.count("DELETE sessions"); closed != 2 {
			t.Errorf("%d sessions deleted at the end", closed)
		}
	})
}
