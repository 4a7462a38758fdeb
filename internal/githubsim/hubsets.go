package githubsim

import (
	"context"
	"encoding/json"
	"fmt"
	"iter"
	"math"
	"net/http"
	"slices"
	"strings"
	"time"
)

// scaleSet is one runner scale set, its session and its message queue.
type scaleSet struct {
	id            int64
	domain        string
	group         *group
	name          string
	labels        []string
	disableUpdate bool
	created       time.Time
	deleted       bool

	session  string // id; empty when there is none
	owner    string
	lastPoll time.Time
	polls    int // polls that wait now
	poll     int // number of the newest poll; older ones give way
	capacity int // what the last poll advertised; -1 before the first

	lastMessage int
	pending     []jobMessage
	sent        []jobMessage // the last ones of all sessions
	samples     []sample     // of the statistics, when they lag; the oldest first
	last        statistics   // as the owner was told
	inflight    *envelope    // sent and not yet deleted; sent again until it is
}

// statistics are the numbers a scale set's owner scales by. Assigned includes Running.
type statistics struct {
	Available  int `json:"totalAvailableJobs"`
	Acquired   int `json:"totalAcquiredJobs"`
	Assigned   int `json:"totalAssignedJobs"`
	Running    int `json:"totalRunningJobs"`
	Registered int `json:"totalRegisteredRunners"`
	Busy       int `json:"totalBusyRunners"`
	Idle       int `json:"totalIdleRunners"`
}

// envelope is one message of a queue: up to 50 job messages, encoded as a JSON array in a string.
type envelope struct {
	ID         int        `json:"messageId"`
	Type       string     `json:"messageType"`
	Body       string     `json:"body"`
	Statistics statistics `json:"statistics"`
}

const maxBatch = 50

// jobMessage is what the owner of a scale set is told of one job.
type jobMessage struct {
	Type               string   `json:"messageType"`
	RequestID          int64    `json:"runnerRequestId"` // 0 where jobs are assigned without asking
	Repository         string   `json:"repositoryName"`
	Owner              string   `json:"ownerName"`
	JobID              string   `json:"jobId"`
	WorkflowRef        string   `json:"jobWorkflowRef"`
	DisplayName        string   `json:"jobDisplayName"`
	RunID              int64    `json:"workflowRunId"`
	EventName          string   `json:"eventName"`
	Labels             []string `json:"requestLabels"`
	QueueTime          string   `json:"queueTime"`
	ScaleSetAssignTime string   `json:"scaleSetAssignTime"`
	RunnerAssignTime   string   `json:"runnerAssignTime"`
	FinishTime         string   `json:"finishTime"`
	AcquireJobURL      string   `json:"acquireJobUrl,omitempty"`
	RunnerID           int64    `json:"runnerId,omitempty"`
	RunnerName         string   `json:"runnerName,omitempty"`
	Result             string   `json:"result,omitempty"`
}

func (h *hub) tell(j *job, kind, result string) {
	if j.set == nil || j.set.deleted {
		return
	}
	m := jobMessage{
		Type: kind, Repository: j.run.repo.name, Owner: h.cfg.Owner, JobID: j.id, DisplayName: j.name, RunID: j.run.id,
		WorkflowRef: fmt.Sprintf("%s/%s/%s@refs/heads/%s", h.cfg.Owner, j.run.repo.name, j.run.wf.Path, j.run.branch),
		EventName:   j.run.event, Labels: j.labels, RunnerID: j.runnerID, RunnerName: j.runnerName, Result: result,
		QueueTime: timestamp(j.queued), ScaleSetAssignTime: timestamp(j.assigned), RunnerAssignTime: timestamp(j.started), FinishTime: timestamp(j.finished),
	}
	if h.cfg.Acquire {
		m.RequestID = j.number
	}
	if kind == "JobAvailable" {
		m.AcquireJobURL = fmt.Sprintf("%s/tenant/_apis/runtime/runnerscalesets/%d/acquirejobs", h.cfg.URL, j.set.id)
	}
	j.set.pending = append(j.set.pending, m)
}

// set returns the scale set with an id. The caller holds the lock.
func (h *hub) set(id int64) (*scaleSet, error) {
	for _, s := range h.sets {
		if s.id == id {
			return s, nil
		}
	}
	return nil, &apiError{http.StatusNotFound, "RunnerScaleSetNotFoundException", fmt.Sprintf("no runner scale set has the id %d", id)}
}

// serves reports whether the scale set has every label.
func (s *scaleSet) serves(labels []string) bool { return covers(s.labels, labels) }

// covers reports whether every label wanted, of which there is at least one, is among those there are.
func covers(have, wanted []string) bool {
	for _, want := range wanted {
		if !slices.ContainsFunc(have, func(l string) bool { return strings.EqualFold(l, want) }) {
			return false
		}
	}
	return len(wanted) > 0
}

// statistics counts. The caller holds the lock.
func (h *hub) statistics(s *scaleSet) statistics {
	var st statistics
	for j := range h.open() {
		if j.set != s {
			continue
		}
		switch j.state {
		case jobAvailable:
			st.Available++
		case jobAssigned, jobDispatched:
			st.Assigned++
			st.Acquired++
		case jobRunning:
			st.Assigned++
			st.Running++
		}
	}
	for _, x := range h.runners {
		if x.set != s {
			continue
		}
		st.Registered++
		if x.busy() {
			st.Busy++
		} else if x.session != "" {
			st.Idle++
		}
	}
	return st
}

// place gives queued jobs to the scale sets that have their labels, a session, and capacity left, oldest job first;
// then jobs to idle runners that may do them. The caller holds the lock.
func (h *hub) place() {
	free, some := h.free()
	loose := h.loose()
	for j := range h.open() {
		if some && j.state == jobQueued && !j.run.overParallel(j) {
			h.offer(j, free)
		}
		if j.state == jobAssigned || (loose && j.state == jobQueued && !j.run.overParallel(j)) {
			h.dispatch(j)
		}
	}
}

// open yields the jobs that are not over, the oldest run's first. The caller holds the lock.
func (h *hub) open() iter.Seq[*job] {
	return func(yield func(*job) bool) {
		for _, run := range h.runs {
			if run.over {
				continue
			}
			for _, j := range run.jobs {
				if j.state != jobDone && !yield(j) {
					return
				}
			}
		}
	}
}

// free counts how many more jobs each scale set with a session would hold, and says whether any would hold one. The caller
// holds the lock.
func (h *hub) free() (free map[*scaleSet]int, some bool) {
	free = map[*scaleSet]int{}
	for _, s := range h.sets {
		if s.session != "" && s.capacity > 0 {
			free[s] = s.capacity
		}
	}
	for j := range h.open() {
		if n, ok := free[j.set]; ok && (j.state.placed() || j.state == jobRunning) {
			free[j.set] = n - 1
		}
	}
	for _, n := range free {
		some = some || n > 0
	}
	return free, some
}

func (h *hub) offer(j *job, free map[*scaleSet]int) {
	for _, s := range h.sets {
		if free[s] <= 0 || !s.serves(j.labels) || !h.reaches(j, s.domain, s.group) {
			continue
		}
		free[s]--
		j.set = s
		if h.cfg.Acquire {
			j.state = jobAvailable
			h.tell(j, "JobAvailable", "")
			return
		}
		h.assign(j)
		return
	}
}

// assign makes a job its scale set's. The caller holds the lock.
func (h *hub) assign(j *job) {
	j.state, j.assigned = jobAssigned, h.now()
	h.watchAssigned(j)
	h.emitJob(JobAssigned, j, Event{})
	h.tell(j, "JobAssigned", "")
}

// createSet makes a scale set in a group of a domain. Its name is the group's only one.
func (h *hub) createSet(domain string, groupID int64, name string, labels []string, disableUpdate bool) (s *scaleSet, err error) {
	h.change(func() {
		if name == "" {
			err = errBadRequest("a runner scale set needs a name")
			return
		}
		var g *group
		if g, err = h.group(domain, groupID); err != nil {
			return
		}
		for _, other := range h.sets {
			if other.group == g && strings.EqualFold(other.name, name) {
				err = &apiError{http.StatusConflict, "RunnerScaleSetExistsException", fmt.Sprintf("a runner scale set named %q exists", name)}
				return
			}
		}
		if len(labels) == 0 {
			labels = []string{name}
		}
		s = &scaleSet{id: h.id(), domain: domain, group: g, name: name, labels: labels, disableUpdate: disableUpdate, created: h.now(), capacity: -1}
		h.sets = append(h.sets, s)
	})
	return s, err
}

// deleteSet takes the scale set away. Its jobs that have not started are queued again; its runners stay registered.
func (h *hub) deleteSet(id int64) (err error) {
	h.change(func() {
		var s *scaleSet
		if s, err = h.set(id); err != nil {
			return
		}
		s.deleted, s.session = true, ""
		h.sets = slices.DeleteFunc(h.sets, func(o *scaleSet) bool { return o == s })
		for j := range h.open() {
			if j.set == s && j.state.placed() {
				h.requeue(j)
			}
		}
		h.place()
	})
	return err
}

// openSession makes the one session a scale set may have. A session nobody has polled for a while gives way.
func (h *hub) openSession(setID int64, owner string) (session string, err error) {
	h.change(func() {
		var s *scaleSet
		if s, err = h.set(setID); err != nil {
			return
		}
		if s.session != "" && (s.polls > 0 || h.now().Sub(s.lastPoll) < h.cfg.SessionIdle) {
			err = &apiError{http.StatusConflict, "RunnerScaleSetSessionConflictException", fmt.Sprintf("scale set %s has a session already, owned by %s", s.name, s.owner)}
			return
		}
		if h.faults.strikes(refuseSessions) {
			err = &apiError{http.StatusConflict, "RunnerScaleSetSessionConflictException", fmt.Sprintf("scale set %s has a session already, owned by another", s.name)}
			return
		}
		if h.faults.strikes(replayMessages) {
			s.pending = append(slices.Clone(s.sent), s.pending...)
		}
		s.session, s.owner, s.lastPoll, s.capacity = newUUID(), owner, h.now(), -1
		session = s.session
		// What the old session was offered and did not take is offered again.
		for j := range h.open() {
			if j.set == s && j.state == jobAvailable {
				h.requeue(j)
			}
		}
	})
	return session, err
}

// checkSession makes sure a session is the scale set's. The caller holds the lock.
func (h *hub) checkSession(setID int64, session string) (*scaleSet, error) {
	s, err := h.set(setID)
	if err == nil && (session == "" || s.session != session) {
		err = &apiError{http.StatusNotFound, "RunnerScaleSetSessionNotFoundException", "no such session"}
	}
	return s, err
}

func (h *hub) closeSession(setID int64, session string) (err error) {
	h.change(func() {
		var s *scaleSet
		if s, err = h.checkSession(setID, session); err == nil {
			s.session = ""
		}
	})
	return err
}

// nextMessage waits for a message of a session's queue. Neither message nor error means there was none.
func (h *hub) nextMessage(ctx context.Context, setID int64, session string, capacity int) (msg *envelope, err error) {
	var s *scaleSet
	mine := 0
	if h.faults.strikes(deleteScaleSets) {
		_ = h.deleteSet(setID) // one that is gone already is the poll's own error
	}
	h.change(func() {
		if s, err = h.checkSession(setID, session); err != nil {
			return
		}
		s.capacity = h.capacityOf(min(max(capacity, 0), math.MaxInt32))
		s.polls++
		s.poll++
		mine = s.poll
		h.place()
	})
	if err != nil {
		return nil, err
	}
	h.await(ctx, h.cfg.Poll, func() bool {
		if _, err = h.checkSession(setID, session); err == nil && h.isClosed() {
			err = errClosed()
		}
		if err != nil || s.poll != mine {
			return true
		}
		msg = h.nextEnvelope(s)
		return msg != nil
	})
	h.read(func() {
		s.polls--
		s.lastPoll = h.now()
	})
	return msg, err
}

// nextEnvelope returns the message to send now: the one not yet deleted, or a new one. The caller holds the lock.
func (h *hub) nextEnvelope(s *scaleSet) *envelope {
	if s.inflight == nil && (len(s.pending) > 0 || h.outdated(s)) {
		n := min(len(s.pending), maxBatch)
		body, err := json.Marshal(append([]jobMessage{}, s.pending[:n]...))
		if err != nil {
			h.cfg.Log.Error("encode scale set message", "err", err)
			return nil
		}
		s.remember(s.pending[:n])
		s.pending = slices.Clone(s.pending[n:])
		s.lastMessage++
		s.inflight = &envelope{ID: s.lastMessage, Type: "RunnerScaleSetJobMessages", Body: string(body)}
	}
	if s.inflight == nil {
		return nil
	}
	msg := *s.inflight
	msg.Statistics = h.told(s)
	return &msg
}

// deleteMessage acknowledges. Deleting a message twice is no error.
func (h *hub) deleteMessage(setID int64, session string, id int) (err error) {
	h.change(func() {
		var s *scaleSet
		if s, err = h.checkSession(setID, session); err != nil {
			return
		}
		if s.inflight != nil && s.inflight.ID == id {
			s.inflight = nil
		}
	})
	return err
}

// acquire assigns the available jobs with these request ids, and returns those it did.
func (h *hub) acquire(setID int64, session string, ids []int64) (got []int64, err error) {
	got = []int64{}
	h.change(func() {
		var s *scaleSet
		if s, err = h.checkSession(setID, session); err != nil {
			return
		}
		if !h.cfg.Acquire {
			err = errNotFound("jobs are assigned without asking here")
			return
		}
		for j := range h.open() {
			if j.set == s && j.state == jobAvailable && slices.Contains(ids, j.number) {
				h.assign(j)
				got = append(got, j.number)
			}
		}
		slices.Sort(got)
		h.place()
	})
	return got, err
}
