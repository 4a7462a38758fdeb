package githubsim

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"flint"
	"flint/internal/githubsim/simrunner"
)

func mustScenario(t *testing.T, src string) Scenario {
	t.Helper()
	sc, err := ParseScenario("test", []byte(src))
	if err != nil {
		t.Fatal(err)
	}
	return sc
}

func TestScenarioErrorsNameTheirLines(t *testing.T) {
	_, err := ParseScenario("bad.txt", []byte(strings.Join([]string{
		"# a comment, and an empty line", "",
		"at 1s submit 5 jobs runs-on flint taking 2s",   // 3: good
		"at 1s submit 0 jobs runs-on flint taking 2s",   // 4
		"at 1s submit 5 jobs runs-on a,,b taking 2s",    // 5
		"at soon outage 5s",                             // 6
		"at 1s outage 5",                                // 7
		"at -1s kill runner 1",                          // 8
		"at 1s kill runner x",                           // 9
		"at 1s delete scale-set",                        // 10
		"at 1s sing",                                    // 11
		"always lose webhooks 120%",                     // 12
		"always lose webhooks 0.2",                      // 13
		"always lose sleep 20%",                         // 14
		"always delay statistics by 20%",                // 15
		"never lose webhooks 20%",                       // 16
		"at 1s cancel run 2 please",                     // 17
		"seed x",                                        // 18
		"at 1s submit 1 job runs-on ${{x}} taking 2s",   // 19
		"at 1s stop lose webhooks 20%",                  // 20
		"always lose webhooks NaN%",                     // 21
		"at 1s submit 257 jobs runs-on flint taking 2s", // 22
	}, "\n")))
	f := asFault[*flint.Fault](t, err)
	if f.Code != "scenario.syntax" || !errors.Is(err, flint.ErrUsage) || !strings.Contains(f.What, "bad.txt") {
		t.Errorf("the fault is %+v", f)
	}
	var lines []string
	for _, l := range strings.Split(f.Err.Error(), "\n") {
		n, _, _ := strings.Cut(l, ":")
		lines = append(lines, strings.TrimPrefix(n, "line "))
	}
	if want := strings.Fields("4 5 6 7 8 9 10 11 12 13 14 15 16 17 18 19 20 21 22"); !slices.Equal(lines, want) {
		t.Errorf("bad lines are %v, want %v:\n%v", lines, want, f.Err)
	}
}

// Every switch has a name a scenario can say, and every name one switch.
func TestScenarioSetsEverySwitch(t *testing.T) {
	chances, times := faultNames()
	var src strings.Builder
	for _, name := range chances {
		src.WriteString("always " + name + " 25%\n")
	}
	for _, name := range times {
		src.WriteString("always " + name + " 3s\n")
	}
	s := newScriptServer(t)
	if _, err := s.Play(t.Context(), mustScenario(t, "seed 9\n"+src.String())); err != nil {
		t.Fatal(err)
	}
	f := s.hub.faults.settings()
	want := Faults{
		Seed: 9, Routes: RoutesOfCoordinator, RefuseSessions: .25, ReplayMessages: .25, ExpireQueueTokens: .25, ExpireAdminTokens: .25,
		ExceedCapacity: .25, RepeatAssignments: .25, DeleteScaleSets: .25, RefuseRemovals: .25, RefuseNames: .25, RefuseVersions: .25,
		LoseWebhooks: .25, ForgetWebhooks: .25, RepeatWebhooks: .25, DelayWebhooks: .25, ReorderWebhooks: .25, FailDeliveries: .25,
		FailRequests: .25, LoseAnswers: .25, CutAnswers: .25, SlowAnswers: .25, LimitRequests: .25, ForbidRequests: .25,
		SlowBy: 3 * time.Second, RetryAfter: 3 * time.Second, WebhookDelay: 3 * time.Second,
		ReassignAfter: 3 * time.Second, RemoveIdleAfter: 3 * time.Second, StatisticsLag: 3 * time.Second,
	}
	if f != want {
		t.Errorf("set: %+v\nwant %+v", f, want)
	}
}

// The reference shows a scenario that can be played, and names every switch.
func TestScenariosAreDocumented(t *testing.T) {
	b, err := os.ReadFile(filepath.Join("..", "..", "docs", "reference.md"))
	if err != nil {
		t.Fatal(err)
	}
	_, section, _ := strings.Cut(string(b), "### Scenarios")
	_, example, _ := strings.Cut(section, "```\n")
	example, tables, _ := strings.Cut(example, "```\n")
	if sc := mustScenario(t, example); len(sc.acts) < 8 {
		t.Errorf("the example has only %d lines", len(sc.acts))
	}
	tables, _, _ = strings.Cut(tables, "\n## ")
	chances, times := faultNames()
	for _, name := range append(chances, times...) {
		if !strings.Contains(tables, "`"+name+"`") {
			t.Errorf("docs/reference.md does not name %q", name)
		}
	}
}

func newScriptServer(t *testing.T) *Server {
	t.Helper()
	cfg := Config{URL: "http://sim", Owner: "acme", Repo: "widget"}
	if err := cfg.complete(); err != nil {
		t.Fatal(err)
	}
	s := &Server{cfg: cfg, hub: newHub(cfg), creds: newCredentials()}
	t.Cleanup(s.Close)
	return s
}

func TestScenarioHappensInItsTime(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := newScript(t, Config{Poll: time.Hour})
		defer s.Close()
		s.runner("r1")
		var killed []string
		sc := mustScenario(t, `
			at 4s cancel run 2
			at 0s submit 1 job runs-on flint taking 2s
			at 1s submit 2 jobs runs-on flint taking 2s failing
			at 2s outage 4s
			at 3s outage 1s
			at 8s kill runner 1
			at 9s start refuse names 100%
			at 10s stop refuse names
			at 11s delete scale-set flint
		`)
		sc.Kill = func(name string) { killed = append(killed, name) }
		sc.Scale = 60
		start := time.Now()
		type result struct {
			runs []*Run
			err  error
		}
		ended := make(chan result, 1)
		go func() { // received below
			runs, err := s.Play(t.Context(), sc)
			ended <- result{runs, err}
		}()
		at := func(minutes float64, what string, ok func() bool) {
			t.Helper()
			time.Sleep(time.Until(start.Add(time.Duration(minutes * float64(time.Minute)))))
			synctest.Wait()
			good := false
			s.hub.read(func() { good = ok() })
			if !good {
				t.Errorf("after %v minutes: not %s", minutes, what)
			}
		}
		down := func() bool { return s.hub.faults.settings().Outage }
		up := func() bool { return !down() }
		at(0.5, "one run", func() bool { return len(s.hub.runs) == 1 && len(s.hub.runs[0].jobs) == 1 })
		at(1.5, "two runs", func() bool { return len(s.hub.runs) == 2 && len(s.hub.runs[1].jobs) == 2 })
		at(2.5, "down", down)
		at(4.5, "down, though the inner outage is over", down)
		at(4.6, "cancelled", func() bool { return s.hub.runs[1].over && s.hub.runs[1].conclusion == Cancelled })
		at(6.5, "up", up)
		at(8.5, "killed", func() bool { return slices.Equal(killed, []string{"r1"}) })
		at(9.5, "refusing names", func() bool { return s.hub.faults.settings().RefuseNames == 1 })
		at(10.5, "naming", func() bool { return s.hub.faults.settings().RefuseNames == 0 })
		at(11.5, "deleted", func() bool { return len(s.hub.sets) == 0 })
		res := <-ended
		if res.err != nil || len(res.runs) != 2 || time.Since(start) > 12*time.Minute {
			t.Errorf("played %d runs in %s: %v", len(res.runs), time.Since(start), res.err)
		}
		if script := s.hub.runs[1].jobs[0].spec.steps[0].script; script != "sleep 120" {
			t.Errorf("a job does %q", script)
		}
	})
}

func TestScenarioStopsWithItsContext(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := newScript(t, Config{})
		defer s.Close()
		ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
		defer cancel()
		_, err := s.Play(ctx, mustScenario(t, "at 1s outage 1h\nat 2s kill runner 1\n"))
		if !errors.Is(err, context.DeadlineExceeded) || !strings.Contains(err.Error(), "line 2") || s.hub.faults.settings().Outage {
			t.Errorf("ended with %v, outage %v", err, s.hub.faults.settings().Outage)
		}
	})
}

// A whole bad day, seen by the official listener's fleet and runners of the protocol.
func TestScenarioOfABadDay(t *testing.T) {
	// The official client does not bear two expired tokens in a row. With this seed 200 polls meet no such pair, and few are made.
	r := newRig(t, Config{Poll: 10 * time.Second, Keys: 1, Lease: 5 * time.Second})
	client := simrunner.NewClient()
	t.Cleanup(client.CloseIdleConnections)
	ctx, cancel := context.WithCancel(t.Context())
	f := r.runFleet("flint", 3, func(_ context.Context, _, jit string) {
		// One of them is cut off, and has no more to say when its server is back.
		_, _ = simrunner.Run(ctx, jit, simrunner.Options{Client: client, Renew: 100 * time.Millisecond})
	})
	defer f.wg.Wait()
	defer cancel()
	sc := mustScenario(t, `
		seed 695
		always expire queue tokens 20%
		always repeat assignments 50%
		at 0s submit 1 job runs-on flint taking 1h
		at 1s kill runner 1
		at 2s submit 6 jobs runs-on flint taking 1s
	`)
	sc.Scale = 0.1
	sc.Did = func(what string) {
		if strings.HasPrefix(what, "submit 1 ") { // the runner that is killed has to have the job
			r.untilKind(JobStarted)
		}
	}
	runs, err := r.Play(t.Context(), sc)
	if err != nil {
		t.Fatal(err)
	}
	r.waitRun(runs[0], Failure)
	r.waitRun(runs[1], Success)
	if got := r.Misbehaved(); got[expireQueueTokens] == 0 || got[repeatAssignments] == 0 {
		t.Errorf("struck: %v", got)
	}
}

func FuzzScenario(f *testing.F) {
	f.Add([]byte("seed 1\nalways lose webhooks 20%\nat 0s submit 5 jobs runs-on flint taking 2s\nat 1s outage 5s\nat 5s cancel run 2"))
	f.Fuzz(func(t *testing.T, src []byte) {
		sc, err := ParseScenario("fuzz", src)
		if err != nil {
			asFault[*flint.Fault](t, err)
			return
		}
		if !slices.IsSortedFunc(sc.acts, func(a, b act) int { return int(a.at - b.at) }) {
			t.Error("the lines are not in order")
		}
		for _, a := range sc.acts {
			if a.at < 0 || a.n < 0 || a.n > maxRunners {
				t.Errorf("out of bounds: %+v", a)
			}
		}
	})
}
