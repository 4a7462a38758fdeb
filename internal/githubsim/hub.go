package githubsim

import (
	"context"
	"slices"
	"sync"
	"time"
)

// hub is the state behind the services: scale sets and their sessions, registered runners, runs and their jobs. It
// knows nothing of HTTP. Methods take the lock themselves, except those whose comment says that the caller holds it.
type hub struct {
	cfg    Config
	now    func() time.Time
	events eventQueue
	faults *faults
	hooks  *hooks

	// set when it is made
	repos   []*repository
	domains []string

	mu         sync.Mutex
	changed    chan struct{} // closed and replaced at every change, for the long polls
	ended      chan struct{} // closed by close
	lastID     int64
	groups     []*group
	sets       []*scaleSet
	runners    []*runner
	registered int // how many there ever were
	runs       []*Run
	jobs       map[string]*job // by id
	blobs      map[string]*blob
}

func newHub(cfg Config) *hub {
	h := &hub{
		cfg: cfg, now: time.Now, events: eventQueue{observe: cfg.Observe}, faults: newFaults(), hooks: newHooks(cfg.Log, cfg.HookTransport),
		changed: make(chan struct{}), ended: make(chan struct{}),
		jobs: map[string]*job{}, blobs: map[string]*blob{},
	}
	h.hooks.setFate(h.faults.webhook)
	h.makeScopes()
	return h
}

// change runs f under the lock, wakes the long polls, and then lets the observer see what f emitted.
func (h *hub) change(f func()) {
	h.mu.Lock()
	f()
	close(h.changed)
	h.changed = make(chan struct{})
	h.mu.Unlock()
	h.events.deliver()
}

// read runs f under the lock.
func (h *hub) read(f func()) {
	h.mu.Lock()
	defer h.mu.Unlock()
	f()
}

// await calls try under the lock, now and after every change, until it returns true. It returns false when d is over,
// ctx is, or the hub is closed.
func (h *hub) await(ctx context.Context, d time.Duration, try func() bool) bool {
	timer := time.NewTimer(d)
	defer timer.Stop()
	for {
		h.mu.Lock()
		done, closed, changed := try(), h.isClosed(), h.changed
		h.mu.Unlock()
		h.events.deliver()
		if done || closed {
			return done
		}
		select {
		case <-changed:
		case <-timer.C:
			return false
		case <-ctx.Done():
			return false
		}
	}
}

func (h *hub) close() {
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.isClosed() {
		return
	}
	close(h.ended)
	close(h.changed)
	h.changed = make(chan struct{})
	for _, j := range h.jobs {
		j.stopTimers()
	}
}

// isClosed reports whether close was called. The caller holds the lock.
func (h *hub) isClosed() bool {
	select {
	case <-h.ended:
		return true
	default:
		return false
	}
}

// id returns the next number for anything that has one. The caller holds the lock.
func (h *hub) id() int64 {
	h.lastID++
	return h.lastID
}

// emit queues an event. The caller holds the lock.
func (h *hub) emit(e Event, after func()) {
	e.At = h.now()
	h.events.add(e, after)
}

// hookAction is the action of a workflow_job webhook; empty for a kind of event there is none for.
func (k Kind) hookAction() string {
	switch k {
	case JobHeld:
		return "waiting"
	case JobQueued:
		return "queued"
	case JobStarted:
		return "in_progress"
	case JobCompleted, JobSkipped:
		return "completed"
	}
	return ""
}

// emitJob queues an event of a job, and tells the webhooks. The caller holds the lock.
func (h *hub) emitJob(kind Kind, j *job, e Event) {
	if action := kind.hookAction(); action != "" {
		h.postJob(action, j)
	}
	e.Kind, e.RunID, e.Run, e.JobID, e.Job = kind, j.run.id, j.run.wf.Name, j.id, j.name
	if e.Runner == "" {
		e.Runner = j.runnerName
	}
	h.emit(e, nil)
}

func (h *hub) runnerInfos() []RunnerInfo {
	var infos []RunnerInfo
	h.read(func() {
		for _, x := range h.runners {
			infos = append(infos, RunnerInfo{
				ID: x.id, Name: x.name, ScaleSet: x.setName(), Labels: slices.Clone(x.labels), Online: x.session != "", Busy: x.busy(),
			})
		}
	})
	return infos
}

func (h *hub) inventory() Inventory {
	inv := Inventory{Runners: h.runnerInfos()}
	h.read(func() {
		for _, s := range h.sets {
			st := h.statistics(s)
			info := ScaleSetInfo{
				ID: s.id, Name: s.name, Labels: slices.Clone(s.labels), Capacity: s.capacity, Assigned: st.Assigned, Running: st.Running,
			}
			if s.session != "" {
				info.Owner = s.owner
			}
			inv.ScaleSets = append(inv.ScaleSets, info)
		}
		for range h.open() {
			inv.OpenJobs++
		}
	})
	return inv
}
