package app

import (
	"context"
	"fmt"
	"time"

	"flint"
	"flint/internal/api"
)

// drainLook is how often is looked whether the last runner is gone.
const drainLook = 250 * time.Millisecond

// refuses is why the host takes no new runner; zero when it may.
func (a *App) refuses() flint.Reason {
	if why := a.drain.Reason(time.Now()); !why.IsZero() {
		return why
	}
	return a.pressure.Reason()
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
	a.drain.Stop(time.Now())
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
	if err := a.drain.Ask(want, time.Now()); err != nil {
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
	draining := a.drain.Reason(time.Now())
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
