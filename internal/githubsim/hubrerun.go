package githubsim

import (
	"fmt"
	"strings"

	"flint"
)

// rerun begins a new attempt of a run, in which a job and those that need it run again; the others keep their outcome under
// new numbers. The caller holds the lock.
func (h *hub) rerun(j *job) error {
	r := j.run
	if !r.over {
		return errForbidden("The workflow run containing this job is already running")
	}
	if j.attempt != r.attempt {
		return errForbidden("This job is of an earlier attempt")
	}
	again := map[*job]bool{j: true}
	for _, o := range r.jobs {
		for _, n := range r.ancestors(o) {
			again[o] = again[o] || n == j
		}
	}
	r.attempt++
	r.began, r.over, r.cancelled, r.conclusion, r.done = h.now(), false, false, "", make(chan struct{})
	old := r.jobs
	r.earlier, r.jobs = append(r.earlier, old...), nil
	for _, o := range old {
		r.jobs = append(r.jobs, h.nextAttempt(o, again[o]))
	}
	h.advance(r)
	return nil
}

// nextAttempt makes the job of a run's new attempt out of that of the last one: afresh, or with the outcome it had. The
// caller holds the lock.
func (h *hub) nextAttempt(o *job, afresh bool) *job {
	n := &job{
		id: newUUID(), number: h.id(), plan: newUUID(), request: newUUID(), run: o.run, spec: o.spec, name: o.name, labels: o.labels,
		matrix: o.matrix, index: o.index, total: o.total, mayFail: o.mayFail, attempt: o.run.attempt, review: o.review, feedSeen: map[string]int{},
	}
	if afresh {
		n.makeSteps()
	} else {
		n.state, n.conclusion, n.outputs, n.steps, n.blobs = o.state, o.conclusion, o.outputs, o.steps, o.blobs
		n.runnerID, n.runnerName, n.groupID, n.groupName = o.runnerID, o.runnerName, o.groupID, o.groupName
		n.created, n.queued, n.assigned, n.started, n.finished = o.created, o.queued, o.assigned, o.started, o.finished
	}
	h.jobs[n.id] = n
	return n
}

// Approve lets the jobs of a run go on that wait for a reviewer. Its error wraps flint.ErrNotFound when none does.
func (s *Server) Approve(run *Run) error {
	h, none := s.hub, true
	h.change(func() {
		for _, j := range run.jobs {
			if j.state == jobHeld {
				none = false
				h.queue(j)
			}
		}
		h.place()
	})
	if none {
		return fmt.Errorf("approve run %d: no job of it waits for a reviewer: %w", run.id, flint.ErrNotFound)
	}
	return nil
}

// AddHook makes somebody a receiver of webhooks, and returns the hook's id. It gets a ping.
func (s *Server) AddHook(spec Hook) (id int64, err error) {
	if spec.Scope != "" {
		domain, ok := s.hub.domain(spec.Scope)
		if !ok || strings.HasPrefix(domain, enterprisePrefix) {
			return 0, fmt.Errorf("add webhook %s: there is no organisation or repository %q", spec.URL, spec.Scope)
		}
		spec.Scope = domain
	}
	s.hub.change(func() {
		id = s.hub.id()
		if err = s.hub.hooks.add(id, spec); err != nil {
			return
		}
		err = s.hub.ping(id)
	})
	return id, err
}
