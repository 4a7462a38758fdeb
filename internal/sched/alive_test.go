package sched_test

import (
	"testing"
	"testing/synctest"
	"time"

	"flint"
	"flint/internal/sched"
)

type fixedSource struct {
	demand   []flint.Demand
	capacity map[string]int
}

func (s *fixedSource) Demand() []flint.Demand      { return s.demand }
func (s *fixedSource) Changed() <-chan struct{}    { return nil }
func (s *fixedSource) Capacity(pool string, n int) { s.capacity[pool] = n }

// TestNoRunnerIsStartedForALostJob: GitHub counts the job of a dead VM for some ten minutes. Meanwhile no VM may be started for
// it, and a new job must get one although the pool's max is 1.
func TestNoRunnerIsStartedForALostJob(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		github := &fixedSource{capacity: map[string]int{}, demand: []flint.Demand{
			{Pool: "a", Assigned: 1, At: time.Now().Add(-time.Minute)}, {Pool: "b", Assigned: 1, At: time.Now().Add(-time.Minute)},
		}}
		gone := map[string]int{}
		s := sched.Alive(github, func() map[string]int { return gone })
		pools := []flint.Pool{{Name: "a", Max: 1}, {Name: "b", Max: 1}}
		starts := func() (n int) {
			for _, a := range sched.Plan(time.Now(), pools, s.Demand(), []flint.HostState{{Name: "here"}}) {
				if a.Verb == sched.Start && a.Pool == "a" {
					n++
				}
			}
			return n
		}
		if n := starts(); n != 1 {
			t.Errorf("%d runners are started for a job, want 1", n)
		}
		gone["a"] = 1
		if n := starts(); n != 0 {
			t.Errorf("%d runners are started for a job that is lost", n)
		}
		lost := time.Now()
		time.Sleep(time.Second)
		if d := s.Demand(); d[0].Assigned != 0 || !d[0].At.Equal(lost) || d[1] != github.demand[1] || github.demand[0].Assigned != 1 {
			t.Errorf("demand %+v of %+v", d, github.demand)
		}
		s.Capacity("a", 1)
		s.Capacity("b", 1)
		if github.capacity["a"] != 2 || github.capacity["b"] != 1 {
			t.Errorf("capacity %v: GitHub would give the pool no job until the lost one is concluded", github.capacity)
		}
		github.demand[0].Assigned = 2
		if n := starts(); n != 1 {
			t.Errorf("%d runners are started for a new job beside the lost one, want 1", n)
		}
		gone["a"] = 3 // GitHub has concluded some of them, and the host has not heard
		if d := s.Demand(); d[0].Assigned != 0 {
			t.Errorf("demand %+v", d)
		}
	})
}
