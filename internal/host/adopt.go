package host

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"maps"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"flint"
	"flint/internal/guest"
	"flint/internal/undo"
	"flint/internal/vm"
)

// ErrDetached is in what Run and Resume end with for a runner whose VM goes on without this process: it is not over, and
// nothing of it was released.
var ErrDetached = fmt.Errorf("%w, and leaves the VM to its next start", flint.ErrStopped)

// runnerName is the name of the runner program's process in the guest, by which another session knows it.
const runnerName = "runner"

// Survivors returns the runners, by name, in a host's directory that GitHub knows and whose VMMs live: those Adopt goes on
// with, if it can. It changes nothing.
func Survivors(dir string) ([]string, error) {
	entries, err := os.ReadDir(dir)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, fmt.Errorf("list runners: %w", err)
	}
	var ids []string
	for _, e := range entries {
		rec, err := readRecord(filepath.Join(dir, e.Name()))
		if err == nil && rec.survives() {
			ids = append(ids, e.Name())
		}
	}
	return ids, nil
}

// survives reports whether there is something to go on with.
func (r record) survives() bool {
	if r.Ending || r.Runner.Timeline[flint.Registered].IsZero() || r.Shape == (flint.Shape{}) {
		return false
	}
	return r.vmm().lives()
}

// finished reports whether the runner's program had ended and only the rest is to be done, whether its VMM lives or not.
func (r record) finished() bool { return r.Exit != nil && !r.Ending && r.Shape != (flint.Shape{}) }

// Adopt takes over the runners of an earlier process whose VMs live, or whose programs had ended, for Resume to go on with. From
// then on State shows them. Sweep, which is to follow, ends the VMs that cannot be adopted, and tells of their loss. Where ctx ends
// before all were tried, that is an error: the rest live on for the next process to adopt, if this one neither sweeps nor runs
// anything. Call it once, before the first Run.
func (h *Host) Adopt(ctx context.Context) error {
	entries, err := os.ReadDir(h.c.Dir)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("list runners: %w", err)
	}
	for _, e := range entries {
		rec, err := readRecord(filepath.Join(h.c.Dir, e.Name()))
		if err != nil || !rec.survives() && !rec.finished() {
			continue // Sweep says what it is
		}
		var l *life
		if err = ctx.Err(); err == nil {
			l, err = h.adopt(ctx, rec)
		}
		if err != nil && ctx.Err() != nil {
			return fmt.Errorf("adopt the VMs of an earlier flint: %w", context.Cause(ctx))
		}
		if err != nil {
			h.c.Log.Warn("a VM of an earlier flint cannot be adopted, and is ended", "runner", e.Name(), "err", err)
			continue
		}
		h.mu.Lock()
		h.lives[l.id()] = l
		h.adopted = append(h.adopted, l)
		h.mu.Unlock()
	}
	return nil
}

// adopt takes hold of what one runner has. On error it has let go of it; the record stays, for Sweep.
func (h *Host) adopt(ctx context.Context, rec record) (_ *life, err error) {
	l := newLife(h, rec.Runner, Supply{Shape: rec.Shape})
	l.rec, l.conclusion, l.recorded, l.adopted = rec, rec.Conclusion, true, true
	l.given.Store(true)
	if rec.Runner.Job != nil {
		close(l.taken)
	}
	if rec.Concluded {
		close(l.concluded)
	}
	below, err := l.rejoin(ctx)
	if err != nil {
		return nil, err
	}
	l.undo.Push("remove registration", l.unregister)
	l.undo.Push("give back", below.Run)
	l.undo.Push("end the VM", l.machine.Close)
	l.output = openLogbook(l.dir, l.log)
	return l, nil
}

// rejoin takes hold of the port and the VMM. What it returns gives back all but the VMM; on error it has done so, unless ctx has
// ended: then the VM goes on, and needs its port.
func (l *life) rejoin(ctx context.Context) (_ *undo.Stack, err error) {
	below := &undo.Stack{}
	driver, able := l.h.c.Driver.(vm.Adopter)
	if !able || l.h.c.Reattach == nil {
		return below, errors.New("its driver cannot")
	}
	defer func() {
		if err != nil && ctx.Err() == nil {
			err = errors.Join(err, below.Run(context.WithoutCancel(ctx)))
		}
	}()
	over := l.rec.finished()
	err = patiently(ctx, func() (err error) {
		l.port, err = l.h.c.Reattach(ctx, l.id())
		return err
	})
	switch {
	case err == nil:
		below.Push("detach from network", l.port.Close)
	case !over || !errors.Is(err, flint.ErrNotFound):
		return below, fmt.Errorf("find its network port: %w", err)
	}
	vmm := l.rec.vmm()
	err = patiently(ctx, func() (err error) {
		l.machine, err = driver.Adopt(ctx, vm.Spec{ID: l.id(), Dir: l.dir}, vmm.pid, vmm.start)
		return err
	})
	if over && errors.Is(err, flint.ErrNotFound) {
		l.machine, err = gone{}, nil // as it was to be
	}
	return below, err
}

// adoptTime bounds how long a part of a VM that is there is tried to be taken hold of.
const adoptTime = 2 * time.Second

// patiently tries until there is what is sought, or surely is not: a job is not to end because files or memory were short for a
// moment.
func patiently(ctx context.Context, find func() error) error {
	err := ctx.Err()
	for wait := range backoff(ctx, adoptTime) {
		if err = find(); err == nil || errors.Is(err, flint.ErrNotFound) {
			return err
		}
		wait()
	}
	return err
}

// gone is the machine of a VM that has ended.
type gone struct{}

// Dial implements vm.Machine.
func (gone) Dial(context.Context, uint32) (net.Conn, error) { return nil, net.ErrClosed }

// Wait implements vm.Machine.
func (gone) Wait(context.Context) error { return nil }

// Close implements vm.Machine.
func (gone) Close(context.Context) error { return nil }

// Resume goes on with the adopted runners and returns when all of them are over; done is told how each ended, concurrently, as
// Run would have returned it. Their deadlines count from when they began, not from now. Ending ctx ends them as it ends Run's.
func (h *Host) Resume(ctx context.Context, done func(flint.Result, error)) {
	h.mu.Lock()
	lives := h.adopted
	h.adopted = nil
	h.mu.Unlock()
	var all sync.WaitGroup
	for _, l := range lives {
		all.Go(func() { done(l.goOn(ctx)) })
	}
	all.Wait()
}

// goOn is the rest of an adopted runner's life.
func (l *life) goOn(ctx context.Context) (res flint.Result, err error) {
	defer func() {
		if err != nil && ctx.Err() != nil && !explained(err) {
			err = fmt.Errorf("%w (%w)", ended(context.Cause(ctx)), err)
		}
		res, err = l.end(ctx, err)
	}()
	if exit := l.rec.Exit; exit != nil { // nobody else writes it
		l.exited(*exit)
		return res, nil
	}
	began := time.Now()
	agent, err := l.meet(ctx)
	if err != nil {
		return res, err
	}
	l.log.Info("goes on with the VM of an earlier flint", "phase", l.snapshot().Phase, "took", time.Since(began))
	if err := l.resume(ctx, agent); err != nil {
		return res, err
	}
	return res, l.reboot(ctx)
}

// meet takes up the agent's channel.
func (l *life) meet(ctx context.Context) (*guest.Session, error) {
	limit := l.h.c.Deadlines.Boot
	mctx, cancel := within(ctx, limit, fmt.Errorf("%w after %s", flint.ErrTimeout, limit))
	defer cancel()
	var agent *guest.Session
	// The last words of a process before us may reach the agent after our first, and end what we began.
	err := patiently(mctx, func() error {
		conn, err := l.machine.Dial(mctx, guest.Port)
		if err == nil {
			agent, err = guest.Attach(mctx, conn, guest.Options{Log: l.log})
		}
		return err
	})
	if err == nil {
		l.talk(agent)
		return agent, nil
	}
	if ctx.Err() == nil {
		return nil, l.wentLost(ctx, "reach the agent of an adopted VM", err)
	}
	if l.h.detach(l) {
		return nil, ErrDetached
	}
	return nil, ended(context.Cause(ctx))
}

// resume stays with the runner program, which an earlier process started, until it ends.
func (l *life) resume(ctx context.Context, agent *guest.Session) error {
	r := l.snapshot()
	processes := agent.Hello().Processes
	i := slices.IndexFunc(processes, func(p guest.Running) bool { return p.Name == runnerName })
	if i < 0 && r.Job != nil {
		return nil // it had ended, and only its exit was not written down
	}
	if i < 0 || !processes[i].Closed {
		return fmt.Errorf("%w: an earlier flint ended before it had started the runner program", flint.ErrStopped)
	}
	l.mu.Lock()
	begin := l.began(flint.Registered)
	l.mu.Unlock()
	ctx, cancel := l.yielding(ctx, agent)
	defer cancel()
	l.expectEnd()
	return l.execute(ctx, runnerName, begin, func(ctx context.Context) (guest.Exit, error) {
		return agent.Resume(ctx, processes[i], l.io(processes[i]))
	})
}

// io is where the runner program's output goes: the streams of the process as it is now.
func (l *life) io(p guest.Running) guest.IO {
	return guest.IO{
		Stdout: l.output.stream(outStream, p.Stdout), Stderr: l.output.stream(errStream, p.Stderr),
		Ended: func(exit guest.Exit) {
			if err := l.update(false, func(r *record) { r.Exit = &exit }); err != nil {
				l.log.Warn("how its program ended is not recorded", "err", err)
			}
		},
	}
}

// credential is what the runner program reads. It notes when all of it is on its way.
type credential struct {
	*strings.Reader
	given *atomic.Bool
}

// WriteTo implements io.WriterTo, by which the reader is copied.
func (c *credential) WriteTo(w io.Writer) (int64, error) {
	n, err := c.Reader.WriteTo(w)
	c.given.Store(err == nil)
	return n, err
}

// Detach has runners that are stopped from now on, by the end of their contexts or by Stop, live on without this process,
// where GitHub knows them and their programs run: Run and Resume return ErrDetached for them. No runner is admitted any more.
// The next process goes on with them by Adopt. This one may do nothing but end.
func (h *Host) Detach() {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.detaching = true
}

// detach lets go of l's VM, if the host detaches and l can do without it, by ending the session with its agent.
func (h *Host) detach(l *life) bool {
	h.mu.Lock()
	able := h.detaching && l.given.Load()
	if able {
		l.detached = true
	}
	letGo := l.letGo
	h.mu.Unlock()
	if able && letGo != nil {
		letGo()
	}
	return able
}

// LetGo reports whether the VM of a runner goes on without this process.
func (h *Host) LetGo() bool {
	h.mu.Lock()
	defer h.mu.Unlock()
	for _, l := range h.lives {
		if l.detached {
			return true
		}
	}
	return false
}

func (h *Host) isDetached(l *life) bool {
	h.mu.Lock()
	defer h.mu.Unlock()
	return l.detached
}

// leave ends this process's part in a runner that goes on. It stays among the living: nobody is to sweep it.
func (l *life) leave(err error) (flint.Result, error) {
	l.mu.Lock()
	if l.overdue != nil {
		l.overdue.Stop()
	}
	l.mu.Unlock()
	if l.output != nil {
		err = errors.Join(err, l.output.close())
	}
	l.log.Info("its VM goes on without flint")
	res := flint.Result{Runner: l.snapshot(), Reason: flint.Because("runner.detached", "flint stopped, and its VM goes on")}
	res.Timeline = maps.Clone(res.Runner.Timeline)
	return res, err
}

// expectEnd gives the program the rest of its time if GitHub said long ago that its job is over.
func (l *life) expectEnd() {
	l.mu.Lock()
	defer l.mu.Unlock()
	limit := l.h.c.Deadlines.Finish
	if limit > 0 && closed(l.concluded) {
		if l.overdue != nil { // it may have fired before there was a work to end
			l.overdue.Stop()
		}
		l.overdue = time.AfterFunc(left(limit, l.began(flint.Finishing)), l.outstayed)
	}
}
