package sched

import (
	"cmp"
	"fmt"
	"slices"
	"strings"
	"time"

	"flint"
)

// Grace is how long GitHub's number must have stood before an idle runner is stopped because of it.
//
// It covers a race: job A ends and GitHub counts one job less, while A's VM is still on its way down and its runner still
// says Running. For that moment an idle runner looks superfluous although a job of its own is about to reach it. A VM goes
// down within seconds; ten of them cost an idle VM little.
const Grace = 10 * time.Second

// Plan compares what GitHub wants with what the hosts have and says what to do about it. It is pure, and its order is
// deterministic: stops, starts, then waits.
//
// Each pool gets min(Max, Assigned) runners as far as the hosts have room; Planned up to Running count, Finishing
// and Gone do not. Assigned includes jobs that run, so a runner that got a job nobody told us of yet is accounted for. A
// Finishing runner is of no use any more, but its VM is still there: until it is gone no other takes its place under Max.
// Where pools compete for room, the pool whose share of its wish is smallest goes first. A pool GitHub has not spoken of is
// left alone: without knowledge neither a start nor a stop is right. For one that is held nothing is started; its idle
// runners stay while there is demand: GitHub may still give them jobs.
func Plan(now time.Time, pools []flint.Pool, demand []flint.Demand, hosts []flint.HostState) []Action {
	tallies := count(pools, demand, hosts)
	room := newRoom(hosts)
	var actions []Action
	for _, t := range tallies {
		actions = append(actions, t.stops(now)...)
	}
	actions = slices.Grow(actions, mostStarts(tallies, room)) // with thousands of jobs its growth would be most of the work
	for {
		t := neediest(tallies)
		if t == nil {
			break
		}
		host, why := room.place(t.pool.Shape)
		if host == "" {
			t.blocked = why
			continue
		}
		actions = append(actions, Action{Verb: Start, Pool: t.pool.Name, Host: host, Reason: t.startReason()})
		t.have++
	}
	for _, t := range tallies {
		if why := t.waitReason(); !why.IsZero() {
			actions = append(actions, Action{Verb: Wait, Pool: t.pool.Name, Reason: why})
		}
	}
	return actions
}

// tally is one pool's wish and supply.
type tally struct {
	pool    flint.Pool
	demand  flint.Demand
	want    int            // runners the pool should have, hosts permitting
	have    int            // runners planned up to running
	ending  int            // runners whose VM is on its way out
	idle    []flint.Runner // those of them without a job, as far as is known
	blocked flint.Reason   // why no host takes another one
	jobs    flint.Reason   // why one is started for a job
}

// count makes the tallies of all pools GitHub has spoken of, by name.
func count(pools []flint.Pool, demand []flint.Demand, hosts []flint.HostState) []*tally {
	byPool := make(map[string]*tally, len(pools))
	for _, p := range pools {
		byPool[p.Name] = &tally{pool: p, want: -1}
	}
	for _, d := range demand {
		if t := byPool[d.Pool]; t != nil {
			t.demand = d
			t.want = max(0, min(t.pool.Max, d.Assigned))
		}
	}
	for _, h := range hosts {
		for _, r := range h.Runners {
			t := byPool[r.Pool]
			switch {
			case t == nil:
			case supplies(r.Phase):
				t.have++
				if r.Phase < flint.Running {
					t.idle = append(t.idle, r)
				}
			case r.Phase == flint.Finishing:
				t.ending++
			}
		}
	}
	tallies := make([]*tally, 0, len(pools))
	for _, t := range byPool {
		if t.want >= 0 {
			tallies = append(tallies, t)
		}
	}
	slices.SortFunc(tallies, func(a, b *tally) int { return strings.Compare(a.pool.Name, b.pool.Name) })
	return tallies
}

// supplies reports whether a runner in phase p has, or will take, a job.
func supplies(p flint.Phase) bool { return p >= flint.Planned && p <= flint.Running }

// stops ends the newest idle runners that nobody wants any more.
//
// A Running runner is never stopped. Stopping a Registered one can still meet a job that GitHub has just given it: the
// host removes the registration first, which GitHub refuses for a busy runner, and then lets it run.
func (t *tally) stops(now time.Time) []Action {
	n := min(t.have-t.want, len(t.idle))
	if n <= 0 || now.Sub(t.demand.At) < Grace {
		return nil
	}
	newest := slices.Clone(t.idle)
	slices.SortFunc(newest, func(a, b flint.Runner) int {
		return cmp.Or(b.Timeline[flint.Planned].Compare(a.Timeline[flint.Planned]), strings.Compare(b.ID, a.ID))
	})
	actions := make([]Action, 0, n)
	for _, r := range newest[:n] {
		actions = append(actions, Action{
			Verb: Stop, Pool: r.Pool, Host: r.Host, Runner: r.ID,
			Reason: flint.Because("demand.fell", "pool %s needs %s for %s, and has %d",
				r.Pool, plural(t.want, "runner"), plural(t.demand.Assigned, "job"), t.have),
		})
	}
	return actions
}

// neediest returns the pool that has the smallest share of its wish and is not blocked; nil when none wants more.
func neediest(tallies []*tally) *tally {
	var best *tally
	for _, t := range tallies {
		if !t.pool.Held.IsZero() || t.have >= t.want || t.have+t.ending >= t.pool.Max || !t.blocked.IsZero() {
			continue
		}
		// have/want is smaller, without division. The order by name decides between equals.
		if best == nil || t.have*best.want < best.have*t.want {
			best = t
		}
	}
	return best
}

// mostStarts is a bound for how many runners can be started: those that are missing, as far as the smallest of them have room.
func mostStarts(tallies []*tally, r *room) int {
	n, least := 0, flint.Shape{}
	for _, t := range tallies {
		if t.have >= t.want || !t.pool.Held.IsZero() {
			continue
		}
		if n == 0 {
			least = t.pool.Shape
		}
		n += t.want - t.have
		least.CPUs, least.Memory = min(least.CPUs, t.pool.Shape.CPUs), min(least.Memory, t.pool.Shape.Memory)
	}
	return r.fit(least, n)
}

// startReason says why the next one is started. All that are started in one plan for one cause have one reason, which tells
// what the pool had before the plan: with thousands of jobs their sentences would be most of the work.
func (t *tally) startReason() flint.Reason {
	if t.jobs.IsZero() {
		t.jobs = flint.Because("demand.jobs", "GitHub gave pool %s %s, and it has %s",
			t.pool.Name, plural(t.demand.Assigned, "job"), plural(t.have, "runner"))
	}
	return t.jobs
}

// waitReason says why the pool has fewer runners than its jobs need; zero when it has enough.
func (t *tally) waitReason() flint.Reason {
	waiting := max(0, t.demand.Assigned-t.have) + t.demand.Available
	if !t.pool.Held.IsZero() && (waiting > 0 || t.have < t.want) {
		return t.pool.Held
	}
	if t.have < t.want && !t.blocked.IsZero() {
		return flint.Because(t.blocked.Code, "pool %s is %s short: %s", t.pool.Name, plural(t.want-t.have, "runner"), t.blocked.Text)
	}
	if waiting > 0 && t.have+t.ending >= t.pool.Max {
		return flint.Because("pool.max", "%s of pool %s: it has %d of at most %s",
			waitFor(waiting), t.pool.Name, t.have+t.ending, plural(t.pool.Max, "runner"))
	}
	return flint.Reason{}
}

// room is what the hosts still have free.
type room struct {
	hosts []flint.HostState
	taken bool // place has succeeded, so that some host has more on it than its Runners
}

func newRoom(hosts []flint.HostState) *room {
	r := &room{hosts: slices.Clone(hosts)}
	slices.SortFunc(r.hosts, func(a, b flint.HostState) int { return strings.Compare(a.Name, b.Name) })
	return r
}

// place takes shape's room from the host that has most memory left, so that VMs spread. It returns the host's name, or why
// there is none. Disk is watched by the host and not promised away here.
func (r *room) place(shape flint.Shape) (string, flint.Reason) {
	best := -1
	for i := range r.hosts {
		if fits(&r.hosts[i], shape) && (best < 0 || r.hosts[i].Free.Memory > r.hosts[best].Free.Memory) {
			best = i
		}
	}
	if best < 0 {
		return "", r.full(shape)
	}
	take(&r.hosts[best], shape)
	r.taken = true
	return r.hosts[best].Name, flint.Reason{}
}

// take gives a VM of shape its room on h.
func take(h *flint.HostState, shape flint.Shape) {
	h.Free.CPUs -= shape.CPUs
	h.Free.Memory -= shape.Memory + h.Overhead.Of(shape.Memory)
}

// fit returns how many more VMs of shape have room, at most limit.
func (r *room) fit(shape flint.Shape, limit int) int {
	n := 0
	for i := range r.hosts {
		h := &r.hosts[i]
		if !fits(h, shape) {
			continue
		}
		most := limit
		if shape.CPUs > 0 {
			most = min(most, h.Free.CPUs/shape.CPUs)
		}
		if each := shape.Memory + h.Overhead.Of(shape.Memory); each > 0 {
			most = int(min(flint.Bytes(most), (h.Free.Memory+h.Overhead.Fixed)/each))
		}
		if n += most; n >= limit {
			return limit
		}
	}
	return n
}

func fits(h *flint.HostState, s flint.Shape) bool {
	return h.Refuses.IsZero() && h.Free.CPUs >= s.CPUs && h.Free.Memory >= needs(h, s)
}

// needs is how much free memory a VM of shape s needs on h.
func needs(h *flint.HostState, s flint.Shape) flint.Bytes {
	return s.Memory + h.Overhead.Growing(s.Memory)
}

// full says what is missing, by the host that comes closest.
func (r *room) full(shape flint.Shape) flint.Reason {
	if len(r.hosts) == 0 {
		return flint.Because("host.none", "there is no host")
	}
	idle := !r.taken
	var memory, cpus *flint.HostState // most memory free; most CPUs free among those with memory enough
	for i := range r.hosts {
		h := &r.hosts[i]
		if !h.Refuses.IsZero() {
			continue
		}
		idle = idle && len(h.Runners) == 0
		if memory == nil || h.Free.Memory > memory.Free.Memory {
			memory = h
		}
		if h.Free.Memory >= needs(h, shape) && (cpus == nil || h.Free.CPUs > cpus.Free.CPUs) {
			cpus = h
		}
	}
	left := "left"
	if idle {
		left = "with nothing on it: make the pool's vm smaller, or give the host more"
	}
	switch {
	case memory == nil:
		return flint.Because("host.refuses", "host %s takes no runner: %s", r.hosts[0].Name, r.hosts[0].Refuses.Text)
	case cpus != nil:
		return flint.Because("host.cpus", "one needs %s, and host %s, which has most, has %d %s",
			plural(shape.CPUs, "CPU"), cpus.Name, max(0, cpus.Free.CPUs), left)
	default:
		return flint.Because("host.memory", "one needs %s of memory, and host %s, which has most, has %s %s",
			needs(memory, shape), memory.Name, max(0, memory.Free.Memory), left)
	}
}

func waitFor(n int) string {
	if n == 1 {
		return "1 job waits for a runner"
	}
	return fmt.Sprintf("%d jobs wait for a runner", n)
}

func plural(n int, noun string) string {
	if n == 1 {
		return "1 " + noun
	}
	return fmt.Sprintf("%d %ss", n, noun)
}
