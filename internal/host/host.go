// Package host runs runners on this machine: one runner's whole life in Run, the admission that decides whether there is
// room for it and whether the machine runs out of something or drains, the adoption of what an earlier process left and still
// lives, and the sweep that undoes the rest.
//
// It owns what a runner holds (record, disk, network port, VM, registration) and releases all of it, in reverse order,
// whatever happens. It must not decide how many runners there are (sched does), nor know how GitHub, a VMM or an image
// format works: those come in through Config.
package host

import (
	"context"
	"crypto/rand"
	"encoding/hex"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"time"

	"flint"
	"flint/internal/guest"
	"flint/internal/vm"
)

// Config is what a Host stands on. All fields are required unless they say otherwise.
type Config struct {
	Name      string
	Dir       string      // records and the VMs' private files: one directory per runner
	Limits    flint.Shape // CPUs and memory all VMs together may have; Disk is not limited
	Overhead  flint.Overhead
	Deadlines Deadlines
	Driver    vm.Driver
	Attach    func(ctx context.Context, id string) (Port, error)
	// Reattach returns the port that an earlier process attached; flint.ErrNotFound where it is not whole. nil: there is none.
	Reattach func(ctx context.Context, id string) (Port, error)
	Supply   func(ctx context.Context, pool string) (Supply, error)
	Scratch  func(path string, size flint.Bytes) error // makes an empty file system, in no time whatever its size
	GitHub   Registrar                                 // nil where no runner is ever registered (flint run)
	// Lost is told of a runner of an earlier process whose VM ended, or that Sweep has to end, under a job GitHub had not
	// concluded. It may be told again after a crash. nil: nobody wants to know.
	Lost func(flint.Runner, flint.Job)
	Log  *slog.Logger
	// VMMs are file names of programs that run VMs and are called otherwise than such programs are, qemu-…, firecracker… or jailer….
	VMMs []string
	// Prefix is what the names of all its runners begin with, and of nobody else's: a VM of such a name that has no record is ended.
	// Empty: none is.
	Prefix string
	// BootTime is the time since the machine started; nil: the kernel's.
	BootTime func() time.Duration
	// Step is told before and after each change of a record, so that a test can end the process there. nil: nobody is.
	Step func(what string)
	// Pressure says why the machine takes no new VM for now, such as a disk that fills; nil: nothing ever does.
	Pressure func() flint.Reason
}

// Deadlines bound the parts of a runner's life. One that is zero is none.
type Deadlines struct {
	Boot   time.Duration // start of the VMM → the agent has configured the guest, its init included
	Online time.Duration // registration → GitHub sees the runner program; the runner fails
	Pickup time.Duration // seen by GitHub → a job; the registration is withdrawn, and the runner ends unless it has a job after all
	Job    time.Duration // start of the work → its end
	Finish time.Duration // end of the work → the guest has rebooted
}

// Port is one VM's connection to the network.
type Port struct {
	NIC     *vm.NIC
	Address flint.Address
	Probe   string // a name every DNS server of the port answers, by UDP and TCP
	Close   func(context.Context) error
}

// Supply is what the VMs of a pool are made of.
type Supply struct {
	Shape   flint.Shape
	Kernel  string // paths of the kernel pack
	Initrd  string
	Modules string // empty where the kernel has none
	Base    string // path of the base image
	Runner  string // path of the runner drive; empty for VMs that run no runner
	Tools   string // path of the drive with tools that actions find in their cache; empty: none
	// InMemory has the guest keep what is written to its root in memory. Work directory, /tmp and docker's stay on the disk.
	InMemory bool
	Env      []string
	Dir      string // the image's working directory; empty: it names none
	// Start is the runner program and its arguments, as the guest sees them; nil: /opt/flint/runner/start, which is on the
	// runner drive. It gets what docs/reference.md says of that one.
	Start  []string
	Limits vm.Limits
}

// Registrar makes a runner known to GitHub, and forgotten.
type Registrar interface {
	Register(ctx context.Context, r flint.Runner) (flint.Registration, error)
	// Remove is idempotent. It returns flint.ErrConflict while GitHub says that the runner has a job.
	Remove(ctx context.Context, runner string, githubID int64) error
	// Status says what GitHub knows of the runner; flint.ErrNotFound when it knows none of this name and id. An id of 0 is
	// not known: the name decides.
	Status(ctx context.Context, runner string, githubID int64) (flint.RunnerStatus, error)
}

// Host is this machine. Make it with New.
type Host struct {
	c Config

	mu      sync.Mutex
	lives   map[string]*life
	left    map[string]*abandoned  // by runner
	stuck   map[string]flint.Shape // by runner that is over: what its VMM, which could not be killed, still has
	stopped bool
	// detaching: those that are stopped are left to the next process, if they can be.
	detaching bool
	adopted   []*life // until Resume goes on with them
}

// New makes a Host; it touches nothing yet. Call Sweep before the first Run, after Adopt where VMs
// outlive processes.
func New(c Config) *Host {
	if c.BootTime == nil {
		c.BootTime = bootTime
	}
	return &Host{c: c, lives: map[string]*life{}, left: map[string]*abandoned{}, stuck: map[string]flint.Shape{}}
}

// maxSlug is how much of a pool's name an id shows. With a prefix of up to 28 bytes an id is a DNS label, of 63 at most.
const maxSlug = 24

// NewID makes a runner's id: unique for ever, safe as a host name, a file name and a runner's name on GitHub as far as
// prefix is. The prefix tells this coordinator's runners from all others: "flint-1a2b3c-".
func NewID(prefix, pool string) string {
	b := make([]byte, 5)
	_, _ = rand.Read(b) // never fails: crypto/rand ends the program instead
	if s := slug(pool); s != "" {
		prefix += s + "-"
	}
	return prefix + hex.EncodeToString(b)
}

// slug keeps of a pool's name what a host name may hold, at most maxSlug bytes of it.
func slug(name string) string {
	b := make([]byte, 0, maxSlug)
	for _, c := range []byte(name) {
		switch {
		case len(b) == maxSlug:
		case c >= 'A' && c <= 'Z':
			b = append(b, c+'a'-'A')
		case c >= 'a' && c <= 'z', c >= '0' && c <= '9':
			b = append(b, c)
		case len(b) > 0 && b[len(b)-1] != '-':
			b = append(b, '-')
		}
	}
	return strings.TrimSuffix(string(b), "-")
}

// Claims reports whether the name is that of a runner that lives, or that has left a record to undo: its registration is
// this host's to remove.
func (h *Host) Claims(name string) bool {
	if h.alive(name) {
		return true
	}
	if name == "" || name == "." || name == ".." || strings.Contains(name, "/") {
		return false // it cannot be ours
	}
	_, err := os.Lstat(filepath.Join(h.c.Dir, name))
	return !errors.Is(err, fs.ErrNotExist)
}

// State implements sched.Host.
func (h *Host) State() flint.HostState {
	var refuses flint.Reason
	if h.c.Pressure != nil {
		refuses = h.c.Pressure()
	}
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.detaching {
		refuses = flint.Because("host.stopping", "flint is stopping; its VMs go on, and it takes them up again when it starts")
	}
	s := flint.HostState{Name: h.c.Name, Free: h.free(), Overhead: h.c.Overhead, Refuses: refuses}
	for _, id := range slices.Sorted(maps.Keys(h.lives)) {
		s.Runners = append(s.Runners, h.lives[id].snapshot())
	}
	return s
}

// Runner returns one runner of State.
func (h *Host) Runner(id string) (r flint.Runner, ok bool) {
	h.mu.Lock()
	defer h.mu.Unlock()
	l, ok := h.lives[id]
	if !ok {
		return r, false
	}
	return l.snapshot(), true
}

// free is what admission would still grant. The caller holds h.mu.
func (h *Host) free() flint.Shape {
	free := h.c.Limits
	take := func(s flint.Shape) {
		free.CPUs -= s.CPUs
		free.Memory -= s.Memory + h.c.Overhead.Of(s.Memory)
	}
	for _, l := range h.lives {
		if !l.released {
			take(l.shape)
		}
	}
	for _, s := range h.stuck {
		take(s)
	}
	// What is left must also hold the next VM's overhead. What of it grows with the guest is not known here.
	free.Memory = max(free.Memory-h.c.Overhead.Fixed, 0)
	free.CPUs = max(free.CPUs, 0)
	return free
}

// Run implements sched.Host: it runs one job in one VM. It blocks until r is over and everything it held is released.
// Cancelling ctx ends r early, except that a runner cancelled with flint.ErrUnneeded goes on if GitHub has given it a job.
// An error that is the guest's fault is flint.ErrGuest; any other is this host's.
func (h *Host) Run(ctx context.Context, r flint.Runner) (flint.Result, error) {
	return h.live(ctx, r, (*life).job)
}

// Command is one command for a VM without GitHub.
type Command struct {
	guest.Command
	guest.IO
}

// Command runs one command in a VM that exists for it alone. The command's exit is in the Result.
func (h *Host) Command(ctx context.Context, r flint.Runner, c Command) (flint.Result, error) {
	return h.live(ctx, r, func(l *life, ctx context.Context, agent *guest.Session) error {
		l.advance(flint.Running)
		return l.execute(ctx, c.Args[0], time.Now(), func(ctx context.Context) (guest.Exit, error) {
			return agent.Exec(ctx, c.Command, c.IO)
		})
	})
}

// live is the whole life of a runner. Each step registers the release of what it took with l.undo; l.end runs them.
func (h *Host) live(ctx context.Context, r flint.Runner, work func(*life, context.Context, *guest.Session) error) (res flint.Result, err error) {
	supply, err := h.c.Supply(ctx, r.Pool)
	if err != nil {
		return flint.Result{Runner: r}, fmt.Errorf("find what pool %s is made of: %w", r.Pool, err)
	}
	l, err := h.admit(r, supply)
	if err != nil {
		return flint.Result{Runner: r}, err
	}
	defer func() {
		if err != nil && ctx.Err() != nil && !explained(err) {
			err = fmt.Errorf("%w (%w)", ended(context.Cause(ctx)), err)
		}
		res, err = l.end(ctx, err)
	}()

	if err := l.record(); err != nil {
		return res, err
	}
	if err := l.prepare(ctx); err != nil {
		return res, err
	}
	if err := l.boot(ctx); err != nil {
		return res, err
	}
	agent, err := l.greet(ctx)
	if err != nil {
		return res, err
	}
	if err := work(l, ctx, agent); err != nil {
		return res, err
	}
	return res, l.reboot(ctx)
}

// admit counts r against the limits, from now until its end.
func (h *Host) admit(r flint.Runner, s Supply) (*life, error) {
	h.mu.Lock()
	defer h.mu.Unlock()
	if _, ok := h.lives[r.ID]; ok {
		return nil, fmt.Errorf("run %s: %w: a runner with this id lives already", r.ID, flint.ErrConflict)
	}
	need := s.Shape
	need.Memory += h.c.Overhead.Growing(need.Memory)
	if free := h.free(); need.CPUs > free.CPUs || need.Memory > free.Memory {
		return nil, &flint.Fault{
			Code: "host.full", What: "admit a VM that needs " + describe(need), Kind: flint.ErrConflict,
			Err: fmt.Errorf("%s are free of %s", describe(free), describe(h.c.Limits)),
			Fix: "wait for a VM to end, make the pool's vm smaller, or raise host.cpus and host.memory",
		}
	}
	r.Host, r.Timeline = h.c.Name, maps.Clone(r.Timeline)
	if r.Timeline == nil {
		r.Timeline = flint.Timeline{}
	}
	if r.Timeline[flint.Planned].IsZero() {
		r.Timeline[flint.Planned] = time.Now()
	}
	r.Phase = flint.Planned
	l := newLife(h, r, s)
	h.lives[r.ID] = l
	return l, nil
}

func describe(s flint.Shape) string { return fmt.Sprintf("%d cpus and %s", s.CPUs, s.Memory) }

// Note records what GitHub says of a job. It returns once that is on disk, so that the message can be acknowledged. An
// event for a runner that is not here any more is no error.
func (h *Host) Note(_ context.Context, ev flint.JobEvent) error {
	h.mu.Lock()
	l := h.lives[ev.Runner]
	h.mu.Unlock()
	if l == nil {
		h.c.Log.Debug("job event for a runner that is gone", "runner", ev.Runner, "job", ev.Job.Name)
		if ev.Kind == flint.JobCompleted {
			h.conclude(ev.Runner)
			return nil
		}
		return h.noteGone(ev)
	}
	err := l.note(ev)
	if ev.Kind == flint.JobCompleted {
		h.conclude(ev.Runner) // it may have ended meanwhile
	}
	return err
}

// Stop ends every runner that outlives its context because it has a job, or lets go of it after Detach. Cancel the contexts of
// Run first. It returns at once; Run returns when each is over.
func (h *Host) Stop() {
	h.mu.Lock()
	h.stopped = true
	lives := slices.Collect(maps.Values(h.lives))
	h.mu.Unlock()
	for _, l := range lives {
		h.stop(l)
	}
}

func (h *Host) stop(l *life) {
	if h.detach(l) {
		return
	}
	h.mu.Lock()
	defer h.mu.Unlock()
	if l.abort != nil {
		l.abort(flint.ErrStopped)
	}
}

// onStop registers what Stop does to l: it calls abort, or letGo.
func (h *Host) onStop(l *life, letGo func(), abort context.CancelCauseFunc) {
	h.mu.Lock()
	l.letGo, l.abort = letGo, abort
	stop := h.stopped && abort != nil
	h.mu.Unlock()
	if stop {
		h.stop(l)
	}
}
