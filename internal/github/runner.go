package github

import (
	"context"
	"errors"
	"fmt"
	"net/http"

	"flint"
)

// Register makes r known to GitHub under its ID and returns the configuration that lets one guest be it for one job. A stale
// registration of the same name in the same scale set (from before a crash) is removed first. On error none is left, as far
// as GitHub can be reached; Remove makes sure.
func (c *Client) Register(ctx context.Context, r flint.Runner) (flint.Registration, error) {
	p := c.poller(r.Pool)
	if p == nil {
		return flint.Registration{}, fmt.Errorf("register runner %s: %w: pool %s", r.ID, flint.ErrNotFound, r.Pool)
	}
	c.remember(r.ID, p.scope)
	svc, err := p.scope.controlService(ctx)
	if err != nil {
		return flint.Registration{}, err
	}
	set := p.scaleSet()
	if set == 0 {
		if set, err = svc.scaleSet(ctx, p.pool); err != nil {
			return flint.Registration{}, err
		}
	}
	reg, err := svc.jit(ctx, set, r.ID)
	if exception(err, "AgentExistsException") {
		if err := c.removeStale(ctx, svc, set, r.ID); err != nil {
			return flint.Registration{}, err
		}
		reg, err = svc.jit(ctx, set, r.ID)
	}
	if err == nil {
		return reg, nil
	}
	if unclear(err) {
		c.undo(ctx, svc, set, r.ID)
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
		return &flint.Fault{
			Code: "github.runner-exists", What: "register runner " + name, Kind: flint.ErrConflict,
			Err: errors.New("GitHub has a runner of this name that belongs to something else"),
			Fix: "remove that runner on GitHub's page of self-hosted runners",
		}
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
func (c *Client) undo(ctx context.Context, svc *service, set int, name string) {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), closeTimeout)
	defer cancel()
	if err := c.removeStale(ctx, svc, set, name); err != nil {
		c.cfg.Log.Warn("registration may be left over", "runner", name, "error", err)
	}
}

// Remove deletes a runner's registration by its GitHub id, or by its name where the id is 0. It is idempotent: nil when there
// is none. While the runner has a job GitHub keeps it: flint.ErrConflict, try again later.
func (c *Client) Remove(ctx context.Context, runner string, githubID int64) error {
	scopes := c.scopes
	if s := c.home(runner); s != nil {
		scopes = []*scope{s}
	}
	for _, s := range scopes {
		svc, err := s.controlService(ctx)
		if err != nil {
			return err
		}
		id := githubID
		// Ids are of one scope. If it is not certain which, only the name tells.
		if id == 0 || len(scopes) > 1 {
			if id, _, err = svc.find(ctx, runner); err != nil {
				return err
			}
			if id == 0 {
				continue
			}
		}
		if err := outcome(runner, svc.remove(ctx, runner, id)); err != nil {
			return err
		}
	}
	c.forgetRunner(runner)
	return nil
}

// outcome reads the answer to a removal.
func outcome(name string, err error) error {
	switch {
	case exception(err, "AgentNotFoundException"), status(err) == http.StatusNotFound:
		return nil
	case exception(err, "JobStillRunningException"):
		return &flint.Fault{
			Code: "github.busy", What: "remove runner " + name, Kind: flint.ErrConflict, Err: err,
			Fix: "wait until its job has ended or GitHub has given it up (about ten minutes after the runner was last heard)",
		}
	}
	return err
}

// exception reports whether err is a refusal that GitHub named so.
func exception(err error, name string) bool {
	var e *callError
	return errors.As(err, &e) && e.is(name)
}

func (c *Client) remember(runner string, s *scope) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.runners[runner] = s
}

func (c *Client) home(runner string) *scope {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.runners[runner]
}

func (c *Client) forgetRunner(runner string) {
	c.mu.Lock()
	defer c.mu.Unlock()
	delete(c.runners, runner)
}
