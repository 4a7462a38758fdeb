package host_test

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"flint"
	"flint/internal/guest"
	"flint/internal/host"
	"flint/internal/vm/vmtest"
)

// outcome is what Run returned, and after what time.
type outcome struct {
	res  flint.Result
	err  error
	took time.Duration
}

// begin starts a runner whose program works until it is told to end, and returns once it is registered. It is for synctest.
func (w *world) begin(ctx context.Context, h *host.Host) (string, <-chan outcome) {
	w.t.Helper()
	id, ended, at := host.NewID("flint-", "pool"), make(chan outcome, 1), time.Now()
	go func() {
		res, err := h.Run(ctx, flint.Runner{ID: id, Pool: "pool"})
		ended <- outcome{res, err, time.Since(at)}
	}()
	synctest.Wait()
	if s := h.State(); len(s.Runners) != 1 || s.Runners[0].Phase != flint.Registered {
		w.t.Fatalf("the runner is not registered: %+v", s.Runners)
	}
	return id, ended
}

// patient is a guest whose program works until finish is closed or a signal comes.
func patient(finish <-chan struct{}) *vmtest.Fake {
	return &vmtest.Fake{Exec: func(ctx context.Context, _ guest.Command, stdin io.Reader, _, _ io.Writer) guest.Exit {
		_, _ = bufio.NewReader(stdin).ReadString('\n')
		select {
		case <-finish:
			return guest.Exit{}
		case <-ctx.Done():
			return guest.Exit{Code: 143, Signal: "SIGTERM"}
		}
	}}
}

func note(t *testing.T, h *host.Host, kind flint.JobEventKind, id string) {
	t.Helper()
	ev := flint.JobEvent{
		Kind: kind, Pool: "another pool", Runner: id, Job: flint.Job{ID: "j", Name: "build", Repository: "acme/hello"}, Conclusion: "succeeded",
	}
	if err := h.Note(t.Context(), ev); err != nil {
		t.Error(err)
	}
}

func TestDeadlinesBeforeTheJob(t *testing.T) {
	const online, pickup, finish, job = time.Minute, 3 * time.Minute, 5 * time.Second, time.Hour
	type step struct {
		at time.Duration
		do func(w *world, h *host.Host, id string, finish func())
	}
	ends := func(_ *world, _ *host.Host, _ string, finish func()) { finish() }
	begins := func(w *world, h *host.Host, id string, _ func()) { note(w.t, h, flint.JobStarted, id) }
	github := func(change func(*fakeGitHub)) func(*world, *host.Host, string, func()) {
		return func(w *world, _ *host.Host, _ string, _ func()) {
			w.github.mu.Lock()
			defer w.github.mu.Unlock()
			change(w.github)
		}
	}
	for name, tt := range map[string]struct {
		github *fakeGitHub
		limits host.Deadlines
		steps  []step
		code   string
		kind   error
		took   time.Duration
		asked  int // for the status

		onWithdraw func(w *world, h *host.Host, id string, finish func())
	}{
		"never online":        {code: "runner.offline", kind: flint.ErrGuest, took: online, asked: 1},
		"GitHub is silent":    {github: &fakeGitHub{silent: 3}, code: "runner.offline", kind: flint.ErrGuest, took: online + 7*time.Second, asked: 4},
		"GitHub knows it not": {github: &fakeGitHub{forgot: true}, code: "runner.offline", kind: flint.ErrGuest, took: online + finish, asked: 1},
		"GitHub forgot it after its job": {
			github: &fakeGitHub{forgot: true}, steps: []step{{online + 2*time.Second, ends}}, code: "runner.done", took: online + 2*time.Second, asked: 1,
		},
		"a job before it is online": {
			steps: []step{{10 * time.Second, begins}, {30 * time.Minute, ends}}, code: "runner.done", took: 30 * time.Minute,
		},
		"a job while GitHub is silent": {
			github: &fakeGitHub{silent: 1000}, steps: []step{{2 * time.Minute, begins}, {30 * time.Minute, ends}},
			code: "runner.done", took: 30 * time.Minute, asked: 6, // after 0, 1, 3, 7, 15 and 31 seconds
		},
		"no job": {
			github: &fakeGitHub{status: flint.RunnerStatus{Online: true}}, code: "runner.idle", kind: flint.ErrUnneeded, took: online + pickup, asked: 1,
		},
		"a job after it is online": {
			github: &fakeGitHub{status: flint.RunnerStatus{Online: true}}, steps: []step{{2 * time.Minute, begins}, {30 * time.Minute, ends}},
			code: "runner.done", took: 30 * time.Minute, asked: 1,
		},
		"a job nobody told us of": {
			github: &fakeGitHub{status: flint.RunnerStatus{Online: true}, busy: true},
			steps:  []step{{20 * time.Minute, github(func(g *fakeGitHub) { g.busy = false })}, {30 * time.Minute, ends}},
			code:   "runner.done", took: 30 * time.Minute, asked: 1,
		},
		"a job in the moment of its withdrawal": {
			github: &fakeGitHub{status: flint.RunnerStatus{Online: true}}, onWithdraw: begins, steps: []step{{30 * time.Minute, ends}},
			code: "runner.done", took: 30 * time.Minute, asked: 1,
		},
		"busy and no session": {
			github: &fakeGitHub{status: flint.RunnerStatus{Busy: true}}, steps: []step{{2 * time.Minute, ends}}, code: "runner.done",
			took: 2 * time.Minute, asked: 1,
		},
		"GitHub does not let go for a while": {
			github: &fakeGitHub{status: flint.RunnerStatus{Online: true}, refuse: 1 << 20},
			steps:  []step{{10 * time.Minute, github(func(g *fakeGitHub) { g.refuse = 0 })}},
			code:   "runner.idle", kind: flint.ErrUnneeded, asked: 1,
		},
		"no deadlines":         {limits: host.Deadlines{Job: job}, code: "runner.time_limit", kind: flint.ErrTimeout, took: job},
		"no time to be online": {limits: host.Deadlines{Pickup: pickup}, code: "runner.idle", kind: flint.ErrUnneeded, took: pickup},
		"no limit at all": {
			limits: host.Deadlines{Online: online}, github: &fakeGitHub{status: flint.RunnerStatus{Online: true}},
			steps: []step{{48 * time.Hour, ends}}, code: "runner.done", took: 48 * time.Hour, asked: 1,
		},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				finished := make(chan struct{})
				w := newWorld(t, patient(finished))
				g := tt.github
				if g == nil {
					g = &fakeGitHub{}
				}
				g.registered, w.github, w.config.GitHub = map[string]int64{}, g, g
				w.config.Deadlines = tt.limits
				if tt.limits == (host.Deadlines{}) {
					w.config.Deadlines = host.Deadlines{Boot: 20 * time.Second, Online: online, Pickup: pickup, Job: job, Finish: finish}
				}
				var h *host.Host
				running := 0 // VMs when GitHub was first asked to forget the runner
				g.onRemove = func() {
					if g.removals > 1 {
						return
					}
					running = w.fake.Running()
					if tt.onWithdraw != nil {
						tt.onWithdraw(w, h, h.State().Runners[0].ID, nil)
					}
				}
				h = w.host()
				begin := time.Now()
				id, ended := w.begin(t.Context(), h)
				for _, s := range tt.steps {
					time.Sleep(s.at - time.Since(begin))
					s.do(w, h, id, func() { close(finished) })
				}
				got := <-ended
				if got.res.Reason.Code != tt.code || (tt.kind == nil) != (got.err == nil) || tt.kind != nil && !errors.Is(got.err, tt.kind) {
					t.Errorf("reason %+v, error %v; want %s, %v", got.res.Reason, got.err, tt.code, tt.kind)
				}
				if worked := got.res.Timeline[flint.Finishing].Sub(begin); tt.took > 0 && worked != tt.took || g.asked != tt.asked {
					t.Errorf("it worked for %s and its status was asked for %d times, want %s and %d", worked, g.asked, tt.took, tt.asked)
				}
				if tt.code == "runner.idle" && running != 1 {
					t.Error("it was ended before its registration was withdrawn")
				}
				if got.res.Lost {
					t.Error("it is said to have lost a job")
				}
				w.nothingLeft()
			})
		})
	}
}

// TestOfflineSaysWhatToCheck: the fault is for a person.
func TestOfflineSaysWhatToCheck(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t, patient(nil))
		w.config.Deadlines.Online, w.config.Deadlines.Job = time.Minute, time.Hour
		_, ended := w.begin(t.Context(), w.host())
		got := <-ended
		var fault *flint.Fault
		if !errors.As(got.err, &fault) || fault.Code != "runner.offline" || !strings.Contains(fault.Error(), "online within 1m0s") ||
			!strings.Contains(got.res.Reason.Text, fault.Fix) || !strings.Contains(fault.Fix, "never reached GitHub") {
			t.Errorf("got %v, reason %v", got.err, got.res.Reason)
		}
		w.nothingLeft()
	})
}

func TestVMThatEndsUnderItsJob(t *testing.T) {
	crash := func(w *world, _ *host.Host, id string, _ context.CancelCauseFunc) { w.fake.Crash(id) }
	for name, tt := range map[string]struct {
		exit  guest.Exit // of the program once it is told to finish
		job   bool
		after []flint.JobEventKind // what GitHub says half a second after the end
		end   func(w *world, h *host.Host, id string, cancel context.CancelCauseFunc)
		lost  bool
		code  string
		says  string
		kind  error
	}{
		"crash": {
			job: true, end: crash, lost: true, code: "runner.lost", kind: flint.ErrGuest,
			says: "the VM was lost under job build of acme/hello; GitHub will declare it failed in about ten minutes (run /opt/flint/runner/start: VM flint-",
		},
		"crash without a job":            {end: crash, code: "runner.guest", kind: flint.ErrGuest},
		"crash right after its job":      {job: true, after: []flint.JobEventKind{flint.JobCompleted}, end: crash, code: "runner.guest", kind: flint.ErrGuest},
		"crash, and the job is repeated": {job: true, after: []flint.JobEventKind{flint.JobStarted}, end: crash, lost: true, code: "runner.lost", kind: flint.ErrGuest},
		"program killed":                 {job: true, exit: guest.Exit{Code: 137, Signal: "SIGKILL"}, lost: true, code: "runner.lost", says: "ended by SIGKILL under job build"},
		"program killed for memory": {
			job: true, exit: guest.Exit{Code: 137, Signal: "SIGKILL", OOM: true}, lost: true, code: "runner.oom",
		},
		"program killed without a job":      {exit: guest.Exit{Code: 137, Signal: "SIGKILL"}, code: "runner.exit"},
		"program ends before GitHub's word": {job: true, code: "runner.done"},
		"flint stops": {job: true, end: func(_ *world, h *host.Host, _ string, cancel context.CancelCauseFunc) {
			cancel(context.Canceled)
		}, code: "runner.stopped", kind: flint.ErrStopped},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				finish := make(chan struct{})
				fake := patient(finish)
				work := fake.Exec
				fake.Exec = func(ctx context.Context, c guest.Command, stdin io.Reader, stdout, stderr io.Writer) guest.Exit {
					if e := work(ctx, c, stdin, stdout, stderr); e.Signal != "" {
						return e
					}
					return tt.exit
				}
				w := newWorld(t, fake)
				w.config.Deadlines.Job = time.Hour
				h := w.host()
				ctx, cancel := context.WithCancelCause(t.Context())
				defer cancel(nil)
				id, ended := w.begin(ctx, h)
				if tt.job {
					note(t, h, flint.JobStarted, id)
					w.github.setBusy(true) // as GitHub believes until the job's lock expires
				}
				at := time.Now()
				if tt.end != nil {
					tt.end(w, h, id, cancel)
				} else {
					close(finish)
				}
				time.Sleep(500 * time.Millisecond)
				for _, kind := range tt.after {
					note(t, h, kind, id)
				}
				got := <-ended
				if r := got.res; r.Lost != tt.lost || r.Reason.Code != tt.code || !strings.Contains(r.Reason.Text, tt.says) {
					t.Errorf("lost %v, reason %+v; want %v, %s, %q", r.Lost, r.Reason, tt.lost, tt.code, tt.says)
				}
				if tt.kind != nil && !errors.Is(got.err, tt.kind) {
					t.Errorf("error %v, want %v", got.err, tt.kind)
				}
				if took := time.Since(at); tt.lost && took > 3*time.Second {
					t.Errorf("the loss was said after %s", took)
				}
				if tt.job && (got.res.Runner.Job == nil || got.res.Runner.Job.Name != "build" || !h.Claims(id)) {
					t.Errorf("the runner's job is %+v; its record is there: %v", got.res.Runner.Job, h.Claims(id))
				}
				if tt.job {
					begin := time.Now()
					if err := h.Sweep(t.Context()); !errors.Is(err, flint.ErrConflict) || time.Since(begin) > 0 || !h.Claims(id) {
						t.Errorf("while GitHub keeps the registration: %v after %s, claimed: %v", err, time.Since(begin), h.Claims(id))
					}
				}
				w.github.setBusy(false)
				if err := h.Sweep(t.Context()); err != nil || h.Claims(id) {
					t.Errorf("after its lock has expired: %v, claimed: %v", err, h.Claims(id))
				}
				w.nothingLeft()
			})
		})
	}
}

func TestExitOfARefusedRunner(t *testing.T) {
	for code, tt := range map[string]struct{ job bool }{"runner.deprecated": {}, "runner.exit": {job: true}} {
		t.Run(code, func(t *testing.T) {
			var h *host.Host
			w := newWorld(t, runner(t, func(context.Context, io.Writer) guest.Exit {
				if tt.job {
					note(t, h, flint.JobStarted, h.State().Runners[0].ID)
					note(t, h, flint.JobCompleted, h.State().Runners[0].ID)
				}
				return guest.Exit{Code: 7}
			}))
			h = w.host()
			res, err := h.Run(t.Context(), flint.Runner{ID: host.NewID("flint-", "pool"), Pool: "pool"})
			if err != nil || res.ExitCode != 7 || res.Reason.Code != code {
				t.Errorf("exit %d, reason %+v, error %v", res.ExitCode, res.Reason, err)
			}
			w.nothingLeft()
		})
	}
}

func TestRunnerInsideTheImage(t *testing.T) {
	want := []string{"/bin/sh", "-c", "exec /home/runner/run.sh"}
	w := newWorld(t, &vmtest.Fake{Exec: func(_ context.Context, c guest.Command, stdin io.Reader, _, _ io.Writer) guest.Exit {
		line, err := bufio.NewReader(stdin).ReadString('\n')
		if strings.Join(c.Args, "|") != strings.Join(want, "|") || line != testJIT+"\n" || err != nil {
			t.Errorf("the runner is started as %q and reads %q, %v", c.Args, line, err)
		}
		return guest.Exit{}
	}})
	supply, _ := w.config.Supply(t.Context(), "")
	supply.Start, supply.Runner = want, ""
	w.config.Supply = func(context.Context, string) (host.Supply, error) { return supply, nil }
	if _, err := w.host().Run(t.Context(), flint.Runner{ID: host.NewID("flint-", "pool"), Pool: "pool"}); err != nil {
		t.Error(err)
	}
	w.nothingLeft()
}

func TestIDsAreSafeNames(t *testing.T) {
	seen := map[string]bool{}
	for pool, want := range map[string]string{
		"flint": "flint-", "Ubuntu_24.04 Large": "ubuntu-24-04-large-", "": "", strings.Repeat("x", 200): strings.Repeat("x", 24) + "-",
		"../../etc": "etc-", "twenty-three-letters-xx--": "twenty-three-letters-xx-", "_": "",
	} {
		for range 2 {
			const prefix = "flint-1a2b3c-"
			id := host.NewID(prefix, pool)
			random, ok := strings.CutPrefix(id, prefix+want)
			if len(id) > 63 || !ok || len(random) != 10 || strings.Trim(random, "0123456789abcdef") != "" || seen[id] {
				t.Errorf("%q makes %q", pool, id)
			}
			seen[id] = true
		}
	}
}

func TestClaims(t *testing.T) {
	w := newWorld(t, &vmtest.Fake{Exec: untilSignal})
	h := w.host()
	ctx, cancel := context.WithCancel(t.Context())
	ended := start(t, ctx, h)
	if id := h.State().Runners[0].ID; !h.Claims(id) {
		t.Error("a runner that lives is not claimed")
	}
	cancel()
	<-ended
	if err := os.MkdirAll(filepath.Join(w.dir, "flint-left"), 0o700); err != nil {
		t.Fatal(err)
	}
	for name, want := range map[string]bool{
		"flint-left": true, "flint-other": false, "": false, ".": false, "..": false, "../runners": false, "/": false, "flint-left/": false,
	} {
		if got := h.Claims(name); got != want {
			t.Errorf("%q is claimed: %v", name, got)
		}
	}
}

func TestRegistrationIsAskedForAgain(t *testing.T) {
	away := errors.New("502 Bad Gateway")
	for name, tc := range map[string]struct {
		fail     error
		failures int
		tries    int
		done     bool
	}{
		"at once":                     {nil, 0, 1, true},
		"GitHub is away for a moment": {away, 2, 3, true},
		"GitHub is away":              {away, -1, 5, false},
		"GitHub refuses":              {fmt.Errorf("%w: the App is suspended", flint.ErrPermission), -1, 1, false},
	} {
		t.Run(name, func(t *testing.T) {
			w := newWorld(t, &vmtest.Fake{})
			w.github.fail, w.github.failures = tc.fail, tc.failures
			h := w.host()
			synctest.Test(t, func(t *testing.T) {
				res, err := h.Run(t.Context(), flint.Runner{ID: host.NewID("flint-", "pool"), Pool: "pool"})
				if w.github.tries != tc.tries || (err == nil) != tc.done {
					t.Errorf("asked %d times, want %d; %+v, %v", w.github.tries, tc.tries, res.Reason, err)
				}
			})
			w.nothingLeft()
		})
	}
}
