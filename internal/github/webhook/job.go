package webhook

import (
	"cmp"
	"encoding/json"
	"slices"
	"strconv"
	"strings"
	"time"

	"flint"
)

// rank orders the states of a job. News of a lower rank never undo a higher one: webhooks come out of order.
type rank int

const (
	waiting rank = iota + 1 // for an approval or another job: nothing is started for it
	queued
	running
	completed
)

var rankNames = [...]string{"", "waiting", "queued", "in_progress", "completed"}

// parseRank reads the action of a webhook or the status of a job. GitHub's REST API knows more words for "not yet queued".
func parseRank(s string) (rank, bool) {
	switch s {
	case "pending", "requested":
		return waiting, true
	}
	i := slices.Index(rankNames[1:], s)
	return rank(i + 1), i >= 0
}

func (r rank) String() string { return rankNames[r] }

// jobKey tells jobs apart. The repository is part of it, so that nobody who may speak for one repository can end a job of
// another, and its server, whose ids are its own.
type jobKey struct {
	place string // host/owner/name, in lower case
	id    int64
}

func (k jobKey) String() string { return k.place + "#" + strconv.FormatInt(k.id, 10) }

// job is what is known of one job. A record is never changed once it is in the ledger: a new one takes its place.
type job struct {
	Place      string    `json:"place"`
	ID         int64     `json:"id"`
	RunID      int64     `json:"run,omitempty"`
	Account    string    `json:"account,omitempty"` // the one that told us
	Repository string    `json:"repository"`
	Name       string    `json:"name,omitempty"`
	URL        string    `json:"url,omitempty"`
	Labels     []string  `json:"labels,omitempty"`
	Public     bool      `json:"public,omitempty"`
	State      rank      `json:"state"`
	Conclusion string    `json:"conclusion,omitempty"` // as REST says it
	Runner     string    `json:"runner,omitempty"`
	Pool       string    `json:"pool,omitempty"` // of Runner; empty when that is not ours
	Queued     time.Time `json:"queued,omitzero"`
	Started    time.Time `json:"started,omitzero"`
	Completed  time.Time `json:"completed,omitzero"`
	First      time.Time `json:"first"` // when we first heard of it as queued or later
	At         time.Time `json:"at"`    // when the record was last changed
	// Expired says that it was queued for so long that GitHub has dropped it.
	Expired       bool `json:"expired,omitempty"`
	ToldStarted   bool `json:"told_started,omitempty"`
	ToldCompleted bool `json:"told_completed,omitempty"`

	rev uint64 // order of the writes to the database
}

func (j *job) key() jobKey { return jobKey{j.Place, j.ID} }

// merge returns what a and b say together. The order of the arguments does not matter: each field is that of the further
// state that has it.
func merge(a, b *job) *job {
	if a == nil {
		a, b = b, nil
	}
	if b == nil {
		out := *a
		return &out
	}
	if compare(a, b) < 0 {
		a, b = b, a
	}
	out := *a
	out.RunID = cmp.Or(a.RunID, b.RunID)
	out.Account = cmp.Or(a.Account, b.Account)
	out.Name, out.URL = cmp.Or(a.Name, b.Name), cmp.Or(a.URL, b.URL)
	out.Conclusion = cmp.Or(a.Conclusion, b.Conclusion)
	if len(a.Labels) == 0 {
		out.Labels = b.Labels
	}
	if a.Runner == "" {
		out.Runner, out.Pool = b.Runner, b.Pool
	}
	out.Queued, out.First = earlier(a.Queued, b.Queued), earlier(a.First, b.First)
	out.Started, out.Completed = cmpTime(a.Started, b.Started), cmpTime(a.Completed, b.Completed)
	out.ToldStarted, out.ToldCompleted = false, false
	for _, from := range []*job{a, b} {
		if from.Runner != out.Runner {
			continue
		}
		// The host forgets a runner soon after its end; that it was ours stays true.
		out.Pool = cmp.Or(out.Pool, from.Pool)
		out.ToldStarted = out.ToldStarted || from.ToldStarted
		out.ToldCompleted = out.ToldCompleted || from.ToldCompleted
	}
	out.Expired = out.State == queued && (a.Expired || b.Expired)
	out.At = a.At
	if b.At.After(a.At) {
		out.At = b.At
	}
	return &out
}

// compare says which of two records is the further one.
func compare(a, b *job) int {
	return cmp.Or(cmp.Compare(a.State, b.State), a.Completed.Compare(b.Completed), a.Started.Compare(b.Started),
		strings.Compare(a.Runner, b.Runner), strings.Compare(a.Conclusion, b.Conclusion), strings.Compare(a.Name, b.Name),
		strings.Compare(a.Account, b.Account), slices.Compare(a.Labels, b.Labels))
}

func earlier(a, b time.Time) time.Time {
	if a.IsZero() || !b.IsZero() && b.Before(a) {
		return b
	}
	return a
}

func cmpTime(a, b time.Time) time.Time {
	if a.IsZero() {
		return b
	}
	return a
}

// news reports whether after says more than before.
func news(before, after *job) bool {
	if before == nil {
		return true
	}
	a, b := *before, *after
	a.At, b.At = time.Time{}, time.Time{}
	a.rev, b.rev = 0, 0
	x, errX := json.Marshal(&a)
	y, errY := json.Marshal(&b)
	return errX != nil || errY != nil || string(x) != string(y)
}

// open reports whether the job still wants a runner, or has one of ours.
func (j *job) open() bool {
	return j.State == queued && !j.Expired || j.State == running && j.Pool != ""
}

// untold reports whether the job met a runner of ours and that was not yet told.
func (j *job) untold() bool {
	return j.Pool != "" && (j.State == running && !j.ToldStarted || j.State == completed && !j.ToldCompleted)
}

// event is what is told of an untold job: its newest state. told is the record once that was done.
func (j *job) event() (ev flint.JobEvent, told *job) {
	done := *j
	ev = flint.JobEvent{Pool: j.Pool, Runner: j.Runner, Job: j.status().Job}
	if j.State == completed {
		ev.Kind, ev.Conclusion, ev.At = flint.JobCompleted, conclusion(j.Conclusion), cmpTime(j.Completed, j.At)
		done.ToldCompleted = true
	} else {
		ev.Kind, ev.At = flint.JobStarted, cmpTime(j.Started, j.At)
	}
	done.ToldStarted = true
	return ev, &done
}

// conclusion turns REST's word into that of the scale set side, which knows fewer.
func conclusion(rest string) string {
	switch rest {
	case "success", "neutral":
		return "succeeded"
	case "failure", "timed_out", "startup_failure", "action_required":
		return "failed"
	case "cancelled":
		return "canceled"
	}
	return rest
}

func (j *job) status() flint.JobStatus {
	return flint.JobStatus{
		Job:   flint.Job{ID: strconv.FormatInt(j.ID, 10), Name: j.Name, Repository: j.Repository, RunID: j.RunID},
		State: j.State.String(), Conclusion: j.Conclusion, Labels: slices.Clone(j.Labels), Runner: j.Runner, Public: j.Public,
		Queued: j.Queued, Account: j.Account, URL: j.URL,
	}
}
