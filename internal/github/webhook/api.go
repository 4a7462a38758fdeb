package webhook

import (
	"context"
	"time"

	"flint"
)

// Delivery is one attempt of GitHub to bring a webhook.
type Delivery struct {
	ID         int64  // of this attempt; what Redeliver wants
	GUID       string // of the event: the same for all attempts, and the X-GitHub-Delivery they carry
	Event      string // workflow_job, ping, ...
	Action     string // queued, in_progress, completed, waiting; empty where the event has none
	At         time.Time
	Redelivery bool // asked for, not the first attempt
	Status     int  // HTTP status of the answer; 0 where there was none
}

// API is what a Receiver asks one account of GitHub to catch up with what it was not told. Its calls are bounded by
// themselves and obey GitHub's rate limits; refusals that a person has to mend are faults.
type API interface {
	// Deliveries returns the attempts since then, newest first. GitHub keeps them for three days.
	Deliveries(ctx context.Context, since time.Time) ([]Delivery, error)
	// Redeliver asks GitHub to bring a delivery once more.
	Redeliver(ctx context.Context, id int64) error
	// Open returns the queued and running jobs of these repositories (owner/name; nil: of all that the account sees), with at
	// most budget requests. What it found before an error it returns with the error. A fault github.rate says that the rate
	// limit leaves no room.
	Open(ctx context.Context, repositories []string, budget int) ([]flint.JobStatus, error)
	// Job returns what GitHub knows of one job; flint.ErrNotFound where it knows none.
	Job(ctx context.Context, repository string, id int64) (flint.JobStatus, error)
}
