package crashtest

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"flint"
	"flint/internal/host"
	"flint/internal/vm"
	"flint/internal/vm/firecracker"
	"flint/internal/vm/qemu"
)

// worldEnv holds a world: it makes the test's program the daemon on it.
const worldEnv = "FLINT_TEST_CRASH_WORLD"

const (
	lines     = 40 // what the job counts, one each 10 ms
	exitOfJob = 3
	atCount   = -1 // dies in the middle of the job
	jobTime   = 3 * time.Minute
)

// world is a machine: everything on it but processes is below its directory, and GitHub, too.
type world struct {
	Dir         string
	Firecracker string // the double
	Assets      string // what real VMs boot from, which run under QEMU then; empty: doubles do
	Begin       string // id of a runner to begin; empty: none
	Cut         int    // die at this step, the first being 1; 0: never
	CutAt       string // die at the first step of this name; empty: at none
	Detach      bool   // stop at the tenth line of the job, and leave the VM
}

func (w world) runners() string       { return filepath.Join(w.Dir, "runners") }
func (w world) ports() string         { return filepath.Join(w.Dir, "ports") }
func (w world) registrations() string { return filepath.Join(w.Dir, "registrations") }
func (w world) jobs() string          { return filepath.Join(w.Dir, "jobs") }
func (w world) results() string       { return filepath.Join(w.Dir, "results") }
func (w world) trace() string         { return filepath.Join(w.Dir, "trace") }

// process is the daemon.
type process struct {
	world
	stop  context.CancelFunc // of the runners
	mu    sync.Mutex
	count int
	trace *os.File
}

// step notes a step, and dies at the one where it is to.
func (p *process) step(what string) {
	p.mu.Lock()
	defer p.mu.Unlock()
	fmt.Fprintln(p.trace, what)
	if p.count++; p.count == p.Cut || what == p.CutAt {
		die()
	}
}

func die() {
	_ = unix.Kill(os.Getpid(), unix.SIGKILL)
	select {}
}

// around is a step before and one after f.
func (p *process) around(what string, f func() error) error {
	p.step(what)
	err := f()
	p.step("done: " + what)
	return err
}

// daemon is the whole program: what flint serve does with one runner.
func daemon() error {
	p := &process{}
	if err := json.Unmarshal([]byte(os.Getenv(worldEnv)), &p.world); err != nil {
		return err
	}
	var err error
	if p.trace, err = os.Create(p.world.trace()); err != nil {
		return err
	}
	unlock, err := p.lock()
	if err != nil {
		return err
	}
	defer unlock()
	log := slog.New(slog.NewTextHandler(os.Stderr, &slog.HandlerOptions{Level: slog.LevelDebug}))
	ctx, cancel := context.WithTimeout(context.Background(), 5*time.Minute)
	defer cancel()
	driver, deadlines, err := p.driver(ctx, log)
	if err != nil {
		return err
	}
	if err := p.openNetwork(); err != nil {
		return err
	}
	h := host.New(host.Config{
		Name: "here", Dir: p.runners(), Limits: flint.Shape{CPUs: 4, Memory: flint.GiB}, Driver: stepper{driver, p},
		Deadlines: deadlines,
		Attach:    p.attach, Reattach: p.reattach, Supply: p.supply, Scratch: p.scratch, GitHub: &github{p}, Lost: p.lost, Log: log, Step: p.step,
	})
	listen, stop := context.WithCancel(ctx)
	ctx, p.stop = context.WithCancel(ctx)
	defer p.stop()
	var tasks sync.WaitGroup
	tasks.Go(func() { p.events(listen, h) })
	defer tasks.Wait()
	defer stop()
	if err := h.Adopt(ctx); err != nil {
		return err
	}
	if err := h.Sweep(ctx); err != nil {
		return err
	}
	for _, r := range h.State().Runners {
		p.step("adopted")
		log.Info("adopted", "runner", r.ID)
	}
	var failed error
	h.Resume(ctx, func(res flint.Result, err error) { failed = errors.Join(failed, p.done(res, err)) })
	if p.Begin != "" {
		res, err := h.Run(ctx, flint.Runner{ID: p.Begin, Pool: "pool"})
		failed = errors.Join(failed, p.done(res, err))
	}
	return failed
}

// lock makes the world this process's alone, as the state directory's lock does. A VMM that an earlier process has forked and that
// is not itself yet holds it, too: it cannot be missed by the sweep.
func (p *process) lock() (unlock func(), err error) {
	f, err := os.OpenFile(filepath.Join(p.Dir, "lock"), os.O_CREATE|os.O_RDWR, 0o600)
	if err != nil {
		return nil, err
	}
	if err := unix.Flock(int(f.Fd()), unix.LOCK_EX); err != nil {
		return nil, errors.Join(err, f.Close())
	}
	return func() { _ = f.Close() }, nil
}

// done writes down how a runner ended.
func (p *process) done(res flint.Result, err error) error {
	if errors.Is(err, host.ErrDetached) {
		p.step("detached")
		return nil
	}
	if errors.Is(err, flint.ErrTimeout) {
		err = nil // the result says so
	}
	if err != nil && !errors.Is(err, flint.ErrStopped) {
		return err
	}
	b, err := json.Marshal(res)
	if err != nil {
		return err
	}
	return p.around("note result", func() error { return p.put(filepath.Join(p.results(), res.Runner.ID), b) })
}

// put writes a file of GitHub's or of the test's own: the death of a process leaves the new one or the old one, whole.
func (w world) put(path string, content []byte) error {
	f, err := os.CreateTemp(w.Dir, "put")
	if err != nil {
		return err
	}
	_, err = f.Write(content)
	if err = errors.Join(err, f.Close()); err != nil {
		return err
	}
	return os.Rename(f.Name(), path)
}

func (p *process) lost(r flint.Runner, _ flint.Job) {
	_ = os.WriteFile(filepath.Join(p.results(), r.ID+".lost"), nil, 0o600)
}

func (p *process) supply(context.Context, string) (host.Supply, error) {
	in := func(name string) string { return filepath.Join(p.Dir, name) }
	if p.Assets != "" {
		return p.realSupply(), nil
	}
	return host.Supply{
		Shape:  flint.Shape{CPUs: 1, Memory: 256 * flint.MiB, Disk: flint.MiB},
		Kernel: in("kernel"), Initrd: in("initrd"), Base: in("base"),
		Start: []string{"sh", "-c", fmt.Sprintf("echo Listening; count %d; echo over; exit %d", lines, exitOfJob)},
	}, nil
}

func (p *process) scratch(path string, size flint.Bytes) error {
	return p.around("make scratch disk", func() error {
		if p.Assets != "" {
			return exec.Command("cp", "--sparse=always", filepath.Join(p.Assets, "scratch.ext4"), path).Run()
		}
		return os.WriteFile(path, make([]byte, size), 0o600)
	})
}

// openNetwork removes the ports of all that do not live, as the network does.
func (p *process) openNetwork() error {
	entries, err := os.ReadDir(p.ports())
	if err != nil {
		return err
	}
	keep, err := host.Survivors(p.runners())
	if err != nil {
		return err
	}
	for _, e := range entries {
		if !slices.Contains(keep, e.Name()) {
			if err := os.Remove(filepath.Join(p.ports(), e.Name())); err != nil {
				return err
			}
		}
	}
	return nil
}

func (p *process) attach(_ context.Context, id string) (host.Port, error) {
	path := filepath.Join(p.ports(), id)
	err := p.around("attach", func() error { return os.WriteFile(path, nil, 0o600) })
	return host.Port{Close: func(context.Context) error {
		return p.around("detach", func() error { return os.Remove(path) })
	}}, err
}

func (p *process) reattach(_ context.Context, id string) (host.Port, error) {
	path := filepath.Join(p.ports(), id)
	err := p.around("reattach", func() error {
		if _, err := os.Stat(path); err != nil {
			return fmt.Errorf("%w: %w", flint.ErrNotFound, err)
		}
		return nil
	})
	return host.Port{Close: func(context.Context) error {
		return p.around("detach", func() error { return os.Remove(path) })
	}}, err
}

// driver is what runs the world's VMs, and what their lives are bound by.
func (p *process) driver(ctx context.Context, log *slog.Logger) (adopting, host.Deadlines, error) {
	deadlines := host.Deadlines{Boot: 2 * time.Minute, Job: jobTime, Finish: time.Minute}
	if p.Assets == "" {
		d, err := firecracker.New(ctx, firecracker.Config{Firecracker: p.Firecracker, NoJail: true, Serial: true, Log: log})
		return d, deadlines, err
	}
	d, err := qemu.New(ctx, qemu.Config{Log: log})
	return d, deadlines, err
}

// realSupply is supply for real VMs.
func (p *process) realSupply() host.Supply {
	in := func(name string) string { return filepath.Join(p.Assets, name) }
	count := fmt.Sprintf("read -r _; echo Listening; i=0; while [ $i -lt %d ]; do i=$((i + 1)); echo count $i; sleep 0.02; done; echo over; exit %d", lines, exitOfJob)
	return host.Supply{
		Shape:  flint.Shape{CPUs: 1, Memory: 384 * flint.MiB, Disk: flint.GiB},
		Kernel: in("vmlinux"), Initrd: in("initrd"), Base: in("base.ext4"), Start: []string{"/bin/sh", "-c", count},
	}
}

// adopting is a driver whose VMs outlive a process.
type adopting interface {
	vm.Driver
	vm.Adopter
}

// stepper makes steps of what a driver does.
type stepper struct {
	adopting
	p *process
}

// Boot implements vm.Driver.
func (s stepper) Boot(ctx context.Context, spec vm.Spec) (m vm.Machine, err error) {
	err = s.p.around("boot", func() error {
		m, err = s.adopting.Boot(ctx, spec)
		return err
	})
	return stepperOf(m, s.p), err
}

// Adopt implements vm.Adopter.
func (s stepper) Adopt(ctx context.Context, spec vm.Spec, pid int, start uint64) (m vm.Machine, err error) {
	err = s.p.around("adopt", func() error {
		m, err = s.adopting.Adopt(ctx, spec, pid, start)
		return err
	})
	return stepperOf(m, s.p), err
}

type machine struct {
	vm.Machine
	p *process
}

func stepperOf(m vm.Machine, p *process) vm.Machine {
	if m == nil {
		return nil
	}
	return machine{m, p}
}

// Process implements vm.Process.
func (m machine) Process() (pid int, start uint64) { return m.Machine.(vm.Process).Process() }

// Close implements vm.Machine.
func (m machine) Close(ctx context.Context) error {
	return m.p.around("end VM", func() error { return m.Machine.Close(ctx) })
}

// github is GitHub, as far as it is in files: registrations, and jobs that are "started" or "over". A runner gets a job when
// it listens, and the job is over when its program has said so.
type github struct{ p *process }

// Register implements host.Registrar.
func (g *github) Register(_ context.Context, r flint.Runner) (flint.Registration, error) {
	err := g.p.around("register", func() error { return os.WriteFile(filepath.Join(g.p.registrations(), r.ID), nil, 0o600) })
	return flint.Registration{Runner: r.ID, GitHubID: 7, Credential: "secret"}, err
}

// Remove implements host.Registrar.
func (g *github) Remove(_ context.Context, runner string, _ int64) error {
	if job, err := readJob(g.p.world, runner); err != nil || job == "started" {
		return errors.Join(flint.ErrConflict, err)
	}
	return g.p.around("unregister", func() error {
		err := os.Remove(filepath.Join(g.p.registrations(), runner))
		if errors.Is(err, fs.ErrNotExist) {
			return nil
		}
		return err
	})
}

// Status implements host.Registrar.
func (g *github) Status(_ context.Context, runner string, _ int64) (flint.RunnerStatus, error) {
	if _, err := os.Stat(filepath.Join(g.p.registrations(), runner)); err != nil {
		return flint.RunnerStatus{}, flint.ErrNotFound
	}
	job, err := readJob(g.p.world, runner)
	return flint.RunnerStatus{Online: true, Busy: job == "started"}, err
}

// readJob returns what GitHub knows of a runner's job. That it is over it hears from the runner itself.
func readJob(w world, runner string) (string, error) {
	path := filepath.Join(w.jobs(), runner)
	b, err := os.ReadFile(path)
	if errors.Is(err, fs.ErrNotExist) {
		return "", nil
	}
	log, lerr := os.ReadFile(filepath.Join(w.runners(), runner, "output.log"))
	if string(b) == "started" && lerr == nil && bytes.Contains(log, []byte("over\n")) {
		return "over", w.put(path, []byte("over"))
	}
	return string(b), err
}

// events tells the host of jobs, until ctx ends. GitHub repeats what was not taken.
func (p *process) events(ctx context.Context, h *host.Host) {
	tick := time.NewTicker(2 * time.Millisecond)
	defer tick.Stop()
	told := map[string]bool{}
	for {
		select {
		case <-tick.C:
		case <-ctx.Done():
			return
		}
		for _, r := range h.State().Runners {
			b, _ := os.ReadFile(filepath.Join(p.runners(), r.ID, "output.log")) // it comes, and goes
			job, err := readJob(p.world, r.ID)
			if err != nil || job == "failed" {
				continue
			}
			if p.Cut == atCount && bytes.Contains(b, []byte("count 10\n")) {
				die()
			}
			if p.Detach && bytes.Contains(b, []byte("count 10\n")) {
				p.step("detach VM")
				h.Detach()
				p.stop()
				h.Stop()
			}
			ev := flint.JobEvent{Kind: flint.JobStarted, Runner: r.ID, Job: flint.Job{Name: "job"}}
			state := "started"
			switch {
			case job == "over", bytes.Contains(b, []byte("over\n")):
				ev.Kind, ev.Conclusion, state = flint.JobCompleted, "succeeded", "over"
			case !bytes.Contains(b, []byte("count 3\n")):
				continue
			}
			if told[r.ID+state] {
				continue
			}
			told[r.ID+state] = true
			if job == "" || state == "over" { // a job that is over does not start again
				err = p.put(filepath.Join(p.jobs(), r.ID), []byte(state))
			}
			if err = errors.Join(err, p.around("note job "+state, func() error { return h.Note(ctx, ev) })); err != nil {
				fmt.Fprintln(os.Stderr, strings.TrimSpace(err.Error()))
			}
		}
	}
}
