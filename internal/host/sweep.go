package host

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	"flint"
	"flint/internal/vm"
)

// Sweep undoes what runners of an earlier process left behind: it reads every record, ends the VMM it names, removes the
// registration, and then the directory. VMMs of ours that have no record are ended, too. A job that was lost with its VM is told of (Config.Lost). Network ports are undone by
// opening the network. It is idempotent. A record that cannot be read is moved to the directory "damaged" beside the runners',
// never guessed at. Runners of this process are left alone.
func (h *Host) Sweep(ctx context.Context) error {
	if err := os.MkdirAll(h.c.Dir, 0o700); err != nil {
		return fmt.Errorf("make directory of runners: %w", err)
	}
	before := h.State().Runners // some may end while processes are looked at
	entries, err := os.ReadDir(h.c.Dir)
	if err != nil {
		return fmt.Errorf("list runners: %w", err)
	}
	entries = slices.DeleteFunc(entries, func(e fs.DirEntry) bool { return h.alive(e.Name()) })
	var errs []error
	failed := func(e fs.DirEntry, err error) {
		errs = append(errs, fmt.Errorf("undo runner %s: %w", e.Name(), err))
	}
	// Every VM ends before GitHub is asked anything: it may take its time.
	named := h.namedVMMs(len(entries))
	if err := h.endOrphans(ctx, before, named); err != nil {
		errs = append(errs, err)
	}
	entries = slices.DeleteFunc(entries, func(e fs.DirEntry) bool {
		err := h.endVMM(ctx, e.Name(), named[e.Name()])
		if err != nil {
			failed(e, err)
		}
		return err != nil
	})
	if s, ok := h.c.Driver.(vm.Sweeper); ok {
		if err := s.Sweep(ctx); err != nil {
			errs = append(errs, fmt.Errorf("undo what VMMs left: %w", err))
		}
	}
	// In any order: where the first ones are refused, the others are not put off for ever.
	rand.Shuffle(len(entries), func(i, j int) { entries[i], entries[j] = entries[j], entries[i] })
	refusals := 0
	for _, e := range entries {
		err := h.sweepOne(ctx, filepath.Join(h.c.Dir, e.Name()), refusals < maxRefusals)
		if err != nil {
			failed(e, err)
		}
		if errors.Is(err, errRefused) && !errors.Is(err, flint.ErrConflict) {
			refusals++
		}
	}
	return errors.Join(errs...)
}

// alive reports whether the runner is this process's own.
func (h *Host) alive(id string) bool {
	h.mu.Lock()
	defer h.mu.Unlock()
	return h.lives[id] != nil
}

// maxRefusals is how many registrations in one sweep are asked for in vain, each for removeTime and more, before the others are
// left for the next one.
const maxRefusals = 3

// errRefused is in what sweepOne returns where GitHub did not remove a registration.
var errRefused = errors.New("remove its registration")

// endOrphans ends the VMMs that bear our mark and have no record, because somebody removed it: nobody would ever do so otherwise.
func (h *Host) endOrphans(ctx context.Context, before []flint.Runner, named map[string][]process) error {
	var errs []error
	for id, vmms := range named {
		lived := slices.ContainsFunc(before, func(r flint.Runner) bool { return r.ID == id })
		if h.c.Prefix == "" || !strings.HasPrefix(id, h.c.Prefix) || lived || h.Claims(id) {
			continue
		}
		h.c.Log.Warn("a VM that has no record is ended, and a job it may have had is lost", "runner", id)
		for _, p := range vmms {
			if err := endProcess(ctx, p.pid, p.start); err != nil {
				errs = append(errs, fmt.Errorf("end the VM %s, which has no record: %w", id, err))
			}
		}
	}
	return errors.Join(errs...)
}

// endVMM ends the VMM that a directory stands for. The directory's name is the runner's id, which is enough to find it, and the
// registration, even where the record does not name them: the process may have died in between.
func (h *Host) endVMM(ctx context.Context, id string, named []process) (err error) {
	rec, _ := readRecord(filepath.Join(h.c.Dir, id)) // one that cannot be read names no process
	defer func() { h.noteStuck(id, rec.Shape, err != nil) }()
	for _, p := range append([]process{rec.vmm()}, named...) {
		if err := endProcess(ctx, p.pid, p.start); err != nil {
			return fmt.Errorf("end its VMM: %w", err)
		}
	}
	return nil
}

// noteStuck notes whether the VMM of a runner that is over, or of an earlier process, is still there although it was killed.
func (h *Host) noteStuck(id string, has flint.Shape, stuck bool) {
	h.mu.Lock()
	defer h.mu.Unlock()
	delete(h.stuck, id)
	if stuck {
		h.stuck[id] = has
	}
}

// sweepOne undoes what else one directory stands for. Unless ask is set, GitHub is not asked to remove the registration.
func (h *Host) sweepOne(ctx context.Context, dir string, ask bool) error {
	id := filepath.Base(dir)
	rec, err := readRecord(dir)
	unreadable := err != nil && !errors.Is(err, fs.ErrNotExist)
	h.c.Log.Info("undoing what a runner left", "runner", id, "phase", rec.Runner.Phase, "unreadable", unreadable)
	if unreadable {
		h.c.Log.Warn("a runner's record cannot be read: its VM was ended, and a job it may have had is lost", "runner", id, "err", err)
	}
	if rec.Register && h.c.GitHub == nil {
		return errors.New("its registration can be removed only with access to GitHub")
	}
	if rec.Register || unreadable && h.c.GitHub != nil {
		err := errors.New("GitHub does not remove others either")
		if ask {
			err = h.mourn(ctx, dir, rec)
		}
		if ask && err == nil {
			// By its name, not its id: the configuration may name another organisation by now, with ids of its own.
			err = remove(ctx, h.c.GitHub, id, 0, false)
		}
		if err != nil {
			h.leave(rec)
			return fmt.Errorf("%w: %w", errRefused, err)
		}
	}
	h.forget(id)
	if !unreadable {
		return h.erase(dir)
	}
	return h.setAside(dir, err)
}

// maxDamaged is how many damaged records are kept for a person to look at.
const maxDamaged = 32

// setAside moves a directory whose record cannot be read out of the way, and removes the oldest of those moved before.
func (h *Host) setAside(dir string, why error) error {
	h.c.Log.Warn("a runner's record is set aside", "dir", dir, "err", why)
	aside := filepath.Join(filepath.Dir(h.c.Dir), "damaged")
	if err := os.MkdirAll(aside, 0o700); err != nil {
		return err
	}
	if err := os.Rename(dir, filepath.Join(aside, fmt.Sprintf("%s.%d", filepath.Base(dir), time.Now().UnixNano()))); err != nil {
		return err
	}
	entries, err := os.ReadDir(aside)
	if err != nil {
		return err
	}
	slices.SortFunc(entries, func(a, b fs.DirEntry) int { return cmp.Compare(setAsideAt(b), setAsideAt(a)) })
	for _, e := range entries[min(len(entries), maxDamaged):] {
		h.c.Log.Info("removing an old damaged record", "dir", e.Name())
		if err := os.RemoveAll(filepath.Join(aside, e.Name())); err != nil {
			return err
		}
	}
	return nil
}

// setAsideAt is when a directory was set aside, which its name ends with. What has no such name is the oldest.
func setAsideAt(e fs.DirEntry) int64 {
	n, err := strconv.ParseInt(strings.TrimPrefix(filepath.Ext(e.Name()), "."), 10, 64)
	if err != nil {
		return 0
	}
	return n
}

// mourn tells of the job that a runner's end took with it, once: the record says so then. Whether the job was over before,
// GitHub knows: it forgets a runner with its job's end. Until it answers, nothing is told and the record stays.
func (h *Host) mourn(ctx context.Context, dir string, rec record) error {
	job := rec.Runner.Job
	if job == nil || rec.Concluded || rec.Runner.Phase >= flint.Finishing {
		return nil
	}
	log := h.c.Log.With("runner", rec.Runner.ID, "job", job.Name, "repository", job.Repository, "run", job.RunID)
	ctx, cancel := context.WithTimeout(ctx, removeTime)
	defer cancel()
	switch _, err := h.c.GitHub.Status(ctx, rec.Runner.ID, 0); { // by its name, as it is removed
	case errors.Is(err, flint.ErrNotFound):
		log.Info("its job was over before its VM was ended")
	case err != nil:
		return fmt.Errorf("ask whether its job was over: %w", err)
	default:
		log.Error("job lost: its VM did not outlive flint")
		if h.c.Lost != nil {
			h.c.Lost(rec.Runner, *job)
		}
	}
	h.enter(&rec, flint.Finishing)
	if err := h.save(rec, dir, true); err != nil {
		log.Warn("its job may be called lost again", "err", err)
	}
	return nil
}

// process is one process of this machine, told from another with its pid by its start time.
type process struct {
	pid   int
	start uint64
}

// lives reports whether the process has not ended.
func (p process) lives() bool {
	if p.pid <= 1 {
		return false
	}
	start, err := vm.ProcessStart(p.pid)
	return err == nil && start == p.start
}

// namedVMMs returns every process that gives a VM a name, by that name: QEMU with -name, Firecracker and its jailer with --id.
// Others may have an id behind these words, too, such as a find by the name of a runner's directory: they are not looked at. It
// looks at all processes of the machine, so it does nothing where there is nothing to find.
func (h *Host) namedVMMs(names int) map[string][]process {
	found := map[string][]process{}
	if names == 0 && h.c.Prefix == "" {
		return found
	}
	files, _ := filepath.Glob("/proc/[0-9]*/cmdline") // the pattern is a good one
	for _, file := range files {
		pid, _ := strconv.Atoi(filepath.Base(filepath.Dir(file)))
		start, err := vm.ProcessStart(pid)
		if err != nil {
			continue // gone by now
		}
		cmdline, err := os.ReadFile(file)
		if err != nil {
			continue
		}
		ids := named(cmdline)
		if len(ids) == 0 {
			continue
		}
		if !h.runsVMs(program(filepath.Dir(file))) {
			continue
		}
		for _, id := range ids {
			found[id] = append(found[id], process{pid, start})
		}
	}
	return found
}

// program is the name of what a process runs, by its directory in /proc.
func program(proc string) string {
	if exe, err := os.Readlink(filepath.Join(proc, "exe")); err == nil {
		return strings.TrimSuffix(filepath.Base(exe), " (deleted)")
	}
	// Another user's, for who lacks CAP_SYS_PTRACE. This is everybody's to read.
	comm, _ := os.ReadFile(filepath.Join(proc, "comm"))
	return strings.TrimSuffix(string(comm), "\n")
}

// maxComm is how much of a program's name the kernel keeps in a process's comm (TASK_COMM_LEN, less the zero).
const maxComm = 15

// runsVMs reports whether a program is a VMM or what becomes one: by its name, which a jail, an upgrade or
// another configuration leaves as it is.
func (h *Host) runsVMs(name string) bool {
	for _, known := range []string{"qemu-", "firecracker", "jailer"} {
		if strings.HasPrefix(name, known) {
			return true
		}
	}
	return slices.ContainsFunc(h.c.VMMs, func(known string) bool { return name == known || name == known[:min(len(known), maxComm)] })
}

// named returns what a command line, as /proc shows it, calls a VM.
func named(cmdline []byte) (ids []string) {
	args := strings.Split(string(cmdline), "\x00")
	for i, arg := range args[:len(args)-1] {
		if arg == "-name" || arg == "--id" {
			ids = append(ids, args[i+1])
		}
	}
	return ids
}

// removeTime bounds how long a registration's removal is tried before its record is left for the next sweep.
const removeTime = 10 * time.Second

// remove asks until GitHub has forgotten the runner, for at most removeTime. It refuses while it believes that the runner
// has a job, and learns only from silence, after minutes, that the VM is gone: unless busy is set such an answer is final.
// The caller's record stays then.
func remove(ctx context.Context, github Registrar, runner string, id int64, busy bool) error {
	err := ctx.Err()
	for wait := range backoff(ctx, removeTime) {
		if err = github.Remove(ctx, runner, id); err == nil || !busy && errors.Is(err, flint.ErrConflict) {
			return err
		}
		wait()
	}
	return err
}

// backoff yields until the time is up or ctx ends; the loop calls what it yields to wait, twice as long each time.
func backoff(ctx context.Context, limit time.Duration) func(func(func()) bool) {
	return func(yield func(func()) bool) {
		ctx, cancel := context.WithTimeout(ctx, limit)
		defer cancel()
		pause := 100 * time.Millisecond
		for ctx.Err() == nil {
			if !yield(func() {
				select {
				case <-time.After(pause):
					pause *= 2
				case <-ctx.Done():
				}
			}) {
				return
			}
		}
	}
}

// killTime is how long a process that was killed is waited for. One that is stuck in the kernel takes longer, and must not keep the
// sweep from the others.
const killTime = 5 * time.Second

// endProcess kills the process and waits until it is gone. Its start time makes sure that it is the one we mean: a
// process that is gone, or whose pid is another's by now, is no error.
func endProcess(ctx context.Context, pid int, start uint64) error {
	p, err := vm.OpenProcess(pid, start)
	if errors.Is(err, flint.ErrNotFound) {
		return nil
	}
	if err != nil {
		return err
	}
	defer p.Close()
	if err := p.Kill(); err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(ctx, killTime)
	defer cancel()
	defer context.AfterFunc(ctx, func() { p.Close() })() // ends the wait
	if err := p.Wait(); err != nil {
		return fmt.Errorf("wait for process %d, which was killed: %w", pid, errors.Join(ctx.Err(), err))
	}
	return nil
}

// Leftovers lists what of past and present runners is still on this machine: their directories, and the VMMs their
// records name. It is the proof that nothing is left.
func (h *Host) Leftovers() ([]string, error) {
	entries, err := os.ReadDir(h.c.Dir)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("list runners: %w", err)
	}
	var left []string
	for _, e := range entries {
		dir := filepath.Join(h.c.Dir, e.Name())
		left = append(left, "directory "+dir)
		if rec, err := readRecord(dir); err == nil && rec.vmm().lives() {
			left = append(left, fmt.Sprintf("process %d of %s", rec.PID, rec.Runner.ID))
		}
	}
	return left, nil
}
