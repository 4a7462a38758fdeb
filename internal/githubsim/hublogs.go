package githubsim

import (
	"bytes"
	"context"
	"slices"
	"strings"
	"time"
)

// Bounds on what one job may leave in memory.
const (
	maxBlobs       = 2*maxStepsPerJob + 2 // a log and a summary per step, and the job's
	maxBlobKept    = 1 << 20              // bytes of one blob
	maxBlobsKept   = 16 << 20             // bytes of all blobs of a job
	maxFeedLines   = 50_000               // in one message; runners collect for a second
	maxAddedSteps  = 64                   // steps the runner adds: set-up, post steps
	maxOutputBytes = 1 << 20              // a job's outputs together, which is GitHub's limit
	drainTime      = 2 * time.Second      // how long a finished job waits for its last live lines
)

// blob is one uploaded log or summary, its beginning kept.
type blob struct {
	id    string
	job   *job
	kind  blobKind
	step  string // id; empty for the job's log
	data  []byte
	lines int // newlines of the whole, kept or not
}

type blobKind int

const (
	jobLog blobKind = iota + 1
	stepLog
	stepSummary
)

// stepUpdate is what a runner says of a step.
type stepUpdate struct {
	id         string
	name       string
	number     int
	status     string // pending, in_progress, completed
	conclusion Conclusion
}

// updateSteps notes how a running job's steps are.
func (h *hub) updateSteps(jobID string, updates []stepUpdate) (err error) {
	h.change(func() {
		j := h.jobs[jobID]
		if j == nil || j.state != jobRunning {
			err = errNotFound("no such job is running")
			return
		}
		for _, u := range updates {
			h.updateStep(j, u)
		}
	})
	return err
}

// updateStep applies one update. A step never goes back. The caller holds the lock.
func (h *hub) updateStep(j *job, u stepUpdate) {
	i := slices.IndexFunc(j.steps, func(st *step) bool { return strings.EqualFold(st.id, u.id) })
	if i < 0 {
		if len(j.steps) >= len(j.spec.steps)+maxAddedSteps || u.id == "" || len(u.id) > 64 {
			return
		}
		j.steps = append(j.steps, &step{id: u.id, name: "step", status: "pending"})
		i = len(j.steps) - 1
	}
	st := j.steps[i]
	st.number = u.number
	if name := clip(u.name, maxName); name != "" && !strings.Contains(name, "${{") {
		st.name = name
	}
	if st.status == "pending" && (u.status == "in_progress" || (u.status == "completed" && u.conclusion != Skipped)) {
		st.status, st.started = "in_progress", h.now()
		h.emitJob(StepStarted, j, Event{Step: st.name})
	}
	if u.status == "completed" && st.status != "completed" {
		st.status, st.conclusion, st.completed = "completed", u.conclusion, h.now()
		h.emitJob(StepCompleted, j, Event{Step: st.name, Conclusion: u.conclusion})
	}
}

// openFeed notes that a job has a live log, before its runner can know.
func (h *hub) openFeed(jobID string) {
	h.read(func() {
		if j := h.jobs[jobID]; j != nil {
			j.feeds++
		}
	})
}

// addLines takes live log lines of a step. first is the number of the first line, from 1; lines sent twice after a
// reconnect are recognised by it. It is 0 when the runner does not say.
func (h *hub) addLines(jobID, stepID string, first int, lines []string) {
	h.change(func() {
		j := h.jobs[jobID]
		if j == nil || j.state != jobRunning || len(stepID) > 64 {
			return
		}
		name := ""
		i := slices.IndexFunc(j.steps, func(st *step) bool { return strings.EqualFold(st.id, stepID) })
		if i >= 0 {
			name = j.steps[i].name
		}
		seen, known := j.feedSeen[stepID]
		if !known && len(j.feedSeen) >= len(j.spec.steps)+maxAddedSteps {
			return
		}
		for n, l := range lines {
			if first > 0 && first+n <= seen {
				continue
			}
			h.emitJob(LogLine, j, Event{Step: name, Line: clip(l, maxLine)})
		}
		if first > 0 {
			seen = max(seen, first-1+len(lines))
		} else {
			seen += len(lines)
		}
		j.feedSeen[stepID] = seen
	})
}

// drain waits until the live log of a job has shown as many lines as its uploaded step logs have, or for a bounded
// time: the last lines come by another connection than the news that the job is over.
func (h *hub) drain(ctx context.Context, jobID string) {
	ctx, cancel := context.WithTimeout(ctx, drainTime)
	defer cancel()
	h.await(ctx, drainTime, func() bool {
		j := h.jobs[jobID]
		if j == nil || j.feeds == 0 {
			return true
		}
		for _, b := range j.blobs {
			if b.kind == stepLog && j.feedSeen[b.step] < b.lines {
				return false
			}
		}
		return true
	})
}

// openBlob returns the id of a blob of a running job, making it if need be.
func (h *hub) openBlob(jobID string, kind blobKind, stepID string) (id string, err error) {
	h.change(func() {
		j := h.jobs[jobID]
		if j == nil {
			err = errNotFound("no such job")
			return
		}
		if i := slices.IndexFunc(j.blobs, func(b *blob) bool { return b.kind == kind && b.step == stepID }); i >= 0 {
			id = j.blobs[i].id
			return
		}
		if len(j.blobs) >= maxBlobs || len(stepID) > 64 {
			err = errForbidden("too many logs")
			return
		}
		b := &blob{id: newUUID(), job: j, kind: kind, step: stepID}
		j.blobs = append(j.blobs, b)
		h.blobs[b.id] = b
		id = b.id
	})
	return id, err
}

// appendBlob adds to a blob; what goes beyond the bounds is counted and dropped. A whole upload replaces it instead.
func (h *hub) appendBlob(id string, data []byte, replace bool) {
	h.change(func() {
		b := h.blobs[id]
		if b == nil {
			return
		}
		if replace {
			b.job.blobSize -= len(b.data)
			b.data, b.lines = nil, 0
		}
		b.lines += bytes.Count(data, []byte("\n"))
		keep := max(0, min(len(data), maxBlobKept-len(b.data), maxBlobsKept-b.job.blobSize))
		b.data = append(b.data, data[:keep]...)
		b.job.blobSize += keep
	})
}

// log returns the job's uploaded log. The caller holds the lock.
func (j *job) log() string {
	for _, b := range j.blobs {
		if b.kind == jobLog {
			return string(b.data)
		}
	}
	return ""
}
