package githubsim

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"net/http/httptest"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/actions/scaleset"
	"github.com/actions/scaleset/listener"

	"flint/internal/githubsim/simrunner"
)

// scaler is what the official listener drives: it notes what it is told, and starts a runner for every job.
type scaler struct {
	fleet

	started   []string // "job runner"
	completed []string // "job runner result"
	desired   []int
}

func (s *scaler) HandleJobStarted(_ context.Context, j *scaleset.JobStarted) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.started = append(s.started, j.JobDisplayName+" "+j.RunnerName)
	return nil
}

func (s *scaler) HandleJobCompleted(ctx context.Context, j *scaleset.JobCompleted) error {
	s.mu.Lock()
	s.completed = append(s.completed, j.JobDisplayName+" "+j.RunnerName+" "+j.Result)
	s.mu.Unlock()
	return s.fleet.HandleJobCompleted(ctx, j)
}

func (s *scaler) HandleDesiredRunnerCount(ctx context.Context, count int) (int, error) {
	s.mu.Lock()
	s.desired = append(s.desired, count)
	s.mu.Unlock()
	return s.fleet.HandleDesiredRunnerCount(ctx, count)
}

// TestOfficialListener holds the simulator to the listener that comes with GitHub's client, unmodified, and to runners that
// know it by its addresses alone.
func TestOfficialListener(t *testing.T) {
	for _, acquire := range []bool{false, true} {
		t.Run(fmt.Sprintf("acquire=%v", acquire), func(t *testing.T) {
			r := newRig(t, Config{Acquire: acquire, Keys: 1, Poll: 300 * time.Millisecond})
			runners := simrunner.NewClient()
			t.Cleanup(runners.CloseIdleConnections)
			s := &scaler{}
			s.r, s.client = r, r.client()
			s.start = func(ctx context.Context, name, jit string) {
				if exit, err := simrunner.Run(ctx, jit, simrunner.Options{Client: runners}); exit != 0 || err != nil {
					t.Errorf("runner %s: exit %d, %v", name, exit, err)
				}
			}
			s.set = r.scaleSet(s.client, "flint")
			session, err := r.client().MessageSessionClient(t.Context(), s.set.ID, "official")
			if err != nil {
				t.Fatal(err)
			}
			l, err := listener.New(session, listener.Config{ScaleSetID: s.set.ID, MaxRunners: 2})
			if err != nil {
				t.Fatal(err)
			}
			ctx, cancel := context.WithCancel(t.Context())
			defer cancel()
			ended := make(chan error, 1)
			go func() { ended <- l.Run(ctx, s) }() // received below
			run := submit(t, r, "on: push\njobs:\n  good: { runs-on: flint, steps: [{run: 'true', name: one}, {run: sleep 0.01, name: two}] }\n"+
				"  bad: { runs-on: flint, steps: [{run: exit 3, name: one}] }\n  more: { runs-on: flint, steps: [{run: 'true', name: one}] }\n")
			r.waitRun(run, Failure)
			heard := func() bool {
				s.mu.Lock()
				defer s.mu.Unlock()
				return len(s.completed) == 3
			}
			for !heard() && ctx.Err() == nil {
				if _, err := session.GetMessage(ctx, 0, 2); err != nil { // as long as a poll lasts
					t.Fatal(err)
				}
			}
			cancel()
			if err := <-ended; !errors.Is(err, context.Canceled) {
				t.Errorf("the listener ended: %v", err)
			}
			if err := session.Close(context.WithoutCancel(t.Context())); err != nil {
				t.Error(err)
			}
			s.wg.Wait()
			results := map[string]bool{}
			for _, c := range s.completed {
				job, rest, _ := strings.Cut(c, " ")
				runner, result, _ := strings.Cut(rest, " ")
				results[job+" "+result] = true
				if !slices.Contains(s.started, job+" "+runner) {
					t.Errorf("%q was completed; started were %q", c, s.started)
				}
			}
			if len(results) != 3 || !results["good succeeded"] || !results["bad failed"] || !results["more succeeded"] {
				t.Errorf("completed: %q", s.completed)
			}
			if slices.Max(s.desired) != 2 {
				t.Errorf("wanted runners: %v, want at most 2, which is the capacity", s.desired)
			}
			inv := r.Inventory()
			if len(inv.Runners) != 0 || inv.OpenJobs != 0 || inv.ScaleSets[0].Owner != "" {
				t.Errorf("left: %+v", inv)
			}
		})
	}
}

// jitFor registers a runner and brings its job to its scale set.
func jitFor(t *testing.T, r *rig, src string) (jit string, run *Run) {
	t.Helper()
	c, set, m := r.session("flint")
	run = submit(t, r, src)
	if message(t, m, 1) == nil {
		t.Fatal("no message")
	}
	j, err := c.GenerateJitRunnerConfig(t.Context(), &scaleset.RunnerScaleSetJitRunnerSetting{Name: "one"}, set.ID)
	if err != nil {
		t.Fatal(err)
	}
	return j.EncodedJITConfig, run
}

func TestSimrunnerReportsWhatARunnerReports(t *testing.T) {
	r := newRig(t, Config{Poll: 5 * time.Second})
	jit, run := jitFor(t, r, "on: push\njobs:\n  a:\n    runs-on: flint\n    steps:\n      - {name: first, run: 'true'}\n      - {name: second, run: exit 1}\n      - {name: third, run: 'true'}\n")
	var way []simrunner.Point
	exit, err := simrunner.Run(t.Context(), jit, simrunner.Options{Reached: func(p simrunner.Point) { way = append(way, p) }})
	if exit != simrunner.ExitDone || err != nil {
		t.Fatalf("exit %d, %v", exit, err)
	}
	r.waitRun(run, Failure)
	if len(way) != int(simrunner.Completed) || !slices.IsSorted(way) {
		t.Errorf("its way was %v", way)
	}
	if got, want := r.lines("a"), "run first\nrun second\n##[error]exit code 1\n"; got != want {
		t.Errorf("live log %q, want %q", got, want)
	}
	j := run.Jobs()[0]
	var steps []string
	for _, st := range j.Steps {
		steps = append(steps, st.Name+" "+st.Status+" "+string(st.Conclusion))
	}
	if want := []string{"first completed success", "second completed failure"}; !slices.Equal(steps[:2], want) || j.Log != r.lines("a") {
		t.Errorf("steps %q, want %q first; log %q", steps, want, j.Log)
	}
}

func TestSimrunnerHearsItsJobCancelled(t *testing.T) {
	r := newRig(t, Config{Poll: 5 * time.Second})
	jit, run := jitFor(t, r, oneJob)
	exit, err := simrunner.Run(t.Context(), jit, simrunner.Options{Work: func(ctx context.Context, _ simrunner.Step) error {
		run.Cancel()
		<-ctx.Done()
		return ctx.Err()
	}})
	if exit != simrunner.ExitDone || err != nil {
		t.Errorf("exit %d, %v", exit, err)
	}
	r.waitRun(run, Cancelled)
}

func TestSimrunnerDiesAnywhere(t *testing.T) {
	for p := simrunner.Decoded; p <= simrunner.Completed; p++ {
		t.Run(fmt.Sprint(p), func(t *testing.T) {
			t.Parallel() // their time is the lease's, which a runner that is slow must not miss
			r := newRig(t, Config{Poll: 5 * time.Second, Lease: 20 * time.Second, Keys: 1})
			jit, run := jitFor(t, r, oneJob)
			exit, err := simrunner.Run(t.Context(), jit, simrunner.Options{Die: p})
			if exit != simrunner.ExitDied || !errors.Is(err, simrunner.ErrDied) {
				t.Errorf("exit %d, %v", exit, err)
			}
			switch {
			case p == simrunner.Completed:
				r.waitRun(run, Success)
			case p >= simrunner.Acquired:
				r.waitRun(run, Failure)
			default:
				if st := run.Jobs()[0].Status; st != "assigned" {
					t.Errorf("its job is %s", st)
				}
			}
		})
	}
}

func TestSimrunnerExitCodes(t *testing.T) {
	r := newRig(t, Config{Poll: 5 * time.Second, Keys: 1})
	c, set, _ := r.session("flint")
	jit := func(name string) (string, int64) {
		j, err := c.GenerateJitRunnerConfig(t.Context(), &scaleset.RunnerScaleSetJitRunnerSetting{Name: name}, set.ID)
		if err != nil {
			t.Fatal(err)
		}
		return j.EncodedJITConfig, int64(j.Runner.ID)
	}
	check := func(what, jit string, o simrunner.Options, want int, wantErr error) {
		t.Helper()
		if exit, err := simrunner.Run(t.Context(), jit, o); exit != want || !errors.Is(err, wantErr) {
			t.Errorf("%s: exit %d, %v; want %d, %v", what, exit, err, want, wantErr)
		}
	}
	gone, id := jit("gone")
	if err := c.RemoveRunner(t.Context(), id); err != nil {
		t.Fatal(err)
	}
	check("registration gone", gone, simrunner.Options{}, simrunner.ExitTerminated, simrunner.ErrGone)
	leaving, id := jit("leaving")
	check("registration removed while it waits", leaving, simrunner.Options{Reached: func(p simrunner.Point) {
		if p == simrunner.Online {
			if err := c.RemoveRunner(t.Context(), id); err != nil {
				t.Error(err)
			}
		}
	}}, simrunner.ExitTerminated, simrunner.ErrGone)
	if exit, err := simrunner.Run(t.Context(), "bm9uc2Vuc2U=", simrunner.Options{}); exit != simrunner.ExitTerminated || err == nil {
		t.Errorf("nonsense: exit %d, %v", exit, err)
	}
	late, _ := jit("late")
	r.http.Config.Handler = nil
	away := &http.Client{Transport: &http.Transport{Proxy: nil, DialContext: nil}}
	unreachable := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { w.WriteHeader(503) }))
	defer unreachable.Close()
	away.Transport = redirect{unreachable.Listener.Addr().String()}
	if exit, err := simrunner.Run(t.Context(), late, simrunner.Options{Client: away, Patience: 200 * time.Millisecond}); exit != simrunner.ExitRetry || err == nil {
		t.Errorf("unreachable: exit %d, %v", exit, err)
	}
}

// redirect sends every request to another address.
type redirect struct{ address string }

func (d redirect) RoundTrip(r *http.Request) (*http.Response, error) {
	r = r.Clone(r.Context())
	r.URL.Host = d.address
	return http.DefaultTransport.RoundTrip(r)
}

// crowd runs n one-job runs through the simulator: one scale set, at most width runners at a time, no coordinator but this
// loop. It returns how the runners ended.
func crowd(tb testing.TB, n, width int, f Faults, o simrunner.Options) (exits map[int]int) {
	tb.Helper()
	ts := httptest.NewUnstartedServer(nil)
	s, err := New(Config{URL: "http://" + ts.Listener.Addr().String(), Owner: "acme", Repo: "widget", Keys: 4, Poll: 5 * time.Second})
	if err != nil {
		tb.Fatal(err)
	}
	ts.Config.Handler = s.Handler()
	s.Misbehave(f)
	ts.Start()
	defer func() {
		s.Close()
		ts.Close()
	}()
	o.Client = simrunner.NewClient()
	defer o.Client.CloseIdleConnections()
	wf, err := ParseWorkflow(".github/workflows/ci.yml", []byte("on: push\njobs:\n  a: { runs-on: flint, steps: [{run: 'true', name: s}] }\n"))
	if err != nil {
		tb.Fatal(err)
	}
	set, err := s.hub.createSet("acme", groupID, "flint", nil, false)
	if err != nil {
		tb.Fatal(err)
	}
	session, err := s.hub.openSession(set.id, "crowd")
	if err != nil {
		tb.Fatal(err)
	}
	var runs []*Run
	for range n {
		run, err := s.Submit(wf, Trigger{Event: "push"})
		if err != nil {
			tb.Fatal(err)
		}
		runs = append(runs, run)
	}
	if _, err := s.hub.nextMessage(tb.Context(), set.id, session, n); err != nil {
		tb.Fatal(err)
	}
	var mu sync.Mutex
	exits = map[int]int{}
	var wg sync.WaitGroup
	next := make(chan int)
	for range width {
		wg.Go(func() {
			for i := range next {
				key, err := s.keys.key()
				if err != nil {
					tb.Error(err)
					return
				}
				x, err := s.hub.register(registration{set: set.id, name: fmt.Sprintf("r%d", i), key: &key.PublicKey, ephemeral: true})
				if err != nil {
					tb.Error(err)
					return
				}
				jit, err := s.encodeJIT(x, key, "")
				if err != nil {
					tb.Error(err)
					return
				}
				exit, err := simrunner.Run(tb.Context(), jit, o)
				if err != nil {
					tb.Errorf("runner %d: %v", i, err)
				}
				mu.Lock()
				exits[exit]++
				mu.Unlock()
			}
		})
	}
	for i := range n {
		next <- i
	}
	close(next)
	wg.Wait()
	for _, run := range runs {
		if c, err := run.Wait(tb.Context()); c != Success || err != nil {
			tb.Fatalf("a run ended %q, %v", c, err)
		}
	}
	if left := s.Inventory(); len(left.Runners) != 0 || left.OpenJobs != 0 {
		tb.Errorf("left: %d registrations, %d jobs", len(left.Runners), left.OpenJobs)
	}
	return exits
}

func TestManySimrunners(t *testing.T) {
	if exits := crowd(t, 200, 20, Faults{}, simrunner.Options{Quiet: true}); exits[simrunner.ExitDone] != 200 || len(exits) != 1 {
		t.Errorf("exits: %v", exits)
	}
}

// A server that fails, forgets its answers and hangs up costs its runners time and nothing else.
func TestSimrunnersPersist(t *testing.T) {
	f := Faults{Seed: 7, Routes: RouteRunners, FailRequests: .1, LoseAnswers: .1, CutAnswers: .1, LimitRequests: .05}
	if exits := crowd(t, 40, 10, f, simrunner.Options{Quiet: true}); exits[simrunner.ExitDone] != 40 || len(exits) != 1 {
		t.Errorf("exits: %v", exits)
	}
}

// BenchmarkSimrunner is one job from registration to the end of its run, 20 at a time.
func BenchmarkSimrunner(b *testing.B) {
	for name, quiet := range map[string]bool{"quiet": true, "talking": false} {
		b.Run(name, func(b *testing.B) {
			crowd(b, b.N, min(b.N, 20), Faults{}, simrunner.Options{Quiet: quiet})
			b.ReportMetric(float64(b.N)/b.Elapsed().Seconds(), "jobs/s")
		})
	}
}
