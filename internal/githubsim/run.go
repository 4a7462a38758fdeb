package githubsim

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strconv"
	"strings"
	"time"

	"flint"
)

// Trigger is what starts a run. The zero value is a manual one.
type Trigger struct {
	Event  string            // github.event_name; "workflow_dispatch" when empty
	Inputs map[string]string // of workflow_dispatch; the file's defaults fill in
	Env    map[string]string // added to the workflow's env:, where it wins over the file
	Repo   string            // name of the repository; Config.Repo when empty
	Branch string            // "main" when empty
}

// Run is one run of a workflow.
type Run struct {
	id     int64
	number int64
	wf     *Workflow
	event  string
	inputs *object
	env    []pair
	hub    *hub
	repo   *repository
	branch string

	// guarded by the hub's lock
	done       chan struct{} // closed after RunCompleted was observed; a new one for each attempt
	created    time.Time
	began      time.Time // the attempt
	attempt    int       // from 1
	jobs       []*job    // of this attempt
	earlier    []*job    // of those before
	cancelled  bool
	over       bool
	conclusion Conclusion
}

type jobState int

const (
	jobWaiting    jobState = iota // for its needs
	jobHeld                       // for a reviewer
	jobQueued                     // for a scale set
	jobAvailable                  // offered to one, which has not acquired it
	jobAssigned                   // a scale set has it; it waits for a runner
	jobDispatched                 // a runner is told, and has not begun
	jobRunning
	jobDone
)

var jobStateNames = [...]string{"waiting", "waiting", "queued", "queued", "assigned", "assigned", "in_progress", "completed"}

// placed reports whether a scale set has the job and no runner has begun it.
func (s jobState) placed() bool { return s == jobAvailable || s == jobAssigned || s == jobDispatched }

// job is one job of a run. Its fields are guarded by the hub's lock, but for those set when the run is made.
type job struct {
	id      string // UUID: the coordinator's and the runner's name for it
	number  int64  // the runnerRequestId
	plan    string // UUID the runner repeats in most calls
	request string // UUID by which the runner acquires it
	run     *Run
	spec    *jobSpec
	name    string
	labels  []string
	matrix  *object // nil without a matrix
	index   int     // within its matrix
	total   int
	mayFail bool // continue-on-error
	attempt int  // of the run, from 1
	review  bool // its environment has a reviewer

	state      jobState
	conclusion Conclusion
	outputs    map[string]string
	set        *scaleSet
	runner     *runner
	runnerID   int64 // kept when the runner is gone
	runnerName string
	groupID    int64
	groupName  string

	acknowledged bool // the runner has the job request
	cancel       bool // the runner is to be told to cancel it
	cancelTold   bool
	reassigned   int // how often it was taken back because no runner took it

	created, queued, assigned, started, finished time.Time
	lockedUntil                                  time.Time
	lease                                        *time.Timer // ends it when it is not renewed
	deadline                                     *time.Timer // its timeout-minutes
	unserved                                     *time.Timer // says that nobody serves it

	steps    []*step
	blobs    []*blob
	blobSize int
	feeds    int            // live logs its runner has opened
	feedSeen map[string]int // live log lines by step
}

func (j *job) stopTimers() {
	for _, t := range []*time.Timer{j.lease, j.deadline, j.unserved} {
		if t != nil {
			t.Stop()
		}
	}
}

// step is one step of a job, or one the runner added to it.
type step struct {
	id         string // UUID
	spec       *stepSpec
	name       string
	number     int
	status     string // pending, in_progress, completed
	conclusion Conclusion
	started    time.Time
	completed  time.Time
}

// Submit queues a run of a workflow. Its error is a *flint.Fault with code workflow.input when an input does not exist or
// has the wrong type, and workflow.expression when a job's name, label or continue-on-error cannot be worked out.
func (s *Server) Submit(wf *Workflow, t Trigger) (*Run, error) {
	h := s.hub
	r := &Run{wf: wf, event: t.Event, branch: t.Branch, hub: h, done: make(chan struct{}), inputs: newObject(), attempt: 1}
	if r.event == "" {
		r.event = "workflow_dispatch"
	}
	if r.branch == "" {
		r.branch = "main"
	}
	if t.Repo == "" {
		t.Repo = h.cfg.Repo
	}
	if r.repo = h.repository(t.Repo); r.repo == nil {
		return nil, &flint.Fault{
			Code: "workflow.repository", Kind: flint.ErrUsage, What: "start workflow " + wf.Path, Err: fmt.Errorf("%s has no repository %q", h.cfg.Owner, t.Repo),
			Fix: "name one of the repositories the simulated GitHub was made with",
		}
	}
	if err := r.takeInputs(t.Inputs); err != nil {
		return nil, &flint.Fault{
			Code: "workflow.input", Kind: flint.ErrUsage, Err: err,
			What: "start workflow " + wf.Path, Fix: "give the inputs its on.workflow_dispatch declares",
		}
	}
	r.env = slices.DeleteFunc(slices.Clone(wf.env), func(p pair) bool { _, ok := t.Env[p.name]; return ok })
	for _, k := range slices.Sorted(maps.Keys(t.Env)) {
		r.env = append(r.env, pair{k, t.Env[k]})
	}
	var err error
	h.change(func() {
		if h.isClosed() {
			err = errors.New("submit run: the simulated GitHub is closed")
			return
		}
		r.id, r.created, r.began = h.id(), h.now(), h.now()
		r.number = int64(len(h.runs) + 1)
		if err = h.planJobs(r); err != nil {
			err = &flint.Fault{
				Code: "workflow.expression", Kind: flint.ErrUsage, Err: err,
				What: "plan workflow " + wf.Path, Fix: "correct the expression; name:, runs-on: and continue-on-error: are evaluated when a run is queued",
			}
			return
		}
		h.runs = append(h.runs, r)
		for _, j := range r.jobs {
			h.jobs[j.id] = j
		}
		h.advance(r)
	})
	if err != nil {
		return nil, err
	}
	return r, nil
}

// takeInputs fills the inputs context, which only workflow_dispatch has.
func (r *Run) takeInputs(given map[string]string) error {
	for name := range given {
		if r.event != "workflow_dispatch" || !slices.ContainsFunc(r.wf.inputs, func(in input) bool { return in.name == name }) {
			return fmt.Errorf("it has no input %q for the event %s", name, r.event)
		}
	}
	if r.event != "workflow_dispatch" {
		return nil
	}
	for _, in := range r.wf.inputs {
		s, ok := given[in.name]
		if !ok {
			s = in.value
		}
		v, err := in.typed(s)
		if err != nil {
			return err
		}
		r.inputs.set(in.name, v)
	}
	return nil
}

// planJobs makes the jobs of a run: one for each combination of each matrix.
func (h *hub) planJobs(r *Run) error {
	for i := range r.wf.jobs {
		spec := &r.wf.jobs[i]
		for n, combo := range spec.matrix {
			if len(r.jobs) >= maxJobsPerSubmit {
				return fmt.Errorf("plan jobs: more than %d", maxJobsPerSubmit)
			}
			j := &job{
				id: newUUID(), number: h.id(), plan: newUUID(), request: newUUID(), run: r, spec: spec,
				matrix: combo, index: n, total: len(spec.matrix), feedSeen: map[string]int{}, attempt: r.attempt,
			}
			if err := h.nameJob(j); err != nil {
				return fmt.Errorf("job %s: %w", spec.id, err)
			}
			j.makeSteps()
			r.jobs = append(r.jobs, j)
		}
	}
	return nil
}

func (j *job) makeSteps() {
	for k := range j.spec.steps {
		st := &j.spec.steps[k]
		j.steps = append(j.steps, &step{id: newUUID(), spec: st, name: clip(st.name, maxName), number: k + 1, status: "pending"})
	}
}

// nameJob works out what depends on the matrix: the job's name, labels, and whether it may fail.
func (h *hub) nameJob(j *job) error {
	sc := h.scope(j)
	name := j.spec.name
	if name == "" {
		name = j.spec.id
	}
	name, err := sc.expand(name)
	if err != nil {
		return fmt.Errorf("expand name: %w", err)
	}
	if j.matrix != nil && !strings.Contains(j.spec.name, "${{") {
		values := make([]string, len(j.matrix.keys))
		for i, k := range j.matrix.keys {
			values[i] = text(j.matrix.values[k])
		}
		name += " (" + strings.Join(values, ", ") + ")"
	}
	j.name = clip(name, maxName)
	for _, l := range j.spec.labels {
		label, err := sc.expand(l)
		if err != nil {
			return fmt.Errorf("expand runs-on: %w", err)
		}
		j.labels = append(j.labels, label)
	}
	mayFail, err := sc.expand(j.spec.continueOnError)
	if err != nil {
		return fmt.Errorf("expand continue-on-error: %w", err)
	}
	j.mayFail, _ = strconv.ParseBool(mayFail)
	environment, err := sc.expand(j.spec.environment)
	if err != nil {
		return fmt.Errorf("expand environment: %w", err)
	}
	j.review = slices.ContainsFunc(h.cfg.Reviewed, func(e string) bool { return strings.EqualFold(e, environment) })
	return nil
}

// ID returns the run's number on the server.
func (r *Run) ID() int64 { return r.id }

// Wait waits until the run's newest attempt is over and the observer has seen it so. It must not be called by the observer.
func (r *Run) Wait(ctx context.Context) (Conclusion, error) {
	var done chan struct{}
	r.hub.read(func() { done = r.done })
	select {
	case <-done:
	case <-ctx.Done():
		return "", fmt.Errorf("wait for run %d: %w", r.id, ctx.Err())
	case <-r.hub.ended:
		return "", fmt.Errorf("wait for run %d: the simulated GitHub is closed", r.id)
	}
	var c Conclusion
	r.hub.read(func() { c = r.conclusion })
	return c, nil
}

// ForceCancel ends the run at once, as GitHub's force-cancel does: every job that is not over is cancelled without waiting
// for its runner, whose registration goes with it.
func (r *Run) ForceCancel() {
	r.hub.change(func() { r.hub.forceCancelRun(r) })
}

// forceCancelRun ends a run. The caller holds the lock.
func (h *hub) forceCancelRun(r *Run) {
	if r.over {
		return
	}
	r.cancelled = true
	for _, j := range r.jobs {
		if j.state == jobDone {
			continue
		}
		if x := j.runner; x != nil {
			h.dropRunner(x)
		}
		h.finish(j, Cancelled)
	}
	h.advance(r)
}

// Cancel cancels the run: jobs that have not started end at once, except those whose `if:` asks for it; runners are
// told to cancel the others.
func (r *Run) Cancel() {
	r.hub.change(func() { r.hub.cancelRun(r) })
}

// cancelRun begins to cancel a run. The caller holds the lock.
func (h *hub) cancelRun(r *Run) {
	if r.over || r.cancelled {
		return
	}
	r.cancelled = true
	for _, j := range r.jobs {
		h.cancelJob(j)
	}
	h.advance(r)
}

// JobInfo is one job of a run as it is now.
type JobInfo struct {
	ID         string
	Name       string
	Status     string // waiting, queued, assigned, in_progress, completed
	Conclusion Conclusion
	Runner     string
	Labels     []string
	Queued     time.Time
	Assigned   time.Time
	Started    time.Time
	Completed  time.Time
	Steps      []StepInfo
	Log        string // as the runner uploaded it, its first mebibyte; empty until then
}

// StepInfo is one step of a job, those the runner added included.
type StepInfo struct {
	Name       string
	Status     string // pending, in_progress, completed
	Conclusion Conclusion
	Started    time.Time
	Completed  time.Time
}

// Jobs returns the jobs as they are now, in the order of the file.
func (r *Run) Jobs() []JobInfo {
	var infos []JobInfo
	r.hub.read(func() {
		for _, j := range r.jobs {
			info := JobInfo{
				ID: j.id, Name: j.name, Status: jobStateNames[j.state], Conclusion: j.conclusion, Runner: j.runnerName,
				Labels: slices.Clone(j.labels), Queued: j.queued, Assigned: j.assigned, Started: j.started, Completed: j.finished, Log: j.log(),
			}
			ordered := slices.Clone(j.steps)
			slices.SortStableFunc(ordered, func(a, b *step) int { return a.number - b.number })
			for _, st := range ordered {
				info.Steps = append(info.Steps, StepInfo{st.name, st.status, st.conclusion, st.started, st.completed})
			}
			infos = append(infos, info)
		}
	})
	return infos
}
