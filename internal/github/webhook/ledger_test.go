package webhook

import (
	"errors"
	"fmt"
	"io"
	"log/slog"
	"math/rand/v2"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"

	"flint"
)

func quiet() *slog.Logger { return slog.New(slog.NewTextHandler(io.Discard, nil)) }

func fault(err error) string {
	var f *flint.Fault
	if errors.As(err, &f) {
		return f.Code
	}
	return ""
}

func TestMatching(t *testing.T) {
	wide := pool("wide", "self-hosted", "linux", "x64", "gpu")
	first, second := pool("first", "self-hosted", "linux"), pool("second", "self-hosted", "linux")
	repo := pool("repo", "self-hosted", "arm64")
	repo.Scope = "https://github.com/acme/app"
	r := open(t, t.TempDir(), &host{}, Account{Secret: secret, Pools: []flint.Pool{wide, first, second, repo}})
	for _, c := range []struct {
		labels     []string
		repository string
		want, why  string
	}{
		{[]string{"self-hosted"}, "acme/app", "first", ""},
		{[]string{"Self-Hosted", "LINUX"}, "acme/app", "first", ""},
		{[]string{"linux", "gpu"}, "acme/app", "wide", ""},
		{[]string{"arm64"}, "Acme/App", "repo", ""},
		{[]string{"arm64"}, "acme/lib", "", "no pool has the label arm64: the nearest, wide, lacks arm64"},
		{[]string{"gpu", "big"}, "acme/app", "", "no pool has the labels gpu, big: the nearest, wide, lacks big"},
		{nil, "acme/app", "", "the job names a runner group and no label, and a webhook does not say which group"},
		{[]string{"linux"}, "else/where", "", "no pool serves the repository else/where"},
	} {
		j := &job{Repository: c.repository, Labels: c.labels, Place: strings.ToLower("github.com/" + c.repository)}
		i, why := r.ledger.matcher.find(j)
		got := ""
		if i >= 0 {
			got = r.ledger.matcher.pools[i].pool.Name
		}
		if got != c.want || why.Text != c.why {
			t.Errorf("%v of %s: pool %q, reason %q", c.labels, c.repository, got, why)
		}
	}
}

func TestDemandFollowsTheJobs(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		h := &host{runners: map[string]string{"flint-1": "linux"}}
		r := open(t, t.TempDir(), h, Account{Secret: secret, Pools: []flint.Pool{linux()}})
		expect := func(want int, since time.Duration) {
			t.Helper()
			d := r.Demand()
			if len(d) != 1 || d[0].Assigned != want || time.Since(d[0].At).Round(time.Second) != since {
				t.Errorf("demand %+v at %s, want %d since %s", d, time.Now(), want, since)
			}
		}
		expect(0, 0)
		mustTake(t, r, jobHook("waiting", 1, linuxLabels))
		time.Sleep(time.Minute)
		expect(0, time.Minute)
		mustTake(t, r, jobHook("queued", 1, linuxLabels))
		expect(1, 0)
		time.Sleep(time.Minute)
		expect(1, time.Minute)
		mustTake(t, r, jobHook("in_progress", 1, linuxLabels, on("flint-1")))
		expect(1, time.Minute)
		mustTake(t, r, jobHook("queued", 2, linuxLabels))
		mustTake(t, r, jobHook("in_progress", 2, linuxLabels, on("a machine of theirs")))
		expect(1, time.Minute)
		h.ending = map[string]bool{"flint-1": true} // its VM goes down, and GitHub is slow to say that the job is over
		expect(0, 0)
		h.ending = nil
		expect(1, 0)
		h.set("flint-1", "") // its VM died, GitHub does not know yet
		expect(0, 0)
		mustTake(t, r, jobHook("completed", 1, linuxLabels, on("flint-1"), ended("failure")))
		late := jobHook("queued", 1, linuxLabels)
		late.guid = "late"
		mustTake(t, r, late)
		expect(0, 0)
		mustTake(t, r, jobHook("completed", 3, linuxLabels, ended("cancelled"))) // its queued is still to come
		mustTake(t, r, jobHook("queued", 3, linuxLabels))
		expect(0, 0)
		if len(r.Unmatched()) != 0 {
			t.Errorf("unmatched: %v", r.Unmatched())
		}
	})
}

func TestUnmatchedSaysWhyOnce(t *testing.T) {
	var log strings.Builder
	r := open(t, t.TempDir(), &host{}, Account{Name: "acme", Secret: secret, Pools: []flint.Pool{linux()}})
	r.log = slog.New(slog.NewTextHandler(&log, nil))
	for i := range int64(5) {
		mustTake(t, r, jobHook("queued", i+1, []string{"linux", "gpu"}))
	}
	got := r.Unmatched()
	if len(got) != 5 || got[0].Account != "acme" || got[0].Reason.Code != "job.unmatched" {
		t.Errorf("unmatched: %+v", got)
	}
	if n := strings.Count(log.String(), "lacks gpu"); n != 1 {
		t.Errorf("said %d times:\n%s", n, log.String())
	}
}

func TestPoolsChangeBetweenStarts(t *testing.T) {
	dir := t.TempDir()
	r := open(t, dir, &host{}, Account{Secret: secret, Pools: []flint.Pool{linux()}})
	mustTake(t, r, jobHook("queued", 1, linuxLabels))
	mustTake(t, r, jobHook("queued", 2, []string{"gpu"}))
	r.Close()
	r = open(t, dir, &host{}, Account{Secret: secret, Pools: []flint.Pool{pool("gpu", "gpu")}})
	if got := assigned(r); got["gpu"] != 1 || len(r.Unmatched()) != 1 {
		t.Errorf("demand %v, unmatched %v", got, r.Unmatched())
	}
	r.Close()
	elsewhere := linux()
	elsewhere.Scope = "https://github.com/other"
	r = open(t, dir, &host{}, Account{Secret: secret, Pools: []flint.Pool{elsewhere}})
	if n := len(r.ledger.jobs); n != 0 {
		t.Errorf("%d jobs of an organisation that nobody serves are kept", n)
	}
}

func TestOldJobsAreDropped(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		h := &host{runners: map[string]string{"flint-1": "linux"}}
		r := open(t, t.TempDir(), h, Account{Secret: secret, Pools: []flint.Pool{linux()}})
		mustTake(t, r, jobHook("queued", 1, linuxLabels))
		mustTake(t, r, jobHook("completed", 2, linuxLabels))
		mustTake(t, r, jobHook("in_progress", 3, linuxLabels, on("flint-1")))
		left := func(after time.Duration, demand, jobs, ids int) {
			t.Helper()
			time.Sleep(after)
			if err := r.tidy(t.Context()); err != nil {
				t.Fatal(err)
			}
			if got := assigned(r)["linux"]; got != demand || len(r.ledger.jobs) != jobs || len(r.ledger.seen) != ids {
				t.Errorf("demand %d, %d jobs, %d delivery ids; want %d, %d, %d", got, len(r.ledger.jobs), len(r.ledger.seen), demand, jobs, ids)
			}
		}
		left(23*time.Hour, 2, 3, 3)
		left(2*time.Hour, 1, 2, 3)  // the queued one is dropped, the completed one forgotten
		left(25*time.Hour, 1, 1, 3) // the dropped one is forgotten
		left(3*24*time.Hour, 1, 1, 0)
		left(3*24*time.Hour, 0, 0, 0)
		if r.ledger.open != 0 || len(r.ledger.running) != 0 || r.ledger.queued[0] != 0 {
			t.Errorf("counts are off: open %d, running %d, queued %v", r.ledger.open, len(r.ledger.running), r.ledger.queued)
		}
	})
}

func TestTombstonesAreBounded(t *testing.T) {
	l := newLedger(&matcher{}, func(string) (string, bool) { return "", false })
	for i := range maxPassive + 10 {
		l.put(&job{ID: int64(i + 1), State: completed, At: time.Now()}, time.Now())
	}
	if keys, surplus := l.old(time.Now()); len(keys) != 10 || len(surplus) != 10 {
		t.Errorf("%d surplus", len(keys))
	}
	for i := range maxArrivals + 10 {
		l.arrived(arrival{seq: uint64(i + 1), at: time.Now(), guid: fmt.Sprint(i)})
	}
	if seq := l.outdated(time.Now()); seq != 10 || len(l.seen) != maxArrivals {
		t.Errorf("forgot up to %d, %d are left", seq, len(l.seen))
	}
}

// ignore what depends on when news came, and in how many writes.
var ignore = cmp.Options{
	cmpopts.IgnoreFields(job{}, "At", "First"), cmpopts.IgnoreUnexported(job{}), cmpopts.EquateEmpty(),
}

// lives are the deliveries of a job as GitHub sends them.
func lives() [][]*job {
	at := time.Date(2026, 11, 1, 12, 0, 0, 0, time.UTC)
	base := job{Place: "github.com/acme/app", ID: 1, RunID: 2, Repository: "acme/app", Name: "build", Labels: linuxLabels, Queued: at, Account: "a"}
	news := func(s rank, change func(*job)) *job {
		j := base
		j.State, j.First, j.At = s, at, at
		if change != nil {
			change(&j)
		}
		return &j
	}
	started := func(j *job) { j.Runner, j.Pool, j.Started = "flint-1", "linux", at.Add(time.Minute) }
	done := func(j *job) { started(j); j.Conclusion, j.Completed = "success", at.Add(time.Hour) }
	cancelled := func(j *job) { j.Conclusion, j.Completed = "cancelled", at.Add(time.Hour) }
	return [][]*job{
		{news(waiting, nil), news(queued, nil), news(running, started), news(completed, done)},
		{news(queued, nil), news(completed, cancelled)},
		{news(queued, nil), news(running, started), news(completed, cancelled)}, // lost its runner
		{news(queued, nil), news(running, started)},
		{news(waiting, nil), news(queued, func(j *job) { j.Name, j.URL = "", "" })},
	}
}

func fold(order []*job) *job {
	var have *job
	for _, j := range order {
		have = merge(have, j)
	}
	return have
}

// FuzzLedger holds merge to its promise: any order and number of a job's deliveries end the same.
func FuzzLedger(f *testing.F) {
	for i := range lives() {
		f.Add(uint(i), uint64(1), uint(7))
	}
	f.Fuzz(func(t *testing.T, life uint, seed uint64, copies uint) {
		inOrder := lives()[life%uint(len(lives()))]
		rnd := rand.New(rand.NewPCG(seed, 0))
		shuffled := append([]*job(nil), inOrder...)
		for range copies % 16 {
			shuffled = append(shuffled, inOrder[rnd.IntN(len(inOrder))])
		}
		rnd.Shuffle(len(shuffled), func(i, j int) { shuffled[i], shuffled[j] = shuffled[j], shuffled[i] })
		if d := cmp.Diff(fold(inOrder), fold(shuffled), ignore); d != "" {
			t.Error(d)
		}
	})
}

func TestTwoReportsOfTheSameStateMergeEitherWay(t *testing.T) {
	at := time.Date(2026, 11, 1, 12, 0, 0, 0, time.UTC)
	a := &job{ID: 1, State: running, Runner: "x", Pool: "p", Started: at, ToldStarted: true}
	b := &job{ID: 1, State: running, Runner: "y", Started: at.Add(time.Minute)}
	ab, ba := merge(a, b), merge(b, a)
	if d := cmp.Diff(ab, ba, ignore); d != "" || ab.Runner != "y" || ab.Pool != "" || ab.ToldStarted {
		t.Errorf("%+v\n%s", ab, d)
	}
}

func TestShuffledJobsThroughTheStore(t *testing.T) {
	dir := t.TempDir()
	h := &host{runners: map[string]string{"flint-1": "linux"}}
	account := Account{Secret: secret, Pools: []flint.Pool{linux()}}
	r := open(t, dir, h, account)
	var hooks []hook
	for id := range int64(40) {
		hooks = append(hooks, jobHook("queued", id+1, linuxLabels), jobHook("in_progress", id+1, linuxLabels, on("flint-1")))
		if id%2 == 0 {
			hooks = append(hooks, jobHook("completed", id+1, linuxLabels, on("flint-1"), ended("success")))
		}
	}
	hooks = append(hooks, hooks...)
	rand.New(rand.NewPCG(1, 2)).Shuffle(len(hooks), func(i, j int) { hooks[i], hooks[j] = hooks[j], hooks[i] })
	done := make(chan struct{})
	for w := range 8 {
		go func() {
			defer func() { done <- struct{}{} }()
			for i := w; i < len(hooks); i += 8 {
				send(r, hooks[i])
			}
		}()
	}
	for range 8 {
		<-done
	}
	if got := assigned(r)["linux"]; got != 20 {
		t.Errorf("demand %d, want 20", got)
	}
	before := r.ledger.jobs
	r.Close()
	r = open(t, dir, h, account)
	if got := assigned(r)["linux"]; got != 20 || len(before) != 40 {
		t.Errorf("demand %d after a restart, %d jobs", got, len(before))
	}
	for k, e := range before {
		if d := cmp.Diff(e.job, r.ledger.jobs[k].job, cmpopts.IgnoreUnexported(job{}), cmpopts.EquateEmpty()); d != "" {
			t.Errorf("memory and disk differ: %s", d)
		}
	}
}
