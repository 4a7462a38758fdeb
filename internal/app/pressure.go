package app

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"flint"
	"flint/internal/config"
	"flint/internal/image"
	"flint/internal/kernel"
)

const (
	// pressureEvery is how often the machine is looked at. A VM's disk grows by some GB in that time at most.
	pressureEvery = 5 * time.Second
	// collectPause is how long unused images are left alone after a search that found none.
	collectPause = time.Minute
	// leastInodes is how many files must be left to make: a VM needs some ten, an image less than that.
	leastInodes = 1000
)

// What a VM takes of what is counted, in this program or below it. More than was ever seen, so that it lasts.
const (
	filesOfVM   = 16 // sockets to VMM and agent, its console, its process, its record while it is written
	threadsOfVM = 24 // of the VMM beside one for each CPU: QEMU's workers for its disks
	sparePIDs   = 64 // for the tools that flint starts
	spareFiles  = 64 // for GitHub's connections, images being made
)

// pressure is what this machine runs out of, beside the CPUs and the memory that VMs are admitted by. The zero value has
// not looked yet.
type pressure struct {
	machine machine // the zero value: this one

	mu  sync.Mutex
	why flint.Reason
}

// machine is where pressure looks; tests have one of their own.
type machine struct {
	root   string // of /proc and /sys; empty: /
	statfs func(path string, st *unix.Statfs_t) error
	files  func() (limit uint64, err error)
}

// reason says why no new VM is started; zero when there is no pressure.
func (p *pressure) reason() flint.Reason {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.why
}

// set remembers the reason and returns the one before.
func (p *pressure) set(why flint.Reason) (before flint.Reason) {
	p.mu.Lock()
	defer p.mu.Unlock()
	before, p.why = p.why, why
	return before
}

// watchPressure looks at the machine until ctx ends, and makes room before it has to refuse VMs.
func (a *App) watchPressure(ctx context.Context) error {
	tick := time.NewTicker(pressureEvery)
	defer tick.Stop()
	var collected time.Time // when last nothing was found; of a clock nobody sets
	for {
		if lacks := a.feelPressure(); lacks > 0 && (collected.IsZero() || time.Since(collected) >= collectPause) {
			collected = time.Time{}
			if !a.makeRoom(ctx, lacks) {
				collected = time.Now()
			}
			a.feelPressure()
		}
		select {
		case <-tick.C:
		case <-ctx.Done():
			return nil
		}
	}
}

// feelPressure looks once. It returns how much of the disk unused images should give back: what it is below twice the
// watermark.
func (a *App) feelPressure() (lacks flint.Bytes) {
	minFree := a.current().Host.MinFree
	d, err := a.pressure.machine.disk(a.cfg.StateDir)
	why := d.refuses(minFree, a.pressure.reason().Code == "host.disk")
	if err != nil {
		why = flint.Because("host.disk", "the disk of state_dir cannot be looked at: %v", err)
	}
	if why.IsZero() {
		why = a.pressure.machine.crowded(a.current().Pools)
	}
	switch before := a.pressure.set(why); {
	case why.Code == before.Code:
	case why.IsZero():
		a.log.Info("VMs are started again", "after", before.Code)
	default:
		a.log.Warn("no VM is started", "reason", why)
	}
	return max(0, 2*minFree.Of(d.size)-d.free)
}

// disk is the state of a file system.
type disk struct {
	size, free flint.Bytes // free is what ordinary users may still have: VMs' own users are such
	inodes     int64       // free ones; -1 where they are not counted
	readOnly   bool
}

func (m machine) disk(dir string) (disk, error) {
	statfs := m.statfs
	if statfs == nil {
		statfs = unix.Statfs
	}
	var st unix.Statfs_t
	if err := statfs(dir, &st); err != nil {
		return disk{}, fmt.Errorf("statfs: %w", err)
	}
	unit := flint.Bytes(st.Frsize)
	if unit == 0 {
		unit = flint.Bytes(st.Bsize)
	}
	d := disk{
		size: flint.Bytes(st.Blocks) * unit, free: flint.Bytes(st.Bavail) * unit, inodes: -1,
		readOnly: st.Flags&unix.ST_RDONLY != 0,
	}
	if st.Files > 0 { // btrfs has none
		d.inodes = int64(st.Ffree)
	}
	return d, nil
}

// refuses says why a disk in this state takes no new VM. One that refused takes some more room to take VMs again.
func (d disk) refuses(minFree config.Free, refused bool) flint.Reason {
	least := minFree.Of(d.size)
	again := ""
	if refused {
		least += least / 10
		again = " and a tenth more"
	}
	switch {
	case d.readOnly:
		return flint.Because("host.readonly", "the disk of state_dir is mounted read-only; the kernel does that when it fails (dmesg)")
	case d.free < least:
		return flint.Because("host.disk", "the disk of state_dir has %s free, and host.min_free keeps %s%s; make room, or lower it", d.free, minFree, again)
	case d.inodes >= 0 && d.inodes < leastInodes && minFree.Of(d.size) > 0:
		return flint.Because("host.disk", "the disk of state_dir has %d inodes free, which is too few; remove files there", d.inodes)
	}
	return flint.Reason{}
}

// crowded says what there is too little of for one more VM of the largest kind: open files of this program, or processes.
func (m machine) crowded(pools []config.Pool) flint.Reason {
	cpus := 0
	for _, p := range pools {
		cpus = max(cpus, p.VM.CPUs)
	}
	files := m.files
	if files == nil {
		files = func() (uint64, error) {
			// The Go runtime has raised the soft limit to the hard one, and gives children back what was.
			var limit unix.Rlimit
			err := unix.Getrlimit(unix.RLIMIT_NOFILE, &limit)
			return limit.Cur, err
		}
	}
	open, err := os.ReadDir(m.path("/proc/self/fd"))
	if limit, lerr := files(); err == nil && lerr == nil && uint64(len(open)+spareFiles+filesOfVM) > limit {
		return flint.Because("host.files", "flint may have %d files open and has %d; raise its limit (LimitNOFILE= in its unit, ulimit -n) and restart it", limit, len(open))
	}
	need := int64(cpus + threadsOfVM + sparePIDs)
	for _, l := range m.processLimits() {
		if l.limit-l.used < need {
			return flint.Because("host.pids", "%s is %d, and %d processes and threads are there; raise it", l.name, l.limit, l.used)
		}
	}
	return flint.Reason{}
}

// processLimit is a bound on processes and threads.
type processLimit struct {
	name        string
	limit, used int64
}

// processLimits reads the machine's bounds, and those of the cgroups this program is in. What cannot be read bounds
// nothing.
func (m machine) processLimits() (all []processLimit) {
	if load := strings.Fields(m.read("/proc/loadavg")); len(load) > 3 { // 0.20 0.18 0.12 1/80 11206: proc(5)
		_, total, _ := strings.Cut(load[3], "/")
		used, err := strconv.ParseInt(total, 10, 64)
		for _, name := range []string{"kernel.pid_max", "kernel.threads-max"} {
			limit, lerr := strconv.ParseInt(m.read("/proc/sys/"+strings.ReplaceAll(name, ".", "/")), 10, 64)
			if err == nil && lerr == nil {
				all = append(all, processLimit{"sysctl " + name, limit, used})
			}
		}
	}
	group, ok := strings.CutPrefix(m.read("/proc/self/cgroup"), "0::") // cgroup v2
	for dir := group; ok && dir != "/" && dir != "." && dir != ""; dir = filepath.Dir(dir) {
		at := filepath.Join("/sys/fs/cgroup", dir)
		limit, lerr := strconv.ParseInt(m.read(at+"/pids.max"), 10, 64) // "max" is none
		used, err := strconv.ParseInt(m.read(at+"/pids.current"), 10, 64)
		if err == nil && lerr == nil {
			all = append(all, processLimit{"pids.max of cgroup " + dir + " (TasksMax= in a unit)", limit, used})
		}
	}
	return all
}

func (m machine) path(name string) string { return filepath.Join("/", m.root, name) }

// read returns a small file of the kernel's without its newline; empty when it cannot be read.
func (m machine) read(name string) string {
	b, err := os.ReadFile(m.path(name))
	if err != nil {
		return ""
	}
	return strings.TrimSpace(string(b))
}

// makeRoom removes what is not needed until room more bytes are free, and reports whether it found anything.
func (a *App) makeRoom(ctx context.Context, room flint.Bytes) bool {
	freed, removed, err := a.collect(ctx, room)
	if err != nil && ctx.Err() == nil {
		a.log.Warn("not everything unused could be removed", "err", err)
	}
	if len(removed) > 0 {
		a.log.Warn("disk is filling: removed what was unused", "freed", freed, "removed", removed)
	}
	return freed > 0
}

// collect lets go of what the next VMs are not made of, and removes what nobody uses until room more bytes are free. It does one after the
// other: what a later one has kept, an earlier one, which was told before what is needed, would let go.
func (a *App) collect(ctx context.Context, room flint.Bytes) (freed flint.Bytes, removed []string, err error) {
	a.collecting.Lock()
	defer a.collecting.Unlock()
	return collect(ctx, a.store, a.kernels(), a.needed(), room)
}

// collect removes images, then kernels, that are in neither use nor keep.
func collect(ctx context.Context, store *image.Store, kernels kernel.Config, keep []string, room flint.Bytes) (freed flint.Bytes, removed []string, err error) {
	freed, removed, err = store.GC(ctx, keep, room)
	more, packs, kerr := kernel.Prune(ctx, kernels, keep, max(0, room-freed))
	return freed + more, append(removed, packs...), errors.Join(err, kerr)
}

func (a *App) kernels() kernel.Config {
	return kernel.Config{Dir: filepath.Join(a.cfg.StateDir, "kernels"), Log: a.log}
}

// needed lists the files that the next VMs are made of.
func (a *App) needed() []string {
	a.mu.Lock()
	defer a.mu.Unlock()
	paths := []string{a.runnerDrive} // though all pools may pin another for now
	for _, s := range a.supply {
		paths = append(paths, s.Base, s.Runner, s.Tools, s.Kernel, s.Initrd, s.Modules)
	}
	return paths
}

// letGo lets go of the images that the next VMs were made of and are no longer, so that any process may remove them when room
// is needed.
func (a *App) letGo(ctx context.Context) {
	if _, _, err := a.collect(ctx, 0); err != nil {
		a.log.Warn("not all unused images could be let go", "err", err)
	}
}
