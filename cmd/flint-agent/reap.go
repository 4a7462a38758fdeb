package main

import (
	"errors"
	"os"
	"os/signal"
	"sync"
	"syscall"

	"golang.org/x/sys/unix"
)

// reaper collects every child of this process: those it started itself, whose ends it hands to who waits for them, and
// as PID 1 the orphans of all others. It alone waits; nothing else in the agent may start a process.
type reaper struct {
	mu       sync.Mutex
	waiting  map[int]chan syscall.WaitStatus // by pid, each with one buffered element
	children chan os.Signal
}

func newReaper() *reaper {
	r := &reaper{waiting: map[int]chan syscall.WaitStatus{}, children: make(chan os.Signal, 1)}
	signal.Notify(r.children, unix.SIGCHLD)
	return r
}

// run collects until stop is closed.
func (r *reaper) run(stop <-chan struct{}) {
	defer signal.Stop(r.children)
	for {
		select {
		case <-r.children:
			r.collect()
		case <-stop:
			return
		}
	}
}

// start runs begin, which forks, and registers the pid it returns before anybody can collect it.
func (r *reaper) start(begin func() (int, error)) (int, <-chan syscall.WaitStatus, error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	pid, err := begin()
	if err != nil {
		return 0, nil, err
	}
	ended := make(chan syscall.WaitStatus, 1)
	r.waiting[pid] = ended
	return pid, ended, nil
}

// collect reaps what there is to reap and reports whether this process has no child any more.
func (r *reaper) collect() (childless bool) {
	r.mu.Lock()
	defer r.mu.Unlock()
	for {
		var ws syscall.WaitStatus
		pid, err := syscall.Wait4(-1, &ws, syscall.WNOHANG, nil)
		switch {
		case errors.Is(err, syscall.EINTR):
			continue
		case err != nil:
			return true // ECHILD
		case pid <= 0:
			return false
		}
		if ended, ok := r.waiting[pid]; ok {
			delete(r.waiting, pid)
			ended <- ws
		}
	}
}

// signal sends sig to the process group that pid leads, or led: what is left of a group keeps its number from being
// given to another process, so that a process with the number is either the leader, not collected yet, or a sign that
// the whole group has gone.
func (r *reaper) signal(pid int, sig syscall.Signal) error {
	r.mu.Lock()
	defer r.mu.Unlock()
	if _, ok := r.waiting[pid]; !ok && !errors.Is(syscall.Kill(pid, 0), syscall.ESRCH) {
		return nil
	}
	err := syscall.Kill(-pid, sig)
	if errors.Is(err, syscall.ESRCH) {
		return nil
	}
	return err
}
