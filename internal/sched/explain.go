package sched

import (
	"fmt"
	"net/url"
	"strings"
	"time"
	"unicode"

	"flint"
)

// Situation is all that Explain looks at. Every part may be empty.
type Situation struct {
	Now     time.Time // for ages; zero: none is said
	Pools   []flint.Pool
	Demand  []flint.Demand
	Hosts   []flint.HostState
	Waiting map[string]flint.Reason // by pool: why it has fewer runners than its jobs need (Loop.Waiting)
	Sources map[string]flint.Reason // by pool: why nothing, or not all, is heard of its jobs
	Private map[string]bool         // by pool: its runner group does not serve public repositories
}

// Explain says in one sentence why a job is where it is. It is pure. What stands furthest from a runner is said first: a job
// that no pool matches will not run however much room there is. The Reason is never zero.
func Explain(job flint.JobStatus, s Situation) flint.Reason {
	switch job.State {
	case "completed":
		return over(job)
	case "in_progress":
		return s.running(job)
	case "waiting":
		return flint.Because("explain.waiting", "it waits for a deployment review, or for another rule that protects its environment")
	case "pending", "requested":
		return flint.Because("explain.pending", "GitHub holds it back until another run of its concurrency group is over")
	}
	pool, why := s.pool(job)
	if pool == nil {
		return why
	}
	if why := s.Sources[pool.Name]; !why.IsZero() {
		return why
	}
	if !pool.Held.IsZero() {
		return pool.Held
	}
	if job.Public && s.Private[pool.Name] {
		group := pool.Group
		if group == "" {
			group = "default"
		}
		return flint.Because("pool.private", "the runner group %s of pool %s does not serve public repositories, and %s is one; "+
			"allow it in the organisation's settings (Actions, Runner groups)", group, pool.Name, word(job.Repository))
	}
	if why := s.Waiting[pool.Name]; !why.IsZero() {
		return why
	}
	return s.supply(job, *pool)
}

// Closed says why a pool that has no runner could not start one; zero where it could, or has one. A scale set is then given no
// job, and GitHub need not say that any waits.
func (s Situation) Closed(p flint.Pool) flint.Reason {
	if !p.Held.IsZero() {
		return p.Held
	}
	for _, h := range s.Hosts {
		for _, r := range h.Runners {
			if r.Pool == p.Name {
				return flint.Reason{}
			}
		}
	}
	if host, why := newRoom(s.Hosts).place(p.Shape); host == "" {
		return flint.Because(why.Code, "pool %s is given no job, because it has no room for a runner: %s", p.Name, why.Text)
	}
	return flint.Reason{}
}

func over(job flint.JobStatus) flint.Reason {
	how := "it is over"
	if job.Conclusion != "" {
		how += ": its conclusion is " + word(job.Conclusion)
	}
	if job.Runner == "" {
		return flint.Because("explain.completed", "%s; no runner had it", how)
	}
	return flint.Because("explain.completed", "%s; it ran on runner %s", how, word(job.Runner))
}

func (s Situation) running(job flint.JobStatus) flint.Reason {
	for _, h := range s.Hosts {
		for _, r := range h.Runners {
			if r.ID == job.Runner {
				return flint.Because("explain.running", "it runs on runner %s of pool %s, on host %s%s", r.ID, r.Pool, h.Name, s.age(r, flint.Running))
			}
		}
	}
	if job.Runner == "" {
		return flint.Because("explain.running", "it runs; GitHub does not say on which runner")
	}
	return flint.Because("explain.running", "it runs on runner %s, which is no live runner of this flint", word(job.Runner))
}

// pool finds the pool that is to run the job: of those of its server and repository that have all its labels the one with the
// fewest labels of its own, in the order of the configuration, whichever account sees the job. Without one it says why.
func (s Situation) pool(job flint.JobStatus) (*flint.Pool, flint.Reason) {
	var best, nearest *flint.Pool
	var misses []string
	for i := range s.Pools {
		p := s.Pools[i]
		if len(p.Labels) == 0 {
			p.Labels = []string{p.Name} // as its scale set is called
		}
		if p.Account != job.Account && !sameServer(p.Scope, job.URL) || !covers(p.Scope, job.Repository) {
			continue
		}
		missing := p.Misses(job.Labels)
		switch {
		case len(missing) > 0 && (nearest == nil || len(missing) < len(misses)):
			nearest, misses = &p, missing
		case len(missing) == 0 && (best == nil || len(p.Labels) < len(best.Labels)):
			best = &p
		}
	}
	switch {
	case best != nil:
		return best, flint.Reason{}
	case nearest == nil:
		return nil, flint.Because("job.unmatched", "no pool serves the repository %s", word(job.Repository))
	case hosted(job.Labels):
		return nil, flint.Because("job.unmatched", "it asks for a machine of GitHub's own: no pool has the label %s", words(job.Labels))
	}
	noun := "labels"
	if len(job.Labels) == 1 {
		noun = "label"
	}
	return nil, flint.Because("job.unmatched", "no pool has the %s %s: the nearest, %s, lacks %s", noun, words(job.Labels), nearest.Name, words(misses))
}

// sameServer reports whether two URLs are known to be of one server.
func sameServer(a, b string) bool {
	x, errX := url.Parse(a)
	y, errY := url.Parse(b)
	if errX != nil || errY != nil || x.Host == "" {
		return false
	}
	return strings.EqualFold(strings.TrimPrefix(x.Host, "www."), strings.TrimPrefix(y.Host, "www."))
}

// covers reports whether the organisation, repository or enterprise at a URL has the repository (owner/name).
func covers(scope, repository string) bool {
	u, err := url.Parse(scope)
	if err != nil || repository == "" {
		return true
	}
	path := strings.Trim(u.Path, "/")
	owner, name, many := strings.Cut(path, "/")
	switch {
	case path == "":
		return true
	case many && owner == "enterprises":
		return true // which organisations are in it GitHub knows
	case many && name != "":
		return strings.EqualFold(path, repository)
	}
	has, _, _ := strings.Cut(repository, "/")
	return strings.EqualFold(owner, has)
}

// hosted reports whether the labels are those of GitHub's own machines.
func hosted(labels []string) bool {
	if len(labels) != 1 {
		return false
	}
	for _, system := range []string{"ubuntu-", "windows-", "macos-"} {
		if strings.HasPrefix(strings.ToLower(labels[0]), system) {
			return true
		}
	}
	return false
}

// supply explains a job whose pool GitHub and the scheduler have no complaint about.
func (s Situation) supply(job flint.JobStatus, p flint.Pool) flint.Reason {
	var first *flint.Runner // of those that have no job, the one that is furthest
	coming, running, ending := 0, 0, 0
	for _, h := range s.Hosts {
		for _, r := range h.Runners {
			switch {
			case r.Pool != p.Name:
			case r.Phase == flint.Running:
				running++
			case r.Phase == flint.Finishing:
				ending++
			case supplies(r.Phase):
				coming++
				if first == nil || r.Phase > first.Phase || r.Phase == first.Phase && begun(r).Before(begun(*first)) {
					r.Host = h.Name
					first = &r
				}
			}
		}
	}
	var demand *flint.Demand
	for i := range s.Demand {
		if s.Demand[i].Pool == p.Name {
			demand = &s.Demand[i]
		}
	}
	if coming == 0 {
		if have := running + ending; have >= p.Max {
			return flint.Because("pool.max", "pool %s has %d of at most %s, and none of them is free", p.Name, have, plural(p.Max, "runner"))
		}
		if host, why := newRoom(s.Hosts).place(p.Shape); host == "" {
			return flint.Because(why.Code, "pool %s has no room for another runner: %s", p.Name, why.Text)
		}
	}
	if demand != nil && demand.Assigned > running {
		if first == nil {
			return flint.Because("explain.coming", "a runner of pool %s is about to be started", p.Name)
		}
		return s.onItsWay(p, *first, coming)
	}
	switch {
	case len(job.Labels) == 0:
		return flint.Because("job.unmatched", "it names a runner group and no label, and GitHub has given it to no pool yet")
	case demand == nil:
		return flint.Because("explain.unoffered", "GitHub has not spoken of pool %s yet", p.Name)
	case first != nil && first.Phase == flint.Registered:
		return flint.Because("explain.unoffered", "GitHub has not given it to pool %s yet, whose runner %s is free%s",
			p.Name, first.ID, s.age(*first, flint.Registered))
	}
	return flint.Because("explain.unoffered", "GitHub has not given it to pool %s yet", p.Name)
}

// onItsWay tells of the first of n runners that have no job yet.
func (s Situation) onItsWay(p flint.Pool, r flint.Runner, n int) flint.Reason {
	what := "a runner is on its way"
	if n > 1 {
		what = fmt.Sprintf("%d runners of pool %s are on their way, one of them", n, p.Name)
	}
	doing := "is " + r.Phase.String()
	if r.Phase == flint.Registered {
		doing = "waits for GitHub to give it a job"
	}
	return flint.Because("explain.coming", "%s: %s on host %s %s%s", what, r.ID, r.Host, doing, s.age(r, r.Phase))
}

// begun is when the runner entered its phase.
func begun(r flint.Runner) time.Time { return r.Timeline[r.Phase] }

// age says for how long a runner has been in a phase, with a comma in front; nothing where that is not known.
func (s Situation) age(r flint.Runner, p flint.Phase) string {
	at := r.Timeline[p]
	if at.IsZero() || s.Now.IsZero() {
		return ""
	}
	return fmt.Sprintf(", for %s", max(0, s.Now.Sub(at)).Round(time.Second))
}

// What GitHub sends is of other people's choosing, and may be long.
const (
	maxWord  = 100 // bytes
	maxWords = 12
)

// word makes a name safe to show in a sentence.
func word(s string) string {
	if s == "" {
		return "without a name"
	}
	if len(s) > maxWord {
		s = s[:maxWord] + "…"
	}
	return strings.Map(func(r rune) rune {
		if !unicode.IsPrint(r) {
			return '\uFFFD'
		}
		return r
	}, s)
}

func words(list []string) string {
	out := make([]string, 0, maxWords+1)
	for i, s := range list {
		if i == maxWords {
			out = append(out, "…")
			break
		}
		out = append(out, word(s))
	}
	return strings.Join(out, ", ")
}
