package webhook

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"flint"
)

// run starts r.Run and returns what ends it.
func run(t *testing.T, r *Receiver) (stop func()) {
	t.Helper()
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() { done <- r.Run(ctx) }()
	synctest.Wait()
	return func() {
		t.Helper()
		cancel()
		if err := <-done; err != nil {
			t.Error(err)
		}
	}
}

// settle lets the writes that are under way end.
func settle() { after(time.Second) }

func after(d time.Duration) {
	time.Sleep(d)
	synctest.Wait()
}

func acme(g *gitHub) Account {
	return Account{Name: "acme", Secret: secret, API: g, Pools: []flint.Pool{linux()}}
}

func TestDaemonThatWasDownCatchesUp(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		dir := t.TempDir()
		h := &host{runners: map[string]string{"flint-1": "linux"}}
		g := &gitHub{jobs: map[int64]flint.JobStatus{}}
		r := open(t, dir, h, acme(g))
		if d := r.Demand(); len(d) != 0 {
			t.Errorf("demand %v before GitHub was heard", d)
		}
		stop := run(t, r)
		mustTake(t, r, jobHook("queued", 1, linuxLabels))
		mustTake(t, r, jobHook("queued", 2, linuxLabels))
		mustTake(t, r, jobHook("in_progress", 3, linuxLabels, on("flint-1")))
		settle()
		stop()
		r.Close()

		after(time.Hour)
		running := status(3, "in_progress", linuxLabels...)
		running.Runner = "flint-1"
		gone := status(1, "completed", linuxLabels...)
		gone.Conclusion = "cancelled"
		g.with(func() {
			g.open = []flint.JobStatus{running, status(4, "queued", linuxLabels...), status(5, "queued", "ubuntu-latest"), {State: "queued"}}
			g.jobs[1] = gone // 2 was deleted
			g.asked, g.since = nil, nil
		})
		r = open(t, dir, h, acme(g))
		stop = run(t, r)
		defer stop()
		settle()
		if got := assigned(r); got["linux"] != 2 {
			t.Errorf("demand %v, want jobs 3 and 4", got)
		}
		slices.Sort(g.asked)
		if !slices.Equal(g.asked, []int64{1, 2}) {
			t.Errorf("asked for %v", g.asked)
		}
		if len(g.since) != 1 || time.Since(g.since[0]).Round(time.Minute) != time.Hour+overlap {
			t.Errorf("deliveries since %v", g.since)
		}
		if why := r.Waiting(); len(why) != 0 {
			t.Errorf("waiting: %v", why)
		}
		g.with(func() { g.asked = nil })
		after(time.Hour) // nothing new, so nothing is asked for singly but what the list leaves out
		if len(g.asked) != 0 {
			t.Errorf("asked for %v, which the list has", g.asked)
		}
	})
}

func TestOnlyTheRepositoriesOfTheScopes(t *testing.T) {
	a, b := linux(), pool("b", "b")
	a.Scope, b.Scope = "https://github.com/acme/app", "https://github.com/acme/lib"
	for _, c := range []struct {
		pools []flint.Pool
		want  []string
	}{{[]flint.Pool{a, b, a}, []string{"acme/app", "acme/lib"}}, {[]flint.Pool{a, linux()}, nil}} {
		acc, err := newAccount(Account{Secret: secret, Pools: c.pools}, &matcher{})
		if err != nil {
			t.Fatal(err)
		}
		if got := acc.repositories(); !slices.Equal(got, c.want) {
			t.Errorf("asks for %v, want %v", got, c.want)
		}
	}
}

// TestLooksForLostWebhooksWhenTheClockIsSet: a process looks every ten minutes, and the next one after some time.
func TestLooksForLostWebhooksWhenTheClockIsSet(t *testing.T) {
	last := time.Date(2026, 11, 3, 12, 0, 0, 0, time.UTC)
	for name, tt := range map[string]struct {
		first bool          // of this process
		set   time.Duration // by which the clock was set after the last look
		want  time.Duration // from the last look to what this one stands for
	}{
		"right":                  {false, 0, 10 * time.Minute},
		"set forwards":           {false, time.Hour, 10 * time.Minute},
		"set back":               {false, -time.Hour, -50 * time.Minute},
		"right, after a restart": {true, 0, 10 * time.Minute},
	} {
		a := &account{swept: last, looked: last}
		if tt.first {
			a.looked = time.Time{}
		}
		if got := a.passed(last.Add(10*time.Minute+tt.set), 10*time.Minute).Sub(last); got != tt.want {
			t.Errorf("%s: %s after the last look, want %s", name, got, tt.want)
		}
	}
}

// TestClockSetBackLooksAtAllDeliveries: a process ended while the clock was ahead, and begins again when it is right.
func TestClockSetBackLooksAtAllDeliveries(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		g := &gitHub{}
		r := open(t, t.TempDir(), &host{}, acme(g))
		r.accounts[0].swept = time.Now().Add(time.Hour)
		defer run(t, r)()
		after(15 * time.Minute)
		g.with(func() {
			if len(g.since) < 2 {
				t.Fatalf("looked %d times", len(g.since))
			}
			if first := time.Since(g.since[0]); first < deliveryTime {
				t.Errorf("looked at the last %s", first)
			}
			if last := time.Since(g.since[len(g.since)-1]); last > time.Hour {
				t.Errorf("then at the last %s", last)
			}
		})
	})
}

func TestLostWebhooksAreSentAgain(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		g := &gitHub{}
		r := open(t, t.TempDir(), &host{}, acme(g))
		lost, dead := jobHook("queued", 1, linuxLabels), jobHook("queued", 2, linuxLabels)
		at := time.Now().Add(-time.Minute)
		g.deliveries = []Delivery{
			{ID: 16, GUID: dead.guid, Event: "workflow_job", At: at},
			{ID: 15, GUID: "in flight", Event: "workflow_job", At: time.Now()},
			{ID: 14, GUID: "twice", Event: "workflow_job", At: at, Status: 200, Redelivery: true},
			{ID: 13, GUID: "twice", Event: "workflow_job", At: at, Status: 502},
			{ID: 12, GUID: "push", Event: "push", At: at, Status: 502},
			{ID: 11, GUID: lost.guid, Event: "workflow_job", At: at, Status: 503},
			{ID: 10, GUID: "arrived", Event: "workflow_job", At: at, Status: 500},
		}
		arrived := jobHook("queued", 3, linuxLabels) // GitHub did not wait for our answer
		arrived.guid = "arrived"
		mustTake(t, r, arrived)
		g.redeliver = func(id int64) error {
			switch id {
			case 11:
				if w := send(r, lost); w.Code != http.StatusAccepted {
					t.Errorf("answer %d", w.Code)
				}
			case 15:
				return fmt.Errorf("redeliver: %w", flint.ErrNotFound)
			}
			return nil
		}
		stop := run(t, r)
		settle()
		if !slices.Equal(g.redelivered, []int64{11, 16}) {
			t.Errorf("sent again: %v", g.redelivered)
		}
		if got := assigned(r); got["linux"] != 2 {
			t.Errorf("demand %v", got)
		}
		g.with(func() { // the list goes on to say that 16 has no answer
			g.deliveries = slices.DeleteFunc(g.deliveries, func(d Delivery) bool { return d.GUID == lost.guid })
		})
		var pauses []time.Duration
		for last, n := time.Now(), 2; time.Since(at) < 24*time.Hour; after(time.Minute) {
			if sent := g.sent(); sent > n {
				pauses = append(pauses, time.Since(last).Round(time.Minute))
				last, n = time.Now(), sent
			}
		}
		if got := slices.DeleteFunc(slices.Clone(g.redelivered), func(id int64) bool { return id != 16 }); len(got) != maxAttempts {
			t.Errorf("the dead one was sent %d times, with pauses %v", len(got), pauses)
		}
		if n := len(slices.DeleteFunc(slices.Clone(g.redelivered), func(id int64) bool { return id != 15 })); n != 1 {
			t.Errorf("one that GitHub has forgotten was asked for %d times", n)
		}
		if !slices.IsSorted(pauses[1:]) {
			t.Errorf("pauses do not grow: %v", pauses)
		}
		stop()
		if n := len(r.accounts[0].failed); n != 0 {
			t.Errorf("%d lost webhooks are remembered for ever", n)
		}
	})
}

func TestTroubleIsSaidAndBeliefEnds(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		refused := &flint.Fault{Code: "github.permission", What: "list runs", Fix: "grant Actions: read", Kind: flint.ErrPermission}
		g := &gitHub{openErr: refused, listErr: errors.New("read: connection reset")}
		r := open(t, t.TempDir(), &host{}, acme(g))
		stop := run(t, r)
		defer stop()
		settle()
		why := r.Waiting()["linux"]
		if why.Code != "github.permission" || !strings.Contains(why.Text, "grant Actions: read") || !strings.Contains(why.Text, "until GitHub is heard") {
			t.Errorf("waiting: %+v", why)
		}
		if d := r.Demand(); len(d) != 0 {
			t.Errorf("demand %v, and nobody was heard", d)
		}
		mustTake(t, r, jobHook("queued", 1, linuxLabels))
		if d := assigned(r); d["linux"] != 1 || !strings.Contains(r.Waiting()["linux"].Text, "still count") {
			t.Errorf("demand %v, waiting %v", d, r.Waiting())
		}
		after(beliefTime + time.Minute)
		if d := r.Demand(); len(d) != 0 || !strings.Contains(r.Waiting()["linux"].Text, "not believed") {
			t.Errorf("demand %v, waiting %v", d, r.Waiting())
		}
		mustTake(t, r, jobHook("queued", 2, linuxLabels))
		if d := r.Demand(); len(d) != 1 || d[0].Assigned != 2 || time.Since(d[0].At) > time.Minute {
			t.Errorf("demand %v", d)
		}
		g.with(func() { g.openErr = nil })
		after(2 * pollPeriod)
		if why := r.Waiting()["linux"]; why.Code != "webhook.deliveries" {
			t.Errorf("waiting: %+v", why)
		}
		g.with(func() { g.listErr = nil })
		after(2 * sweepPeriod)
		if why := r.Waiting(); len(why) != 0 {
			t.Errorf("waiting: %v", why)
		}
		after(24 * time.Hour)
		if d := r.Demand(); len(d) != 1 {
			t.Errorf("demand %v although GitHub answers", d)
		}
	})
}

func TestFailuresAreNotRetriedFasterThanTheirBackoff(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		g := &gitHub{openErr: errors.New("down")}
		r := open(t, t.TempDir(), &host{}, acme(g))
		stop := run(t, r)
		defer stop()
		after(time.Hour)
		// 0, 15, 45, 105, 225, 465, 945 s, then every 10 minutes.
		if g.opened < 8 || g.opened > 12 {
			t.Errorf("asked %d times in an hour", g.opened)
		}
	})
}

func TestUnsupportedIsOffAndNoTrouble(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		off := fmt.Errorf("no hook: %w", errors.ErrUnsupported)
		g := &gitHub{openErr: off, listErr: off}
		r := open(t, t.TempDir(), &host{}, acme(g), Account{Name: "mute", Secret: "x", Pools: []flint.Pool{pool("mute", "mute")}})
		stop := run(t, r)
		defer stop()
		after(time.Hour)
		if why := r.Waiting(); len(why) != 0 {
			t.Errorf("waiting: %v", why)
		}
		if len(g.since) != 1 {
			t.Errorf("deliveries were asked for %d times", len(g.since))
		}
		if d := r.Demand(); len(d) != 2 {
			t.Errorf("demand %v", d)
		}
	})
}

func TestEventsAreToldUntilTheySucceed(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		dir := t.TempDir()
		h := &host{runners: map[string]string{"flint-1": "linux", "flint-2": "linux", "scale-1": "another mode's"}}
		account := Account{Secret: secret, Pools: []flint.Pool{linux()}}
		r := open(t, dir, h, account)
		stop := run(t, r)
		mustTake(t, r, jobHook("in_progress", 1, linuxLabels, on("flint-1")))
		settle()
		mustTake(t, r, jobHook("completed", 1, linuxLabels, on("flint-1"), ended("failure")))
		mustTake(t, r, jobHook("completed", 2, linuxLabels, on("flint-2"), ended("cancelled")))
		mustTake(t, r, jobHook("in_progress", 2, linuxLabels, on("flint-2"))) // late
		mustTake(t, r, jobHook("completed", 3, linuxLabels, on("theirs"), ended("success")))
		mustTake(t, r, jobHook("completed", 4, linuxLabels, on("scale-1"), ended("success")))
		settle()
		want := []string{"1 linux flint-1 1", "2 linux flint-1 1 failed", "2 linux flint-2 2 canceled"}
		if got := h.heard(); !slices.Equal(got, want) {
			t.Errorf("told %q, want %q", got, want)
		}

		h.refuse = errors.New("disk full")
		mustTake(t, r, jobHook("completed", 5, linuxLabels, on("flint-1"), ended("success")))
		settle()
		if why := r.Waiting()["linux"]; why.Code != "webhook.events" {
			t.Errorf("waiting: %v", why)
		}
		stop()
		r.Close()
		h.refuse, h.events = nil, nil
		h.set("flint-1", "") // gone by now; that it was ours is remembered
		r = open(t, dir, h, account)
		stop = run(t, r)
		settle()
		if got := h.heard(); !slices.Equal(got, []string{"2 linux flint-1 5 succeeded"}) {
			t.Errorf("told %q after a restart", got)
		}
		h.mu.Lock()
		h.refuse = errors.New("again")
		h.mu.Unlock()
		mustTake(t, r, jobHook("completed", 6, linuxLabels, on("flint-2"), ended("success")))
		after(time.Minute)
		h.mu.Lock()
		h.refuse = nil
		h.mu.Unlock()
		after(2 * time.Minute)
		if got := h.heard(); len(got) != 2 || len(r.Waiting()) != 0 {
			t.Errorf("told %q, waiting %v", got, r.Waiting())
		}
		stop()
		r.Close()
		r = open(t, dir, h, account)
		defer run(t, r)()
		settle()
		if got := h.heard(); len(got) != 2 {
			t.Errorf("told twice: %q", got)
		}
	})
}

func TestRunnerThatIsKnownLater(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		h := &host{}
		r := open(t, t.TempDir(), h, Account{Secret: secret, Pools: []flint.Pool{linux()}})
		defer run(t, r)()
		mustTake(t, r, jobHook("in_progress", 1, linuxLabels, on("flint-1"))) // the host still reads its records
		settle()
		h.set("flint-1", "linux")
		after(tidyPeriod + time.Second)
		if d := assigned(r); d["linux"] != 1 || len(h.heard()) != 1 {
			t.Errorf("demand %v, told %v", d, h.heard())
		}
	})
}

func TestTwoAccountsThatSeeTheSameJob(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		wide, narrow := linux(), pool("repo", "self-hosted")
		narrow.Scope = "https://github.com/acme/app"
		a := &gitHub{open: []flint.JobStatus{status(1, "queued", "self-hosted"), status(2, "queued", "linux")}}
		b := &gitHub{open: slices.Clone(a.open), openErr: errors.New("half of it")} // what came before the error counts
		r := open(t, t.TempDir(), &host{},
			Account{Name: "a", Secret: "a", API: a, Pools: []flint.Pool{wide}},
			Account{Name: "b", Secret: "b", API: b, Pools: []flint.Pool{narrow}})
		stop := run(t, r)
		defer stop()
		settle()
		hook := jobHook("queued", 1, []string{"self-hosted"})
		hook.secret = "b"
		mustTake(t, r, hook)
		if d := assigned(r); d["linux"] != 1 || d["repo"] != 1 || len(d) != 2 {
			t.Errorf("demand %v, want each job once, in the most specific pool", d)
		}
		if why := r.Waiting(); len(why) != 1 || why["repo"].Code != "webhook.poll" {
			t.Errorf("waiting: %v", why)
		}
		if !slices.Equal(b.repos, []string{"acme/app"}) || a.repos != nil {
			t.Errorf("asked for %v and %v", a.repos, b.repos)
		}
	})
}
