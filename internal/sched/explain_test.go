package sched_test

import (
	"math/rand/v2"
	"strings"
	"testing"
	"time"
	"unicode/utf8"

	"flint"
	"flint/internal/sched"
)

func TestExplain(t *testing.T) {
	labelled := func(name string, labels ...string) flint.Pool {
		p := pool(name, 2)
		p.Labels, p.Scope = labels, "https://github.com/acme"
		return p
	}
	in := func(phase flint.Phase, id, pool string, age time.Duration) flint.Runner {
		r := runner(id, pool, phase, time.Hour)
		r.Timeline[phase] = now.Add(-age)
		return r
	}
	linux, gpu := labelled("linux", "self-hosted", "Linux", "X64"), labelled("gpu", "self-hosted", "linux", "x64", "gpu")
	flintPool := labelled("flint")
	held := labelled("flint")
	held.Held = flint.Because("runner.age", "the runner software of pool flint is 40 days old")
	room := []flint.HostState{host("h1", 8, 8*flint.GiB)}
	queued := func(labels ...string) flint.JobStatus {
		return flint.JobStatus{Job: flint.Job{Repository: "Acme/hello", Name: "build"}, State: "queued", Labels: labels}
	}
	with := func(j flint.JobStatus, change func(*flint.JobStatus)) flint.JobStatus {
		change(&j)
		return j
	}
	public := with(queued("flint"), func(j *flint.JobStatus) { j.Public = true })
	because := func(code string) map[string]flint.Reason {
		return map[string]flint.Reason{"flint": flint.Because(code, "the reason of %s", code)}
	}
	busy := []flint.HostState{host("h1", 6, 6*flint.GiB, in(flint.Running, "r1", "flint", time.Minute), in(flint.Finishing, "r2", "flint", time.Second))}
	everything := sched.Situation{
		Pools: []flint.Pool{held}, Sources: because("github.unreachable"), Private: map[string]bool{"flint": true}, Waiting: because("pool.max"), Hosts: busy,
	}
	without := func(change func(*sched.Situation)) sched.Situation {
		s := everything
		change(&s)
		return s
	}
	drained := host("h1", 8, 8*flint.GiB)
	drained.Refuses = flint.Because("host.drain", "it is being drained")
	other := labelled("flint")
	other.Account = "other"
	enterprise, repository, anywhere := labelled("flint"), labelled("flint"), labelled("flint")
	enterprise.Scope, repository.Scope, anywhere.Scope = "https://ghe.acme.example/enterprises/e", "https://github.com/acme/Hello", ""
	elsewhere, never := labelled("flint"), labelled("flint")
	elsewhere.Scope, never.Max = "https://github.com/acme/other", 0

	for _, tc := range []struct {
		name string
		job  flint.JobStatus
		s    sched.Situation
		code string
		text string
	}{
		// What GitHub says of the job.
		{
			"over",
			flint.JobStatus{State: "completed", Conclusion: "success", Runner: "r1"},
			everything,
			"explain.completed", "it is over: its conclusion is success; it ran on runner r1",
		},
		{
			"cancelled",
			flint.JobStatus{State: "completed", Conclusion: "cancelled"},
			everything,
			"explain.completed", "it is over: its conclusion is cancelled; no runner had it",
		},
		{"over, no more", flint.JobStatus{State: "completed"}, everything, "explain.completed", "it is over; no runner had it"},
		{
			"running here",
			flint.JobStatus{State: "in_progress", Runner: "r1"},
			sched.Situation{Now: now, Hosts: busy},
			"explain.running", "it runs on runner r1 of pool flint, on host h1, for 1m0s",
		},
		{
			"running elsewhere",
			flint.JobStatus{State: "in_progress", Runner: "GitHub Actions 7"},
			everything,
			"explain.running", "it runs on runner GitHub Actions 7, which is no live runner of this flint",
		},
		{"running somewhere", flint.JobStatus{State: "in_progress"}, everything, "explain.running", "it runs; GitHub does not say on which runner"},
		{
			"review",
			flint.JobStatus{State: "waiting", Labels: []string{"flint"}},
			everything,
			"explain.waiting", "it waits for a deployment review, or for another rule that protects its environment",
		},
		{"concurrency", flint.JobStatus{State: "pending"}, everything, "explain.pending", "GitHub holds it back until another run of its concurrency group is over"},

		// Which pool it is for.
		{"no pool at all", queued("flint"), sched.Situation{}, "job.unmatched", "no pool serves the repository Acme/hello"},
		{"another account's pool", queued("flint"), sched.Situation{Pools: []flint.Pool{other}}, "job.unmatched", "no pool serves the repository Acme/hello"},
		{"another repository's pool", queued("flint"), sched.Situation{Pools: []flint.Pool{elsewhere}}, "job.unmatched", "no pool serves the repository Acme/hello"},
		{
			"another organisation's pool", with(queued("flint"), func(j *flint.JobStatus) { j.Repository = "acme-two/hello" }),
			sched.Situation{Pools: []flint.Pool{flintPool}},
			"job.unmatched", "no pool serves the repository acme-two/hello",
		},
		{
			"nearest pool", queued("linux", "GPU", "big"),
			sched.Situation{Pools: []flint.Pool{linux, flintPool, gpu}},
			"job.unmatched", "no pool has the labels linux, GPU, big: the nearest, gpu, lacks big",
		},
		{
			"nearest pool, first of equals", queued("gpu"),
			sched.Situation{Pools: []flint.Pool{linux, flintPool}},
			"job.unmatched", "no pool has the label gpu: the nearest, linux, lacks gpu",
		},
		{
			"GitHub's machines", queued("ubuntu-latest"),
			sched.Situation{Pools: []flint.Pool{linux}},
			"job.unmatched", "it asks for a machine of GitHub's own: no pool has the label ubuntu-latest",
		},
		{
			"hostile labels", queued("a\x1b[2Jb", strings.Repeat("ü", 400)),
			sched.Situation{Pools: []flint.Pool{flintPool}},
			"job.unmatched", "no pool has the labels a\uFFFD[2Jb, " + strings.Repeat("ü", 50) + "…: the nearest, flint, lacks a\uFFFD[2Jb, " +
				strings.Repeat("ü", 50) + "…",
		},
		{
			"most specific pool", queued("Linux", "self-hosted"),
			sched.Situation{Pools: []flint.Pool{gpu, linux}},
			"host.none", "pool linux has no room for another runner: there is no host",
		},
		{
			"first of equals", queued("b"),
			sched.Situation{Pools: []flint.Pool{labelled("one", "a", "b"), labelled("two", "b", "c")}},
			"host.none", "pool one has no room for another runner: there is no host",
		},
		{
			"a repository's pool", queued("flint"),
			sched.Situation{Pools: []flint.Pool{repository}},
			"host.none",
			"pool flint has no room for another runner: there is no host",
		},
		{
			"an enterprise's pool", queued("FLINT"),
			sched.Situation{Pools: []flint.Pool{enterprise}},
			"host.none",
			"pool flint has no room for another runner: there is no host",
		},
		{
			"a pool without a scope of its own", queued("flint"),
			sched.Situation{Pools: []flint.Pool{anywhere}},
			"host.none",
			"pool flint has no room for another runner: there is no host",
		},

		// What keeps the pool from it, furthest first.
		{"source", public, everything, "github.unreachable", "the reason of github.unreachable"},
		{
			"held", public, without(func(s *sched.Situation) { s.Sources = nil }),
			"runner.age", "the runner software of pool flint is 40 days old",
		},
		{
			"public repository", public, without(func(s *sched.Situation) { s.Sources, s.Pools = nil, []flint.Pool{flintPool} }), "pool.private",
			"the runner group default of pool flint does not serve public repositories, and Acme/hello is one; " +
				"allow it in the organisation's settings (Actions, Runner groups)",
		},
		{
			"private repository", queued("flint"), without(func(s *sched.Situation) { s.Sources, s.Pools = nil, []flint.Pool{flintPool} }),
			"pool.max", "the reason of pool.max",
		},
		{
			"public repository, group that serves it", public,
			sched.Situation{Pools: []flint.Pool{flintPool}, Waiting: because("host.memory")},
			"host.memory", "the reason of host.memory",
		},
		{
			"a pool that rests", queued("flint"),
			sched.Situation{Pools: []flint.Pool{flintPool}, Waiting: because("vm.boot"), Hosts: room},
			"vm.boot", "the reason of vm.boot",
		},

		// GitHub gives no more jobs than there is room for, so nobody may have said that there is none.
		{
			"at max", queued("flint"),
			sched.Situation{Pools: []flint.Pool{flintPool}, Hosts: busy, Demand: []flint.Demand{wants("flint", 1)}},
			"pool.max", "pool flint has 2 of at most 2 runners, and none of them is free",
		},
		{
			"max 0", queued("flint"),
			sched.Situation{Pools: []flint.Pool{never}, Hosts: room},
			"pool.max", "pool flint has 0 of at most 0 runners, and none of them is free",
		},
		{
			"memory", queued("flint"),
			sched.Situation{Pools: []flint.Pool{flintPool}, Hosts: []flint.HostState{
				host("h1", 8, flint.GiB/2, in(flint.Running, "r1", "other", 0)),
			}},
			"host.memory", "pool flint has no room for another runner: one needs 1GiB of memory, and host h1, which has most, has 512MiB left",
		},
		{
			"cpus", queued("flint"),
			sched.Situation{Pools: []flint.Pool{flintPool}, Hosts: []flint.HostState{
				host("h1", 0, flint.GiB, in(flint.Running, "r1", "other", 0)),
			}},
			"host.cpus", "pool flint has no room for another runner: one needs 1 CPU, and host h1, which has most, has 0 left",
		},
		{
			"drained", queued("flint"),
			sched.Situation{Pools: []flint.Pool{flintPool}, Hosts: []flint.HostState{drained}},
			"host.refuses", "pool flint has no room for another runner: host h1 takes no runner: it is being drained",
		},

		// Nothing does.
		{
			"booting, at max", queued("flint"),
			sched.Situation{Now: now, Pools: []flint.Pool{flintPool}, Demand: []flint.Demand{wants("flint", 2)}, Hosts: []flint.HostState{
				host("h1", 0, 0, in(flint.Running, "r1", "flint", time.Hour), in(flint.Booting, "r2", "flint", 1400*time.Millisecond)),
			}},
			"explain.coming", "a runner is on its way: r2 on host h1 is booting, for 1s",
		},
		{
			"registered, of two", queued("flint"),
			sched.Situation{Now: now, Pools: []flint.Pool{flintPool}, Demand: []flint.Demand{wants("flint", 2)}, Hosts: []flint.HostState{
				host("h1", 1, flint.GiB, in(flint.Planned, "r0", "flint", time.Hour)),
				host("h2", 1, flint.GiB, in(flint.Registered, "r3", "flint", 4*time.Second), in(flint.Registered, "r2", "flint", 5*time.Second)),
			}},
			"explain.coming", "3 runners of pool flint are on their way, one of them: r2 on host h2 waits for GitHub to give it a job, for 5s",
		},
		{
			"without a clock", queued("flint"),
			sched.Situation{Pools: []flint.Pool{flintPool}, Demand: []flint.Demand{wants("flint", 1)}, Hosts: []flint.HostState{
				host("h1", 0, 0, in(flint.Preparing, "r2", "flint", 0)),
			}},
			"explain.coming", "a runner is on its way: r2 on host h1 is preparing",
		},
		{
			"about to start", queued("flint"),
			sched.Situation{Pools: []flint.Pool{flintPool}, Demand: []flint.Demand{wants("flint", 1)}, Hosts: room},
			"explain.coming", "a runner of pool flint is about to be started",
		},
		{
			"not spoken of", queued("flint"),
			sched.Situation{Pools: []flint.Pool{flintPool}, Hosts: room},
			"explain.unoffered", "GitHub has not spoken of pool flint yet",
		},
		{
			"not offered", queued("flint"),
			sched.Situation{Pools: []flint.Pool{flintPool}, Hosts: room, Demand: []flint.Demand{wants("flint", 0)}},
			"explain.unoffered", "GitHub has not given it to pool flint yet",
		},
		{
			"a state nobody knows", with(queued("flint"), func(j *flint.JobStatus) { j.State = "levitating" }),
			sched.Situation{Pools: []flint.Pool{flintPool}, Hosts: room, Demand: []flint.Demand{wants("flint", 0)}},
			"explain.unoffered", "GitHub has not given it to pool flint yet",
		},
		{
			"not offered to a free runner", queued("flint"),
			sched.Situation{
				Now: now, Pools: []flint.Pool{flintPool}, Demand: []flint.Demand{wants("flint", 1)}, Hosts: []flint.HostState{
					host("h1", 0, 0, in(flint.Running, "r1", "flint", time.Hour), in(flint.Registered, "r2", "flint", time.Minute)),
				},
			},
			"explain.unoffered", "GitHub has not given it to pool flint yet, whose runner r2 is free, for 1m0s",
		},
		{
			"group and no label", queued(),
			sched.Situation{Pools: []flint.Pool{flintPool}, Hosts: room},
			"job.unmatched", "it names a runner group and no label, and GitHub has given it to no pool yet",
		},
	} {
		t.Run(tc.name, func(t *testing.T) {
			if got := sched.Explain(tc.job, tc.s); got.Code != tc.code || got.Text != tc.text {
				t.Errorf("got  %s: %s\nwant %s: %s", got.Code, got.Text, tc.code, tc.text)
			}
		})
	}
}

// TestExplainNeverKeepsSilent: whatever the situation, there is a sentence, and always the same.
func TestExplainNeverKeepsSilent(t *testing.T) {
	states := []string{"queued", "waiting", "in_progress", "completed", "pending", ""}
	seen := map[string]int{}
	for seed := range uint64(3000) {
		r := rand.New(rand.NewPCG(seed, 2))
		pools, demand, hosts := world(r)
		s := sched.Situation{Now: now, Pools: pools, Demand: demand, Hosts: hosts, Waiting: map[string]flint.Reason{}}
		for _, a := range sched.Plan(now, pools, demand, hosts) {
			if a.Verb == sched.Wait {
				s.Waiting[a.Pool] = a.Reason
			}
		}
		job := flint.JobStatus{State: states[max(0, r.IntN(12)-6)], Labels: []string{pools[r.IntN(len(pools))].Name}, Public: r.IntN(2) == 0}
		why := sched.Explain(job, s)
		if why.IsZero() || why.Text == "" || !utf8.ValidString(why.Text) || strings.Contains(why.Text, "%!") {
			t.Fatalf("seed %d: %+v", seed, why)
		}
		if again := sched.Explain(job, s); again != why {
			t.Fatalf("seed %d: %+v, and then %+v", seed, why, again)
		}
		seen[why.Code]++
	}
	for _, code := range []string{"pool.max", "host.memory", "host.cpus", "explain.coming", "explain.unoffered", "explain.running"} {
		if seen[code] == 0 {
			t.Errorf("%s was never the reason: %v", code, seen)
		}
	}
}

// TestExplainWhoeverSeesTheJob: of two accounts of one organisation the one that was asked need not be the one whose pool it is.
func TestExplainWhoeverSeesTheJob(t *testing.T) {
	gpu := pool("gpu", 2)
	gpu.Account, gpu.Scope = "hooks", "https://github.com/acme"
	for url, want := range map[string]string{
		"https://github.com/acme/hello/actions/runs/1/job/2":       "explain.unoffered",
		"https://ghe.acme.example/acme/hello/actions/runs/1/job/2": "job.unmatched", // another server's acme
		"": "job.unmatched",
	} {
		job := flint.JobStatus{Job: flint.Job{Repository: "acme/hello", Name: "build"}, State: "queued", Labels: []string{"gpu"}, URL: url}
		s := sched.Situation{Now: now, Pools: []flint.Pool{gpu}, Hosts: []flint.HostState{host("h1", 8, 8*flint.GiB)}}
		if got := sched.Explain(job, s); got.Code != want {
			t.Errorf("a job at %q: %v, want %s", url, got, want)
		}
	}
}

func TestClosed(t *testing.T) {
	small, big, held := pool("small", 2), pool("big", 2), pool("held", 2)
	small.Shape, big.Shape = flint.Shape{CPUs: 1, Memory: flint.GiB}, flint.Shape{CPUs: 1, Memory: 64 * flint.GiB}
	held.Held = flint.Because("runner.too_old", "it is too old")
	s := sched.Situation{Hosts: []flint.HostState{host("h1", 8, 8*flint.GiB, runner("r", "ending", flint.Finishing, time.Minute))}}
	ending := big
	ending.Name = "ending"
	for _, tc := range []struct {
		pool flint.Pool
		code string
	}{{small, ""}, {big, "host.memory"}, {held, "runner.too_old"}, {ending, ""}} {
		if got := s.Closed(tc.pool); got.Code != tc.code {
			t.Errorf("pool %s: %v, want %q", tc.pool.Name, got, tc.code)
		}
	}
	if got := s.Closed(big); !strings.Contains(got.Text, "pool big is given no job") || !strings.Contains(got.Text, "64GiB") {
		t.Errorf("%v", got)
	}
}
