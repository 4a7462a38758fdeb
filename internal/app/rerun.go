package app

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
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

// reruns are the jobs whose VMs were lost and that are to run again. The list survives a restart.
type reruns struct {
	path string

	mu   sync.Mutex
	list []rerun
	said map[string]string // by runner: why it does not run again yet, as it was logged last
}

type rerun struct {
	Job    flint.Job `json:"job"`
	Runner string    `json:"runner"`
	Lost   time.Time `json:"lost"`

	since time.Time // when this process learnt of it, from which it is tried: the clock may have been set before that
}

// openReruns reads the list. One that cannot be read is begun anew: it holds wishes, not facts.
func openReruns(path string) (*reruns, error) {
	r := &reruns{path: path}
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

// add puts a job on the list, where it is not on it.
func (r *reruns) add(x rerun) error {
	r.mu.Lock()
	defer r.mu.Unlock()
	if slices.ContainsFunc(r.list, func(o rerun) bool { return o.Runner == x.Runner }) {
		return nil
	}
	if len(r.list) >= maxReruns {
		return fmt.Errorf("%d jobs wait to run again already", len(r.list))
	}
	x.since = time.Now()
	r.list = append(r.list, x)
	return r.save()
}

func (r *reruns) remove(x rerun) error {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.list = slices.DeleteFunc(r.list, func(o rerun) bool { return o.Runner == x.Runner })
	return r.save()
}

// save writes the list. The caller holds r.mu.
func (r *reruns) save() error {
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
func (r *reruns) news(runner, why string) bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.said == nil {
		r.said = map[string]string{}
	}
	fresh := r.said[runner] != why
	if r.said[runner] = why; why == "" {
		delete(r.said, runner)
	}
	return fresh
}

func (r *reruns) pending() []rerun {
	r.mu.Lock()
	defer r.mu.Unlock()
	return slices.Clone(r.list)
}

// run asks GitHub until every lost job runs again or its time is over.
func (r *reruns) run(ctx context.Context, again func(context.Context, flint.Job, string) error, note func(x rerun, err error, over bool)) error {
	tick := time.NewTicker(rerunEvery)
	defer tick.Stop()
	for {
		for _, x := range r.pending() {
			err := again(ctx, x.Job, x.Runner)
			over := err == nil || errors.Is(err, flint.ErrNotFound) || forGood(err) || time.Since(x.since) > rerunFor
			if over {
				err = errors.Join(err, r.remove(x))
			}
			if ctx.Err() != nil {
				return nil
			}
			note(x, err, over)
		}
		select {
		case <-tick.C:
		case <-ctx.Done():
			return nil
		}
	}
}

// forGood reports whether a job is not to run again whatever time passes.
func forGood(err error) bool {
	var f *flint.Fault
	return errors.As(err, &f) && f.Code == "github.rerun"
}
