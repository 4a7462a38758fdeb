package host

import (
	"context"
	"crypto/rand"
	"encoding/hex"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"flint"
	"flint/internal/guest"
	"flint/internal/undo"
	"flint/internal/vm"
)

// life is one runner while it lives. Its steps run one after the other in the goroutine of Run; only the fields under mu
// are read or written by others.
type life struct {
	h        *Host
	log      *slog.Logger
	dir      string // the runner's own directory
	supply   Supply
	shape    flint.Shape
	undo     undo.Stack
	port     Port
	machine  vm.Machine
	session  *guest.Session // with its agent, the newest
	output   *logbook       // nil until it is registered
	recorded bool           // the directory is ours
	adopted  bool           // an earlier process began it
	given    atomic.Bool    // its program has all it needs to be the runner
	result   flint.Result

	abort     context.CancelCauseFunc // under Host.mu; ends a work that yields
	letGo     func()                  // under Host.mu; while its program runs, ends the session with its agent
	detached  bool                    // under Host.mu; its VM is left to the next process
	released  bool                    // under Host.mu; it holds nothing any more
	taken     chan struct{}           // closed when GitHub has said that it has a job
	concluded chan struct{}           // closed when GitHub has said how the job ended

	mu         sync.Mutex
	rec        record
	conclusion string
	erased     bool        // the record is gone, and stays so
	overdue    *time.Timer // from the job's end, for a program that does not end with it
}

func newLife(h *Host, r flint.Runner, s Supply) *life {
	return &life{
		h: h, log: h.c.Log.With("runner", r.ID), dir: filepath.Join(h.c.Dir, r.ID), supply: s, shape: s.Shape,
		taken: make(chan struct{}), concluded: make(chan struct{}),
		rec: record{Version: recordVersion, Runner: r, Shape: s.Shape},
	}
}

func (l *life) id() string { return l.rec.Runner.ID } // never changes

// snapshot is a copy nobody writes to.
func (l *life) snapshot() flint.Runner {
	l.mu.Lock()
	defer l.mu.Unlock()
	r := l.rec.Runner
	r.Timeline = maps.Clone(r.Timeline)
	return r
}

// update changes the record in memory and on disk. The change stays in memory even if the disk refuses it.
func (l *life) update(durable bool, change func(*record)) error {
	l.mu.Lock()
	defer l.mu.Unlock()
	change(&l.rec)
	if l.erased { // what the record was for is gone
		return nil
	}
	return spaceOr(l.h.save(l.rec, l.dir, durable))
}

// advance enters a phase, unless the runner is past it already: GitHub may report a job before we see the runner at it.
func (l *life) advance(p flint.Phase) {
	err := l.update(false, func(r *record) { l.h.enter(r, p) })
	if err != nil {
		l.log.Warn("the record lags behind", "phase", p, "err", err)
	}
	l.log.Debug("phase", "phase", p)
}

func (l *life) note(ev flint.JobEvent) error {
	change := func(r *record) {
		r.Runner.Job = &ev.Job
		l.given.Store(true) // or it would have none
		l.h.enter(r, flint.Running)
		if !closed(l.taken) {
			close(l.taken)
		}
		if ev.Kind != flint.JobCompleted {
			return
		}
		l.h.enter(r, flint.Finishing)
		r.Concluded = true
		if closed(l.concluded) {
			return // GitHub repeats itself
		}
		l.conclusion, r.Conclusion = ev.Conclusion, ev.Conclusion
		close(l.concluded)
		if limit := l.h.c.Deadlines.Finish; limit > 0 {
			l.overdue = time.AfterFunc(limit, l.outstayed)
		}
	}
	return l.update(true, change)
}

func closed(c <-chan struct{}) bool {
	select {
	case <-c:
		return true
	default:
		return false
	}
}

// outstayed ends a runner whose program goes on although GitHub says that its job is over.
func (l *life) outstayed() {
	l.h.mu.Lock()
	defer l.h.mu.Unlock()
	if l.abort != nil {
		l.abort(fmt.Errorf("%w: %s after the end of its job its program still ran", flint.ErrTimeout, l.h.c.Deadlines.Finish))
	}
}

// record writes the intent before the first resource exists.
func (l *life) record() error {
	if err := os.Mkdir(l.dir, 0o700); err != nil {
		return spaceOr(fmt.Errorf("make the runner's directory: %w", err))
	}
	l.recorded = true
	// Below everything else in the stack: GitHub lets go of a registration when its runner is silent, so the VM ends first.
	l.undo.Push("remove registration", l.unregister)
	return l.update(true, func(*record) {})
}

// prepare makes the scratch disk and the network port.
func (l *life) prepare(ctx context.Context) error {
	l.advance(flint.Preparing)
	if err := l.h.c.Scratch(l.scratch(), l.shape.Disk); err != nil {
		return fmt.Errorf("make scratch disk: %w", err)
	}
	port, err := l.h.c.Attach(ctx, l.id())
	if err != nil {
		return fmt.Errorf("attach to network: %w", err)
	}
	l.undo.Push("detach from network", port.Close)
	l.port = port
	return nil
}

func (l *life) scratch() string { return filepath.Join(l.dir, "scratch.ext4") }

// boot starts the VMM and forgets the scratch disk's name: its space is free again when the VMM ends, whatever else dies.
func (l *life) boot(ctx context.Context) error {
	s := vm.Spec{
		ID: l.id(), Dir: l.dir, CPUs: l.shape.CPUs, Memory: l.shape.Memory,
		Kernel: l.supply.Kernel, Initrd: l.supply.Initrd, NIC: l.port.NIC, Limits: l.supply.Limits,
		Drives: []vm.Drive{
			{ID: "base", Path: l.supply.Base, ReadOnly: true},
			{ID: "scratch", Path: l.scratch()},
		},
	}
	if l.supply.Modules != "" {
		s.Drives = append(s.Drives, vm.Drive{ID: "modules", Path: l.supply.Modules, ReadOnly: true})
	}
	if l.supply.Runner != "" {
		s.Drives = append(s.Drives, vm.Drive{ID: "runner", Path: l.supply.Runner, ReadOnly: true})
	}
	if l.supply.Tools != "" {
		s.Drives = append(s.Drives, vm.Drive{ID: "tools", Path: l.supply.Tools, ReadOnly: true})
	}
	if l.supply.InMemory {
		s.Args = append(s.Args, "flint.root=memory")
	}
	l.log.Debug("prepared", "took", time.Since(l.snapshot().Timeline[flint.Planned]))
	machine, err := l.h.c.Driver.Boot(ctx, s)
	if err != nil {
		return fmt.Errorf("boot: %w", err)
	}
	l.undo.Push("end the VM", machine.Close)
	l.machine = machine
	if err := os.Remove(l.scratch()); err != nil {
		return fmt.Errorf("unlink scratch disk: %w", err)
	}
	if p, ok := machine.(vm.Process); ok {
		err := l.update(false, func(r *record) {
			r.PID, r.Start = p.Process()
			r.Boot = bootID()
		})
		if err != nil {
			return fmt.Errorf("record the VMM: %w", err)
		}
	}
	l.advance(flint.Booting)
	return nil
}

// greet waits for the agent and makes the guest this runner's.
func (l *life) greet(ctx context.Context) (*guest.Session, error) {
	limit := l.h.c.Deadlines.Boot
	ctx, cancel := within(ctx, limit, fmt.Errorf("%w after %s", flint.ErrTimeout, limit))
	defer cancel()
	conn, err := l.machine.Dial(ctx, guest.Port)
	if err != nil {
		return nil, l.noGuest(ctx, "reach the agent", err)
	}
	agent, err := guest.Attach(ctx, conn, guest.Options{Log: l.log})
	if err != nil {
		return nil, l.noGuest(ctx, "greet the agent", err)
	}
	l.talk(agent)
	hello := agent.Hello()
	l.log.Debug("agent answers", "kernel", hello.Kernel, "init", hello.Init, "uptime", hello.Uptime)
	for _, fault := range hello.Faults {
		l.log.Warn("guest came up with a fault", "fault", fault)
	}
	configured, err := agent.Configure(ctx, l.config(ctx))
	if err != nil {
		return nil, l.noGuest(ctx, "configure the guest", err)
	}
	for _, fault := range configured.Faults {
		l.log.Warn("guest is configured with a fault", "fault", fault)
	}
	l.advance(flint.Ready)
	return agent, nil
}

const (
	settleAtMost = time.Minute     // what the init of an image is worth waiting for
	settleSpares = 5 * time.Second // of the time the guest has to come up, for the rest of its configuration
)

// config is what makes the guest this runner's, in the time that ctx leaves.
func (l *life) config(ctx context.Context) guest.Config {
	entropy, machineID := make([]byte, 64), make([]byte, 16)
	_, _ = rand.Read(entropy) // never fails: crypto/rand ends the program instead
	_, _ = rand.Read(machineID)
	c := guest.Config{
		Hostname: l.id(), MachineID: hex.EncodeToString(machineID), Time: time.Now(), Entropy: entropy, Probe: l.port.Probe,
		Settle: settleAtMost,
	}
	if deadline, ok := ctx.Deadline(); ok {
		c.Settle = max(0, min(time.Until(deadline)-settleSpares, settleAtMost))
	}
	if a := l.port.Address; a.MAC != "" {
		c.Interface = &guest.Interface{MAC: a.MAC, Prefixes: a.Prefixes, Gateways: a.Gateways, MTU: a.MTU}
		c.DNS = a.Gateways
	}
	return c
}

// job makes the guest a runner and lets it work until the runner program ends.
func (l *life) job(ctx context.Context, agent *guest.Session) error {
	if err := l.update(true, func(r *record) { r.Register = true }); err != nil {
		return fmt.Errorf("record the registration to come: %w", err)
	}
	reg, err := l.register(ctx)
	if err != nil {
		return fmt.Errorf("register: %w", err)
	}
	err = l.update(false, func(r *record) {
		r.GitHubID = reg.GitHubID
		l.h.enter(r, flint.Registered)
	})
	if err != nil {
		return fmt.Errorf("record the registration: %w", err)
	}
	l.log.Debug("phase", "phase", flint.Registered)
	l.output = openLogbook(l.dir, l.log)
	ctx, cancel := l.yielding(ctx, agent)
	defer cancel()
	// The contract of the runner drive, see docs/reference.md: one line on standard input, nothing secret elsewhere.
	start := l.supply.Start
	if len(start) == 0 {
		start = []string{"/opt/flint/runner/start"}
	}
	c := guest.Command{Name: runnerName, Args: start, User: "runner", Dir: "/work", Env: l.supply.Env}
	io := l.io(guest.Running{})
	io.Stdin = &credential{strings.NewReader(string(reg.Credential) + "\n"), &l.given}
	return l.execute(ctx, start[0], time.Now(), func(ctx context.Context) (guest.Exit, error) { return agent.Exec(ctx, c, io) })
}

// talk makes agent the session with the guest, until the runner's end or another one takes its place.
func (l *life) talk(agent *guest.Session) {
	if l.session == nil {
		l.undo.Push("close the agent's channel", func(context.Context) error { return l.session.Close() })
	} else {
		_ = l.session.Close() // never an error
	}
	l.session = agent
}

// unregister makes GitHub forget the runner, if it may know it. After a job it has done so by itself.
func (l *life) unregister(ctx context.Context) error {
	l.mu.Lock()
	id, maybe := l.rec.GitHubID, l.rec.Register
	l.mu.Unlock()
	if !maybe {
		return nil
	}
	// Under a lost job GitHub keeps the registration for minutes: its record stays for Sweep, and the loss is said now.
	return remove(ctx, l.h.c.GitHub, l.id(), id, !l.result.Lost)
}

// execute stays with the VM's one command, by run, under the job's deadline, which counts from its begin, and notes how it
// ended.
func (l *life) execute(
	ctx context.Context, name string, begin time.Time, run func(context.Context) (guest.Exit, error),
) error {
	limit := l.h.c.Deadlines.Job
	ctx, cancel := within(ctx, left(limit, begin), fmt.Errorf("%w: longer than %s", flint.ErrTimeout, limit))
	defer cancel()
	exit, err := l.persist(ctx, run)
	if err != nil && l.h.isDetached(l) {
		return ErrDetached
	}
	if errors.Is(err, flint.ErrUsage) { // the guest was not asked
		return fmt.Errorf("run %s: %w", name, err)
	}
	if err != nil && context.Cause(ctx) == nil {
		return l.wentLost(ctx, "run "+name, err)
	}
	l.exited(exit)
	if err != nil {
		return l.cutShort(name, context.Cause(ctx))
	}
	if stats, err := l.session.Stats(ctx); err == nil {
		l.result.GuestMemory = flint.Bytes(stats.MemoryPeak)
	}
	return nil
}

// exited takes over how the program ended.
func (l *life) exited(exit guest.Exit) {
	l.result.Unstarted = exit.Err
	l.result.ExitCode, l.result.Signal = exit.Code, exit.Signal
	l.result.OOM, l.result.PIDs, l.result.DiskFull = exit.OOM, exit.PIDs, exit.DiskFull
	l.result.RootFull = exit.RootFull
}

// reboot ends the guest the orderly way. A guest that does not follow is no failure: l.end ends it by force.
func (l *life) reboot(ctx context.Context) error {
	l.advance(flint.Finishing)
	ctx, cancel := within(ctx, l.h.c.Deadlines.Finish, context.DeadlineExceeded)
	defer cancel()
	err := l.session.Reboot(ctx)
	if err == nil {
		err = l.machine.Wait(ctx)
	}
	if err != nil && context.Cause(ctx) == nil {
		l.log.Warn("guest did not end by itself", "err", err)
	}
	return nil
}
