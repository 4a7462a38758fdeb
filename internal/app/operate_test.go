package app

import (
	"context"
	"errors"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"flint"
	"flint/internal/api"
	"flint/internal/config"
	"flint/internal/githubsim"
	"flint/internal/host"
)

const aJob = "on: push\njobs:\n  job:\n    runs-on: flint\n    steps:\n      - run: "

// eventually waits until is true, which says what is awaited.
func eventually(t *testing.T, what string, is func() bool) bool {
	t.Helper()
	tick, end := time.NewTicker(20*time.Millisecond), time.After(5*time.Minute)
	defer tick.Stop()
	for !is() {
		select {
		case <-tick.C:
		case <-end:
			t.Errorf("not in five minutes: %s", what)
			return false
		}
	}
	return true
}

func (c *coordinator) concluded(t *testing.T, run *githubsim.Run) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 5*time.Minute)
	defer cancel()
	if conclusion, err := run.Wait(ctx); err != nil || conclusion != githubsim.Success {
		t.Errorf("the run ended as %q, %v", conclusion, err)
	}
}

func TestDrainedHostFinishesAndTakesNoMore(t *testing.T) {
	c := newCoordinator(t, 3)
	release := filepath.Join(t.TempDir(), "release")
	running := c.submit(t, aJob+"until [ -e "+release+" ]; do sleep 0.1; done\n")
	c.serve(t, func() {
		eventually(t, "the job runs", func() bool { return c.atOnce.Load() == 1 })
		h, err := c.Drain(t.Context(), "")
		if err != nil || h.State != api.HostDraining || len(h.Reasons) != 1 || h.Reasons[0].Code != "host.draining" || !strings.Contains(h.Reasons[0].Text, "by a person") {
			t.Fatalf("drain: %+v, %v", h, err)
		}
		if _, err := c.Drain(t.Context(), "elsewhere"); !errors.Is(err, flint.ErrNotFound) {
			t.Errorf("drain of a host that is not here: %v", err)
		}
		waits := c.submit(t, aJob+"echo hello\n")
		eventually(t, "the second job waits because of it", func() bool {
			found, err := c.Explain(t.Context(), "")
			return err == nil && len(found) == 1 && strings.Contains(found[0].Reason.Text, "it drains since")
		})
		if err := os.WriteFile(release, nil, 0o600); err != nil {
			t.Fatal(err)
		}
		c.concluded(t, running)
		eventually(t, "the host is drained", func() bool {
			hosts, err := c.Hosts(t.Context())
			return err == nil && len(hosts) == 1 && hosts[0].State == api.HostDrained
		})
		if n := c.highest.Load(); n != 1 {
			t.Errorf("%d runners at the same time although the host drains", n)
		}
		// The next process knows.
		var next host.Drain
		if err := next.Open(c.dir); err != nil || next.Reason(time.Now()).Code != "host.draining" {
			t.Errorf("after a restart: %v, %v", next.Reason(time.Now()), err)
		}
		if h, err := c.Uncordon(t.Context(), h.Name); err != nil || h.State != api.HostReady {
			t.Errorf("uncordon: %+v, %v", h, err)
		}
		c.concluded(t, waits)
	})
	var next host.Drain
	if err := next.Open(c.dir); err != nil || !next.Reason(time.Now()).IsZero() {
		t.Errorf("after uncordon and a restart: %v, %v", next.Reason(time.Now()), err)
	}
}

func TestStopDrainsFirst(t *testing.T) {
	for name, hurried := range map[string]bool{"until the job is done": false, "until told again": true} {
		t.Run(name, func(t *testing.T) {
			c := newCoordinator(t, 1)
			hurry := make(chan struct{}, 1)
			c.opt.DrainTimeout, c.opt.Hurry = time.Hour, hurry
			release := filepath.Join(t.TempDir(), "release")
			run := c.submit(t, aJob+"until [ -e "+release+" ]; do sleep 0.1; done\n")
			ctx, stop := context.WithCancel(t.Context())
			if err := c.Connect(ctx); err != nil {
				t.Fatal(err)
			}
			served := make(chan error, 1)
			go func() { served <- c.Serve(ctx) }()
			eventually(t, "the job runs", func() bool { return c.atOnce.Load() == 1 })
			stop()
			eventually(t, "the host drains", func() bool { return c.host.State().Refuses.Code == "host.draining" })
			select {
			case err := <-served:
				t.Fatalf("it stopped with a job under way: %v", err)
			default:
			}
			if hurried {
				run.ForceCancel() // else GitHub would keep the registration of the lost runner
				hurry <- struct{}{}
			} else {
				if err := os.WriteFile(release, nil, 0o600); err != nil {
					t.Fatal(err)
				}
				c.concluded(t, run)
			}
			if err := <-served; err != nil {
				t.Errorf("serve: %v", err)
			}
			c.gone(t)
		})
	}
}

// reloadable lets the test say what the configuration file says now.
func reloadable(c *coordinator, next *config.Config, bad *error) (level *string) {
	level = new(string)
	c.opt.Reload = func() (config.Config, error) { return *next, *bad }
	c.opt.SetLevel = func(l string) bool { *level = l; return true }
	return level
}

func keys(changes []api.Change) string {
	var out []string
	for _, c := range changes {
		out = append(out, c.Key)
	}
	return strings.Join(out, " ")
}

func TestReload(t *testing.T) {
	image := filepath.Join(os.Getenv("FLINT_TEST_ASSETS"), "base.ext4")
	if _, err := os.Stat(image); err != nil {
		t.Skip("needs a base image: FLINT_TEST_ASSETS names none")
	}
	c := newCoordinator(t, 1)
	next, bad := c.cfg, error(nil)
	level := reloadable(c, &next, &bad)
	made := c.supply["flint"]
	c.pack.Kernel, c.pack.Initrd, c.pack.Modules, c.runnerDrive = made.Kernel, made.Initrd, made.Modules, made.Runner
	release := filepath.Join(t.TempDir(), "release")
	hold := aJob + "until [ -e " + release + " ]; do sleep 0.1; done\n"
	c.serve(t, func() {
		first := c.submit(t, hold)
		eventually(t, "the job runs", func() bool { return c.atOnce.Load() == 1 })

		bad = config.Invalid("flint.yaml", errors.New("no good"))
		next.LogLevel = "error"
		if _, err := c.Reload(t.Context()); !errors.Is(err, flint.ErrConfig) || *level != "" || c.current().LogLevel == "error" {
			t.Errorf("an invalid file: %v, level %q", err, *level)
		}
		bad, next = nil, c.cfg

		// More runners, another shape, less of a host, something that needs a restart, and a second pool.
		next.LogLevel, next.VM.JobTimeout, next.Host.CPUs = "debug", config.Duration(time.Hour), 32
		other := c.cfg.Pools[0]
		other.Name, other.Image = "other", image
		next.Pools = append([]config.Pool{}, c.cfg.Pools...)
		next.Pools[0].Max, next.Pools[0].VM.Memory = 2, 512*flint.MiB
		next.Pools = append(next.Pools, other)
		done, err := c.Reload(t.Context())
		if err != nil || keys(done.Applied) != "log_level pools[flint].vm.memory pools[flint].max pools[other] host.cpus" || keys(done.Restart) != "vm.job_timeout" {
			t.Fatalf("reload: %+v, %v", done, err)
		}
		if h, _ := c.Hosts(t.Context()); *level != "debug" || h[0].CPUs.Of != 32 {
			t.Errorf("level %q, hosts %+v", *level, h)
		}
		if again, err := c.Reload(t.Context()); err != nil || len(again.Applied) != 0 || keys(again.Restart) != "vm.job_timeout" {
			t.Errorf("once more: %+v, %v", again, err)
		}
		if s := c.Supplies()["flint"]; s.Shape.Memory != 512*flint.MiB {
			t.Errorf("the pool's VMs have %s", s.Shape.Memory)
		}
		second := c.submit(t, hold)
		eventually(t, "two at a time", func() bool { return c.atOnce.Load() == 2 })
		third := c.submit(t, strings.ReplaceAll(aJob, "runs-on: flint", "runs-on: other")+"echo hello\n")
		c.concluded(t, third)

		// The first pool goes, with two jobs under way.
		next.Pools = next.Pools[1:]
		if done, err := c.Reload(t.Context()); err != nil || keys(done.Applied) != "pools[flint]" || done.Applied[0].Note == "" {
			t.Fatalf("reload: %+v, %v", done, err)
		}
		if err := os.WriteFile(release, nil, 0o600); err != nil {
			t.Fatal(err)
		}
		c.concluded(t, first)
		c.concluded(t, second)
		eventually(t, "the pool is gone", func() bool {
			c.retire(t.Context(), time.Now().Add(retireAfter))
			return len(c.pools()) == 1 && len(c.Supplies()) == 1
		})
		eventually(t, "its session is deleted", func() bool {
			for _, s := range c.sim.Inventory().ScaleSets {
				if s.Name == "flint" && s.Owner != "" {
					return false
				}
			}
			return true
		})
	})
	c.gone(t)
	for _, r := range c.results {
		if r.Runner.Job != nil && r.Conclusion != "succeeded" {
			t.Errorf("job %s ended as %q, lost %t", r.Runner.Job.Name, r.Conclusion, r.Lost)
		}
	}
}

func TestPoolWhoseImageCannotBePreparedIsHeld(t *testing.T) {
	c := newCoordinator(t, 1)
	next, bad := c.cfg, error(nil)
	reloadable(c, &next, &bad)
	c.serve(t, func() {
		other := c.cfg.Pools[0]
		other.Name, other.Image = "other", filepath.Join(t.TempDir(), "none.ext4")
		next.Pools = append(append([]config.Pool{}, c.cfg.Pools...), other)
		if _, err := c.Reload(t.Context()); err != nil {
			t.Fatal(err)
		}
		c.submit(t, strings.ReplaceAll(aJob, "runs-on: flint", "runs-on: other")+"echo hello\n").ForceCancel()
		eventually(t, "it says why", func() bool {
			for _, p := range c.pools() {
				if p.Name == "other" && p.Held.Code == "pool.image" {
					return true
				}
			}
			return false
		})
		c.concluded(t, c.submit(t, aJob+"echo hello\n")) // the other pool goes on
	})
}

func TestCommandLineCannotBeReloaded(t *testing.T) {
	a := &App{log: slog.New(slog.DiscardHandler)}
	var fault *flint.Fault
	if _, err := a.Reload(t.Context()); !errors.As(err, &fault) || fault.Code != "config.fixed" {
		t.Errorf("%v", err)
	}
}
