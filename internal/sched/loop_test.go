package sched_test

import (
	"bytes"
	"cmp"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"flint"
	"flint/internal/sched"
)

// source is demand a test sets.
type source struct {
	mu       sync.Mutex
	demand   map[string]flint.Demand
	capacity map[string][]int // every change of what was reported
	changed  chan struct{}
}

func newSource() *source {
	return &source{demand: map[string]flint.Demand{}, capacity: map[string][]int{}, changed: make(chan struct{}, 1)}
}

func (s *source) set(pool string, n int) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.demand[pool] = flint.Demand{Pool: pool, Assigned: n, At: time.Now()}
	select {
	case s.changed <- struct{}{}:
	default:
	}
}

func (s *source) add(pool string, n int) {
	s.mu.Lock()
	have := s.demand[pool].Assigned
	s.mu.Unlock()
	s.set(pool, have+n)
}

func (s *source) Demand() []flint.Demand {
	s.mu.Lock()
	defer s.mu.Unlock()
	return slices.Collect(maps.Values(s.demand))
}

func (s *source) Changed() <-chan struct{} { return s.changed }

func (s *source) Capacity(pool string, n int) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if c := s.capacity[pool]; len(c) == 0 || c[len(c)-1] != n {
		s.capacity[pool] = append(c, n)
	}
}

func (s *source) lastCapacity(pool string) int {
	s.mu.Lock()
	defer s.mu.Unlock()
	c := s.capacity[pool]
	return c[len(c)-1]
}

// machine is a fake host. A runner takes a while to show up in its state, as on a busy machine.
type machine struct {
	free flint.Shape
	run  func(ctx context.Context, r flint.Runner, phase func(flint.Phase)) error

	mu      sync.Mutex
	runners map[string]flint.Runner
	inside  int // calls of Run that have not returned
	most    int
	starts  []time.Time
	ended   int

	exitCode int // of the runner program
	reason   flint.Reason
}

func (m *machine) State() flint.HostState {
	m.mu.Lock()
	defer m.mu.Unlock()
	s := flint.HostState{Name: "h1", Free: m.free}
	for _, r := range m.runners {
		s.Runners = append(s.Runners, r)
		s.Free.CPUs--
		s.Free.Memory -= flint.GiB
	}
	return s
}

func (m *machine) Run(ctx context.Context, r flint.Runner) (flint.Result, error) {
	m.mu.Lock()
	m.inside++
	m.most = max(m.most, m.inside)
	m.starts = append(m.starts, time.Now())
	m.mu.Unlock()
	pause(ctx, 50*time.Millisecond)
	phase := func(p flint.Phase) {
		m.mu.Lock()
		defer m.mu.Unlock()
		r.Phase, r.Timeline = p, maps.Clone(r.Timeline)
		r.Timeline[p] = time.Now()
		m.runners[r.ID] = r
	}
	err := m.run(ctx, r, phase)
	phase(flint.Finishing)
	m.mu.Lock()
	defer m.mu.Unlock()
	delete(m.runners, r.ID)
	m.inside--
	m.ended++
	return flint.Result{Runner: r, ExitCode: m.exitCode, Reason: m.reason}, err
}

func pause(ctx context.Context, d time.Duration) {
	select {
	case <-ctx.Done():
	case <-time.After(d):
	}
}

// settle lets time pass and waits until everybody has done what there is to do.
func settle(d time.Duration) {
	time.Sleep(d)
	synctest.Wait()
}

// rig is a loop with fakes on both sides.
type rig struct {
	*source
	*machine
	loop  *sched.Loop
	log   bytes.Buffer
	done  []error
	stop  func()
	pools atomic.Pointer[[]flint.Pool]
}

func newRig(t *testing.T, pools []flint.Pool, run func(context.Context, flint.Runner, func(flint.Phase)) error) *rig {
	t.Helper()
	r := &rig{
		source:  newSource(),
		machine: &machine{free: flint.Shape{CPUs: 16, Memory: 16 * flint.GiB}, run: run, runners: map[string]flint.Runner{}},
	}
	r.pools.Store(&pools)
	var mu sync.Mutex
	n := 0
	r.loop = sched.New(sched.Config{
		Pools: func() []flint.Pool { return *r.pools.Load() }, Source: r.source, Hosts: []sched.Host{r.machine},
		NewID: func(pool string) string { n++; return fmt.Sprintf("%s-%d", pool, n) },
		Done: func(_ flint.Result, err error) {
			mu.Lock()
			defer mu.Unlock()
			r.done = append(r.done, err)
		},
		Log:    slog.New(slog.NewTextHandler(&r.log, nil)),
		Jitter: func() float64 { return 0 },
	})
	ctx, cancel := context.WithCancel(t.Context())
	finished := make(chan error)
	go func() { finished <- r.loop.Run(ctx) }()
	r.stop = sync.OnceFunc(func() {
		cancel()
		if err := <-finished; err != nil {
			t.Errorf("Run returned %v", err)
		}
	})
	t.Cleanup(r.stop)
	return r
}

func TestTenJobsMaxTwo(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var r *rig
		r = newRig(t, []flint.Pool{pool("a", 2)}, func(ctx context.Context, _ flint.Runner, phase func(flint.Phase)) error {
			for _, p := range []flint.Phase{flint.Preparing, flint.Booting, flint.Ready, flint.Registered, flint.Running} {
				phase(p)
				pause(ctx, time.Second)
			}
			pause(ctx, time.Minute)
			r.add("a", -1) // GitHub counts one job less before the VM is down
			pause(ctx, 2*time.Second)
			phase(flint.Finishing)
			pause(ctx, 3*time.Second)
			return ctx.Err()
		})
		r.set("a", 10)
		settle(time.Hour)
		r.stop()
		if r.most != 2 || len(r.starts) != 10 || r.ended != 10 {
			t.Errorf("at most %d at once, %d started, %d ended; want 2, 10, 10", r.most, len(r.starts), r.ended)
		}
		for _, err := range r.done {
			if err != nil {
				t.Errorf("a runner ended with %v", err)
			}
		}
		if c := r.capacity["a"]; slices.Max(c) != 2 {
			t.Errorf("capacity reported: %v, want at most 2", c)
		}
		if !strings.Contains(r.log.String(), "pool.max") {
			t.Errorf("the log does not say that jobs wait for pool.max:\n%s", &r.log)
		}
	})
}

func TestFailingHostIsNoLaunchStorm(t *testing.T) {
	for _, tc := range []struct {
		err  error
		code string
	}{
		{errors.New("no space left on device"), "host.failing"},
		{fmt.Errorf("guest did not come up: %w", flint.ErrGuest), "guest.failing"},
		{&flint.Fault{Code: "image.build", What: "build image", Fix: "mend the Dockerfile"}, "image.build"},
	} {
		t.Run(tc.code, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				r := newRig(t, []flint.Pool{pool("a", 5)}, func(context.Context, flint.Runner, func(flint.Phase)) error { return tc.err })
				r.set("a", 10)
				settle(10 * time.Minute)
				// Five at first, then one at a time after 1, 2, 4, … 60 seconds.
				if n := len(r.starts); n < 5+6 || n > 5+6+10 {
					t.Errorf("%d starts in ten minutes", n)
				}
				for i := 6; i < len(r.starts); i++ {
					gap, before := r.starts[i].Sub(r.starts[i-1]), time.Duration(0)
					if i > 6 {
						before = r.starts[i-1].Sub(r.starts[i-2])
					}
					if gap < before-time.Second || gap > time.Minute+time.Second {
						t.Errorf("pause %d is %s after one of %s", i, gap, before)
					}
				}
				why := r.loop.Waiting()
				if len(why) != 1 || why["a"].Code != tc.code || !strings.Contains(why["a"].Text, "pool a rests until") {
					t.Errorf("waiting: %v, want code %s", why, tc.code)
				}
				if c := r.lastCapacity("a"); c != 0 {
					t.Errorf("capacity is %d while the pool rests", c)
				}
			})
		})
	}
}

// TestReleaseThatFailsIsNoFailureOfThePool: every job goes well, and something of every VM is left behind.
func TestReleaseThatFailsIsNoFailureOfThePool(t *testing.T) {
	left := fmt.Errorf("end runner: %w", fmt.Errorf("%w: %w", flint.ErrRelease, errors.New("remove registration: 502 Bad Gateway")))
	fault := &flint.Fault{Code: "host.release", What: "end runner", Kind: flint.ErrRelease, Err: errors.New("remove tap: busy")}
	for name, tc := range map[string]struct {
		err  error
		code int
		rest string // why the pool rests; empty: it does not
	}{
		"one thing":                   {err: left},
		"a fault":                     {err: fault},
		"two things":                  {err: errors.Join(left, nil, fault)},
		"beside a failure":            {err: errors.Join(errors.New("no space left on device"), left), rest: "host.failing"},
		"beside a guest's failure":    {err: errors.Join(left, fmt.Errorf("boot: %w", flint.ErrGuest)), rest: "guest.failing"},
		"beside a program's bad exit": {err: left, code: 7, rest: "runner.exit"},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				r := newRig(t, []flint.Pool{pool("a", 1)}, func(ctx context.Context, _ flint.Runner, phase func(flint.Phase)) error {
					phase(flint.Registered)
					pause(ctx, time.Second)
					return tc.err
				})
				r.machine.mu.Lock()
				r.exitCode = tc.code
				r.machine.mu.Unlock()
				r.set("a", 5)
				settle(time.Minute)
				why := r.loop.Waiting()
				if len(why) != 1 || why["a"].Code != cmp.Or(tc.rest, "pool.max") {
					t.Errorf("waiting: %v, want %q", why, tc.rest)
				}
				if n := len(r.starts); (n > 50) != (tc.rest == "") {
					t.Errorf("%d runners of a second each in a minute", n)
				}
			})
		})
	}
}

// TestRunnerProgramThatGivesUp: the VM is fine and registered, but the program in it ends at once, as one that is too old does.
func TestRunnerProgramThatGivesUp(t *testing.T) {
	for code, said := range map[string]flint.Reason{
		"runner.exit":       {},
		"runner.deprecated": flint.Because("runner.deprecated", "GitHub refuses this version of the runner software"),
	} {
		t.Run(code, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				r := newRig(t, []flint.Pool{pool("a", 5)}, func(ctx context.Context, _ flint.Runner, phase func(flint.Phase)) error {
					phase(flint.Registered)
					pause(ctx, 2*time.Second)
					return nil
				})
				r.machine.mu.Lock()
				r.exitCode, r.reason = 7, said
				r.machine.mu.Unlock()
				r.set("a", 5)
				settle(10 * time.Minute)
				if n := len(r.starts); n > 5+6+10 {
					t.Errorf("%d starts in ten minutes", n)
				}
				if why := r.loop.Waiting(); len(why) != 1 || why["a"].Code != code || !strings.Contains(why["a"].Text, said.Text) {
					t.Errorf("waiting: %v", why)
				}
				if c := r.lastCapacity("a"); c != 0 {
					t.Errorf("capacity is %d while the pool rests", c)
				}
			})
		})
	}
}

// TestHeldPool: it is held while it works, and let go again.
func TestHeldPool(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t, []flint.Pool{pool("a", 5)}, func(ctx context.Context, _ flint.Runner, phase func(flint.Phase)) error {
			phase(flint.Running)
			pause(ctx, time.Minute)
			return ctx.Err()
		})
		r.set("a", 2)
		settle(30 * time.Second)
		held := pool("a", 5)
		held.Held = flint.Because("runner.age", "the runner software is 40 days old")
		r.pools.Store(&[]flint.Pool{held})
		r.set("a", 4)
		settle(10 * time.Second)
		if why := r.loop.Waiting(); len(r.starts) != 2 || len(why) != 1 || why["a"] != held.Held || r.lastCapacity("a") != 2 {
			t.Errorf("%d starts, waiting %v, capacity %d", len(r.starts), why, r.lastCapacity("a"))
		}
		settle(2 * time.Minute)
		if c := r.lastCapacity("a"); c != 0 || r.ended != 2 || len(r.starts) != 2 {
			t.Errorf("capacity %d, %d of %d ended", c, r.ended, len(r.starts))
		}
		r.pools.Store(&[]flint.Pool{pool("a", 5)})
		settle(10 * time.Second)
		if why := r.loop.Waiting(); len(r.starts) != 6 || len(why) != 0 || r.lastCapacity("a") != 5 {
			t.Errorf("after it was let go: %d starts, waiting %v, capacity %d", len(r.starts), why, r.lastCapacity("a"))
		}
	})
}

// TestRunnerWithoutAJobIsNoFailure: GitHub offers a job and gives it to nobody, so hosts end the runners for it, in peace.
func TestRunnerWithoutAJobIsNoFailure(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t, []flint.Pool{pool("a", 2)}, func(ctx context.Context, _ flint.Runner, phase func(flint.Phase)) error {
			phase(flint.Registered)
			pause(ctx, 4*time.Minute)
			return errors.Join(fmt.Errorf("run: %w: GitHub gave it no job", flint.ErrUnneeded), ctx.Err())
		})
		r.set("a", 2)
		settle(time.Hour)
		if n := len(r.starts); n < 2*14 || n > 2*15 {
			t.Errorf("%d starts in an hour, want two every four minutes", n)
		}
		if strings.Contains(r.log.String(), "runner failed") || len(r.loop.Waiting()) != 0 {
			t.Errorf("it counts against the pool: %v\n%s", r.loop.Waiting(), &r.log)
		}
	})
}

func TestPoolRecoversWhenOneRunnerWorks(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var mended atomic.Bool
		r := newRig(t, []flint.Pool{pool("a", 5)}, func(ctx context.Context, _ flint.Runner, phase func(flint.Phase)) error {
			if !mended.Load() {
				return errors.New("broken")
			}
			phase(flint.Booting)
			pause(ctx, 3*time.Second)
			phase(flint.Running)
			pause(ctx, time.Hour)
			return ctx.Err()
		})
		r.set("a", 5)
		settle(10 * time.Minute)
		mended.Store(true)
		settle(2 * time.Minute)
		if r.inside != 5 {
			t.Errorf("%d runners after the host was mended, want 5", r.inside)
		}
		if why := r.loop.Waiting(); len(why) != 0 {
			t.Errorf("still waiting: %v", why)
		}
	})
}

func TestOnePoolsFailureDoesNotStopAnother(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t, []flint.Pool{pool("bad", 4), pool("good", 4)}, func(ctx context.Context, r flint.Runner, phase func(flint.Phase)) error {
			if r.Pool == "bad" {
				return errors.New("broken")
			}
			phase(flint.Running)
			pause(ctx, time.Hour)
			return ctx.Err()
		})
		r.set("bad", 4)
		r.set("good", 4)
		settle(30 * time.Second)
		n := 0
		for _, x := range r.State().Runners {
			if x.Pool == "good" && x.Phase == flint.Running {
				n++
			}
		}
		if n != 4 {
			t.Errorf("%d runners of the good pool, want 4", n)
		}
	})
}

func TestCancelledJobStopsIdleRunner(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var cancelled atomic.Int32
		r := newRig(t, []flint.Pool{pool("a", 5)}, func(ctx context.Context, r flint.Runner, phase func(flint.Phase)) error {
			phase(flint.Registered)
			if r.ID == "a-1" {
				phase(flint.Running)
			}
			pause(ctx, time.Hour)
			if errors.Is(context.Cause(ctx), flint.ErrUnneeded) {
				cancelled.Add(1)
			}
			pause(context.Background(), time.Minute) // release takes its time
			return ctx.Err()
		})
		r.set("a", 3)
		settle(time.Minute)
		r.set("a", 1)
		settle(sched.Grace - time.Second)
		if cancelled.Load() != 0 {
			t.Errorf("%d runners stopped before the number had stood for %s", cancelled.Load(), sched.Grace)
		}
		settle(10 * time.Second)
		if cancelled.Load() != 2 {
			t.Errorf("%d runners stopped, want the two without a job", cancelled.Load())
		}
		r.set("a", 2) // those on their way out are no supply
		settle(10 * time.Second)
		if n := len(r.starts); n != 4 {
			t.Errorf("%d starts, want a fourth for the new job", n)
		}
		if strings.Contains(r.log.String(), "runner failed") {
			t.Errorf("stopping counts as failure:\n%s", &r.log)
		}
	})
}

func TestEndOfContextWaitsForRunners(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t, []flint.Pool{pool("a", 3)}, func(ctx context.Context, _ flint.Runner, phase func(flint.Phase)) error {
			phase(flint.Running)
			<-ctx.Done()
			pause(context.Background(), 20*time.Second)
			return ctx.Err()
		})
		r.set("a", 3)
		settle(time.Second)
		before := time.Now()
		r.stop()
		if took := time.Since(before); took != 20*time.Second || r.inside != 0 || len(r.done) != 3 {
			t.Errorf("Run returned after %s with %d runners inside and %d told to Done", took, r.inside, len(r.done))
		}
	})
}

func TestDrainByMaxZero(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t, []flint.Pool{pool("a", 2)}, func(ctx context.Context, _ flint.Runner, phase func(flint.Phase)) error {
			phase(flint.Running)
			pause(ctx, 10*time.Minute)
			return ctx.Err()
		})
		r.set("a", 5)
		settle(time.Minute)
		r.pools.Store(&[]flint.Pool{pool("a", 0)})
		settle(time.Hour)
		if len(r.starts) != 2 || r.ended != 2 {
			t.Errorf("%d started, %d ended; want 2 and 2", len(r.starts), r.ended)
		}
		if slices.ContainsFunc(r.done, func(err error) bool { return err != nil }) {
			t.Errorf("draining ended runners: %v", r.done)
		}
		if c := r.lastCapacity("a"); c != 0 {
			t.Errorf("capacity is %d", c)
		}
	})
}

func TestLogsOnlyChanges(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t, []flint.Pool{pool("a", 1)}, func(ctx context.Context, _ flint.Runner, phase func(flint.Phase)) error {
			phase(flint.Running)
			pause(ctx, time.Hour)
			return ctx.Err()
		})
		r.set("a", 3)
		settle(30 * time.Minute)
		if n := strings.Count(r.log.String(), "\n"); n > 6 {
			t.Errorf("%d lines in half an hour of nothing new:\n%s", n, &r.log)
		}
	})
}
