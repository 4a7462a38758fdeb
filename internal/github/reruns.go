package github

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"slices"
	"sync"
	"time"

	"flint"
	"flint/internal/durable"
)

const (
	// rerunEvery is how often GitHub is asked to run lost jobs again. It declares them failed about ten minutes after their
	// runner was last heard, and runs nothing again before.
	rerunEvery = time.Minute
	// rerunFor is how long it is tried.
	rerunFor = time.Hour
	// maxReruns bounds the list.
	maxReruns = 1000
)

// Reruns are the jobs whose VMs were lost and that are to run again. The list survives a restart.
type Reruns struct {
	path string
	log  *slog.Logger

	mu   sync.Mutex
	list []Lost
	said map[string]string // by runner: why it does not run again yet, as it was logged last
}

// Lost is a job that is to run again.
type Lost struct {
	Job    flint.Job `json:"job"`
	Runner string    `json:"runner"`
	At     time.Time `json:"lost"`

	since time.Time // when this process learnt of it, from which it is tried: the clock may have been set before that
}

// OpenReruns reads the list. One that cannot be read is begun anew: it holds wishes, not facts.
func OpenReruns(path string, log *slog.Logger) (*Reruns, error) {
	r := &Reruns{path: path, log: log, said: map[string]string{}}
	if err := durable.Clear(path); err != nil {
		log.Warn("what a crash left beside the jobs to run again stays", "err", err)
	}
	b, err := os.ReadFile(path)
	if errors.Is(err, fs.ErrNotExist) {
		return r, nil
	}
	if err != nil {
		return nil, fmt.Errorf("read the jobs to run again: %w", err)
	}
	if json.Unmarshal(b, &r.list) != nil || len(r.list) > maxReruns {
		r.list = nil
	}
	for i := range r.list {
		r.list[i].since = time.Now()
	}
	return r, nil
}

// Add puts a job that a runner lost on the list, where it is not on it.
func (r *Reruns) Add(job flint.Job, runner string) error {
	r.mu.Lock()
	defer r.mu.Unlock()
	if slices.ContainsFunc(r.list, func(o Lost) bool { return o.Runner == runner }) {
		return nil
	}
	if len(r.list) >= maxReruns {
		return fmt.Errorf("%d jobs wait to run again already", len(r.list))
	}
	now := time.Now()
	r.list = append(r.list, Lost{Job: job, Runner: runner, At: now, since: now})
	return r.save()
}

func (r *Reruns) remove(x Lost) error {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.list = slices.DeleteFunc(r.list, func(o Lost) bool { return o.Runner == x.Runner })
	return r.save()
}

// save writes the list. The caller holds r.mu.
func (r *Reruns) save() error {
	b, err := json.Marshal(r.list)
	if err != nil {
		return fmt.Errorf("encode the jobs to run again: %w", err)
	}
	if err := durable.Replace(r.path, b); err != nil {
		return fmt.Errorf("write the jobs to run again: %w", err)
	}
	return nil
}

// news reports whether a reason was not the last one of this runner. An empty one forgets it.
func (r *Reruns) news(runner, why string) bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	fresh := r.said[runner] != why
	if r.said[runner] = why; why == "" {
		delete(r.said, runner)
	}
	return fresh
}

// Pending returns the list.
func (r *Reruns) Pending() []Lost {
	r.mu.Lock()
	defer r.mu.Unlock()
	return slices.Clone(r.list)
}

// Run asks GitHub to run the lost jobs again, each until it does or its time is over, until ctx ends. Again is Client.Rerun.
func (r *Reruns) Run(ctx context.Context, again func(context.Context, flint.Job, string) error) error {
	tick := time.NewTicker(rerunEvery)
	defer tick.Stop()
	for {
		for _, x := range r.Pending() {
			err := again(ctx, x.Job, x.Runner)
			over := err == nil || errors.Is(err, flint.ErrNotFound) || forGood(err) || time.Since(x.since) > rerunFor
			if over {
				err = errors.Join(err, r.remove(x))
			}
			if ctx.Err() != nil {
				return nil
			}
			r.tell(x, err, over)
		}
		select {
		case <-tick.C:
		case <-ctx.Done():
			return nil
		}
	}
}

// tell says in the log what became of a lost job.
func (r *Reruns) tell(x Lost, err error, over bool) {
	log := r.log.With("job", x.Job.Name, "repository", x.Job.Repository, "runner", x.Runner)
	if over {
		r.news(x.Runner, "")
	}
	var fault *flint.Fault
	switch {
	case err == nil:
		log.Info("lost job runs again")
	case over:
		log.Error("lost job does not run again", "err", err)
	case errors.As(err, &fault) && r.news(x.Runner, fault.Error()): // it may need a person
		log.Warn("lost job cannot run again yet", "err", err, "fix", fault.Fix)
	default:
		log.Debug("lost job cannot run again yet", "err", err)
	}
}

// forGood reports whether a job is not to run again whatever time passes.
func forGood(err error) bool {
	var f *flint.Fault
	return errors.As(err, &f) && f.Code == "github.rerun"
}
