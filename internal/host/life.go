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

// releaseTime bounds the release of everything a runner held.
const releaseTime = time.Minute

// conclusionTime is how long a runner whose VM is gone waits for GitHub's word on its job. It usually comes first.
const conclusionTime = 2 * time.Second

// verdictTime is how long a VM whose agent is lost gets to end, and so to say why.
const verdictTime = 2 * time.Second

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
	output   *logbook    // nil until it is registered
	recorded bool        // the directory is ours
	adopted  bool        // an earlier process began it
	given    atomic.Bool // its program has all it needs to be the runner
	result   flint.Result

	abort     context.CancelCauseFunc // under Host.mu; ends a work that yields
	agent     *guest.Session          // under Host.mu; while its program runs
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

// awaitConclusion gives GitHub's word on the job, which comes by another way than the end of its VM, a moment to arrive.
func (l *life) awaitConclusion(ctx context.Context) {
	ctx, cancel := context.WithTimeout(ctx, conclusionTime)
	defer cancel()
	select {
	case <-l.concluded:
	case <-ctx.Done():
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
	l.undo.Push("close the agent's channel", func(context.Context) error { return agent.Close() })
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

// noGuest says why a VM did not come up: the deadline rather than what it interrupted, with the console beside it.
func (l *life) noGuest(ctx context.Context, what string, err error) error {
	var why error
	var fix string
	switch cause := context.Cause(ctx); {
	case cause == nil:
		fix, why = l.verdict(ctx, err)
	case errors.Is(cause, flint.ErrTimeout):
		why, fix = cause, l.look()+"; a machine without KVM may need a longer vm.boot_timeout"
	default:
		return fmt.Errorf("%s: %w", what, ended(cause))
	}
	return &flint.Fault{Code: "vm.boot", What: what, Kind: flint.ErrGuest, Err: &vm.BootError{Err: why, Console: l.console()}, Fix: fix}
}

// verdict adds to the loss of the agent how its VM ended, or that it did not, and says what to do about it.
func (l *life) verdict(ctx context.Context, lost error) (fix string, why error) {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), verdictTime)
	defer cancel()
	err := l.machine.Wait(ctx)
	switch {
	case err == nil:
		return l.look(), fmt.Errorf("its guest ended by itself, by a reboot or a panic: %w", lost)
	case ctx.Err() != nil && errors.Is(err, ctx.Err()):
		return l.look(), fmt.Errorf("its VMM still runs, and its agent does not answer: %w", lost)
	}
	l.result.OOM = l.result.OOM || errors.Is(err, vm.ErrMemory)
	fix = l.look()
	var fault *flint.Fault
	if errors.As(err, &fault) {
		fix = fault.Fix
	}
	return fix, fmt.Errorf("%w (%w)", err, lost)
}

// look says where to look for why a VM was lost.
func (l *life) look() string {
	if c, ok := l.machine.(vm.Console); ok && len(c.Console()) == 0 {
		return "the guest's console is empty: where VMs run under Firecracker, firecracker.serial: true makes it speak"
	}
	return "the end of the guest's console says more"
}

// console is the end of the guest's console, or of what the VMM itself said where that is all there is.
func (l *life) console() []byte {
	if c, ok := l.machine.(vm.Console); ok {
		if b := c.Console(); len(b) > 0 {
			return b
		}
	}
	if c, ok := l.machine.(vm.Log); ok {
		return c.Log()
	}
	return nil
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
	return l.execute(ctx, agent, start[0], time.Now(), func(ctx context.Context) (guest.Exit, error) { return agent.Exec(ctx, c, io) })
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
	ctx context.Context, agent *guest.Session, name string, begin time.Time, run func(context.Context) (guest.Exit, error),
) error {
	limit := l.h.c.Deadlines.Job
	ctx, cancel := within(ctx, left(limit, begin), fmt.Errorf("%w: longer than %s", flint.ErrTimeout, limit))
	defer cancel()
	exit, err := run(ctx)
	if err != nil && l.h.isDetached(l) {
		return ErrDetached
	}
	if err != nil && context.Cause(ctx) == nil {
		return l.wentLost(ctx, "run "+name, err)
	}
	l.exited(exit)
	if err != nil {
		return l.cutShort(name, context.Cause(ctx))
	}
	if stats, err := agent.Stats(ctx); err == nil {
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

// wentLost is the error of a VM whose agent was lost under its work.
func (l *life) wentLost(ctx context.Context, what string, err error) error {
	fix, why := l.verdict(ctx, err)
	return &flint.Fault{
		Code: "vm.lost", What: what, Kind: flint.ErrGuest, Err: &vm.LostError{Err: why, Console: l.console()},
		Fix: "the VM ended or fell silent before its work did; " + fix,
	}
}

// reboot ends the guest the orderly way. A guest that does not follow is no failure: l.end ends it by force.
func (l *life) reboot(ctx context.Context, agent *guest.Session) error {
	l.advance(flint.Finishing)
	ctx, cancel := within(ctx, l.h.c.Deadlines.Finish, context.DeadlineExceeded)
	defer cancel()
	err := agent.Reboot(ctx)
	if err == nil {
		err = l.machine.Wait(ctx)
	}
	if err != nil && context.Cause(ctx) == nil {
		l.log.Warn("guest did not end by itself", "err", err)
	}
	return nil
}

// end releases everything and says how the runner ended. If something could not be released, what Sweep needs to try
// again stays on disk.
func (l *life) end(ctx context.Context, err error) (flint.Result, error) {
	if errors.Is(err, ErrDetached) {
		return l.leave(err)
	}
	if l.recorded {
		uerr := l.update(false, func(r *record) {
			l.h.enter(r, flint.Finishing)
			r.Ending = err != nil
		})
		if uerr != nil {
			l.log.Warn("the record lags behind", "phase", flint.Finishing, "err", uerr)
		}
	}
	l.result.Lost = l.lost(err)
	l.result.Console = strings.ToValidUTF8(string(l.console()), "\uFFFD")
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), releaseTime)
	defer cancel()
	if l.output != nil {
		_ = l.output.close() // what it has is in memory, too
	}
	leftover := l.release(ctx)
	if m, ok := l.machine.(vm.Metrics); ok {
		l.result.VMM = m.Metrics()
	}
	if u, ok := l.machine.(vm.Usage); ok {
		l.result.PeakMemory = u.PeakMemory()
	}
	l.mu.Lock()
	l.h.enter(&l.rec, flint.Gone)
	registered := l.rec.Register
	if l.overdue != nil {
		l.overdue.Stop()
	}
	l.mu.Unlock()
	l.h.mu.Lock()
	l.released = true
	l.h.mu.Unlock()
	if (err == nil || l.result.Lost) && registered {
		l.awaitConclusion(ctx)
	}
	l.h.bury(l, leftover != nil && registered)

	l.mu.Lock()
	defer l.mu.Unlock()
	l.result.Timeline = maps.Clone(l.rec.Runner.Timeline)
	l.result.Runner = l.rec.Runner
	l.result.Runner.Timeline = l.result.Timeline
	l.result.Conclusion = l.conclusion
	if l.output != nil {
		l.result.Output = strings.ToValidUTF8(string(l.output.Bytes()), "\uFFFD")
	}
	l.result.Lost = l.result.Lost && !closed(l.concluded)
	l.result.Reason = l.why(err)
	return l.result, errors.Join(err, leftover)
}

// lost reports whether the runner ended under a job that GitHub has not concluded, without anybody's having ended it. It is
// logged at once: GitHub itself notices only when it has heard nothing for minutes.
func (l *life) lost(err error) bool {
	for _, kind := range []error{flint.ErrUnneeded, flint.ErrStopped, flint.ErrTimeout} {
		if errors.Is(err, kind) {
			return false
		}
	}
	l.mu.Lock()
	job := l.rec.Runner.Job
	l.mu.Unlock()
	if job == nil || closed(l.concluded) || err == nil && l.result.Signal == "" {
		return false
	}
	l.log.Error("its VM ended under its job", "job", job.Name, "repository", job.Repository, "run", job.RunID)
	return true
}

// release undoes every step. The record goes last, and only if nothing else is left for Sweep to undo.
func (l *life) release(ctx context.Context) error {
	if err := l.undo.Run(ctx); err != nil {
		l.log.Warn("not everything could be released; flint tries again every few minutes", "err", err)
		return fmt.Errorf("%w: %w", flint.ErrRelease, err)
	}
	if !l.recorded {
		return nil
	}
	l.mu.Lock() // nobody writes the record meanwhile
	defer l.mu.Unlock()
	l.erased = true
	return l.h.erase(l.dir)
}

// why tells a person how the runner ended. The caller holds l.mu.
func (l *life) why(err error) flint.Reason {
	var fault *flint.Fault
	switch r := l.result; {
	case err != nil && r.Lost:
		return flint.Because("runner.lost", "the VM was lost under %s; GitHub will declare it failed in about ten minutes (%s)", jobOf(l.rec.Runner), err)
	case errors.Is(err, errIdle):
		return flint.Because("runner.idle", "GitHub gave it no job within %s", l.h.c.Deadlines.Pickup)
	case errors.Is(err, flint.ErrUnneeded):
		return flint.Because("runner.unneeded", "nobody needed it any more")
	case errors.Is(err, flint.ErrStopped):
		return flint.Because("runner.stopped", "flint was told to stop")
	case errors.As(err, &fault) && fault.Code == "runner.offline":
		return flint.Because(fault.Code, "%s; %s", fault, fault.Fix)
	case errors.Is(err, flint.ErrGuest):
		return flint.Because("runner.guest", "its VM failed: %s", err)
	case errors.Is(err, flint.ErrTimeout):
		return flint.Because("runner.time_limit", "its time was up: %s", err)
	case err != nil:
		return flint.Because("runner.failed", "it failed: %s", err)
	case !l.shortage().IsZero() && !l.succeeded(): // what it ran out of did no harm otherwise
		return l.shortage()
	case r.Lost:
		return flint.Because("runner.lost", "its program was ended by %s under %s; GitHub will declare it failed in about ten minutes",
			r.Signal, jobOf(l.rec.Runner))
	case r.ExitCode == exitDeprecated && l.rec.Register && l.rec.Runner.Job == nil:
		return flint.Because("runner.deprecated", "GitHub refuses this version of the runner software: give the pool a newer release")
	case r.Unstarted != "":
		return flint.Because("runner.start", "its program could not be started: %s", r.Unstarted)
	case r.ExitCode != 0:
		return flint.Because("runner.exit", "its program ended with code %d", r.ExitCode)
	}
	return flint.Because("runner.done", "its work was done")
}

// exitDeprecated is how the runner program ends when GitHub refuses its version (actions/runner, Constants.ReturnCode). One
// that had a job was not refused: its exit code is then what the job made of it.
const exitDeprecated = 7

// jobOf names a runner's job for a person.
func jobOf(r flint.Runner) string {
	if r.Job.Repository == "" {
		return "job " + r.Job.Name
	}
	return fmt.Sprintf("job %s of %s", r.Job.Name, r.Job.Repository)
}
