package githubsim

import (
	"crypto/rsa"
	"fmt"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"
)

// script is a hub with one scale set, capacity for everything, and what it emitted.
type script struct {
	*Server
	t      *testing.T
	set    *scaleSet
	events []Event
}

// newScript makes a hub whose services are not needed: the test is its only client. It must run in a synctest bubble.
func newScript(t *testing.T, cfg Config) *script {
	t.Helper()
	s := &script{t: t}
	cfg.URL, cfg.Owner, cfg.Repo = "http://sim", "acme", "widget"
	cfg.Observe = func(e Event) { s.events = append(s.events, e) }
	if err := cfg.complete(); err != nil {
		t.Fatal(err)
	}
	s.Server = &Server{cfg: cfg, hub: newHub(cfg), creds: newCredentials()}
	set, err := s.hub.createSet("acme", groupID, "flint", nil, false)
	if err != nil {
		t.Fatal(err)
	}
	s.set = set
	session, err := s.hub.openSession(set.id, "test")
	if err != nil {
		t.Fatal(err)
	}
	if _, err := s.hub.nextMessage(t.Context(), set.id, session, 100); err != nil {
		t.Fatal(err)
	}
	return s
}

// runner registers a runner and brings it online.
func (s *script) runner(name string) *runner {
	s.t.Helper()
	x, err := s.hub.register(registration{set: s.set.id, name: name, key: &rsa.PublicKey{}, ephemeral: true})
	if err != nil {
		s.t.Fatal(err)
	}
	if _, _, err := s.hub.openRunnerSession(x.clientID); err != nil {
		s.t.Fatal(err)
	}
	return x
}

func (s *script) begin(x *runner) *job {
	s.t.Helper()
	j, err := s.hub.begin(x.clientID, x.job.request)
	if err != nil {
		s.t.Fatal(err)
	}
	return j
}

func (s *script) submit(src string) *Run {
	s.t.Helper()
	run, err := s.Submit(mustParse(s.t, src), Trigger{Event: "push"})
	if err != nil {
		s.t.Fatal(err)
	}
	return run
}

func TestLeaseIsExtendedByRenewal(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := newScript(t, Config{})
		defer s.Close()
		run := s.submit(oneJob)
		j := s.begin(s.runner("r"))
		for range 5 {
			time.Sleep(9 * time.Minute)
			if _, err := s.hub.renew(j.id); err != nil {
				t.Fatal(err)
			}
		}
		time.Sleep(10*time.Minute - time.Second)
		if c := run.Jobs()[0].Status; c != "in_progress" {
			t.Fatalf("the job is %s before its lease is over", c)
		}
		time.Sleep(2 * time.Second)
		if c, err := run.Wait(t.Context()); c != Failure || err != nil {
			t.Fatalf("the run ended %s, %v", c, err)
		}
	})
}

func TestTimeoutMinutesCancels(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := newScript(t, Config{Lease: time.Hour, Poll: time.Hour})
		defer s.Close()
		run := s.submit("on: push\njobs:\n  a: { runs-on: flint, timeout-minutes: 7, steps: [{run: x}] }\n")
		x := s.runner("r")
		start := time.Now()
		j := s.begin(x)
		msg, err := s.hub.nextRunnerMessage(t.Context(), x.clientID, x.session)
		if err != nil || msg == nil || msg.Type != "JobCancellation" || time.Since(start) != 7*time.Minute {
			t.Fatalf("after %s: %+v, %v", time.Since(start), msg, err)
		}
		s.hub.read(func() {
			if msg := s.hub.messageFor(x); msg != nil {
				t.Errorf("the runner is told again: %+v", msg)
			}
		})
		// It never obeys.
		time.Sleep(time.Hour)
		if c, _ := run.Wait(t.Context()); c != Cancelled || run.Jobs()[0].ID != j.id || run.Jobs()[0].Status != "completed" {
			t.Errorf("the run ended %s", c)
		}
	})
}

func TestRunnerThatNeverBeginsLosesItsJob(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := newScript(t, Config{})
		defer s.Close()
		s.submit(oneJob)
		x := s.runner("mute")
		s.hub.acknowledge(x.clientID, x.job.request)
		y := s.runner("good")
		s.hub.read(func() {
			if y.job != nil {
				t.Error("both have the job")
			}
		})
		time.Sleep(11 * time.Minute)
		synctest.Wait()
		s.hub.read(func() {
			if x.job != nil || y.job == nil {
				t.Errorf("the job is still with the mute one: %v, %v", x.job, y.job)
			}
		})
		if _, err := s.hub.begin(x.clientID, y.job.request); err == nil {
			t.Error("the mute one begins it after all")
		}
		s.begin(y)
	})
}

func TestScaleSetDeletedUnderItsJobs(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := newScript(t, Config{Poll: time.Second})
		defer s.Close()
		run := s.submit(oneJob)
		x := s.runner("r")
		if x.job == nil {
			t.Fatal("not dispatched")
		}
		if err := s.hub.deleteSet(s.set.id); err != nil {
			t.Fatal(err)
		}
		if st := run.Jobs()[0].Status; st != "queued" || x.job != nil {
			t.Errorf("the job is %s", st)
		}
	})
}

func TestJobNobodyServesSaysSo(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := newScript(t, Config{})
		defer s.Close()
		s.submit("on: push\njobs:\n  served:\n    runs-on: flint\n    steps:\n      - run: 'true'\n" +
			"  lost:\n    runs-on: [flint, gpu]\n    steps:\n      - run: 'true'\n" +
			"  late:\n    runs-on: late\n    steps:\n      - run: 'true'\n" +
			"  never:\n    needs: served\n    if: failure()\n    runs-on: nowhere\n    steps:\n      - run: 'true'\n")
		said := func() (jobs []string) {
			for _, e := range s.events {
				if e.Kind == JobUnserved {
					jobs = append(jobs, e.Job+" "+strings.Join(e.Labels, ","))
				}
			}
			return jobs
		}
		time.Sleep(9 * time.Second)
		synctest.Wait()
		if got := said(); len(got) != 0 {
			t.Errorf("too early: %q", got)
		}
		late, err := s.hub.createSet("acme", groupID, "late", nil, false)
		if err != nil {
			t.Fatal(err)
		}
		time.Sleep(time.Hour)
		synctest.Wait()
		if got, want := said(), []string{"lost flint,gpu"}; !slices.Equal(got, want) {
			t.Errorf("said of %q, want %q, once", got, want)
		}
		session, err := s.hub.openSession(late.id, "test")
		if err != nil {
			t.Fatal(err)
		}
		if _, err := s.hub.nextMessage(t.Context(), late.id, session, 1); err != nil {
			t.Fatal(err)
		}
		if err := s.hub.deleteSet(late.id); err != nil {
			t.Fatal(err)
		}
		time.Sleep(time.Minute)
		synctest.Wait()
		if got, want := said(), []string{"lost flint,gpu", "late late"}; !slices.Equal(got, want) {
			t.Errorf("said of %q, want %q: its scale set was deleted", got, want)
		}
	})
}

func TestNewestPollWins(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := newScript(t, Config{Poll: time.Hour})
		defer s.Close()
		x := s.runner("r")
		old := make(chan *runnerMessage)
		go func() { // received below
			msg, _ := s.hub.nextRunnerMessage(t.Context(), x.clientID, x.session)
			old <- msg
		}()
		synctest.Wait()
		fresh := make(chan *runnerMessage)
		go func() { // received below
			msg, _ := s.hub.nextRunnerMessage(t.Context(), x.clientID, x.session)
			fresh <- msg
		}()
		if msg := <-old; msg != nil {
			t.Errorf("the old poll got %+v", msg)
		}
		s.submit(oneJob)
		if msg := <-fresh; msg == nil || msg.Type != "RunnerJobRequest" {
			t.Errorf("the new poll got %+v", msg)
		}
	})
}

// An observer may call the server, and a slow one loses log lines but nothing else.
func TestObserver(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := newScript(t, Config{})
		defer s.Close()
		var lines, gaps int
		seen := map[Kind]int{}
		block := make(chan struct{})
		entered := make(chan struct{}, 1)
		s.hub.events.observe = func(e Event) {
			seen[e.Kind]++
			_ = s.Inventory()
			switch {
			case e.Kind == JobStarted:
				entered <- struct{}{}
				<-block
			case strings.Contains(e.Line, "dropped"):
				gaps++
			case e.Kind == LogLine:
				lines++
			}
		}
		s.submit(oneJob)
		x := s.runner("r")
		began := make(chan *job)
		go func() { began <- s.begin(x) }() // received below
		<-entered
		j := x.job
		for i := range 60 {
			s.hub.addLines(j.id, "step", i*maxFeedLines+1, strings.Split(strings.Repeat("line\n", maxFeedLines), "\n")[:maxFeedLines])
		}
		close(block)
		<-began
		s.hub.addLines(j.id, "step", 60*maxFeedLines+1, []string{"last"})
		if err := s.hub.complete(j.id, Success, nil); err != nil {
			t.Fatal(err)
		}
		if lines != maxQueuedEvents+1 || gaps != 1 || seen[JobCompleted] != 1 || seen[RunCompleted] != 1 {
			t.Errorf("%d lines, %d gaps, kinds %v", lines, gaps, seen)
		}
	})
}

func TestClip(t *testing.T) {
	for in, want := range map[string]string{
		"plain\ttext":                       "plain\ttext",
		"\x1b[1;31mred\x1b[0m":              "\x1b[1;31mred\x1b[0m",
		"a\x1b[2Jb\x1b[10;10Hc\x1b]0;t\x07": "abc]0;t",
		"\x00\r\n\u202eabc\x9b2J\xff":       "abc2J",
		"\x1b[" + strings.Repeat("1", 40):   "[" + strings.Repeat("1", 40),
		strings.Repeat("é", 300):            strings.Repeat("é", 128),
	} {
		if got := clip(in, maxName); got != want {
			t.Errorf("clip(%q) = %q, want %q", in, got, want)
		}
	}
}

func TestCredentialsExpire(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := newCredentials()
		token := c.issue(credJob, "j", time.Minute)
		if got, ok := c.check(credJob, token); !ok || got != "j" {
			t.Errorf("check: %q, %v", got, ok)
		}
		if _, ok := c.check(credRunner, token); ok {
			t.Error("a job's token passes for a runner's")
		}
		time.Sleep(time.Minute + 1)
		if _, ok := c.check(credJob, token); ok {
			t.Error("it outlives its life")
		}
		for i := range 1000 {
			c.issue(credJob, fmt.Sprint(i), time.Minute)
			time.Sleep(time.Second)
		}
		if n := len(c.known); n > 512 || len(c.held) != n {
			t.Errorf("%d tokens kept of %d subjects, most of them expired", n, len(c.held))
		}
	})
}

func TestBlobsAreBounded(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := newScript(t, Config{})
		defer s.Close()
		run := s.submit(oneJob)
		j := s.begin(s.runner("r"))
		chunk := []byte(strings.Repeat("0123456789abcde\n", 4096))
		for i := range 40 {
			id, err := s.hub.openBlob(j.id, stepLog, strings.Repeat("s", i+1))
			if err != nil {
				t.Fatal(err)
			}
			for range 20 {
				s.hub.appendBlob(id, chunk, false)
			}
		}
		kept := 0
		for _, b := range j.blobs {
			kept += len(b.data)
			if len(b.data) > maxBlobKept || b.lines != 20*4096 {
				t.Fatalf("a blob keeps %d bytes of %d lines", len(b.data), b.lines)
			}
		}
		if kept != maxBlobsKept {
			t.Errorf("kept %d bytes, want %d", kept, maxBlobsKept)
		}
		if log := run.Jobs()[0].Log; log != "" {
			t.Errorf("a step's log passes for the job's: %d bytes", len(log))
		}
	})
}

func FuzzFeed(f *testing.F) {
	f.Add([]byte(`{"StepID":"a","Value":["x"],"StartLine":1,"Count":1}`))
	f.Add([]byte(`{"stepId":"b","value":null,"startLine":-9223372036854775808}`))
	f.Fuzz(func(t *testing.T, b []byte) {
		m, ok := parseFeed(b)
		if !ok {
			return
		}
		if m.StepID == "" || len(m.StepID) > 64 || len(m.Value) > maxFeedLines {
			t.Fatalf("out of bounds: %+v", m)
		}
		for _, l := range m.Value {
			if c := clip(l, maxLine); len(c) > maxLine+4 || strings.ContainsAny(c, "\n\r\x00\x07") {
				t.Fatalf("clip let %q through", c)
			}
		}
	})
}
