// Package app wires the rooms together and owns every long-lived task.
//
// New acquires what every way of running needs (state directory, images, kernel, network, host); Serve is the
// coordinator, Command one VM for one command; Close gives everything back. Nothing is decided here: it must not hold
// logic that a room could hold.
package app

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"maps"
	"net"
	"net/http"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"sync"
	"time"

	"golang.org/x/sync/errgroup"
	"golang.org/x/sys/unix"

	"flint"
	"flint/internal/config"
	"flint/internal/github"
	"flint/internal/github/webhook"
	"flint/internal/host"
	"flint/internal/image"
	"flint/internal/kernel"
	"flint/internal/network"
	"flint/internal/runnersoft"
	"flint/internal/sched"
	"flint/internal/undo"
	"flint/internal/vm"
	"flint/internal/vm/qemu"
)

// Options are what the caller decides beside the configuration. Log is required.
type Options struct {
	Log      *slog.Logger
	Progress flint.Progress
	// Instance names this flint among those that share a state directory (images, kernels): each has its own lock and
	// its own runners, and needs a network of its own. Empty: serve.
	Instance string
	// LocalBase allows images to be built on a Debian base made here when the registry of their Dockerfile's BASE
	// cannot be reached.
	LocalBase bool
	// Services are TCP services on the gateway's addresses that guests may reach.
	Services []netip.AddrPort
	// Outlive has VMs outlive this process: those of an earlier one are gone on with, and those of this one are left to the next,
	// unless host.on_stop says otherwise.
	Outlive bool
	// Result is told how each runner ended; it may be called concurrently. May be nil.
	Result func(flint.Result, error)
	// API is the path of the socket at which commands ask Serve; empty: they cannot.
	API string
	// Reload reads the configuration again; nil: it cannot be. Reloads asks for that, beside the API. SetLevel changes the
	// level of Log, and reports false where that is not the configuration's to decide.
	Reload   func() (config.Config, error)
	Reloads  <-chan struct{}
	SetLevel func(level string) bool
	// DrainTimeout is how long Serve waits for the last runner when it is told to stop, before it stops as usual. Hurry ends
	// that at once.
	DrainTimeout time.Duration
	Hurry        <-chan struct{}
}

// App is a flint that has what it needs. Make it with New and end it with Close.
type App struct {
	cfg  config.Config
	opt  Options
	log  *slog.Logger
	dir  string // the instance's own part of the state directory
	undo undo.Stack

	store  *image.Store
	driver vm.Driver
	extra  flint.Overhead // what a VMM is counted with beyond its guest's memory
	net    *network.Network
	host   *host.Host // knows GitHub after Connect
	sweep  sync.Once
	attach func(ctx context.Context, id string) (host.Port, error)
	// reattach finds what an earlier process attached.
	reattach func(ctx context.Context, id string) (host.Port, error)

	pressure   host.Pressure // why no VM is started for now
	collecting sync.Mutex    // held by collect, and while a pool gets what its VMs are made of

	drain        host.Drain   // why the host takes no new runner although it could
	reloading    reloading    // what reloads have changed
	preparations preparations // pools' images that are being made
	notifier     notifier

	// Ways to the network that tests replace; nil: the machine's own.
	transport http.RoundTripper
	listen    func(ctx context.Context, network, address string) (net.Listener, error)

	// After Connect:
	prefix   string // of the names of all our runners
	github   *github.Client
	hooks    *webhook.Receiver // nil where no account uses webhooks
	listener net.Listener      // of the webhooks
	demand   *sources
	reruns   *github.Reruns
	adopted  *adopted // nil: no VM of an earlier process is gone on with

	tasks  *errgroup.Group // what runs from New to Close
	served chan struct{}   // closed when the network no longer serves
	left   chan struct{}   // has room for one word that a runner left something behind

	fetching sync.Mutex // held while runner software is fetched for pools: one at a time can change what is kept

	mu sync.Mutex
	// Guarded by mu, after Prepare: the path of the runner software's drive, and what that was made of.
	runnerDrive string
	runnerDir   fs.FileInfo
	pack        kernel.Pack
	supply      map[string]host.Supply
	software    runnersoft.Standing            // of all pools but those that pin another
	pinned      map[string]runnersoft.Standing // by version: of pools that do
	refused     map[string]runnersoft.Refusal  // by pool; "": of all that share their software
	stale       map[string]flint.Reason        // by pool: why its image is what was there before
	loop        *sched.Loop                    // while Serve runs
}

// New acquires, in this order: the state directory, its lock, the image store, the VM driver, and the network, whose DNS
// forwarder runs from then on. If one fails, those before it are given back.
func New(ctx context.Context, cfg config.Config, opt Options) (_ *App, err error) {
	if opt.Instance == "" {
		opt.Instance = "serve"
	}
	a := &App{cfg: cfg, opt: opt, log: opt.Log, dir: filepath.Join(cfg.StateDir, opt.Instance), supply: map[string]host.Supply{}, left: make(chan struct{}, 1)}
	a.opt.Progress = a.progressTo(opt.Progress)
	defer func() {
		if err != nil {
			err = errors.Join(err, a.Close(ctx))
		}
	}()
	if err := a.lock(); err != nil {
		return nil, err
	}
	if a.store, err = makeStore(cfg, a.log); err != nil {
		return nil, err
	}
	if err := a.openDriver(ctx, vm.ProbeKVM); err != nil {
		return nil, err
	}
	if err := a.openNetwork(ctx); err != nil {
		return nil, err
	}
	a.host = a.newHost(nil)
	return a, nil
}

// lock makes the instance's directory ours alone.
func (a *App) lock() error {
	denied := func(err error) error {
		if f := flint.SpaceFault("state.space", "use state directory", "the state directory", err); f != nil {
			return f
		}
		return &flint.Fault{
			Code: "state.dir", What: "use state directory", Kind: flint.ErrPermission, Err: err,
			Fix: "run as root, or set state_dir to a directory you may write to",
		}
	}
	if err := os.MkdirAll(a.dir, 0o755); err != nil {
		return denied(err)
	}
	f, err := os.OpenFile(filepath.Join(a.dir, "lock"), os.O_CREATE|os.O_RDWR, 0o600)
	if err != nil {
		return denied(err)
	}
	a.undo.Push("unlock state directory", func(context.Context) error { return f.Close() })
	err = unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB)
	if err != nil && !errors.Is(err, unix.EWOULDBLOCK) {
		return &flint.Fault{
			Code: "state.dir", What: "lock state directory " + a.dir, Err: err, Fix: "see what the kernel says of its disk (dmesg); it must be a local one",
		}
	}
	if err != nil {
		return &flint.Fault{
			Code: "state.locked", What: "lock state directory " + a.dir, Kind: flint.ErrConflict, Err: errors.New("another flint uses it" + ownerOf(f)),
			Fix: "stop the other flint, or set state_dir and network to something of its own",
		}
	}
	// For whoever finds it locked. The lock is what counts, so a full disk does not hinder.
	if err := errors.Join(f.Truncate(0), writeAt(f, strconv.Itoa(os.Getpid()))); err != nil {
		a.log.Debug("note who has the state directory", "err", err)
	}
	return nil
}

func writeAt(f *os.File, text string) error {
	_, err := f.WriteAt([]byte(text), 0)
	return err
}

// ownerOf names the process that wrote itself into a lock.
func ownerOf(f *os.File) string {
	var b [16]byte
	n, _ := f.ReadAt(b[:], 0)
	pid, err := strconv.Atoi(string(b[:n]))
	if err != nil {
		return ""
	}
	return fmt.Sprintf(": process %d", pid)
}

// checkEvery is how often the network is looked at: others may remove its rules or links, and until they are made again guests have no
// internet, and nothing keeps them from what they may not reach. With 50 VMs a look takes some 5 ms.
const checkEvery = 10 * time.Second

// watchNetwork mends what others did to the network, until ctx ends. It returns an error if the network stops serving before.
func (a *App) watchNetwork(ctx context.Context) error {
	tick := time.NewTicker(checkEvery)
	defer tick.Stop()
	for {
		select {
		case <-tick.C:
			if a.net == nil {
				continue // attach is a test's
			}
			if err := a.net.Check(ctx); err != nil && ctx.Err() == nil {
				a.log.Error("the guests' network is not whole, and could not be mended", "err", err)
			}
		case <-a.served:
			return fmt.Errorf("serve the guests' DNS: %w", errors.Join(errors.New("it ended"), a.tasks.Wait()))
		case <-ctx.Done():
			return nil
		}
	}
}

func (a *App) openNetwork(ctx context.Context) error {
	keep, err := a.survivors()
	if err != nil {
		return err // all of them would lose their network
	}
	done := a.opt.Progress.Step("network")
	n, err := network.Open(ctx, network.Config{
		Name: a.cfg.Network.Bridge, IPv4: a.cfg.Network.IPv4, IPv6: a.cfg.Network.IPv6, Services: a.opt.Services, Log: a.log,
		Keep: keep,
	})
	if err != nil {
		done("", err)
		return err
	}
	a.undo.Push("close network", a.closeNetwork(n))
	done(fmt.Sprintf("%s, %s", a.cfg.Network.Bridge, a.cfg.Network.IPv4), nil)
	a.net, a.attach, a.reattach = n, attachTo(n), reattachTo(n)
	run, cancel := context.WithCancel(context.WithoutCancel(ctx))
	a.tasks, run = errgroup.WithContext(run)
	a.served = make(chan struct{})
	a.tasks.Go(func() error {
		defer close(a.served)
		return n.Serve(run)
	})
	a.undo.Push("stop serving DNS", func(context.Context) error {
		cancel()
		return a.tasks.Wait()
	})
	return nil
}

func attachTo(n *network.Network) func(context.Context, string) (host.Port, error) {
	return func(ctx context.Context, id string) (host.Port, error) {
		p, err := n.Attach(ctx, id)
		if err != nil {
			return host.Port{}, err
		}
		return portOf(ctx, p)
	}
}

// How long a runner may take from its registration to GitHub's seeing it online, from there to a job, and from its job's end
// to its own.
const (
	onlineTime = time.Minute
	pickupTime = 3 * time.Minute
	finishTime = 30 * time.Second
)

func (a *App) newHost(github host.Registrar) *host.Host {
	return host.New(host.Config{
		Name: a.cfg.Host.Name, Dir: filepath.Join(a.dir, "runners"), Limits: limits(a.cfg.Host), Overhead: a.extra,
		Deadlines: host.Deadlines{
			Boot: time.Duration(a.cfg.VM.BootTimeout), Online: onlineTime, Pickup: pickupTime,
			Job: time.Duration(a.cfg.VM.JobTimeout), Finish: finishTime,
		},
		Driver: a.driver, Attach: a.attach, Reattach: a.reattach, Supply: a.supplyOf, Scratch: a.store.Scratch, GitHub: github, Lost: a.lost, Log: a.log,
		Prefix: a.prefix, Pressure: a.refuses, VMMs: namesOf(a.cfg.VM.QEMU, a.cfg.Firecracker.Binary, a.cfg.Firecracker.Jailer),
	})
}

// namesOf returns the file names of programs, those behind links included. An empty path is none.
func namesOf(paths ...string) []string {
	var names []string
	for _, path := range paths {
		if path == "" {
			continue
		}
		names = append(names, filepath.Base(path))
		if real, err := filepath.EvalSymlinks(path); err == nil {
			names = append(names, filepath.Base(real))
		}
	}
	return names
}

// limits are what all VMs of a configuration together may have.
func limits(h config.Host) flint.Shape {
	return host.LimitsOf(flint.Shape{CPUs: h.CPUs, Memory: h.Memory})
}

func (a *App) supplyOf(_ context.Context, pool string) (host.Supply, error) {
	a.mu.Lock()
	defer a.mu.Unlock()
	s, ok := a.supply[pool]
	if !ok {
		return host.Supply{}, fmt.Errorf("pool %s: %w", pool, flint.ErrNotFound)
	}
	return s, nil
}

// Supplies returns what each prepared pool is made of, by name.
func (a *App) Supplies() map[string]host.Supply {
	a.mu.Lock()
	defer a.mu.Unlock()
	return maps.Clone(a.supply)
}

// Close gives back everything New acquired. It is idempotent.
func (a *App) Close(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), time.Minute)
	defer cancel()
	return a.undo.Run(ctx)
}

// Leftovers lists what this configuration's flint left on the machine: processes, files, interfaces, tables. After Close
// it is empty.
func (a *App) Leftovers() ([]string, error) {
	left, err := a.newHost(nil).Leftovers()
	links, nerr := network.Leftovers(a.cfg.Network.Bridge)
	groups, gerr := qemu.Leftovers(a.cgroup())
	return slices.Concat(left, links, groups), errors.Join(err, nerr, gerr)
}

// Recover undoes what a dead instance left: VMs, records, interfaces. It does nothing where the instance lives, or has
// nothing. Registrations are left to Connect.
func Recover(ctx context.Context, cfg config.Config, opt Options) error {
	a := &App{cfg: cfg, opt: opt, log: opt.Log, dir: filepath.Join(cfg.StateDir, opt.Instance)}
	if left, err := os.ReadDir(filepath.Join(a.dir, "runners")); err != nil || len(left) == 0 {
		return nil // never used, or clean
	}
	if err := a.lock(); err != nil {
		return errors.Join(ignoreConflict(err), a.Close(ctx))
	}
	err := a.newHost(nil).Sweep(ctx)
	n, nerr := network.Open(ctx, network.Config{Name: cfg.Network.Bridge, IPv4: cfg.Network.IPv4, IPv6: cfg.Network.IPv6, Log: a.log})
	if nerr == nil {
		nerr = n.Close(ctx) // Open has removed what was there
	}
	return errors.Join(err, nerr, a.Close(ctx))
}

func ignoreConflict(err error) error {
	if errors.Is(err, flint.ErrConflict) {
		return nil
	}
	return err
}

// ConsoleOf returns the end of the guest's console when err is about a VM that did not come up, or was lost. It is untrusted bytes.
func ConsoleOf(err error) []byte {
	var boot *vm.BootError
	if errors.As(err, &boot) {
		return boot.Console
	}
	var lost *vm.LostError
	if errors.As(err, &lost) {
		return lost.Console
	}
	return nil
}
