package githubsim

import (
	"context"
	"errors"
	"io"
	"math"
	"net/http"
	"net/http/httptest"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/actions/scaleset"

	"flint/internal/githubsim/simrunner"
)

// get asks for the runners of the organisation as an installation.
func (r *rig) get(path string) (*http.Response, []byte, error) {
	r.t.Helper()
	req, err := http.NewRequestWithContext(r.t.Context(), http.MethodGet, r.cfg.URL+path, nil)
	if err != nil {
		r.t.Fatal(err)
	}
	req.Header.Set("Authorization", "Bearer "+r.creds.issue(credInstallation, "", time.Minute))
	resp, err := http.DefaultClient.Do(req)
	if err != nil {
		return nil, nil, err
	}
	defer func() { _ = resp.Body.Close() }()
	b, err := io.ReadAll(resp.Body)
	return resp, b, err
}

// struck checks how often a fault struck.
func (r *rig) struck(name string, want int) {
	r.t.Helper()
	if got := r.Misbehaved()[name]; got != want {
		r.t.Errorf("%q struck %d times, want %d: %v", name, got, want, r.Misbehaved())
	}
}

func TestFaultsOfHTTP(t *testing.T) {
	const path = "/api/v3/orgs/acme/actions/runners"
	r := newRig(t, Config{})
	if resp, _, err := r.get(path); err != nil || resp.StatusCode != 200 {
		t.Fatalf("behaving: %v, %v", resp, err)
	}

	r.Misbehave(Faults{FailRequests: 1})
	seen := map[int]bool{}
	for range 6 {
		resp, body, err := r.get(path)
		if err != nil || resp.StatusCode < 500 || !strings.Contains(string(body), "<title>") {
			t.Fatalf("failing: %v, %q, %v", resp, body, err)
		}
		seen[resp.StatusCode] = true
	}
	if len(seen) != 3 {
		t.Errorf("statuses of failures: %v", seen)
	}
	r.struck(failRequests, 6)

	r.Misbehave(Faults{LimitRequests: 1, RetryAfter: 1500 * time.Millisecond})
	resp, _, err := r.get(path)
	if err != nil || resp.StatusCode != http.StatusTooManyRequests || resp.Header.Get("Retry-After") != "2" {
		t.Errorf("limited: %v, %v", resp, err)
	}

	r.Misbehave(Faults{ForbidRequests: 1, RetryAfter: time.Minute})
	resp, body, err := r.get(path)
	if err != nil || resp.StatusCode != http.StatusForbidden || resp.Header.Get("X-RateLimit-Remaining") != "0" || !strings.Contains(string(body), "rate limit exceeded") {
		t.Errorf("forbidden: %v, %q, %v", resp, body, err)
	}
	if reset, err := strconv.ParseInt(resp.Header.Get("X-RateLimit-Reset"), 10, 64); err != nil || math.Abs(time.Until(time.Unix(reset, 0)).Seconds()-60) > 30 {
		t.Errorf("reset at %d, %v", reset, err)
	}

	r.Misbehave(Faults{CutAnswers: 1})
	if resp, body, err := r.get(path); !errors.Is(err, io.ErrUnexpectedEOF) || len(body) == 0 || resp.StatusCode != 200 {
		t.Errorf("cut: %q, %v", body, err)
	}

	r.Misbehave(Faults{Outage: true})
	if resp, _, err := r.get(path); err != nil || resp.StatusCode != http.StatusServiceUnavailable {
		t.Errorf("outage: %v, %v", resp, err)
	}
	if status := r.post("POST", "/oauth2/token", "", ""); status != http.StatusBadRequest {
		t.Errorf("an outage for coordinators, seen by a runner: %d", status)
	}
	r.Misbehave(Faults{Outage: true, Routes: RouteRunners})
	if status := r.post("POST", "/oauth2/token", "", ""); status != http.StatusServiceUnavailable {
		t.Errorf("an outage for runners, seen by a runner: %d", status)
	}

	r.Misbehave(Faults{FailDeliveries: 1})
	if status := r.post("GET", "/api/v3/app/hook/deliveries", "", ""); status != http.StatusBadGateway {
		t.Errorf("deliveries: %d", status)
	}
	if resp, _, err := r.get(path); err != nil || resp.StatusCode != 200 {
		t.Errorf("deliveries fail, and the rest: %v, %v", resp, err)
	}
}

func TestSlowAnswer(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := newScript(t, Config{})
		defer s.Close()
		s.Misbehave(Faults{SlowAnswers: 1, SlowBy: 7 * time.Second})
		start := time.Now()
		served := http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { w.WriteHeader(http.StatusTeapot) })
		w := httptest.NewRecorder()
		s.misbehave(served, w, httptest.NewRequest("GET", "/api/v3/meta", nil))
		if w.Code != http.StatusTeapot || time.Since(start) != 7*time.Second {
			t.Errorf("status %d after %s", w.Code, time.Since(start))
		}
	})
}

// A lost answer is of something that took place.
func TestLostAnswerTookEffect(t *testing.T) {
	r := newRig(t, Config{Keys: 1})
	c, set, _ := r.session("flint")
	r.Misbehave(Faults{LoseAnswers: 1})
	if _, err := c.GenerateJitRunnerConfig(t.Context(), &scaleset.RunnerScaleSetJitRunnerSetting{Name: "one"}, set.ID); err == nil {
		t.Fatal("the answer came")
	}
	if got := r.Runners(); len(got) != 1 || got[0].Name != "one" {
		t.Errorf("registrations: %+v", got)
	}
}

func TestFaultsOfSessions(t *testing.T) {
	r := newRig(t, Config{Poll: 50 * time.Millisecond})
	c, set, m := r.session("flint")
	submit(t, r, oneJob)
	msg := message(t, m, 1)
	if err := m.DeleteMessage(t.Context(), msg.MessageID); err != nil {
		t.Fatal(err)
	}

	// A queue token that ends in the middle of a session is refreshed by the client.
	before := m.Session().MessageQueueAccessToken
	r.Misbehave(Faults{ExpireQueueTokens: 1})
	if _, err := m.GetMessage(t.Context(), 0, 1); err == nil {
		t.Error("two tokens ended and the poll went well")
	}
	r.Misbehave(Faults{})
	if got := message(t, m, 1); got != nil || m.Session().MessageQueueAccessToken == before {
		t.Errorf("after that: %+v, the old token %v", got, m.Session().MessageQueueAccessToken == before)
	}
	r.struck(expireQueueTokens, 2)

	if err := m.Close(t.Context()); err != nil {
		t.Fatal(err)
	}
	r.Misbehave(Faults{RefuseSessions: 1})
	if _, err := c.MessageSessionClient(t.Context(), set.ID, "test"); err == nil || !strings.Contains(err.Error(), "409") {
		t.Errorf("a session though they are refused: %v", err)
	}
	r.Misbehave(Faults{ReplayMessages: 1})
	m2, err := c.MessageSessionClient(t.Context(), set.ID, "test")
	if err != nil {
		t.Fatal(err)
	}
	again := message(t, m2, 1)
	if again == nil || again.MessageID == msg.MessageID || len(again.JobAssignedMessages) != 1 || again.JobAssignedMessages[0].JobID != msg.JobAssignedMessages[0].JobID {
		t.Errorf("replayed: %+v", again)
	}

	// The token of the scale set API ends, and goes on being refused; a fresh client gets in.
	r.Misbehave(Faults{ExpireAdminTokens: 1})
	if _, err := c.GetRunnerScaleSetByID(t.Context(), set.ID); err == nil || !strings.Contains(err.Error(), "401") {
		t.Errorf("with a token that has ended: %v", err)
	}
	r.Misbehave(Faults{})
	if _, err := c.GetRunnerScaleSetByID(t.Context(), set.ID); err == nil {
		t.Error("the token lives again")
	}
	if _, err := r.client().GetRunnerScaleSetByID(t.Context(), set.ID); err != nil {
		t.Errorf("with a fresh token: %v", err)
	}

	r.Misbehave(Faults{DeleteScaleSets: 1})
	if _, err := m2.GetMessage(t.Context(), 0, 1); err == nil || !strings.Contains(err.Error(), "RunnerScaleSetNotFound") {
		t.Errorf("a poll of a scale set that is gone: %v", err)
	}
	r.struck(deleteScaleSets, 1)
}

func TestFaultsOfRegistrations(t *testing.T) {
	r := newRig(t, Config{Poll: time.Second, Keys: 1})
	c, set, _ := r.session("flint")
	x, id := r.jit(c, set.ID, "one")
	r.Misbehave(Faults{RefuseNames: 1})
	if _, err := c.GenerateJitRunnerConfig(t.Context(), &scaleset.RunnerScaleSetJitRunnerSetting{Name: "two"}, set.ID); !errors.Is(err, scaleset.RunnerExistsError) {
		t.Errorf("a free name: %v", err)
	}
	r.Misbehave(Faults{RefuseRemovals: 1})
	if err := c.RemoveRunner(t.Context(), int64(id)); !errors.Is(err, scaleset.JobStillRunningError) {
		t.Errorf("removing an idle runner: %v", err)
	}
	r.Misbehave(Faults{RefuseVersions: 1})
	x.online()
	if status := x.call("GET", x.broker+"message?sessionId="+x.session, x.token, nil, nil); status != http.StatusForbidden {
		t.Errorf("an old runner polls: %d", status)
	}
	r.Misbehave(Faults{RefuseVersions: 1, Routes: RouteRunners})
	j, err := c.GenerateJitRunnerConfig(t.Context(), &scaleset.RunnerScaleSetJitRunnerSetting{Name: "old"}, set.ID)
	if err != nil {
		t.Fatal(err)
	}
	submit(t, r, oneJob)
	if exit, err := simrunner.Run(t.Context(), j.EncodedJITConfig, simrunner.Options{}); exit != simrunner.ExitDeprecated || !errors.Is(err, simrunner.ErrDeprecated) {
		t.Errorf("an old runner ends with %d, %v", exit, err)
	}
	if got := r.Runners(); slices.ContainsFunc(got, func(x RunnerInfo) bool { return x.Online || x.Busy }) {
		t.Errorf("old runners: %+v", got)
	}
}

func TestCapacityIsExceededByOne(t *testing.T) {
	r := newRig(t, Config{Poll: 50 * time.Millisecond})
	_, _, m := r.session("flint")
	for range 3 {
		submit(t, r, oneJob)
	}
	r.Misbehave(Faults{ExceedCapacity: 1})
	if msg := message(t, m, 0); msg == nil || msg.Statistics.TotalAssignedJobs != 1 {
		t.Errorf("a poll with capacity 0: %+v", msg)
	}
	if msg := message(t, m, 1); msg == nil || msg.Statistics.TotalAssignedJobs != 2 {
		t.Errorf("a poll with capacity 1: %+v", msg)
	}
}

func TestAssignmentIsRepeatedAfterTheEnd(t *testing.T) {
	r := newRig(t, Config{Poll: time.Second})
	c, set, m := r.session("flint")
	run := submit(t, r, oneJob)
	first := message(t, m, 1)
	r.Misbehave(Faults{RepeatAssignments: 1})
	x, _ := r.jit(c, set.ID, "one")
	x.online()
	x.acquire()
	x.want(200, x.complete("succeeded"), "complete")
	r.waitRun(run, Success)
	if err := m.DeleteMessage(t.Context(), first.MessageID); err != nil {
		t.Fatal(err)
	}
	msg := message(t, m, 1)
	if msg == nil || len(msg.JobCompletedMessages) != 1 || len(msg.JobAssignedMessages) != 1 || msg.Statistics.TotalAssignedJobs != 0 {
		t.Fatalf("after the end: %+v", msg)
	}
}

func TestJobNobodyTakesIsReassignedAndFails(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := newScript(t, Config{})
		defer s.Close()
		s.Misbehave(Faults{ReassignAfter: 5 * time.Minute})
		run := s.submit(oneJob)
		assigned := func() (n int) {
			for _, m := range s.set.pending {
				if m.Type == "JobAssigned" {
					n++
				}
			}
			return n
		}
		for i := 1; i <= maxReassigned; i++ {
			time.Sleep(5*time.Minute + time.Second)
			synctest.Wait()
			if got := assigned(); got != i+1 || run.Jobs()[0].Status != "assigned" {
				t.Fatalf("after %d time-outs: assigned %d times, %s", i, got, run.Jobs()[0].Status)
			}
		}
		time.Sleep(5 * time.Minute)
		if c, err := run.Wait(t.Context()); c != Failure || err != nil {
			t.Errorf("ended %s, %v", c, err)
		}
		if n := s.Misbehaved()[reassignAfter]; n != maxReassigned+1 {
			t.Errorf("counted %d", n)
		}
		// A job that a runner took in time stays its own.
		run = s.submit(oneJob)
		s.begin(s.runner("r"))
		time.Sleep(6 * time.Minute)
		if st := run.Jobs()[0].Status; st != "in_progress" {
			t.Errorf("a job that runs is %s", st)
		}
	})
}

func TestIdleRegistrationIsRemoved(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := newScript(t, Config{})
		defer s.Close()
		s.Misbehave(Faults{RemoveIdleAfter: time.Minute})
		s.runner("idle")
		run := s.submit(oneJob)
		s.runner("other")
		_ = run
		time.Sleep(time.Minute + time.Second)
		synctest.Wait()
		infos := s.Runners()
		if len(infos) != 1 || infos[0].Name != "idle" { // the first took the job
			t.Errorf("left: %+v", infos)
		}
	})
}

func TestStatisticsLag(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := newScript(t, Config{Poll: time.Hour})
		defer s.Close()
		s.Misbehave(Faults{StatisticsLag: 10 * time.Second})
		s.hub.read(func() { s.hub.told(s.set) })
		time.Sleep(time.Minute)
		s.submit(oneJob)
		start := time.Now()
		var got []string
		for range 2 {
			msg, err := s.hub.nextMessage(t.Context(), s.set.id, s.set.session, 100)
			if err != nil || msg == nil {
				t.Fatalf("after %q: %+v, %v", got, msg, err)
			}
			got = append(got, time.Since(start).String()+" "+strconv.Itoa(msg.Statistics.Assigned)+" "+strconv.Itoa(strings.Count(msg.Body, "JobAssigned")))
			if err := s.hub.deleteMessage(s.set.id, s.set.session, msg.ID); err != nil {
				t.Fatal(err)
			}
		}
		if want := []string{"0s 0 1", "10s 1 0"}; !slices.Equal(got, want) {
			t.Errorf("time, assigned, messages: %q, want %q", got, want)
		}
	})
}

// inbox is a receiver of webhooks that notes what it got.
type inbox struct {
	mu   sync.Mutex
	got  []string // guid action
	more chan struct{}
}

func (i *inbox) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	if r.Header.Get("X-GitHub-Event") != "workflow_job" {
		return
	}
	b, _ := io.ReadAll(r.Body)
	action := "completed"
	for _, a := range []string{"queued", "in_progress"} {
		if strings.Contains(string(b), `"action":"`+a+`"`) {
			action = a
		}
	}
	i.mu.Lock()
	i.got = append(i.got, r.Header.Get("X-GitHub-Delivery")+" "+action)
	i.mu.Unlock()
	i.more <- struct{}{}
}

// webhooks queues and cancels a job under faults and returns the actions received until n have come.
func webhooks(t *testing.T, f Faults, n int) (actions []string, guids map[string]int, r *rig) {
	t.Helper()
	in := &inbox{more: make(chan struct{}, 100)}
	ts := httptest.NewServer(in)
	t.Cleanup(ts.Close)
	r = newRig(t, Config{Hooks: []Hook{{URL: ts.URL}}})
	r.Misbehave(f)
	run := submit(t, r, oneJob)
	run.Cancel()
	ctx, cancel := context.WithTimeout(t.Context(), 5*time.Minute)
	defer cancel()
	for range n {
		select {
		case <-in.more:
		case <-ctx.Done():
			t.Fatalf("only %q came", in.got)
		}
	}
	in.mu.Lock()
	defer in.mu.Unlock()
	guids = map[string]int{}
	for _, g := range in.got {
		guid, action, _ := strings.Cut(g, " ")
		guids[guid]++
		actions = append(actions, action)
	}
	return actions, guids, r
}

func TestFaultsOfWebhooks(t *testing.T) {
	if got, _, _ := webhooks(t, Faults{}, 2); !slices.Equal(got, []string{"queued", "completed"}) {
		t.Errorf("behaving: %q", got)
	}
	if got, guids, _ := webhooks(t, Faults{RepeatWebhooks: 1}, 4); len(guids) != 2 || len(got) != 4 {
		t.Errorf("repeated: %q with guids %v", got, guids)
	}
	// Of the two, the seed strikes the first only: it comes second.
	seed := uint64(0)
	for uniform(seed, reorderWebhooks, 0) >= .5 || uniform(seed, reorderWebhooks, 1) < .5 {
		seed++
	}
	if got, _, _ := webhooks(t, Faults{Seed: seed, ReorderWebhooks: .5}, 2); !slices.Equal(got, []string{"completed", "queued"}) {
		t.Errorf("reordered: %q", got)
	}
	start := time.Now()
	if got, _, _ := webhooks(t, Faults{DelayWebhooks: 1, WebhookDelay: 300 * time.Millisecond}, 2); len(got) != 2 || time.Since(start) < 300*time.Millisecond {
		t.Errorf("delayed: %q after %s", got, time.Since(start))
	}
	for name, f := range map[string]Faults{loseWebhooks: {LoseWebhooks: 1}, forgetWebhooks: {ForgetWebhooks: 1}} {
		_, _, r := webhooks(t, f, 0)
		r.struck(name, 2)
		r.hub.hooks.mu.Lock()
		kept := 0
		for _, d := range r.hub.hooks.kept {
			if d.event == "workflow_job" {
				kept++
			}
		}
		r.hub.hooks.mu.Unlock()
		if want := map[string]int{loseWebhooks: 2, forgetWebhooks: 0}[name]; kept != want {
			t.Errorf("%s: %d deliveries are recorded, want %d", name, kept, want)
		}
	}
}

// What strikes depends on the seed alone, and strikes as often as its chance says.
func TestChancesRepeat(t *testing.T) {
	strikes := func(seed uint64, other bool) (hits []int) {
		m := newFaults()
		m.put(Faults{Seed: seed, LoseAnswers: .2, CutAnswers: .5})
		for i := range 2000 {
			if other {
				m.strikes(cutAnswers)
			}
			if m.strikes(loseAnswers) {
				hits = append(hits, i)
			}
		}
		return hits
	}
	a, b, c := strikes(1, false), strikes(1, true), strikes(2, false)
	if !slices.Equal(a, b) {
		t.Error("another fault changes when this one strikes")
	}
	if slices.Equal(a, c) {
		t.Error("another seed changes nothing")
	}
	for _, hits := range [][]int{a, c} {
		if len(hits) < 320 || len(hits) > 480 {
			t.Errorf("struck %d times of 2000 with a chance of a fifth", len(hits))
		}
	}
}
