// Package sched decides how many runners there should be and where, and keeps at it.
//
// Plan is pure: the same demand and supply give the same actions, each with its Reason. Loop observes, plans and
// applies, on every message, every VM exit and every few seconds; it never counts events (GitHub's statistics are the
// demand, the hosts' records are the supply). Explain, pure too, says why one job waits. Alive takes jobs
// that no runner works on any more out of the demand. The package must not know GitHub, VMs or where a host is.
package sched

import (
	"context"

	"flint"
)

// Host is a machine that runs runners: this one, or a remote one.
type Host interface {
	// State is a snapshot, cheap enough to take on every pass.
	State() flint.HostState
	// Run blocks until r is over and everything it held is released. Cancelling ctx ends r early; release still happens. An
	// error that is only flint.ErrRelease does not count against the pool: the host releases again what it left behind.
	Run(ctx context.Context, r flint.Runner) (flint.Result, error)
}

// Source is where demand comes from.
type Source interface {
	// Demand is the newest known demand per pool. A pool GitHub has not spoken of yet, or not for so long that its last
	// word cannot be believed, is absent.
	Demand() []flint.Demand
	// Changed is signalled (one buffered element) when Demand may have changed.
	Changed() <-chan struct{}
	// Capacity tells how many runners of the pool there are and could still be started, for the next poll.
	Capacity(pool string, n int)
}

// Action is one step of a plan.
type Action struct {
	Verb   Verb
	Pool   string
	Host   string       // with Start: where
	Runner string       // with Stop: which
	Reason flint.Reason // why; never zero
}

// Verb says what an Action does.
type Verb int

// The verbs.
const (
	Start Verb = iota + 1 // start a runner of Pool on Host
	Stop                  // end an idle runner
	Wait                  // a job of Pool waits; Reason says for what
)
