package githubsim

import (
	"net/http"
	"slices"
	"time"
)

// Misbehaviour of the state behind the services.

const (
	maxReplayed   = 100 // messages a new session may hear again
	maxReassigned = 3   // how often a job is taken back before it fails
)

// errVersion refuses an old runner. Runners know it by its words on the wire, which writeVersionError writes.
var errVersion = &apiError{http.StatusForbidden, "RunnerVersionTooOld", "Runner version v0.0.0 is deprecated and cannot receive messages."}

// writeVersionError answers a poll as the broker does that refuses a runner's version: the official runner exits with 7.
func writeVersionError(w http.ResponseWriter) {
	writeJSON(w, errVersion.status, map[string]any{
		"source": "actions-broker-listener", "errorKind": errVersion.typeName, "statusCode": errVersion.status, "errorMessage": errVersion.message,
	})
}

// remember keeps what a session was sent, for one that may have to hear it again. The caller holds the lock.
func (s *scaleSet) remember(batch []jobMessage) {
	s.sent = append(s.sent, batch...)
	s.sent = slices.Delete(s.sent, 0, max(0, len(s.sent)-maxReplayed))
}

// capacityOf is what a poll's capacity is taken for. The caller holds the lock.
func (h *hub) capacityOf(capacity int) int {
	if h.faults.strikes(exceedCapacity) {
		return capacity + 1
	}
	return capacity
}

// watchAssigned takes an assigned job back when no runner has it in time; the fourth time it fails. The caller holds the lock.
func (h *hub) watchAssigned(j *job) {
	d := h.faults.time(reassignAfter)
	if d <= 0 {
		return
	}
	at := j.assigned
	time.AfterFunc(d, func() {
		h.change(func() {
			if h.isClosed() || j.state != jobAssigned || !j.assigned.Equal(at) {
				return
			}
			h.faults.count(reassignAfter)
			if j.reassigned++; j.reassigned > maxReassigned {
				h.cfg.Log.Warn("fail job: it was assigned too often and no runner took it", "job", j.name)
				h.finish(j, Failure)
				h.advance(j.run)
				return
			}
			h.requeue(j)
			h.place()
		})
	})
}

// watchIdle removes a registration that has no job in time. The caller holds the lock.
func (h *hub) watchIdle(x *runner) {
	d := h.faults.time(removeIdle)
	if d <= 0 {
		return
	}
	time.AfterFunc(d, func() {
		h.change(func() {
			if !h.isClosed() && x.job == nil && slices.Contains(h.runners, x) {
				h.faults.count(removeIdle)
				h.dropRunner(x)
			}
		})
	})
}

// sample is a scale set's statistics at one time.
type sample struct {
	at time.Time
	statistics
}

// told is what a scale set's owner is told its statistics are: those of some time ago, when they lag. The caller holds the
// lock.
func (h *hub) told(s *scaleSet) statistics {
	st, lag, now := h.statistics(s), h.faults.time(statisticsLag), h.now()
	if lag <= 0 {
		s.samples, s.last = nil, st
		return st
	}
	if n := len(s.samples); n == 0 || s.samples[n-1].statistics != st {
		s.samples = append(s.samples, sample{now, st})
	}
	old := 0
	for old+1 < len(s.samples) && now.Sub(s.samples[old+1].at) >= lag {
		old++
	}
	s.samples = slices.Delete(s.samples, 0, old)
	if s.last = s.samples[0].statistics; s.last != st {
		h.faults.count(statisticsLag)
		// Somebody must hear of it when the truth is old enough to be told.
		time.AfterFunc(lag, func() { h.change(func() {}) })
	}
	return s.last
}

// outdated reports whether the owner was told statistics that are known to be others by now. The caller holds the lock.
func (h *hub) outdated(s *scaleSet) bool {
	if len(s.samples) == 0 {
		return false
	}
	last := s.last
	told := h.told(s)
	s.last = last
	return told != last
}

// cut parts a runner from the server: whatever it asks from now on is not answered.
func (h *hub) cut(x *runner) { x.cut, x.session = true, "" }

// cutOff reports whether the runner a request comes from was parted from the server.
func (s *Server) cutOff(r *http.Request) bool {
	token, cut := bearer(r, "Bearer"), false
	clientID, isRunner := s.creds.check(credRunner, token)
	jobID, isJob := s.creds.check(credJob, token)
	if !isRunner && !isJob {
		return false
	}
	s.hub.read(func() {
		x := s.hub.findRunner(func(x *runner) bool {
			return isRunner && x.clientID == clientID || isJob && x.job != nil && x.job.id == jobID
		})
		cut = x != nil && x.cut
	})
	return cut
}
