package githubsim

import (
	"context"
	"crypto/rsa"
	"encoding/json"
	"net/http"
	"slices"
	"strings"
	"time"
)

// runner is one registration: of a scale set, or, when set is nil, one that takes any job its labels cover.
type runner struct {
	id        int64
	name      string
	clientID  string
	key       *rsa.PublicKey
	set       *scaleSet
	domain    string
	group     *group
	labels    []string
	ephemeral bool   // it is for one job
	session   string // id; empty until it is online
	poll      int    // number of the newest poll; older ones give way
	job       *job   // dispatched to it or running on it
	nth       int    // of all registrations there ever were, from 1
	refused   bool   // its version is too old: it gets no job
	cut       bool   // nothing it asks is answered any more
	created   time.Time
}

func (x *runner) busy() bool { return x.job != nil && x.job.state == jobRunning }

func (x *runner) setName() string {
	if x.set == nil {
		return ""
	}
	return x.set.name
}

// setID is the id of its scale set; 0 when it has none.
func (x *runner) setID() int64 {
	if x.set == nil {
		return 0
	}
	return x.set.id
}

const maxRunners = 10_000 // GitHub's limit for a group

// registration is what a runner is registered with: by a scale set, or by a domain, a group and labels.
type registration struct {
	set       int64 // id; 0 for none
	domain    string
	group     int64
	labels    []string
	name      string
	key       *rsa.PublicKey
	ephemeral bool
}

// register makes a registration.
func (h *hub) register(reg registration) (x *runner, err error) {
	h.change(func() {
		var s *scaleSet
		var g *group
		if reg.set != 0 {
			if s, err = h.set(reg.set); err != nil {
				return
			}
			reg.domain, reg.labels, g = s.domain, s.labels, s.group
		} else if g, err = h.group(reg.domain, reg.group); err != nil {
			return
		}
		if err = h.checkNewRunner(reg.name); err != nil {
			return
		}
		x = &runner{
			id: h.id(), name: reg.name, clientID: newUUID(), key: reg.key, set: s, domain: reg.domain, group: g, labels: reg.labels,
			ephemeral: reg.ephemeral, created: h.now(),
		}
		h.registered++
		x.nth = h.registered
		h.runners = append(h.runners, x)
		h.watchIdle(x)
		h.emit(Event{Kind: RunnerRegistered, Runner: reg.name}, nil)
	})
	return x, err
}

// checkNewRunner makes sure the name is free and good. The caller holds the lock.
func (h *hub) checkNewRunner(name string) error {
	if h.faults.strikes(refuseNames) {
		return &apiError{http.StatusConflict, "AgentExistsException", "a runner named " + clip(name, 64) + " exists already"}
	}
	if name == "" || len(name) > 64 || name != clip(name, 64) {
		return errBadRequest("a runner's name has 1 to 64 characters")
	}
	if len(h.runners) >= maxRunners {
		return &apiError{http.StatusForbidden, "TooManyRunnersException", "the runner group is full"}
	}
	if slices.ContainsFunc(h.runners, func(x *runner) bool { return strings.EqualFold(x.name, name) }) {
		return &apiError{http.StatusConflict, "AgentExistsException", "a runner named " + name + " exists already"}
	}
	return nil
}

// findRunner returns the first registration f accepts, or nil. The caller holds the lock.
func (h *hub) findRunner(f func(*runner) bool) *runner {
	if i := slices.IndexFunc(h.runners, f); i >= 0 {
		return h.runners[i]
	}
	return nil
}

// clientKey returns the public key of the registration with a client id; nil when there is none.
func (h *hub) clientKey(clientID string) (key *rsa.PublicKey) {
	h.read(func() {
		if x := h.findRunner(func(x *runner) bool { return x.clientID == clientID }); x != nil {
			key = x.key
		}
	})
	return key
}

// removeRunner ends a domain's registration, unless it runs a job.
func (h *hub) removeRunner(domain string, id int64) (err error) {
	h.change(func() {
		x := h.findRunner(func(x *runner) bool { return x.id == id && x.domain == domain })
		switch {
		case x == nil:
			err = &apiError{http.StatusNotFound, "AgentNotFoundException", "no such runner"}
		case x.busy() || h.faults.strikes(refuseRemovals):
			err = &apiError{http.StatusUnprocessableEntity, "JobStillRunningException", "runner " + x.name + " is running a job"}
		default:
			h.dropRunner(x)
			h.place()
		}
	})
	return err
}

// dropRunner forgets a registration; a job it was sent and has not begun goes to another. The caller holds the lock.
func (h *hub) dropRunner(x *runner) {
	h.runners = slices.DeleteFunc(h.runners, func(o *runner) bool { return o == x })
	if j := x.job; j != nil && j.state == jobDispatched {
		h.takeBack(j)
	}
	x.job, x.session = nil, ""
	h.emit(Event{Kind: RunnerRemoved, Runner: x.name}, nil)
}

// takeBack takes a job from the runner it was sent to. The caller holds the lock and sees to x.job.
func (h *hub) takeBack(j *job) {
	j.runner = nil
	if j.state = jobAssigned; j.set == nil {
		j.state = jobQueued
		h.watch(j)
	}
}

// takes reports whether a runner may do a job: one of the job's scale set, or one of no scale set whose labels, domain and
// group fit.
func (h *hub) takes(x *runner, j *job) bool {
	if x.set != nil || j.set != nil {
		return x.set == j.set
	}
	return covers(x.labels, j.labels) && h.reaches(j, x.domain, x.group)
}

// loose reports whether a runner without a scale set is idle. The caller holds the lock.
func (h *hub) loose() bool {
	return h.findRunner(func(x *runner) bool { return x.set == nil && x.session != "" && x.job == nil }) != nil
}

// dispatch hands a job to an idle runner that may do it, if there is one. The caller holds the lock.
func (h *hub) dispatch(j *job) {
	x := h.findRunner(func(x *runner) bool { return x.session != "" && x.job == nil && h.takes(x, j) })
	if x == nil {
		return
	}
	x.job, j.runner = j, x
	j.state, j.acknowledged = jobDispatched, false
	j.stopTimers()
	j.lease = time.AfterFunc(h.cfg.Lease, func() { h.undispatch(j, x) })
}

// undispatch takes a job back from a runner that has not begun it in time, and counts the runner as offline.
func (h *hub) undispatch(j *job, x *runner) {
	h.change(func() {
		if !h.isClosed() && j.state == jobDispatched && j.runner == x {
			h.cfg.Log.Warn("take job back: its runner has not begun it", "job", j.name, "runner", x.name)
			x.job, x.session = nil, ""
			h.takeBack(j)
			h.place()
		}
	})
}

// openRunnerSession brings a runner online. An older session of it ends.
func (h *hub) openRunnerSession(clientID string) (session string, x *runner, err error) {
	h.change(func() {
		if x = h.findRunner(func(x *runner) bool { return x.clientID == clientID }); x == nil {
			err = errUnauthorized()
			return
		}
		if x.refused = x.refused || h.faults.strikes(refuseVersions); x.refused {
			session = newUUID()
			return
		}
		if x.session == "" {
			h.emit(Event{Kind: RunnerOnline, Runner: x.name}, nil)
		}
		x.session = newUUID()
		session = x.session
		h.place()
	})
	return session, x, err
}

// closeRunnerSession takes a runner offline.
func (h *hub) closeRunnerSession(clientID string) {
	h.change(func() {
		x := h.findRunner(func(x *runner) bool { return x.clientID == clientID })
		if x == nil {
			return
		}
		x.session = ""
		if j := x.job; j != nil && j.state == jobDispatched {
			x.job = nil
			h.takeBack(j)
			h.place()
		}
	})
}

// runnerMessage is what a runner's poll returns.
type runnerMessage struct {
	ID   int64  `json:"messageId"`
	Type string `json:"messageType"`
	Body string `json:"body"`
}

// nextRunnerMessage waits for a job for the runner, or the order to cancel its job. Neither message nor error means
// there was none.
func (h *hub) nextRunnerMessage(ctx context.Context, clientID, session string) (msg *runnerMessage, err error) {
	mine := 0
	check := func() *runner {
		x := h.findRunner(func(x *runner) bool { return x.clientID == clientID })
		switch {
		case x == nil:
			err = errUnauthorized()
		case h.isClosed():
			err = errClosed()
		case x.refused:
			err = errVersion
		case x.session == "" || x.session != session:
			err = &apiError{http.StatusNotFound, "TaskAgentSessionExpiredException", "no such session"}
		}
		return x
	}
	h.change(func() {
		if x := check(); err == nil {
			x.poll++
			mine = x.poll
		}
	})
	if err != nil {
		return nil, err
	}
	h.await(ctx, h.cfg.Poll, func() bool {
		x := check()
		if err != nil || x.poll != mine {
			return true
		}
		msg = h.messageFor(x)
		return msg != nil
	})
	return msg, err
}

// messageFor returns what the runner has to be told now. The caller holds the lock.
func (h *hub) messageFor(x *runner) *runnerMessage {
	j := x.job
	switch {
	case j == nil:
		return nil
	case j.state == jobDispatched && !j.acknowledged:
		return h.message("RunnerJobRequest", map[string]any{
			"id": newUUID(), "runner_request_id": j.request, "run_service_url": h.cfg.URL + "/run/",
			"should_acknowledge": true, "billing_owner_id": "",
		})
	case j.state == jobRunning && j.cancel && !j.cancelTold:
		j.cancelTold = true
		return h.message("JobCancellation", map[string]any{"jobId": j.id, "timeout": "00:05:00"})
	}
	return nil
}

func (h *hub) message(kind string, body map[string]any) *runnerMessage {
	b, err := json.Marshal(body)
	if err != nil {
		h.cfg.Log.Error("encode runner message", "err", err)
		return nil
	}
	return &runnerMessage{ID: h.id(), Type: kind, Body: string(b)}
}

// acknowledge notes that the runner has the job request; it is not sent again.
func (h *hub) acknowledge(clientID, request string) {
	h.change(func() {
		x := h.findRunner(func(x *runner) bool { return x.clientID == clientID })
		if x != nil && x.job != nil && x.job.request == request {
			x.job.acknowledged = true
		}
	})
}
