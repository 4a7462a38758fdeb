package app

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"sync"
	"time"

	"flint"
	"flint/internal/api"
	"flint/internal/durable"
)

const (
	// drainLook is how often is looked whether the last runner is gone.
	drainLook = 250 * time.Millisecond
	// drainNote is the file that says that a person drains the host.
	drainNote = "drained.json"
)

// drain is why this host takes no new runner although it could. What a person asked for survives a restart.
type drain struct {
	mu     sync.Mutex
	path   string
	person time.Time // since when a person wants it; zero: nobody does
	stop   time.Time // since when flint is to stop
}

type drainNoted struct {
	Since time.Time `json:"since"`
}

// open reads what an earlier process was told. A note that cannot be understood is still one: somebody wanted the host drained.
func (d *drain) open(dir string) error {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.path = filepath.Join(dir, drainNote)
	info, err := os.Stat(d.path)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("look whether the host is drained: %w", err)
	}
	var noted drainNoted
	if b, err := os.ReadFile(d.path); err != nil || json.Unmarshal(b, &noted) != nil || noted.Since.IsZero() {
		noted.Since = info.ModTime()
	}
	d.person = noted.Since
	return nil
}

// ask notes that a person drains the host, or no longer does. It returns when that is on disk.
func (d *drain) ask(want bool, now time.Time) error {
	d.mu.Lock()
	defer d.mu.Unlock()
	if want == !d.person.IsZero() {
		return nil
	}
	if !want {
		if err := durable.Remove(d.path); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return fmt.Errorf("remove the note that the host is drained: %w", err)
		}
		d.person = time.Time{}
		return nil
	}
	b, err := json.Marshal(drainNoted{now})
	if err != nil {
		return fmt.Errorf("encode the note that the host is drained: %w", err)
	}
	if err := durable.Replace(d.path, b); err != nil {
		return fmt.Errorf("note that the host is drained: %w", err)
	}
	d.person = now
	return nil
}

// stopping notes that flint is to stop when the last runner is gone.
func (d *drain) stopping(now time.Time) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.stop = now
}

// isStopping reports whether flint drains because it is to stop.
func (d *drain) isStopping() bool {
	d.mu.Lock()
	defer d.mu.Unlock()
	return !d.stop.IsZero()
}

// reason is why the host takes no new runner; zero when it may.
func (d *drain) reason(now time.Time) flint.Reason {
	d.mu.Lock()
	defer d.mu.Unlock()
	switch {
	case !d.person.IsZero():
		return flint.Because("host.draining", "it drains since %s, by a person; `flint host uncordon` ends that", clock(d.person, now))
	case !d.stop.IsZero():
		return flint.Because("host.draining", "it drains since %s, because flint is to stop", clock(d.stop, now))
	}
	return flint.Reason{}
}

// refuses is why the host takes no new runner; zero when it may.
func (a *App) refuses() flint.Reason {
	if why := a.drain.reason(time.Now()); !why.IsZero() {
		return why
	}
	return a.pressure.Reason()
}

// clock is a time of today, or one with its day.
func clock(t, now time.Time) string {
	if t, now = t.Local(), now.Local(); t.YearDay() == now.YearDay() && t.Year() == now.Year() {
		return t.Format("15:04")
	}
	return t.Local().Format("2006-01-02 15:04")
}

// drainFirst returns a context that ends when ctx has and then the last runner is gone, Options.DrainTimeout is over, or
// Options.Hurry says so. Without a DrainTimeout it is ctx. The caller calls done in the end.
func (a *App) drainFirst(ctx context.Context) (_ context.Context, done func()) {
	if a.opt.DrainTimeout <= 0 {
		return ctx, func() {}
	}
	run, end := context.WithCancelCause(context.WithoutCancel(ctx))
	over := make(chan struct{})
	stop := context.AfterFunc(ctx, func() {
		defer close(over)
		a.untilDrained(run)
		end(context.Cause(ctx))
	})
	return run, func() {
		end(context.Canceled)
		if !stop() {
			<-over
		}
	}
}

func (a *App) untilDrained(ctx context.Context) {
	a.drain.stopping(time.Now())
	a.log.Info("draining before the end", "runners", len(a.host.State().Runners), "at_most", a.opt.DrainTimeout)
	limit, look := time.NewTimer(a.opt.DrainTimeout), time.NewTicker(drainLook)
	defer limit.Stop()
	defer look.Stop()
	for {
		left := len(a.host.State().Runners)
		if left == 0 {
			a.log.Info("drained")
			return
		}
		select {
		case <-look.C:
		case <-a.opt.Hurry:
			a.log.Warn("told to stop again: draining ends", "runners", left)
			return
		case <-limit.C:
			a.log.Warn("time to drain is over", "runners", left)
			return
		case <-ctx.Done():
			return
		}
	}
}

// Hosts lists the hosts and what is on them, see api.Operator.
func (a *App) Hosts(context.Context) ([]api.Host, error) { return []api.Host{a.shown()}, nil }

// Drain lets the host take no new runner, see api.Operator. Its errors are faults.
func (a *App) Drain(_ context.Context, name string) (api.Host, error) {
	return a.askDrain("drain", name, true)
}

// Uncordon ends Drain, see api.Operator. Its errors are faults.
func (a *App) Uncordon(_ context.Context, name string) (api.Host, error) {
	return a.askDrain("uncordon", name, false)
}

func (a *App) askDrain(verb, name string, want bool) (api.Host, error) {
	own := a.cfg.Host.Name
	if name != "" && name != own {
		return api.Host{}, &flint.Fault{
			Code: "host.unknown", What: verb + " host " + name, Kind: flint.ErrNotFound, Err: fmt.Errorf("this flint runs VMs on %s", own),
			Fix: "see flint host ls",
		}
	}
	if err := a.drain.ask(want, time.Now()); err != nil {
		return api.Host{}, &flint.Fault{
			Code: "host.drain", What: verb + " host " + own, Kind: flint.ErrPermission, Err: err,
			Fix: "let flint write to state_dir, and see whether its disk is full",
		}
	}
	a.log.Info("host was asked by a person", "host", own, "to", verb)
	if a.demand != nil {
		a.demand.signal() // the scheduler looks at once
	}
	return a.shown(), nil
}

// shown is this host as a person sees it.
func (a *App) shown() api.Host {
	s := a.host.State()
	all := limits(a.current().Host)
	h := api.Host{
		Name: s.Name, State: api.HostReady, Reasons: []flint.Reason{}, Runners: s.Runners,
		CPUs:   api.Room{Free: int64(s.Free.CPUs), Of: int64(all.CPUs)},
		Memory: api.Room{Free: int64(s.Free.Memory), Of: int64(all.Memory)},
	}
	draining := a.drain.reason(time.Now())
	switch {
	case !draining.IsZero() && len(s.Runners) == 0:
		h.State = api.HostDrained
	case !draining.IsZero():
		h.State = api.HostDraining
	case !s.Refuses.IsZero():
		h.State = api.HostRefuses
	}
	if h.Runners == nil {
		h.Runners = []flint.Runner{}
	}
	if !s.Refuses.IsZero() {
		h.Reasons = append(h.Reasons, s.Refuses)
	}
	return h
}
