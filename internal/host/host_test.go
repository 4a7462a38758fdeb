package host_test

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"flint"
	"flint/internal/guest"
	"flint/internal/host"
	"flint/internal/vm/vmtest"
)

// world is a host whose VMs, network and GitHub are doubles.
type world struct {
	t      *testing.T
	dir    string
	fake   *vmtest.Fake
	github *fakeGitHub
	config host.Config

	mu    sync.Mutex
	ports int // attached now
}

func newWorld(t *testing.T, fake *vmtest.Fake) *world {
	t.Helper()
	w := &world{t: t, dir: filepath.Join(t.TempDir(), "runners"), fake: fake, github: &fakeGitHub{registered: map[string]int64{}}}
	assets := t.TempDir()
	file := func(name string) string {
		path := filepath.Join(assets, name)
		if err := os.WriteFile(path, []byte(name), 0o644); err != nil {
			t.Fatal(err)
		}
		return path
	}
	supply := host.Supply{
		Shape:  flint.Shape{CPUs: 1, Memory: 256 * flint.MiB, Disk: flint.GiB},
		Kernel: file("vmlinux"), Initrd: file("initrd"), Modules: file("modules"), Base: file("base"), Runner: file("runner"),
	}
	w.config = host.Config{
		Name: "here", Dir: w.dir, Limits: flint.Shape{CPUs: 4, Memory: flint.GiB}, Overhead: flint.Overhead{Fixed: 16 * flint.MiB},
		Deadlines: host.Deadlines{Boot: 20 * time.Second, Job: time.Minute, Finish: 5 * time.Second},
		Driver:    fake, Attach: w.attach, GitHub: w.github,
		Supply: func(context.Context, string) (host.Supply, error) { return supply, nil },
		Scratch: func(path string, _ flint.Bytes) error {
			return os.WriteFile(path, nil, 0o600)
		},
		Log: slog.New(slog.DiscardHandler),
	}
	return w
}

func (w *world) host() *host.Host {
	h := host.New(w.config)
	if err := h.Sweep(w.t.Context()); err != nil {
		w.t.Fatal(err)
	}
	return h
}

// attach insists that the record is on disk before the first resource exists.
func (w *world) attach(_ context.Context, id string) (host.Port, error) {
	if _, err := os.Stat(filepath.Join(w.dir, id, "runner.json")); err != nil {
		w.t.Errorf("a port is asked for before the record is written: %v", err)
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	w.ports++
	return host.Port{Close: func(context.Context) error {
		w.mu.Lock()
		defer w.mu.Unlock()
		w.ports--
		return nil
	}}, nil
}

// nothingLeft checks that every resource is back.
func (w *world) nothingLeft() {
	w.t.Helper()
	entries, err := os.ReadDir(w.dir)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		w.t.Fatal(err)
	}
	for _, e := range entries {
		w.t.Errorf("left behind: %s", e.Name())
	}
	if w.ports != 0 {
		w.t.Errorf("%d network ports left", w.ports)
	}
	if n := w.fake.Running(); n != 0 {
		w.t.Errorf("%d VMs left", n)
	}
	if len(w.github.registered) != 0 {
		w.t.Errorf("registrations left: %v", w.github.registered)
	}
}

type fakeGitHub struct {
	onRemove   func() // called with each Remove
	mu         sync.Mutex
	next       int64
	registered map[string]int64
	busy       bool // says of every runner that it has a job
	fail       error
	failures   int // this many registrations fail, all when negative
	tries      int // registrations asked for
	refuse     int // this many removals fail
	removals   int
	status     flint.RunnerStatus // of every runner it knows
	forgot     bool               // it knows no runner
	silent     int                // this many questions about a runner's status fail
	asked      int
}

func (g *fakeGitHub) Status(_ context.Context, runner string, id int64) (flint.RunnerStatus, error) {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.asked++
	if g.silent > 0 {
		g.silent--
		return flint.RunnerStatus{}, errors.New("502 Bad Gateway")
	}
	if have, ok := g.registered[runner]; !ok || id != 0 && have != id || g.forgot {
		return flint.RunnerStatus{}, flint.ErrNotFound
	}
	return g.status, nil
}

const testJIT = "the-jit-configuration"

func (g *fakeGitHub) Register(_ context.Context, r flint.Runner) (flint.Registration, error) {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.tries++
	if g.fail != nil && g.failures != 0 {
		g.failures--
		return flint.Registration{}, g.fail
	}
	g.next++
	g.registered[r.ID] = g.next
	return flint.Registration{Runner: r.ID, GitHubID: g.next, Credential: testJIT}, nil
}

func (g *fakeGitHub) Remove(_ context.Context, runner string, _ int64) error {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.removals++
	if g.onRemove != nil {
		g.onRemove()
	}
	if g.busy {
		return flint.ErrConflict
	}
	if g.refuse > 0 {
		g.refuse--
		return errors.New("502 Bad Gateway")
	}
	delete(g.registered, runner)
	return nil
}

func (g *fakeGitHub) setBusy(busy bool) {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.busy = busy
}

// runner is a guest that is a runner: it reads its configuration, then does what is given.
func runner(t *testing.T, work func(ctx context.Context, out io.Writer) guest.Exit) *vmtest.Fake {
	return &vmtest.Fake{Exec: func(ctx context.Context, c guest.Command, stdin io.Reader, stdout, _ io.Writer) guest.Exit {
		line, err := bufio.NewReader(stdin).ReadString('\n')
		if err != nil || line != testJIT+"\n" {
			t.Errorf("the runner reads %q, %v", line, err)
		}
		if c.User != "runner" || c.Args[0] != "/opt/flint/runner/start" {
			t.Errorf("the runner is started as %+v", c)
		}
		return work(ctx, stdout)
	}}
}

func TestRunWithoutModules(t *testing.T) {
	var h *host.Host
	w := newWorld(t, runner(t, func(context.Context, io.Writer) guest.Exit {
		ev := flint.JobEvent{Kind: flint.JobCompleted, Runner: h.State().Runners[0].ID, Conclusion: "succeeded"}
		if err := h.Note(t.Context(), ev); err != nil {
			t.Error(err)
		}
		return guest.Exit{}
	}))
	supply, _ := w.config.Supply(t.Context(), "")
	supply.Modules = ""
	w.config.Supply = func(context.Context, string) (host.Supply, error) { return supply, nil }
	h = w.host()
	if res, err := h.Run(t.Context(), flint.Runner{ID: host.NewID("flint-", "pool"), Pool: "pool"}); err != nil || res.Conclusion != "succeeded" {
		t.Errorf("got %+v, %v", res, err)
	}
	w.nothingLeft()
}

func TestRunGoesThroughEveryPhase(t *testing.T) {
	var h *host.Host
	var w *world
	w = newWorld(t, runner(t, func(_ context.Context, out io.Writer) guest.Exit {
		io.WriteString(out, "Listening for Jobs\n")
		state := h.State()
		if len(state.Runners) != 1 || state.Runners[0].Phase != flint.Registered {
			t.Errorf("a working runner is seen as %+v", state.Runners)
		}
		if want := (flint.Shape{CPUs: 3, Memory: flint.GiB - 256*flint.MiB - 2*16*flint.MiB}); state.Free != want {
			t.Errorf("%+v is free, want %+v", state.Free, want)
		}
		id := state.Runners[0].ID
		for _, kind := range []flint.JobEventKind{flint.JobStarted, flint.JobCompleted} {
			ev := flint.JobEvent{Kind: kind, Runner: id, Job: flint.Job{Name: "build"}, Conclusion: "succeeded"}
			if err := h.Note(t.Context(), ev); err != nil {
				t.Error(err)
			}
		}
		record, err := os.ReadFile(filepath.Join(w.dir, id, "runner.json"))
		if err != nil || !strings.Contains(string(record), `"build"`) || strings.Contains(string(record), testJIT) {
			t.Errorf("the record lacks the job or holds the secret: %s, %v", record, err)
		}
		return guest.Exit{}
	}))
	h = w.host()
	res, err := h.Run(t.Context(), flint.Runner{ID: host.NewID("flint-", "pool"), Pool: "pool"})
	if err != nil {
		t.Fatal(err)
	}
	if res.Conclusion != "succeeded" || res.Output != "Listening for Jobs\n" || res.Reason.Code != "runner.done" {
		t.Errorf("result is %+v", res)
	}
	last := time.Time{}
	for p := flint.Planned; p <= flint.Gone; p++ {
		at := res.Timeline[p]
		if at.IsZero() || at.Before(last) {
			t.Errorf("phase %s began at %s, after %s", p, at, last)
		}
		last = at
	}
	w.nothingLeft()
	if s := h.State(); len(s.Runners) != 0 {
		t.Errorf("a runner that is gone is still supply: %+v", s)
	}
}

func TestFailuresLeaveNothing(t *testing.T) {
	ours := errors.New("no such device")
	for name, tt := range map[string]struct {
		fake  *vmtest.Fake
		bend  func(*world)
		guest bool // the guest's fault
		code  string
	}{
		"network": {fake: &vmtest.Fake{}, bend: func(w *world) {
			w.config.Attach = func(context.Context, string) (host.Port, error) { return host.Port{}, ours }
		}, code: "runner.failed"},
		"scratch": {fake: &vmtest.Fake{}, bend: func(w *world) {
			w.config.Scratch = func(string, flint.Bytes) error { return ours }
		}, code: "runner.failed"},
		"boot":     {fake: &vmtest.Fake{FailBoot: ours}, code: "runner.failed"},
		"register": {fake: &vmtest.Fake{}, bend: func(w *world) { w.github.fail, w.github.failures = fmt.Errorf("%w: %w", flint.ErrPermission, ours), -1 }, code: "runner.failed"},
		"silent guest": {fake: &vmtest.Fake{NeverAnswer: true}, bend: func(w *world) {
			w.config.Deadlines.Boot = 50 * time.Millisecond
		}, guest: true, code: "runner.guest"},
		"VMM dies": {fake: &vmtest.Fake{DieAfter: 300 * time.Millisecond, Exec: untilSignal}, guest: true, code: "runner.guest"},
		"job too long": {fake: &vmtest.Fake{Exec: untilSignal}, bend: func(w *world) {
			w.config.Deadlines.Job = 50 * time.Millisecond
		}, code: "runner.time_limit"},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				w := newWorld(t, tt.fake)
				if tt.bend != nil {
					tt.bend(w)
				}
				res, err := w.host().Run(t.Context(), flint.Runner{ID: host.NewID("flint-", "pool"), Pool: "pool"})
				if err == nil || errors.Is(err, flint.ErrGuest) != tt.guest || res.Reason.Code != tt.code {
					t.Errorf("error %v (guest's fault: %v), reason %+v; want code %s", err, errors.Is(err, flint.ErrGuest), res.Reason, tt.code)
				}
				w.nothingLeft()
			})
		})
	}
}

func untilSignal(ctx context.Context, _ guest.Command, _ io.Reader, _, _ io.Writer) guest.Exit {
	<-ctx.Done()
	return guest.Exit{Code: 143, Signal: "SIGTERM"}
}

// start runs a runner in the background and returns once it is registered.
func start(t *testing.T, ctx context.Context, h *host.Host) <-chan error {
	t.Helper()
	ended := make(chan error, 1)
	go func() {
		_, err := h.Run(ctx, flint.Runner{ID: host.NewID("flint-", "pool"), Pool: "pool"})
		ended <- err
	}()
	eventually(t, func() bool {
		s := h.State()
		return len(s.Runners) == 1 && s.Runners[0].Phase == flint.Registered
	})
	return ended
}

func eventually(t *testing.T, ok func() bool) {
	t.Helper()
	tick := time.NewTicker(5 * time.Millisecond)
	defer tick.Stop()
	deadline := time.After(time.Minute)
	for !ok() {
		select {
		case <-tick.C:
		case <-deadline:
			t.Fatal("it did not come to that within a minute")
		}
	}
}

func TestUnneededIdleRunnerEnds(t *testing.T) {
	w := newWorld(t, &vmtest.Fake{Exec: untilSignal})
	ctx, cancel := context.WithCancelCause(t.Context())
	ended := start(t, ctx, w.host())
	cancel(flint.ErrUnneeded)
	if err := <-ended; !errors.Is(err, flint.ErrUnneeded) {
		t.Fatalf("it ended with %v", err)
	}
	w.nothingLeft()
}

func TestUnneededRunnerYieldsToItsJob(t *testing.T) {
	finish := make(chan struct{})
	w := newWorld(t, &vmtest.Fake{Exec: func(ctx context.Context, _ guest.Command, _ io.Reader, _, _ io.Writer) guest.Exit {
		select {
		case <-finish:
			return guest.Exit{}
		case <-ctx.Done():
			return guest.Exit{Code: 143, Signal: "SIGTERM"}
		}
	}})
	ctx, cancel := context.WithCancelCause(t.Context())
	ended := start(t, ctx, w.host())
	w.github.setBusy(true)
	cancel(flint.ErrUnneeded)
	eventually(t, func() bool {
		w.github.mu.Lock()
		defer w.github.mu.Unlock()
		return w.github.removals > 0
	})
	w.github.setBusy(false) // the job ends, and GitHub lets go of the runner
	close(finish)
	if err := <-ended; err != nil {
		t.Fatalf("the job was not let finish: %v", err)
	}
	w.nothingLeft()
}

func TestRegistrationGoesAfterTheVM(t *testing.T) {
	w := newWorld(t, runner(t, func(context.Context, io.Writer) guest.Exit { return guest.Exit{} }))
	w.github.refuse = 2 // and a removal that fails is tried again
	w.github.onRemove = func() {
		if n := w.fake.Running(); n != 0 {
			t.Errorf("the registration is removed while %d VMs run: GitHub would refuse", n)
		}
	}
	if _, err := w.host().Run(t.Context(), flint.Runner{ID: host.NewID("flint-", "pool"), Pool: "pool"}); err != nil {
		t.Fatal(err)
	}
	if w.github.removals != 3 {
		t.Errorf("%d removals, want 3", w.github.removals)
	}
	w.nothingLeft()
}

func TestUnneededRunnerIsKeptWhileGitHubDoesNotAnswer(t *testing.T) {
	synctest.Test(t, func(t *testing.T) { // in fake time: GitHub is asked for 30 s
		finish := make(chan struct{})
		w := newWorld(t, &vmtest.Fake{Exec: func(ctx context.Context, _ guest.Command, _ io.Reader, _, _ io.Writer) guest.Exit {
			select {
			case <-finish:
				return guest.Exit{}
			case <-ctx.Done():
				return guest.Exit{Code: 143, Signal: "SIGTERM"}
			}
		}})
		ctx, cancel := context.WithCancelCause(t.Context())
		ended := start(t, ctx, w.host())
		w.github.mu.Lock()
		w.github.refuse = 1000
		w.github.mu.Unlock()
		cancel(flint.ErrUnneeded)
		<-time.After(45 * time.Second)
		w.github.mu.Lock()
		w.github.refuse = 0
		w.github.mu.Unlock()
		close(finish)
		if err := <-ended; err != nil {
			t.Errorf("a runner that may have had a job was ended: %v", err)
		}
		w.nothingLeft()
	})
}

func TestRunnerThatOutstaysItsJobEnds(t *testing.T) {
	w := newWorld(t, &vmtest.Fake{Exec: untilSignal})
	w.config.Deadlines.Finish = 50 * time.Millisecond
	h := w.host()
	ended := start(t, t.Context(), h)
	ev := flint.JobEvent{Kind: flint.JobCompleted, Runner: h.State().Runners[0].ID, Conclusion: "succeeded"}
	for range 2 { // GitHub may say it twice
		if err := h.Note(t.Context(), ev); err != nil {
			t.Fatal(err)
		}
	}
	if err := <-ended; !errors.Is(err, flint.ErrTimeout) {
		t.Errorf("it ended with %v", err)
	}
	w.nothingLeft()
}

func TestCancelledOnTheWayIsNoFailure(t *testing.T) {
	for name, cause := range map[string]error{"runner.stopped": context.Canceled, "runner.unneeded": flint.ErrUnneeded} {
		t.Run(name, func(t *testing.T) {
			w := newWorld(t, &vmtest.Fake{})
			ctx, cancel := context.WithCancelCause(t.Context())
			w.config.Attach = func(ctx context.Context, _ string) (host.Port, error) {
				cancel(cause)
				return host.Port{}, ctx.Err()
			}
			res, err := w.host().Run(ctx, flint.Runner{ID: host.NewID("flint-", "pool"), Pool: "pool"})
			if err == nil || res.Reason.Code != name {
				t.Errorf("reason %+v, error %v", res.Reason, err)
			}
			w.nothingLeft()
		})
	}
}

func TestStopEndsBusyRunners(t *testing.T) {
	w := newWorld(t, &vmtest.Fake{Exec: untilSignal})
	h := w.host()
	ctx, cancel := context.WithCancelCause(t.Context())
	ended := start(t, ctx, h)
	w.github.setBusy(true)
	cancel(flint.ErrUnneeded)
	eventually(t, func() bool {
		w.github.mu.Lock()
		defer w.github.mu.Unlock()
		return w.github.removals > 0
	})
	h.Stop()
	w.github.setBusy(false)
	if err := <-ended; err == nil {
		t.Fatal("a stopped runner ended well")
	}
	w.nothingLeft()
}

func TestFullHostRefuses(t *testing.T) {
	w := newWorld(t, &vmtest.Fake{Exec: untilSignal})
	w.config.Limits = flint.Shape{CPUs: 1, Memory: flint.GiB}
	h := w.host()
	ctx, cancel := context.WithCancel(t.Context())
	ended := start(t, ctx, h)
	var fault *flint.Fault
	if _, err := h.Run(ctx, flint.Runner{ID: host.NewID("flint-", "pool"), Pool: "pool"}); !errors.As(err, &fault) || fault.Code != "host.full" {
		t.Errorf("a full host says %v", err)
	}
	cancel()
	<-ended
	w.nothingLeft()
}

// TestFullHostCountsOverhead: what a VMM needs on top grows with its guest, and admission and the scheduler's view agree.
func TestFullHostCountsOverhead(t *testing.T) {
	for limit, admitted := range map[flint.Bytes]bool{(256 + 16 + 4) * flint.MiB: true, (256+16+4)*flint.MiB - 1: false} {
		w := newWorld(t, runner(t, func(context.Context, io.Writer) guest.Exit { return guest.Exit{} }))
		w.config.Limits.Memory, w.config.Overhead.Share = limit, 64
		h := w.host()
		s := h.State()
		if s.Free.Memory != limit-16*flint.MiB || s.Overhead != w.config.Overhead {
			t.Errorf("the scheduler sees %+v", s)
		}
		_, err := h.Run(t.Context(), flint.Runner{ID: host.NewID("flint-", "pool"), Pool: "pool"})
		if (err == nil) != admitted {
			t.Errorf("within %d bytes: %v", limit, err)
		}
		w.nothingLeft()
	}
}

func TestCommandReportsItsExit(t *testing.T) {
	w := newWorld(t, &vmtest.Fake{})
	w.config.GitHub = nil
	var out strings.Builder
	res, err := w.host().Command(t.Context(), flint.Runner{ID: host.NewID("flint-", "run"), Pool: "run"}, host.Command{
		Command: guest.Command{Args: []string{"sh", "-c", "echo hello; exit 7"}},
		IO:      guest.IO{Stdout: &out},
	})
	if err != nil || res.ExitCode != 7 || out.String() != "hello\n" {
		t.Fatalf("exit %d, output %q, error %v", res.ExitCode, out.String(), err)
	}
	w.nothingLeft()
}

// TestCommandTooLargeIsNoLoss gives a command that does not fit into a request: its VM has nothing to do with that.
func TestCommandTooLargeIsNoLoss(t *testing.T) {
	w := newWorld(t, &vmtest.Fake{})
	w.config.GitHub = nil
	res, err := w.host().Command(t.Context(), flint.Runner{ID: host.NewID("flint-", "run"), Pool: "run"}, host.Command{
		Command: guest.Command{Args: []string{"sh", "-c", strings.Repeat("#", 70000)}},
	})
	var fault *flint.Fault
	if !errors.As(err, &fault) || fault.Code != "guest.request" || errors.Is(err, flint.ErrGuest) || res.Lost {
		t.Fatalf("it ended with %v, lost %v", err, res.Lost)
	}
	w.nothingLeft()
}

// An image's init gets the time the guest has left to come up, but some is spared for the rest.
func TestInitGetsTimeToSettle(t *testing.T) {
	for boot, want := range map[time.Duration]time.Duration{
		time.Second: 0, 20 * time.Second: 12 * time.Second, 10 * time.Minute: time.Minute,
	} {
		synctest.Test(t, func(t *testing.T) {
			var got time.Duration
			fake := &vmtest.Fake{BootDelay: 3 * time.Second, Configure: func(c guest.Config) (guest.Configured, error) {
				got = c.Settle
				return guest.Configured{}, nil
			}}
			if boot < fake.BootDelay {
				fake.BootDelay = 0
			}
			w := newWorld(t, fake)
			w.config.Deadlines.Boot, w.config.GitHub = boot, nil
			if _, err := w.host().Command(t.Context(), flint.Runner{ID: host.NewID("flint-", "run"), Pool: "run"}, host.Command{
				Command: guest.Command{Args: []string{"true"}},
			}); err != nil {
				t.Fatal(err)
			}
			if got != want {
				t.Errorf("boot within %v: %v to settle, want %v", boot, got, want)
			}
			w.nothingLeft()
		})
	}
}

// TestWordOfTheJobWhileTheRecordGoes lets GitHub speak at every moment of a runner's end.
func TestWordOfTheJobWhileTheRecordGoes(t *testing.T) {
	w := newWorld(t, runner(t, func(context.Context, io.Writer) guest.Exit { return guest.Exit{} }))
	h := w.host()
	id := host.NewID("flint-", "pool")
	stop, done := make(chan struct{}), make(chan struct{})
	go func() {
		defer close(done)
		for {
			select {
			case <-stop:
				return
			default:
				if err := h.Note(t.Context(), flint.JobEvent{Kind: flint.JobStarted, Runner: id}); err != nil && !errors.Is(err, fs.ErrNotExist) {
					t.Error(err)
					return
				}
			}
		}
	}()
	if _, err := h.Run(t.Context(), flint.Runner{ID: id, Pool: "pool"}); err != nil {
		t.Error(err)
	}
	close(stop)
	<-done
	w.nothingLeft()
}
