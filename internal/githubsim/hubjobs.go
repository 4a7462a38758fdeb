package githubsim

import (
	"fmt"
	"net/http"
	"slices"
	"strings"
	"time"
)

// scope returns what a job's server-side expressions see now. The caller holds the lock, or the run is still being made.
func (h *hub) scope(j *job) *scope {
	sc := &scope{succeeded: true, cancelled: j.run.cancelled}
	for _, n := range j.run.ancestors(j) {
		switch n.counts() {
		case Failure:
			sc.succeeded, sc.failed = false, true
		case Success:
		default:
			sc.succeeded = false
		}
	}
	var matrix any
	if j.matrix != nil {
		matrix = j.matrix
	}
	sc.contexts = newObject(
		"github", h.githubContext(j), "needs", j.needsContext(), "inputs", j.run.inputs, "matrix", matrix, "strategy", j.strategyContext(),
	)
	return sc
}

func (j *job) strategyContext() *object {
	parallel := j.spec.maxParallel
	if parallel == 0 {
		parallel = j.total
	}
	return newObject(
		"fail-fast", j.spec.failFast, "job-index", float64(j.index), "job-total", float64(j.total), "max-parallel", float64(parallel),
	)
}

// counts is the conclusion as the jobs that need j see it.
func (j *job) counts() Conclusion {
	if j.conclusion == Failure && j.mayFail {
		return Success
	}
	return j.conclusion
}

// group returns the jobs made of one job of the file.
func (r *Run) group(id string) []*job {
	var group []*job
	for _, j := range r.jobs {
		if strings.EqualFold(j.spec.id, id) {
			group = append(group, j)
		}
	}
	return group
}

// needed returns the jobs j needs.
func (r *Run) needed(j *job) []*job {
	var needed []*job
	for _, n := range j.spec.needs {
		needed = append(needed, r.group(n)...)
	}
	return needed
}

// ancestors returns the jobs j needs, and those they need: failure() looks at all of them.
func (r *Run) ancestors(j *job) []*job {
	seen := map[*job]bool{}
	var all []*job
	todo := r.needed(j)
	for len(todo) > 0 {
		n := todo[0]
		todo = todo[1:]
		if !seen[n] {
			seen[n] = true
			all = append(all, n)
			todo = append(todo, r.needed(n)...)
		}
	}
	return all
}

// needsContext is the needs context: result and outputs of every job needed, a matrix counting as one.
func (j *job) needsContext() *object {
	ctx := newObject()
	for _, id := range j.spec.needs {
		result, outputs := Success, newObject()
		if group := j.run.group(id); len(group) > 0 {
			result = worst(group)
			for _, n := range group {
				for _, o := range n.spec.outputs {
					if v, ok := n.outputs[o.name]; ok {
						outputs.set(o.name, v)
					}
				}
			}
		}
		ctx.set(id, newObject("result", string(result), "outputs", outputs))
	}
	return ctx
}

// worst is the conclusion of several jobs together.
func worst(jobs []*job) Conclusion {
	rank := map[Conclusion]int{Failure: 3, Cancelled: 2, Success: 1}
	c := Skipped
	for _, j := range jobs {
		if k := j.counts(); rank[k] > rank[c] {
			c = k
		}
	}
	return c
}

// overParallel reports whether the job has to wait for others of its matrix.
func (r *Run) overParallel(j *job) bool {
	if j.spec.maxParallel == 0 {
		return false
	}
	active := 0
	for _, o := range r.group(j.spec.id) {
		if o.state.placed() || o.state == jobRunning {
			active++
		}
	}
	return active >= j.spec.maxParallel
}

// advance queues or skips the jobs whose needs are met, and ends the run when nothing is left. The caller holds the lock.
func (h *hub) advance(r *Run) {
	for again := true; again; {
		again = false
		for _, j := range r.jobs {
			if j.state == jobWaiting && allDone(r.needed(j)) {
				h.decide(j)
				again = again || j.state == jobDone
			}
		}
	}
	h.place()
	if r.over || !allDone(r.jobs) {
		return
	}
	r.over, r.conclusion = true, worst(r.jobs)
	if r.conclusion == Skipped {
		r.conclusion = Success
	}
	if r.cancelled && r.conclusion == Success {
		r.conclusion = Cancelled
	}
	done := r.done
	h.emit(Event{Kind: RunCompleted, RunID: r.id, Run: r.wf.Name, Conclusion: r.conclusion}, func() { close(done) })
}

func allDone(jobs []*job) bool {
	for _, j := range jobs {
		if j.state != jobDone {
			return false
		}
	}
	return true
}

// decide queues a job whose needs are met, or skips it. The caller holds the lock.
func (h *hub) decide(j *job) {
	run, err := h.scope(j).holds(j.spec.condition)
	j.created = h.now()
	switch {
	case err != nil:
		h.cfg.Log.Error("evaluate if", "job", j.name, "err", err)
		j.queued = h.now()
		h.finish(j, Failure)
	case run && j.review:
		j.state = jobHeld
		h.emitJob(JobHeld, j, Event{})
	case run:
		h.queue(j)
	case j.run.cancelled:
		h.finish(j, Cancelled)
	default:
		j.state, j.conclusion, j.finished = jobDone, Skipped, j.created
		h.emitJob(JobSkipped, j, Event{Conclusion: Skipped})
	}
}

// queue lets a job wait for a runner. The caller holds the lock.
func (h *hub) queue(j *job) {
	j.state, j.queued = jobQueued, h.now()
	h.emitJob(JobQueued, j, Event{})
	h.watch(j)
}

// requeue takes a placed job back from its scale set and runner. The caller holds the lock.
func (h *hub) requeue(j *job) {
	if x := j.runner; x != nil {
		x.job = nil
	}
	j.state, j.set, j.runner = jobQueued, nil, nil
	h.watch(j)
}

// served reports whether a scale set, or a runner of none, is there that could take the job. The caller holds the lock.
func (h *hub) served(j *job) bool {
	return slices.ContainsFunc(h.sets, func(s *scaleSet) bool { return s.serves(j.labels) && h.reaches(j, s.domain, s.group) }) ||
		slices.ContainsFunc(h.runners, func(x *runner) bool { return x.set == nil && h.takes(x, j) })
}

// watch sees to it that a queued job which nobody has the labels for does not wait in silence. A coordinator may make its
// scale sets after the job, so they have a while. The caller holds the lock.
func (h *hub) watch(j *job) {
	if j.unserved != nil {
		j.unserved.Stop()
	}
	j.unserved = time.AfterFunc(h.cfg.Unserved, func() {
		h.change(func() {
			if h.isClosed() || j.state != jobQueued || h.served(j) {
				return
			}
			h.cfg.Log.Warn("job waits: no scale set and no runner has its labels", "job", j.name, "labels", j.labels)
			h.emitJob(JobUnserved, j, Event{Labels: slices.Clone(j.labels)})
		})
	})
}

// cancelJob ends a job no runner has begun, and orders the cancellation of one that runs. The caller holds the lock,
// and advances the run.
func (h *hub) cancelJob(j *job) {
	switch {
	case j.state == jobRunning:
		j.cancel = true
	case j.state == jobHeld || j.state == jobQueued || j.state.placed():
		if x := j.runner; x != nil {
			x.job = nil
		}
		j.runner = nil
		h.finish(j, Cancelled)
	}
}

// finish ends a job and tells its scale set. The caller holds the lock, and advances the run.
func (h *hub) finish(j *job, c Conclusion) {
	j.stopTimers()
	assigned := !j.assigned.IsZero()
	j.state, j.conclusion, j.finished = jobDone, c, h.now()
	if j.created.IsZero() {
		j.created = j.finished
	}
	for _, st := range j.steps {
		if st.status == "in_progress" {
			st.status, st.conclusion, st.completed = "completed", c, j.finished
		}
	}
	h.emitJob(JobCompleted, j, Event{Conclusion: c})
	if assigned {
		h.tell(j, "JobCompleted", map[Conclusion]string{Success: "succeeded", Failure: "failed", Cancelled: "canceled", Skipped: "skipped"}[c])
	}
	if assigned && h.faults.strikes(repeatAssignments) {
		h.tell(j, "JobAssigned", "")
	}
	if c == Failure && j.spec.failFast && !j.mayFail && j.total > 1 {
		for _, o := range j.run.group(j.spec.id) {
			if o != j {
				h.cancelJob(o)
			}
		}
	}
}

// errJobGone tells a runner that its job went elsewhere. Third-party runners look for the words.
func errJobGone() error {
	return &apiError{http.StatusConflict, "TaskOrchestrationJobAlreadyAcquiredException", "the job assignment is invalid: it is over, or another runner has it"}
}

// begin gives the dispatched job to its runner, and returns it. Asking twice gives the same job.
func (h *hub) begin(clientID, request string) (j *job, err error) {
	h.change(func() {
		x := h.findRunner(func(x *runner) bool { return x.clientID == clientID })
		if x == nil {
			err = errUnauthorized()
			return
		}
		j = x.job
		if j == nil || j.request != request || (j.state != jobDispatched && j.state != jobRunning) {
			err = errJobGone()
			return
		}
		if j.state == jobRunning {
			return
		}
		j.state, j.acknowledged, j.started = jobRunning, true, h.now()
		j.runnerID, j.runnerName, j.groupID, j.groupName = x.id, x.name, x.group.id, x.group.name
		j.lockedUntil = h.now().Add(h.cfg.Lease)
		j.stopTimers()
		j.lease = time.AfterFunc(h.cfg.Lease, func() { h.expire(j) })
		j.deadline = time.AfterFunc(time.Duration(j.spec.timeoutMinutes*float64(time.Minute)), func() { h.timeOut(j) })
		h.emitJob(JobStarted, j, Event{})
		h.tell(j, "JobStarted", "")
	})
	return j, err
}

// expire fails a job whose runner has stopped renewing it, or never obeyed its cancellation. The registration stays, as
// GitHub leaves it.
func (h *hub) expire(j *job) {
	h.change(func() {
		if h.isClosed() || j.state != jobRunning || h.now().Before(j.lockedUntil) {
			return
		}
		h.cfg.Log.Warn("fail job: its runner is lost", "job", j.name, "runner", j.runnerName)
		if x := j.runner; x != nil {
			x.job, x.session = nil, ""
		}
		c := Failure
		if j.cancel {
			c = Cancelled
		}
		h.finish(j, c)
		h.advance(j.run)
	})
}

// timeOut cancels a job that has run for its timeout-minutes.
func (h *hub) timeOut(j *job) {
	h.change(func() {
		if !h.isClosed() && j.state == jobRunning {
			h.cfg.Log.Warn("cancel job: it ran into its time-out", "job", j.name, "minutes", j.spec.timeoutMinutes)
			j.cancel = true
		}
	})
}

// renew extends a running job's lease.
func (h *hub) renew(jobID string) (until time.Time, err error) {
	h.change(func() {
		j := h.jobs[jobID]
		if j == nil || j.state != jobRunning {
			err = errNotFound("no such job is running")
			return
		}
		until = h.now().Add(h.cfg.Lease)
		j.lockedUntil = until
		j.lease.Reset(h.cfg.Lease)
	})
	return until, err
}

// complete ends a running job with its runner's verdict; the runner's registration, if ephemeral, ends with it.
func (h *hub) complete(jobID string, c Conclusion, outputs map[string]string) (err error) {
	h.change(func() {
		j := h.jobs[jobID]
		if j == nil || j.state != jobRunning {
			err = errNotFound("no such job is running")
			return
		}
		j.outputs = outputs
		x := j.runner
		h.finish(j, c)
		switch {
		case x != nil && x.ephemeral:
			h.dropRunner(x)
		case x != nil:
			x.job = nil
		}
		h.advance(j.run)
	})
	return err
}

// conclusionOf reads a runner's verdict.
func conclusionOf(s string) (Conclusion, error) {
	switch strings.ToLower(s) {
	case "succeeded", "success", "succeededwithissues":
		return Success, nil
	case "failed", "failure", "abandoned":
		return Failure, nil
	case "canceled", "cancelled":
		return Cancelled, nil
	case "skipped":
		return Skipped, nil
	}
	return "", errBadRequest(fmt.Sprintf("unknown conclusion %q", clip(s, 40)))
}
