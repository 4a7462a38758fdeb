package github

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"slices"

	"flint"
)

// Register makes r known to GitHub under its ID and returns what lets one guest be it for one job. A stale registration of the
// same name (from before a crash) is removed first, if it is ours. On error none is left, as far as GitHub can be reached;
// Remove makes sure. Where guests register themselves, GitHub does not know the runner yet: its id is 0.
func (c *Client) Register(ctx context.Context, r flint.Runner) (flint.Registration, error) {
	p := c.served(r.Pool)
	if p == nil {
		return flint.Registration{}, fmt.Errorf("register runner %s: %w: pool %s", r.ID, flint.ErrNotFound, r.Pool)
	}
	c.remember(r.ID, p)
	switch {
	case p.poller != nil:
		reg, err := c.registerInSet(ctx, p, r.ID)
		if refused(err) == http.StatusUnauthorized { // the service of before is signed out
			reg, err = c.registerInSet(ctx, p, r.ID)
		}
		return reg, err
	case p.scope.account.SelfRegister:
		return p.scope.selfRegistration(ctx, p.Pool, r.ID)
	}
	return c.registerREST(ctx, p, r.ID)
}

// registerInSet makes a runner of the pool's scale set.
func (c *Client) registerInSet(ctx context.Context, p *served, name string) (flint.Registration, error) {
	svc, err := p.scope.controlService(ctx)
	if err != nil {
		return flint.Registration{}, err
	}
	set := p.poller.scaleSet()
	if set == 0 {
		if set, err = svc.scaleSet(ctx, p.Pool); err != nil {
			return flint.Registration{}, err
		}
	}
	reg, err := svc.jit(ctx, set, name)
	if exception(err, "AgentExistsException") {
		if err := c.removeStale(ctx, svc, set, name); err != nil {
			return flint.Registration{}, err
		}
		reg, err = svc.jit(ctx, set, name)
	}
	if err == nil {
		return reg, nil
	}
	if unclear(err) {
		c.undo(ctx, name, func(ctx context.Context) error { return c.removeStale(ctx, svc, set, name) })
	}
	return flint.Registration{}, err
}

// removeStale removes the registration that has the name we want, if it is of our own scale set.
func (c *Client) removeStale(ctx context.Context, svc *service, set int, name string) error {
	id, owner, err := svc.find(ctx, name)
	if err != nil || id == 0 {
		return err
	}
	if owner != set {
		return existsFault(name)
	}
	c.cfg.Log.Warn("remove stale registration", "runner", name, "github_id", id)
	return outcome(name, svc.remove(ctx, name, id))
}

// unclear reports whether GitHub may have registered the runner in spite of the error: it did not refuse it in so many words.
func unclear(err error) bool {
	s := status(err)
	return s < 300 || s >= http.StatusInternalServerError
}

// undo removes what an unclear answer may have left.
func (c *Client) undo(ctx context.Context, name string, remove func(context.Context) error) {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), closeTimeout)
	defer cancel()
	if err := remove(ctx); err != nil {
		c.cfg.Log.Warn("registration may be left over", "runner", name, "error", err)
	}
}

func existsFault(name string) error {
	return &flint.Fault{
		Code: "github.runner-exists", What: "register runner " + name, Kind: flint.ErrConflict,
		Err: errors.New("GitHub has a runner of this name that belongs to something else"),
		Fix: "remove that runner on GitHub's page of self-hosted runners",
	}
}

// Remove deletes a runner's registration by its GitHub id, or by its name where the id is 0. It is idempotent: nil when there
// is none. While the runner has a job GitHub keeps it: flint.ErrConflict, try again later.
func (c *Client) Remove(ctx context.Context, runner string, githubID int64) error {
	homes, id := c.homes(runner), githubID
	if len(homes) > 1 {
		id = 0 // ids are of one scope; if it is not certain which, only the name tells
	}
	var errs []error
	for _, s := range homes {
		found, err := s.removeRunner(ctx, runner, id)
		if err != nil {
			errs = append(errs, err) // the runner may be in another scope, which can be reached
		} else if found {
			errs = nil
			break
		}
	}
	if err := errors.Join(errs...); err != nil {
		return err
	}
	c.forgetRunner(runner)
	return nil
}

// removeRunner deletes a registration of the scope in the way its account works.
func (s *scope) removeRunner(ctx context.Context, name string, id int64) (found bool, err error) {
	if s.account.Mode == Webhooks {
		return s.removeREST(ctx, name, id)
	}
	if found, err = s.removeFromSet(ctx, name, id); refused(err) == http.StatusUnauthorized {
		found, err = s.removeFromSet(ctx, name, id)
	}
	return found, err
}

func (s *scope) removeFromSet(ctx context.Context, name string, id int64) (found bool, err error) {
	svc, err := s.controlService(ctx)
	if err != nil {
		return false, err
	}
	if id == 0 {
		if id, _, err = svc.find(ctx, name); err != nil || id == 0 {
			return false, err
		}
	}
	return true, outcome(name, svc.remove(ctx, name, id))
}

// Status returns what GitHub says of a registration, which is looked up by its GitHub id, or by its name where the id is 0. It
// returns flint.ErrNotFound where GitHub has none: before a guest has registered itself, and after its job.
func (c *Client) Status(ctx context.Context, runner string, githubID int64) (flint.RunnerStatus, error) {
	homes, id := c.homes(runner), githubID
	if len(homes) > 1 {
		id = 0
	}
	var errs []error
	for _, s := range homes {
		r, err := s.lookUp(ctx, runner, id)
		switch {
		case err != nil:
			errs = append(errs, err)
		case r != nil:
			return flint.RunnerStatus{Online: r.GetStatus() == "online", Busy: r.GetBusy()}, nil
		}
	}
	if err := errors.Join(errs...); err != nil {
		return flint.RunnerStatus{}, err
	}
	return flint.RunnerStatus{}, fmt.Errorf("look up runner %s: %w at GitHub", runner, flint.ErrNotFound)
}

// maxRefusals ends the sweep of a scope: GitHub then refuses the other removals, too.
const maxRefusals = 3

// Prune removes the registrations that have our prefix and that live does not claim, in every scope, and returns their names.
// Those that GitHub says are busy are left for later. live is asked after GitHub, so a runner whose name is known before it is
// registered is never taken for a stale one.
func (c *Client) Prune(ctx context.Context, live func(name string) bool) (removed []string, err error) {
	if c.cfg.Prefix == "" {
		return nil, errors.New("prune registrations: no prefix tells which are ours")
	}
	var errs []error
	for _, s := range c.places() {
		runners, err := s.runners(ctx, c.cfg.Prefix)
		refusals := 0
		if err != nil {
			errs = append(errs, err)
		}
		for _, r := range runners {
			if refusals >= maxRefusals {
				break // there may be thousands, each refused after half a minute
			}
			name := r.GetName()
			if r.GetBusy() || live(name) {
				continue
			}
			found, err := s.removeREST(ctx, name, r.GetID())
			switch {
			case errors.Is(err, flint.ErrConflict):
			case err != nil:
				refusals++
				errs = append(errs, err)
			case found:
				c.cfg.Log.Info("removed a stale registration", "runner", name, "scope", s.name, "github_id", r.GetID())
				c.forgetRunner(name)
				removed = append(removed, name)
			}
		}
	}
	return removed, errors.Join(errs...)
}

// outcome reads the answer to a removal.
func outcome(name string, err error) error {
	switch {
	case exception(err, "AgentNotFoundException"), refused(err) == http.StatusNotFound:
		return nil
	case exception(err, "JobStillRunningException"):
		return busyFault(name, err)
	}
	return err
}

func busyFault(name string, err error) error {
	return &flint.Fault{
		Code: "github.busy", What: "remove runner " + name, Kind: flint.ErrConflict, Err: err,
		Fix: "wait until its job has ended or GitHub has given it up (about ten minutes after the runner was last heard)",
	}
}

// exception reports whether err is a refusal that GitHub named so.
func exception(err error, name string) bool {
	var e *callError
	return errors.As(err, &e) && e.is(name)
}

func (c *Client) remember(runner string, p *served) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.runners[runner] = p
}

// homes returns where a runner may be registered: one scope for those of this process, all for those of an earlier one.
func (c *Client) homes(runner string) []*scope {
	c.mu.Lock()
	defer c.mu.Unlock()
	if p := c.runners[runner]; p != nil {
		return []*scope{p.scope}
	}
	return slices.Clone(c.scopes)
}

// poolOf returns the pool of a runner of this process, or what to say of any other.
func (c *Client) poolOf(runner, otherwise string) string {
	c.mu.Lock()
	defer c.mu.Unlock()
	if p := c.runners[runner]; p != nil {
		return p.Name
	}
	return otherwise
}

func (c *Client) forgetRunner(runner string) {
	c.mu.Lock()
	defer c.mu.Unlock()
	delete(c.runners, runner)
}
