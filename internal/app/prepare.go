package app

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"time"

	"flint"
	"flint/internal/config"
	"flint/internal/host"
	"flint/internal/image"
	"flint/internal/kernel"
	"flint/internal/rootfs"
	"flint/internal/runnersoft"
	"flint/internal/vm"
	"flint/internal/vm/firecracker"
	"flint/internal/vm/qemu"
)

// Prepare makes what the pools' VMs boot: the kernel pack, each pool's base image, and the drives with the runner
// software: what the configuration names, or for a coordinator GitHub's, unless the images have it. What is cached costs milliseconds.
func (a *App) Prepare(ctx context.Context) error {
	for _, p := range a.cfg.Pools {
		if err := image.Check(p.Image); err != nil { // the kernel may take long
			return &imageError{err}
		}
	}
	if err := a.prepareKernel(ctx); err != nil {
		return err
	}
	for _, p := range a.cfg.Pools {
		if err := a.preparePool(ctx, p); err != nil {
			return err
		}
	}
	return nil
}

// serveAfter is how long pools may hold up the others at the start: most images are there already, and are ready by then.
const serveAfter = 30 * time.Second

// PrepareToServe is Prepare for a coordinator that one pool shall not stop: a pool whose image takes long, cannot be made, or is
// none that GitHub's runner can run in, is held; Serve goes on with it, and tries again.
func (a *App) PrepareToServe(ctx context.Context) error {
	if err := a.prepareKernel(ctx); err != nil {
		return err
	}
	a.undo.Push("stop preparing images", func(context.Context) error { a.preparations.stop(); return nil })
	wait := time.NewTimer(serveAfter)
	defer wait.Stop()
	return a.preparePools(ctx, wait.C)
}

// preparePools prepares a coordinator's pools, side by side, and holds those that have no image. It returns when it is through with
// all of them, or enough is told; preparations that still run go on. From then on making images leaves of the disk what VMs are to
// have, too.
func (a *App) preparePools(ctx context.Context, enough <-chan time.Time) error {
	a.store.LeaveFree(func(disk flint.Bytes) flint.Bytes { return a.current().Host.MinFree.Of(disk) })
	tried := make(chan error, len(a.cfg.Pools))
	for _, p := range a.cfg.Pools {
		a.reloading.await(p.Name)
		a.beginPreparing(ctx, p.Name, untried, tried)
	}
	for range a.cfg.Pools {
		select {
		case err := <-tried:
			var bad *imageError
			if err != nil && ctx.Err() == nil && !errors.As(err, &bad) {
				a.preparations.stop() // no image mends that
				return err
			}
		case <-enough:
			a.log.Info("images of some pools take longer; these pools start no VMs until then")
			return nil
		case <-ctx.Done():
		}
		if ctx.Err() != nil {
			a.preparations.stop()
			return context.Cause(ctx)
		}
	}
	return nil
}

// imageError says that it is a pool's image that cannot be had, and nothing else its VMs need.
type imageError struct{ error }

func (e *imageError) Unwrap() error { return e.error }

// preparePool makes what the VMs of one pool boot. The kernel and the runner software are there.
func (a *App) preparePool(ctx context.Context, p config.Pool) error {
	if _, ok := a.driver.(*qemu.Driver); ok && p.Limits != (config.Limits{}) {
		a.log.Warn("QEMU does not hold VMs to limits; Firecracker does", "pool", p.Name)
	}
	base, err := a.prepareImage(ctx, p, a.opt.Progress)
	if err != nil {
		return &imageError{err}
	}
	return a.supplyPool(ctx, p, base)
}

// errOutdated says that a pool is configured otherwise since its drives were begun, or not at all. The reload that did that has
// asked for others.
var errOutdated = errors.New("the configuration has changed meanwhile")

// supplyPool gives the next VMs of a pool what they boot. Making that may take long, so what counts is the configuration at its end.
func (a *App) supplyPool(ctx context.Context, p config.Pool, base image.Base) error {
	runner, err := a.poolRunner(ctx, p)
	if err != nil {
		return err
	}
	tools, err := a.prepareTools(ctx, p)
	if err != nil {
		return err
	}
	defer a.letGo(ctx) // after the locks
	// From here on nothing is let go: another pool may have had the same until a moment ago.
	a.collecting.Lock()
	defer a.collecting.Unlock()
	a.mu.Lock()
	defer a.mu.Unlock()
	if !a.pinsRunner(p) {
		runner = a.runnerDrive // a newer one may have come
	}
	if err := a.store.Keep(base.Path, runner, tools); err != nil {
		return err
	}
	now, ok := poolNamed(a.current(), p.Name)
	if !ok || !madeFrom(now).equal(madeFrom(p)) {
		return errOutdated
	}
	a.supply[p.Name] = host.Supply{
		Shape: flint.Shape(now.VM), Kernel: a.pack.Kernel, Initrd: a.pack.Initrd, Modules: a.pack.Modules,
		Base: base.Path, Runner: runner, Start: runnerInImage(a.cfg.Runner.InImage), Env: poolEnv(now, base.Env), Dir: base.Dir, Limits: rates(now.Limits),
		Tools: tools, InMemory: now.Root == config.MemoryRoot,
	}
	return nil
}

// fits says of an image that GitHub's runner cannot run in why, before a VM is started in vain.
func (a *App) fits(ctx context.Context, p config.Pool, base image.Base) error {
	if a.github == nil || a.cfg.Runner.Dir != "" {
		return nil // it may hold what it likes
	}
	has, err := rootfs.Look(ctx, base.Path)
	if err != nil {
		a.log.Debug("what an image holds is not known", "pool", p.Name, "err", err)
		return nil
	}
	guest := runnersoft.Guest{Shell: has.Shell, Arch: has.Arch, Libc: has.Libc}
	return guest.Fits(fmt.Sprintf("run GitHub's runner in image %q of pool %s", p.Image, p.Name))
}

// prepareTools makes the drive with a pool's tool cache, where it has one.
func (a *App) prepareTools(ctx context.Context, p config.Pool) (drive string, err error) {
	if p.Tools == "" {
		return "", nil
	}
	real, err := filepath.EvalSymlinks(p.Tools)
	if err != nil {
		real = p.Tools // Tools says what is wrong
	}
	d, err := a.store.Tools(ctx, real, a.opt.Progress)
	return d.Path, err
}

// poolEnv is the environment of a pool's jobs: its image's, and where it has a tool cache the variables by which GitHub's own
// machines tell actions of theirs.
func poolEnv(p config.Pool, image []string) []string {
	if p.Tools == "" {
		return image
	}
	const at = "/opt/hostedtoolcache"
	return append(slices.Clone(image), "RUNNER_TOOL_CACHE="+at, "AGENT_TOOLSDIRECTORY="+at)
}

// rates are a pool's limits as a driver takes them.
func rates(l config.Limits) vm.Limits {
	return vm.Limits{DiskBytes: l.DiskBandwidth, DiskOps: l.DiskOps, NetRx: l.NetworkIn, NetTx: l.NetworkOut}
}

func (a *App) prepareKernel(ctx context.Context) error {
	agent, err := agentPath(a.cfg.VM.Agent)
	if err != nil {
		return err
	}
	done := a.opt.Progress.Step("kernel")
	c, source := kernelCache(a.cfg, a.opt), kernelSource(a.cfg.Kernel)
	c.Agent, source.Needs = agent, a.kernelNeeds()
	a.pack, err = kernel.Prepare(ctx, c, source)
	done(a.pack.Version, err)
	for _, m := range a.pack.Missing {
		a.log.Warn("the kernel lacks what jobs may want", "option", m)
	}
	return err
}

// kernelNeeds names what this driver cannot boot a kernel without.
func (a *App) kernelNeeds() []string {
	switch a.driver.(type) {
	case *qemu.Driver:
		return []string{kernel.NeedsPVH, kernel.NeedsACPI, kernel.NeedsSerial}
	case *firecracker.Driver:
		return []string{kernel.NeedsVsock}
	}
	return nil
}

// prepareImage makes a pool's image. A coordinator would rather go on with the last good one than fail, and notes why it does.
func (a *App) prepareImage(ctx context.Context, p config.Pool, progress flint.Progress) (image.Base, error) {
	done := progress.Step("image " + p.Image)
	args := p.Args
	if a.opt.LocalBase {
		var err error
		if args, err = a.localBase(ctx, p); err != nil {
			done("", err)
			return image.Base{}, err
		}
	}
	base, err := a.store.Base(ctx, image.Want{
		Ref: p.Image, BuildArgs: args, Format: image.Format(p.Format), Progress: progress, Pull: image.Pull(p.Pull), OrLast: a.github != nil,
	})
	if err == nil {
		err = a.fits(ctx, p, base)
	}
	if err != nil {
		done("", err)
		a.mu.Lock()
		_, has := a.supply[p.Name]
		a.mu.Unlock()
		if has && ctx.Err() == nil {
			a.noteStale(p, err)
		}
		return image.Base{}, err
	}
	a.noteStale(p, base.Stale)
	done(fmt.Sprintf("%.19s…, %s", base.Digest, base.Size), nil)
	return base, nil
}

// localBase adds a BASE made on this machine to the build arguments when the one the Dockerfile names cannot be reached.
func (a *App) localBase(ctx context.Context, p config.Pool) (map[string]string, error) {
	if p.Args["BASE"] != "" || a.store.BaseReachable(ctx, p.Image) {
		return p.Args, nil
	}
	ref, err := a.store.DebianBase(ctx, "", a.opt.Progress)
	if err != nil {
		return nil, err
	}
	args := maps.Clone(p.Args)
	if args == nil {
		args = map[string]string{}
	}
	args["BASE"] = ref
	return args, nil
}

// DemoRunner builds the demo's runner software from its Go module and returns the directory that runner.dir may name.
func DemoRunner(ctx context.Context, stateDir, moduleDir string, p flint.Progress) (string, error) {
	dir := filepath.Join(stateDir, "demo-runner")
	return dir, image.BuildDemoRunner(ctx, moduleDir, dir, p)
}

// runnerInImage is the program that starts the runner software of an image that has it in dir; nil: on a drive of its own.
func runnerInImage(dir string) []string {
	switch dir {
	case "":
		return nil
	case "auto":
		return runnersoft.InImage()
	}
	return runnersoft.InImage(dir)
}

// agentPath finds the guest's program: where the configuration says, or beside this one.
func agentPath(configured string) (string, error) {
	file := configured
	if file == "" {
		self, err := os.Executable()
		if err != nil {
			return "", fmt.Errorf("find flint-agent: %w", err)
		}
		file = filepath.Join(filepath.Dir(self), "flint-agent")
	}
	if _, err := os.Stat(file); err != nil {
		return "", &flint.Fault{
			Code: "agent.missing", What: "find the guest's program", Kind: flint.ErrNotFound, Err: err,
			Fix: "keep flint-agent beside flint (`make build` makes both), or set vm.agent to its path",
		}
	}
	return file, nil
}
