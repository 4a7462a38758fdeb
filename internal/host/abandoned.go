package host

import (
	"errors"
	"io/fs"
	"path/filepath"

	"flint"
)

// abandoned is a runner that is over and whose record stays, because GitHub keeps its registration.
type abandoned struct {
	pool      string
	concluded bool // GitHub has said how its job ended
}

// Abandoned returns, by pool, how many jobs GitHub counts as running although no runner works on them any more: it hears of a
// runner's end only when its job is concluded, and notices after minutes that a VM has died. Each counts until GitHub has said how
// it ended, or has let go of the runner's registration.
func (h *Host) Abandoned() map[string]int {
	h.mu.Lock()
	defer h.mu.Unlock()
	jobs := map[string]int{}
	for _, a := range h.left {
		if !a.concluded {
			jobs[a.pool]++
		}
	}
	for _, l := range h.lives {
		if pool, yes := l.abandons(); yes {
			jobs[pool]++
		}
	}
	return jobs
}

// abandons reports whether the runner has done with a job that GitHub has not concluded.
func (l *life) abandons() (pool string, yes bool) {
	l.mu.Lock()
	defer l.mu.Unlock()
	r := l.rec.Runner
	return r.Pool, r.Job != nil && r.Phase >= flint.Finishing && !l.rec.Concluded
}

// bury takes a runner off the living. With stays, its record is left, and what that says of its job is remembered.
func (h *Host) bury(l *life, stays bool) {
	h.mu.Lock()
	defer h.mu.Unlock()
	delete(h.lives, l.id())
	if stays {
		l.mu.Lock()
		defer l.mu.Unlock()
		h.remember(l.rec)
	}
}

// leave remembers what the record of a runner of an earlier process says of its job.
func (h *Host) leave(rec record) {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.remember(rec)
}

// remember is leave for who holds h.mu.
func (h *Host) remember(rec record) {
	if _, known := h.left[rec.Runner.ID]; !known && rec.Runner.Job != nil && !rec.Concluded {
		h.left[rec.Runner.ID] = &abandoned{pool: rec.Runner.Pool}
	}
}

// forget is called when a record is gone, and with it the registration.
func (h *Host) forget(id string) {
	h.mu.Lock()
	defer h.mu.Unlock()
	delete(h.left, id)
}

// noteGone notes that a job began on a runner whose VM is gone and whose record stays, so that its loss can be told: flint, or the
// machine, may have died before it heard of the job.
func (h *Host) noteGone(ev flint.JobEvent) error {
	if !h.Claims(ev.Runner) {
		return nil
	}
	dir := filepath.Join(h.c.Dir, ev.Runner)
	rec, err := readRecord(dir)
	if err != nil || rec.Runner.Job != nil {
		return nil // what cannot be read, Sweep sets aside
	}
	rec.Runner.Job = &ev.Job
	if err := h.save(rec, dir, true); err != nil && !errors.Is(err, fs.ErrNotExist) { // Sweep may have undone it just now
		return spaceOr(err)
	}
	h.leave(rec)
	return nil
}

// conclude notes that GitHub has said how a job of a runner ended that is over.
func (h *Host) conclude(id string) {
	h.mu.Lock()
	defer h.mu.Unlock()
	if a := h.left[id]; a != nil {
		a.concluded = true
	}
}
