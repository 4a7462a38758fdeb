package github

import (
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"time"

	"github.com/actions/scaleset"

	"flint"
)

// maxText bounds names that people choose: of jobs, repositories, runners.
const maxText = 512

// statistics is what GitHub counts for a scale set.
type statistics struct{ assigned, available int }

// message is what is used of a message.
type message struct {
	id        int
	stats     *statistics // nil: GitHub sent none
	available []int64     // requests that want to be acquired; GHES only
	events    []flint.JobEvent
}

func convertStatistics(s *scaleset.RunnerScaleSetStatistic) *statistics {
	if s == nil {
		return nil
	}
	return &statistics{assigned: max(0, s.TotalAssignedJobs), available: max(0, s.TotalAvailableJobs)}
}

// convertMessage takes over what concerns our runners. A job that ended before a runner had it is only a number in the
// statistics.
func convertMessage(m *scaleset.RunnerScaleSetMessage) *message {
	out := &message{id: m.MessageID, stats: convertStatistics(m.Statistics)}
	for _, j := range m.JobAvailableMessages {
		out.available = append(out.available, j.RunnerRequestID)
	}
	for _, j := range m.JobStartedMessages {
		if j.RunnerName != "" {
			out.events = append(out.events, flint.JobEvent{
				Kind: flint.JobStarted, Runner: clean(j.RunnerName, maxText), Job: convertJob(&j.JobMessageBase), At: j.RunnerAssignTime,
			})
		}
	}
	for _, j := range m.JobCompletedMessages {
		if j.RunnerName != "" {
			out.events = append(out.events, flint.JobEvent{
				Kind: flint.JobCompleted, Runner: clean(j.RunnerName, maxText), Job: convertJob(&j.JobMessageBase),
				Conclusion: clean(j.Result, 64), At: j.FinishTime,
			})
		}
	}
	return out
}

func convertJob(j *scaleset.JobMessageBase) flint.Job {
	return flint.Job{
		ID: clean(j.JobID, maxText), RequestID: j.RunnerRequestID, Name: clean(j.JobDisplayName, maxText),
		Repository: clean(j.OwnerName+"/"+j.RepositoryName, maxText), RunID: j.WorkflowRunID,
	}
}

// digest identifies what a message says of jobs. Together with its id it tells a message that comes again.
func (m *message) digest() string {
	b, err := json.Marshal(struct {
		Available []int64
		Events    []flint.JobEvent
	}{m.available, m.events})
	if err != nil { // a time beyond the year 9999; such a message is never taken for another
		return time.Now().String()
	}
	sum := sha256.Sum256(b)
	return hex.EncodeToString(sum[:])
}
