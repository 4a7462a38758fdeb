// Package simrunner is the runner's side of the protocol as a library: a program that takes a JIT configuration, goes
// online, does one job and ends, in the time the protocol takes and no more. Tests put it where the official runner would
// be, by the thousand.
//
// It executes nothing: what a step does is a function the caller gives. It must not know the server's insides, flint's
// simulated GitHub least of all: it speaks HTTP to the addresses its credential names, as any runner does.
package simrunner

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"strconv"
	"strings"
	"time"
)

// The exit codes of the official runner.
const (
	ExitDone       = 0 // its one job is over, however it ended
	ExitTerminated = 1 // nothing to be gained by trying again: its registration is gone, its credential is wrong, or it was told to stop
	ExitRetry      = 2 // the server could not be reached for too long
	ExitConflict   = 5 // another process has its session
	ExitDeprecated = 7 // the server refuses its version
	ExitDied       = -1
)

// Errors of Run, beside those of its context.
var (
	ErrDied       = errors.New("the runner died where it was told to")
	ErrDeprecated = errors.New("the server refuses this version of the runner")
	ErrGone       = errors.New("the registration is gone")
	ErrConflict   = errors.New("the runner has a session elsewhere")
)

// Point is a place on a runner's way.
type Point int

// The points, in the order of the way.
const (
	Nowhere      Point = iota
	Decoded            // the credential is read, nothing was asked yet
	Online             // it has a session
	Offered            // the server has offered it a job
	Acknowledged       // and knows that it has heard
	Acquired           // the job is its own
	Worked             // all steps are done, and nobody knows
	Completed          // the server has the conclusion
)

// Conclusions, as the run service spells them.
const (
	Succeeded = "succeeded"
	Failed    = "failed"
	Canceled  = "canceled"
)

// Options say what kind of runner it is. The zero value does every step in no time and reports all a runner reports.
type Options struct {
	// Client sends the requests; http.DefaultClient when nil. Many runners should share one whose transport keeps enough
	// idle connections: see NewClient.
	Client *http.Client
	// Work does a step. An error fails it; the steps after it are not done. ctx is over when the job is cancelled. When
	// nil, a script "sleep N" takes N seconds, "exit N" fails unless N is 0, and all others take no time.
	Work func(ctx context.Context, s Step) error
	// Conclusion overrides the job's: Succeeded, Failed or Canceled.
	Conclusion string
	// Die is where the runner vanishes without a word, as a machine does whose power fails.
	Die Point
	// Quiet runners send no live log, no logs and no steps: only what the server needs to know that the job is done.
	Quiet bool
	// Patience is how long a request that gets no usable answer is tried again; one minute when zero.
	Patience time.Duration
	// Renew is how often the job's lease is renewed; one minute when zero.
	Renew time.Duration
	// Now is the clock of the tokens it signs; time.Now when nil.
	Now func() time.Time
	// Reached is called at each point; it must not block. It may be nil.
	Reached func(Point)
}

// NewClient returns a client for many runners at the same time against one server.
func NewClient() *http.Client {
	return &http.Client{Transport: &http.Transport{MaxIdleConnsPerHost: 64, IdleConnTimeout: time.Minute, DisableCompression: true}}
}

func (o *Options) complete() {
	if o.Client == nil {
		o.Client = http.DefaultClient
	}
	if o.Work == nil {
		o.Work = Script
	}
	if o.Patience <= 0 {
		o.Patience = time.Minute
	}
	if o.Renew <= 0 {
		o.Renew = time.Minute
	}
	if o.Now == nil {
		o.Now = time.Now
	}
	if o.Reached == nil {
		o.Reached = func(Point) {}
	}
}

// Step is one step of the job, as the server sent it.
type Step struct {
	ID     string
	Name   string
	Script string // empty for a step that is not a script, or whose script holds expressions
}

// Script is what Options.Work is unless told otherwise.
func Script(ctx context.Context, s Step) error {
	command, arg, _ := strings.Cut(strings.TrimSpace(s.Script), " ")
	n, err := strconv.ParseFloat(strings.TrimSpace(arg), 64)
	if err != nil {
		return nil
	}
	switch command {
	case "sleep":
		t := time.NewTimer(time.Duration(n * float64(time.Second)))
		defer t.Stop()
		select {
		case <-t.C:
		case <-ctx.Done():
			return fmt.Errorf("sleep: %w", ctx.Err())
		}
	case "exit":
		if n != 0 {
			return fmt.Errorf("exit code %v", n)
		}
	}
	return nil
}

// Run is a runner's whole life: it decodes the credential (an encoded JIT configuration), logs in, opens its session, waits
// for its job, does it, and ends its session. It returns the exit code the official runner would, and why unless that is 0.
// When ctx is over it stops at once: it ends its session, and leaves its job as it is.
func Run(ctx context.Context, credential string, o Options) (exit int, err error) {
	o.complete()
	r, err := decode(credential, o)
	if err != nil {
		return ExitTerminated, err
	}
	err = r.live(ctx)
	if r.session != "" && !errors.Is(err, ErrDied) {
		// Most often the registration is gone with its job, and the session with it.
		end, cancel := context.WithTimeout(context.WithoutCancel(ctx), endTime)
		defer cancel()
		_, _ = r.once(end, request{method: http.MethodDelete, url: r.broker + "session", token: r.token})
	}
	return exitCode(err), err
}

// endTime is how long the end of a session may take.
const endTime = 5 * time.Second

func exitCode(err error) int {
	switch {
	case err == nil:
		return ExitDone
	case errors.Is(err, ErrDied):
		return ExitDied
	case errors.Is(err, ErrDeprecated):
		return ExitDeprecated
	case errors.Is(err, ErrConflict):
		return ExitConflict
	case errors.Is(err, errPatience):
		return ExitRetry
	}
	return ExitTerminated
}

// reach notes a point, and says whether the runner dies there.
func (r *runner) reach(p Point) error {
	r.o.Reached(p)
	if r.o.Die == p {
		return ErrDied
	}
	return nil
}

// live is a runner's life from its credential to the end of its job.
func (r *runner) live(ctx context.Context) error {
	for _, step := range []struct {
		do    func(context.Context) error
		point Point
	}{
		{func(context.Context) error { return nil }, Decoded},
		{r.online, Online},
		{r.awaitJob, Offered},
		{r.acknowledge, Acknowledged},
		{r.acquire, Acquired},
		{r.work, Worked},
		{r.complete, Completed},
	} {
		if err := step.do(ctx); err != nil {
			return err
		}
		if err := r.reach(step.point); err != nil {
			return err
		}
	}
	return nil
}
