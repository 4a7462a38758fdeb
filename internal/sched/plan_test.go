package sched_test

import (
	"fmt"
	"math/rand/v2"
	"reflect"
	"strings"
	"testing"
	"time"

	"flint"
	"flint/internal/sched"
)

var (
	now   = time.Date(2026, 11, 21, 12, 0, 0, 0, time.UTC)
	long  = now.Add(-time.Hour)
	small = flint.Shape{CPUs: 1, Memory: flint.GiB}
)

func pool(name string, limit int) flint.Pool { return flint.Pool{Name: name, Max: limit, Shape: small} }

func wants(pool string, n int) flint.Demand { return flint.Demand{Pool: pool, Assigned: n, At: long} }

func host(name string, cpus int, memory flint.Bytes, runners ...flint.Runner) flint.HostState {
	for i := range runners {
		runners[i].Host = name
	}
	return flint.HostState{Name: name, Free: flint.Shape{CPUs: cpus, Memory: memory}, Runners: runners}
}

func runner(id, pool string, p flint.Phase, age time.Duration) flint.Runner {
	return flint.Runner{ID: id, Pool: pool, Phase: p, Timeline: flint.Timeline{flint.Planned: now.Add(-age)}}
}

// brief renders actions for comparison: "start a@h1 (demand.jobs)".
func brief(actions []sched.Action) string {
	var out []string
	for _, a := range actions {
		switch a.Verb {
		case sched.Start:
			out = append(out, fmt.Sprintf("start %s@%s (%s)", a.Pool, a.Host, a.Reason.Code))
		case sched.Stop:
			out = append(out, fmt.Sprintf("stop %s@%s (%s)", a.Runner, a.Host, a.Reason.Code))
		case sched.Wait:
			out = append(out, fmt.Sprintf("wait %s (%s)", a.Pool, a.Reason.Code))
		}
	}
	return strings.Join(out, ", ")
}

func TestPlan(t *testing.T) {
	held := flint.Pool{Name: "a", Max: 5, Shape: small, Held: flint.Because("runner.deprecated", "the runner software is too old")}
	refuses := host("h1", 8, 8*flint.GiB)
	refuses.Refuses = flint.Because("host.drain", "it is being drained")
	for _, tc := range []struct {
		name   string
		pools  []flint.Pool
		demand []flint.Demand
		hosts  []flint.HostState
		want   string
	}{
		{"nothing to do", []flint.Pool{pool("a", 2)}, []flint.Demand{wants("a", 0)}, []flint.HostState{host("h1", 4, 4*flint.GiB)}, ""},
		{"GitHub has not spoken", []flint.Pool{pool("a", 5)}, nil, []flint.HostState{host("h1", 4, 4*flint.GiB)}, ""},
		{
			"up to max, then wait",
			[]flint.Pool{pool("a", 2)},
			[]flint.Demand{wants("a", 10)},
			[]flint.HostState{host("h1", 8, 8*flint.GiB)},
			"start a@h1 (demand.jobs), start a@h1 (demand.jobs), wait a (pool.max)",
		},
		{
			"jobs GitHub holds back explain themselves",
			[]flint.Pool{pool("a", 1)},
			[]flint.Demand{{Pool: "a", Assigned: 1, Available: 8, At: long}},
			[]flint.HostState{host("h1", 8, 8*flint.GiB, runner("r1", "a", flint.Running, time.Minute))},
			"wait a (pool.max)",
		},
		{
			"fills what fits, then memory",
			[]flint.Pool{pool("a", 9)},
			[]flint.Demand{wants("a", 4)},
			[]flint.HostState{host("h1", 8, 2*flint.GiB)},
			"start a@h1 (demand.jobs), start a@h1 (demand.jobs), wait a (host.memory)",
		},
		{
			"cpus",
			[]flint.Pool{pool("a", 9)},
			[]flint.Demand{wants("a", 2)},
			[]flint.HostState{host("h1", 1, 9*flint.GiB)},
			"start a@h1 (demand.jobs), wait a (host.cpus)",
		},
		{"no host", []flint.Pool{pool("a", 9)}, []flint.Demand{wants("a", 1)}, nil, "wait a (host.none)"},
		{
			"host refuses",
			[]flint.Pool{pool("a", 9)},
			[]flint.Demand{wants("a", 1)},
			[]flint.HostState{refuses},
			"wait a (host.refuses)",
		},
		{
			"spreads by memory",
			[]flint.Pool{pool("a", 9)},
			[]flint.Demand{wants("a", 3)},
			[]flint.HostState{host("h2", 8, 3*flint.GiB), host("h1", 8, 2*flint.GiB)},
			"start a@h2 (demand.jobs), start a@h1 (demand.jobs), start a@h2 (demand.jobs)",
		},
		{
			"fair between pools, largest unmet share first",
			[]flint.Pool{pool("b", 9), pool("a", 9)},
			[]flint.Demand{wants("a", 8), wants("b", 2)},
			[]flint.HostState{host("h1", 5, 9*flint.GiB)},
			"start a@h1 (demand.jobs), start b@h1 (demand.jobs), start a@h1 (demand.jobs), start a@h1 (demand.jobs), " +
				"start a@h1 (demand.jobs), wait a (host.cpus), wait b (host.cpus)",
		},
		{
			"every phase up to running is supply",
			[]flint.Pool{pool("a", 9)},
			[]flint.Demand{wants("a", 6)},
			[]flint.HostState{host("h1", 9, 9*flint.GiB, runner("r1", "a", flint.Planned, 0), runner("r2", "a", flint.Preparing, 0),
				runner("r3", "a", flint.Booting, 0), runner("r4", "a", flint.Ready, 0), runner("r5", "a", flint.Registered, 0),
				runner("r6", "a", flint.Running, 0))},
			"",
		},
		{
			"finishing is not",
			[]flint.Pool{pool("a", 9)},
			[]flint.Demand{wants("a", 1)},
			[]flint.HostState{host("h1", 9, 9*flint.GiB, runner("r1", "a", flint.Finishing, 0), runner("r2", "a", flint.Gone, 0))},
			"start a@h1 (demand.jobs)",
		},
		{
			"finishing keeps its place under max",
			[]flint.Pool{pool("a", 2)},
			[]flint.Demand{wants("a", 2)},
			[]flint.HostState{host("h1", 9, 9*flint.GiB, runner("r1", "a", flint.Finishing, 0), runner("r2", "a", flint.Running, 0))},
			"wait a (pool.max)",
		},
		{
			"a cancelled job stops the newest that has none",
			[]flint.Pool{pool("a", 9)},
			[]flint.Demand{wants("a", 2)},
			[]flint.HostState{host("h1", 9, 9*flint.GiB, runner("r1", "a", flint.Running, time.Hour), runner("r3", "a", flint.Booting, time.Second),
				runner("r2", "a", flint.Registered, time.Minute))},
			"stop r3@h1 (demand.fell)",
		},
		{
			"running ones are never stopped",
			[]flint.Pool{pool("a", 9)},
			[]flint.Demand{wants("a", 0)},
			[]flint.HostState{host("h1", 9, 9*flint.GiB, runner("r1", "a", flint.Running, 0), runner("r2", "a", flint.Registered, 0))},
			"stop r2@h1 (demand.fell)",
		},
		{
			// r1's job has ended and GitHub counts it no more, but r1 still says Running. r2 is for the job that is left.
			"the end of a job does not cost the next one its runner",
			[]flint.Pool{pool("a", 9)},
			[]flint.Demand{{Pool: "a", Assigned: 1, At: now.Add(-time.Second)}},
			[]flint.HostState{host("h1", 9, 9*flint.GiB, runner("r1", "a", flint.Running, time.Hour), runner("r2", "a", flint.Registered, 0))},
			"",
		},
		{
			"a held pool starts nothing and says why",
			[]flint.Pool{held, pool("b", 1)},
			[]flint.Demand{wants("a", 3), wants("b", 1)},
			[]flint.HostState{host("h1", 9, 9*flint.GiB, runner("r1", "a", flint.Running, time.Hour))},
			"start b@h1 (demand.jobs), wait a (runner.deprecated)",
		},
		{
			"a held pool says it of jobs that GitHub holds back",
			[]flint.Pool{held},
			[]flint.Demand{{Pool: "a", Assigned: 1, Available: 1, At: long}},
			[]flint.HostState{host("h1", 9, 9*flint.GiB, runner("r1", "a", flint.Registered, time.Hour))},
			"wait a (runner.deprecated)",
		},
		{
			"a held pool keeps the idle runners there is demand for",
			[]flint.Pool{held},
			[]flint.Demand{wants("a", 2)},
			[]flint.HostState{host("h1", 9, 9*flint.GiB, runner("r1", "a", flint.Registered, time.Hour), runner("r2", "a", flint.Booting, time.Minute))},
			"",
		},
		{
			"a held pool stops those there is no demand for",
			[]flint.Pool{held},
			[]flint.Demand{wants("a", 1)},
			[]flint.HostState{host("h1", 9, 9*flint.GiB, runner("r1", "a", flint.Registered, time.Hour), runner("r2", "a", flint.Booting, time.Minute))},
			"stop r2@h1 (demand.fell)",
		},
		{
			"a held pool at max says that it is held",
			[]flint.Pool{held},
			[]flint.Demand{wants("a", 9)},
			[]flint.HostState{host("h1", 9, 9*flint.GiB, runner("r1", "a", flint.Running, 0), runner("r2", "a", flint.Running, 0),
				runner("r3", "a", flint.Running, 0), runner("r4", "a", flint.Running, 0), runner("r5", "a", flint.Running, 0))},
			"wait a (runner.deprecated)",
		},
		{
			"a pool that is not ours",
			[]flint.Pool{pool("a", 9)},
			[]flint.Demand{wants("a", 0), wants("x", 3)},
			[]flint.HostState{host("h1", 9, 9*flint.GiB, runner("r1", "x", flint.Registered, 0))},
			"",
		},
	} {
		t.Run(tc.name, func(t *testing.T) {
			if got := brief(sched.Plan(now, tc.pools, tc.demand, tc.hosts)); got != tc.want {
				t.Errorf("got  %s\nwant %s", got, tc.want)
			}
		})
	}
}

func TestPlanSaysWhatWouldFit(t *testing.T) {
	big := []flint.Pool{{Name: "big", Max: 4, Shape: flint.Shape{CPUs: 2, Memory: 8 * flint.GiB}}}
	busy := runner("r1", "other", flint.Running, 0)
	for want, hosts := range map[string][]flint.HostState{
		"pool big is 1 runner short: one needs 8GiB of memory, and host h2, which has most, has 6GiB left": {
			host("h1", 8, 3*flint.GiB, busy), host("h2", 8, 6*flint.GiB),
		},
		"pool big is 1 runner short: one needs 8GiB of memory, and host h2, which has most, has 6GiB with nothing on it: " +
			"make the pool's vm smaller, or give the host more": {host("h1", 8, 3*flint.GiB), host("h2", 8, 6*flint.GiB)},
		"pool big is 1 runner short: one needs 2 CPUs, and host h1, which has most, has 1 with nothing on it: " +
			"make the pool's vm smaller, or give the host more": {host("h1", 1, 9*flint.GiB)},
		"pool big is 1 runner short: one needs 2 CPUs, and host h1, which has most, has 1 left": {host("h1", 3, 99*flint.GiB)},
	} {
		n := 1
		if hosts[0].Free.CPUs == 3 { // one is started first
			n = 2
		}
		actions := sched.Plan(now, big, []flint.Demand{wants("big", n)}, hosts)
		if len(actions) != n || actions[n-1].Reason.Text != want {
			t.Errorf("got %v, want %q", actions, want)
		}
	}
}

// world makes a random situation.
func world(r *rand.Rand) ([]flint.Pool, []flint.Demand, []flint.HostState) {
	var pools []flint.Pool
	var demand []flint.Demand
	for i := range 1 + r.IntN(6) {
		p := flint.Pool{
			Name: fmt.Sprintf("p%d", i), Max: r.IntN(8),
			Shape: flint.Shape{CPUs: 1 + r.IntN(4), Memory: flint.Bytes(1+r.IntN(8)) * flint.GiB / 2},
		}
		pools = append(pools, p)
		if r.IntN(5) > 0 {
			demand = append(demand, flint.Demand{Pool: p.Name, Assigned: r.IntN(12), At: now.Add(-time.Duration(r.IntN(20)) * time.Second)})
		}
	}
	var hosts []flint.HostState
	for i := range r.IntN(4) {
		h := host(fmt.Sprintf("h%d", i), r.IntN(16), flint.Bytes(r.IntN(24))*flint.GiB)
		for j := range r.IntN(6) {
			h.Runners = append(h.Runners, runner(fmt.Sprintf("r%d-%d", i, j), pools[r.IntN(len(pools))].Name,
				flint.Phase(1+r.IntN(8)), time.Duration(r.IntN(100))*time.Second))
			h.Runners[j].Host = h.Name
		}
		if r.IntN(6) == 0 {
			h.Refuses = flint.Because("host.drain", "drained")
		}
		hosts = append(hosts, h)
	}
	return pools, demand, hosts
}

// apply carries actions out in copies of the states.
func apply(t *testing.T, pools []flint.Pool, hosts []flint.HostState, actions []sched.Action) []flint.HostState {
	t.Helper()
	out := make([]flint.HostState, len(hosts))
	for i, h := range hosts {
		h.Runners = append([]flint.Runner(nil), h.Runners...)
		out[i] = h
	}
	for n, a := range actions {
		if a.Reason.IsZero() || a.Reason.Text == "" {
			t.Fatalf("action without a reason: %+v", a)
		}
		for i := range out {
			h := &out[i]
			switch {
			case a.Verb == sched.Start && h.Name == a.Host:
				for _, p := range pools {
					if p.Name == a.Pool {
						h.Free.CPUs -= p.Shape.CPUs
						h.Free.Memory -= p.Shape.Memory
					}
				}
				if h.Free.CPUs < 0 || h.Free.Memory < 0 || !h.Refuses.IsZero() {
					t.Fatalf("start on a host that has no room: %+v", h)
				}
				h.Runners = append(h.Runners, runner(fmt.Sprintf("new%d", n), a.Pool, flint.Planned, 0))
			case a.Verb == sched.Stop:
				for j := range h.Runners {
					if h.Runners[j].ID == a.Runner {
						if h.Runners[j].Phase >= flint.Running {
							t.Fatalf("stop of a runner that is %s", h.Runners[j].Phase)
						}
						h.Runners[j].Phase = flint.Finishing
					}
				}
			}
		}
	}
	return out
}

func TestPlanHoldsItsLaws(t *testing.T) {
	for seed := range uint64(3000) {
		r := rand.New(rand.NewPCG(seed, 1))
		pools, demand, hosts := world(r)
		actions := sched.Plan(now, pools, demand, hosts)

		r.Shuffle(len(pools), reflect.Swapper(pools))
		r.Shuffle(len(demand), reflect.Swapper(demand))
		if again := sched.Plan(now, pools, demand, hosts); !reflect.DeepEqual(actions, again) {
			t.Fatalf("seed %d: the order of pools or demand changes the plan:\n%s\n%s", seed, brief(actions), brief(again))
		}
		after := apply(t, pools, hosts, actions)
		for _, p := range pools {
			before, have, started := supply(hosts, p.Name), supply(after, p.Name), 0
			for _, a := range actions {
				if a.Verb == sched.Start && a.Pool == p.Name {
					started++
				}
			}
			if started > 0 && have > p.Max {
				t.Fatalf("seed %d: pool %s has %d VMs of at most %d (had %d)", seed, p.Name, have, p.Max, before)
			}
		}
		for _, a := range sched.Plan(now, pools, demand, after) {
			if a.Verb != sched.Wait {
				t.Fatalf("seed %d: after the plan was carried out there is more to do: %+v", seed, a)
			}
		}
	}
}

func supply(hosts []flint.HostState, pool string) int {
	n := 0
	for _, h := range hosts {
		for _, r := range h.Runners {
			if r.Pool == pool && r.Phase < flint.Gone {
				n++
			}
		}
	}
	return n
}

// BenchmarkPlan: 10,000 queued jobs over 20 pools, on hosts that have room for all, and on hosts that are full of others. The
// goal is 5 ms.
func BenchmarkPlan(b *testing.B) {
	var pools []flint.Pool
	var demand []flint.Demand
	for i := range 20 {
		p := flint.Pool{Name: fmt.Sprintf("p%02d", i), Max: 1000, Shape: flint.Shape{CPUs: 1 + i%4, Memory: flint.Bytes(1+i%8) * flint.GiB}}
		pools = append(pools, p)
		demand = append(demand, wants(p.Name, 500))
	}
	for _, n := range []int{8, 50} {
		for _, running := range []int{0, 5000} {
			var hosts []flint.HostState
			for i := range n {
				h := host(fmt.Sprintf("h%02d", i), 32000/n, 64000*flint.GiB/flint.Bytes(n))
				if running > 0 {
					h.Free.CPUs = 10
				}
				for j := range running / n {
					h.Runners = append(h.Runners, runner(fmt.Sprintf("r%d-%d", i, j), pools[j%len(pools)].Name, flint.Running, time.Hour))
				}
				hosts = append(hosts, h)
			}
			starts := 0
			b.Run(fmt.Sprintf("hosts=%d/running=%d", n, running), func(b *testing.B) {
				for b.Loop() {
					starts = len(sched.Plan(now, pools, demand, hosts))
				}
				b.ReportMetric(float64(starts), "actions")
			})
		}
	}
}

// TestPlanLeavesRoomForOverhead: three VMs of 1GiB need 3GiB and three overheads; Free has kept the fixed part of one back.
func TestPlanLeavesRoomForOverhead(t *testing.T) {
	for _, tt := range []struct {
		free flint.Bytes
		each flint.Overhead
		fit  int
	}{
		{3*flint.GiB + 100*flint.MiB, flint.Overhead{Fixed: 64 * flint.MiB}, 2},
		{3*flint.GiB + 128*flint.MiB, flint.Overhead{Fixed: 64 * flint.MiB}, 3},
		{3*flint.GiB + 128*flint.MiB + 47*flint.MiB, flint.Overhead{Fixed: 64 * flint.MiB, Share: 64}, 2},
		{3*flint.GiB + 128*flint.MiB + 48*flint.MiB, flint.Overhead{Fixed: 64 * flint.MiB, Share: 64}, 3},
		{flint.GiB + 15*flint.MiB, flint.Overhead{Share: 64}, 0},
	} {
		h := host("h1", 9, tt.free)
		h.Overhead = tt.each
		got := brief(sched.Plan(now, []flint.Pool{pool("a", 9)}, []flint.Demand{wants("a", 9)}, []flint.HostState{h}))
		if want := strings.Repeat("start a@h1 (demand.jobs), ", tt.fit) + "wait a (host.memory)"; got != want {
			t.Errorf("%s free, %+v: got %s, want %s", tt.free, tt.each, got, want)
		}
	}
}
