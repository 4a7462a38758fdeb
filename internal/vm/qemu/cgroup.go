package qemu

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"

	"golang.org/x/sys/unix"

	"flint"
	"flint/internal/vm"
)

const (
	// spareTasks are a QEMU's threads beside one for each CPU: up to 64 that read and write its disks, and its own.
	spareTasks = 128
	cpuPeriod  = 100_000 // µs
	maxWeight  = 10_000  // of cpu.weight
	// diskCache is what a VM's disks may keep in the host's page cache beside all that the VM must have.
	diskCache = 128 * flint.MiB
)

// Overhead is counted for each VM beyond its guest's memory: the 128 MiB that QEMU may fill with translated code where
// there is no KVM (tb-size in the arguments), and some 80 MiB for itself.
func Overhead() flint.Overhead { return flint.Overhead{Fixed: 208 * flint.MiB} }

// cgroups makes a group for each VM in cgroup v2, so that a QEMU is in nobody's group who may end before it. A group has
// the limits whose controllers this machine gives us, which may be none.
type cgroups struct {
	parent string          // of the VMs' groups: ours alone
	root   string          // where cgroup v2 is mounted
	mu     sync.Mutex      // parent goes with the last group, and nothing that boots is swept
	live   map[string]bool // the VMs whose groups are this process's
}

// openCgroups finds out whether groups can be made below a parent, which is relative to the root of cgroup v2.
func openCgroups(mounts, parent string) (*cgroups, error) {
	if !filepath.IsLocal(parent) || filepath.Clean(parent) != parent || parent == "." {
		return nil, fmt.Errorf("parent cgroup %q is not a plain path below the root of the hierarchy", parent)
	}
	root, err := vm.CgroupRoot(mounts)
	if err != nil {
		return nil, err
	}
	g := &cgroups{parent: filepath.Join(root, parent), root: root, live: map[string]bool{}}
	if err := g.delegate(); err != nil {
		return nil, err
	}
	return g, nil
}

// Leftovers lists the cgroups of VMs below a parent, as Config.Cgroup names it.
func Leftovers(parent string) ([]string, error) {
	root, err := vm.CgroupRoot("/proc/self/mounts")
	if err != nil {
		return nil, nil // then there are none
	}
	left, err := filepath.Glob(filepath.Join(root, parent, "*", "cgroup.procs"))
	for i, procs := range left {
		left[i] = "cgroup " + filepath.Dir(procs)
	}
	return left, err
}

func cgroupFault(err error) error {
	return &flint.Fault{
		Code: "qemu.cgroup", What: "give the VM a cgroup", Err: err,
		Fix: "make sure that nothing else makes cgroups in the one firecracker.parent_cgroup names, and takes controllers away from it",
	}
}

func memoryFault() error {
	return &flint.Fault{
		Code: "qemu.oom", What: "keep the VM within its memory", Err: fmt.Errorf("%w: it needed more than its guest's memory and what is spared for QEMU", vm.ErrMemory),
		Fix: "see whether the host had memory left; report it with the pool's vm.memory if it had",
	}
}

// delegate makes the parent, and hands down to it what controllers there are. A container may have none, or may not hand
// them down.
func (g *cgroups) delegate() error {
	rel, err := filepath.Rel(g.root, g.parent)
	if err != nil {
		return err
	}
	dir := g.root
	for _, part := range strings.Split(rel, "/") {
		g.enable(dir)
		dir = filepath.Join(dir, part)
		if err := os.Mkdir(dir, 0o755); err != nil && !errors.Is(err, fs.ErrExist) {
			return fmt.Errorf("make cgroup: %w", err)
		}
	}
	g.enable(dir)
	return nil
}

func (g *cgroups) enable(dir string) {
	for _, c := range wantedControllers {
		_ = vm.SetCgroup(dir, "cgroup.subtree_control", "+"+c) // what came of it is in the children's cgroup.controllers
	}
}

var wantedControllers = [...]string{"cpu", "memory", "pids"}

// missing returns the controllers that the VMs' groups will not have.
func (g *cgroups) missing() []string {
	b, _ := os.ReadFile(filepath.Join(g.parent, "cgroup.subtree_control"))
	return slices.DeleteFunc(slices.Clone(wantedControllers[:]), func(c string) bool { return slices.Contains(strings.Fields(string(b)), c) })
}

func (g *cgroups) dir(id string) string { return filepath.Join(g.parent, id) }

// create makes a VM's group with its limits and returns it open, to start a process in it.
func (g *cgroups) create(s vm.Spec) (_ *os.File, err error) {
	g.mu.Lock()
	defer g.mu.Unlock()
	if g.live[s.ID] {
		return nil, fmt.Errorf("a VM of the name %s runs: %w", s.ID, flint.ErrConflict)
	}
	if err := g.delegate(); err != nil {
		return nil, err
	}
	dir := g.dir(s.ID)
	if err := os.Remove(dir); err != nil && !errors.Is(err, fs.ErrNotExist) { // left by an earlier process; not if a VM is in it
		return nil, fmt.Errorf("remove cgroup: %w", err)
	}
	if err := os.Mkdir(dir, 0o755); err != nil {
		return nil, fmt.Errorf("make cgroup: %w", err)
	}
	g.live[s.ID] = true
	defer func() {
		if err != nil {
			delete(g.live, s.ID)
			err = errors.Join(err, os.Remove(dir))
		}
	}()
	if err := limitGroup(dir, s); err != nil {
		return nil, err
	}
	return os.Open(dir)
}

// limitGroup sets those of a VM's limits that its group has.
func limitGroup(dir string, s vm.Spec) error {
	for _, l := range [][2]string{
		{"memory.max", strconv.FormatInt(int64(s.Memory+Overhead().Of(s.Memory)+diskCache), 10)},
		{"memory.oom.group", "1"},
		{"memory.swap.max", "0"},
		// One more than the guest has, for what QEMU does for it.
		{"cpu.max", fmt.Sprintf("%d %d", (s.CPUs+1)*cpuPeriod, cpuPeriod)},
		{"cpu.weight", strconv.Itoa(min(100*s.CPUs, maxWeight))},
		{"pids.max", strconv.Itoa(s.CPUs + spareTasks)},
	} {
		if _, err := os.Stat(filepath.Join(dir, l[0])); errors.Is(err, fs.ErrNotExist) {
			continue // there is no such controller, or the kernel does not count swap
		}
		if err := vm.SetCgroup(dir, l[0], l[1]); err != nil {
			return err
		}
	}
	return nil
}

// killedForMemory tells whether the kernel killed a VM for memory.
func (g *cgroups) killedForMemory(id string) bool {
	_, oom := vm.CgroupUsage(g.dir(id))
	return oom
}

// adopt takes over a VM's group of an earlier process.
func (g *cgroups) adopt(id string) {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.live[id] = true
}

// remove removes a VM's group, and the parent with the last of them.
func (g *cgroups) remove(ctx context.Context, id string) error {
	if err := vm.RemoveCgroup(ctx, g.dir(id), os.Remove); err != nil {
		return err
	}
	g.mu.Lock()
	defer g.mu.Unlock()
	delete(g.live, id)
	g.removeParent()
	return nil
}

// removeParent removes the parent if it is empty. The caller holds the lock.
func (g *cgroups) removeParent() { _ = os.Remove(g.parent) }

// sweep removes what earlier processes left: empty groups that are not this process's.
func (g *cgroups) sweep() ([]string, error) {
	g.mu.Lock()
	defer g.mu.Unlock()
	entries, err := os.ReadDir(g.parent)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("list cgroups of VMs: %w", err)
	}
	var removed []string
	var errs []error
	for _, e := range entries {
		if !e.IsDir() || g.live[e.Name()] {
			continue
		}
		switch err := os.Remove(g.dir(e.Name())); {
		case err == nil:
			removed = append(removed, e.Name())
		case !errors.Is(err, unix.EBUSY) && !errors.Is(err, fs.ErrNotExist): // a VM that runs keeps its group
			errs = append(errs, fmt.Errorf("remove cgroup: %w", err))
		}
	}
	g.removeParent()
	return removed, errors.Join(errs...)
}
