// Package webhook turns GitHub's workflow_job webhooks into demand.
//
// It takes deliveries over HTTP, checks their signature, persists what they say of a job and only then answers. A ledger of
// jobs, each in the furthest state anybody has heard of, gives the demand per pool; what was lost on the way is sent again by
// GitHub on request, or found by asking for the open jobs. It must not decide how many runners there are, must not know how
// GitHub is signed in to (API does), and keeps the types of its database to itself.
package webhook

import (
	"context"
	"time"

	"flint"
)

// Delivery is one attempt of GitHub to deliver a webhook, as GitHub lists it.
type Delivery struct {
	ID         int64  // of the attempt; what Redeliver wants
	GUID       string // X-GitHub-Delivery: the same for all attempts at one webhook
	Event      string // X-GitHub-Event
	Action     string // queued, in_progress, ...; may be empty
	At         time.Time
	Redelivery bool
	Status     int // HTTP status we answered; 0: none was heard
}

// API is what the receiver asks GitHub for one account. Errors that a person can mend are faults; their codes and texts are
// shown as the reason why demand may be incomplete.
type API interface {
	// Deliveries returns the deliveries made since a time, newest first, of all events, and what it read before an error with
	// the error. errors.ErrUnsupported: there is no way to see them (a token whose webhook's id is not configured).
	Deliveries(ctx context.Context, since time.Time) ([]Delivery, error)
	// Redeliver asks GitHub to deliver once more. flint.ErrNotFound: it does not know this delivery any more.
	Redeliver(ctx context.Context, id int64) error
	// Open returns the jobs of these repositories ("owner/name"; nil: of all that the account sees) that are queued or in
	// progress, with at most budget requests: what it read before the budget was used up, and before an error with the error. A
	// fault github.rate says that the rate limit leaves no room; errors.ErrUnsupported, that nobody can list them.
	Open(ctx context.Context, repositories []string, budget int) ([]flint.JobStatus, error)
	// Job returns one job. flint.ErrNotFound: there is no such job, or not any more.
	Job(ctx context.Context, repository string, id int64) (flint.JobStatus, error)
}
