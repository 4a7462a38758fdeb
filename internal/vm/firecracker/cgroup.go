package firecracker

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

	"golang.org/x/sys/unix"

	"flint"
	"flint/internal/vm"
)

const (
	// spareTasks are a VMM's threads beside one for each CPU, those of the kernel included.
	spareTasks = 32
	cpuPeriod  = 100_000 // µs
)

// cgroupFS is where cgroups are. Tests have a directory of plain files instead, which is removed differently.
type cgroupFS struct {
	mounts string // a file as /proc/self/mounts
	remove func(dir string) error
}

// cgroups makes a group for each VM in cgroup v2.
type cgroups struct {
	fs     cgroupFS
	root   string // where it is mounted
	parent string // of the VMs' groups, relative to root
	io     bool   // the io controller is there
}

// neededControllers must be there; io need not.
var neededControllers = [...]string{"cpu", "memory", "pids"}

func cgroupFault(err error, fix string) error {
	return &flint.Fault{Code: "firecracker.cgroup", What: "give each VM a cgroup", Kind: flint.ErrConfig, Err: err, Fix: fix}
}

// openCgroups makes the parent of the VMs' groups and hands the controllers down to it.
func openCgroups(cfs cgroupFS, parent string) (*cgroups, error) {
	if !filepath.IsLocal(parent) || filepath.Clean(parent) != parent || parent == "." {
		return nil, cgroupFault(fmt.Errorf("parent cgroup %q is not a plain path below the root of the hierarchy", parent), "set it to something like flint")
	}
	root, err := vm.CgroupRoot(cfs.mounts)
	if err != nil {
		return nil, cgroupFault(err, "mount /proc, and boot the host with systemd.unified_cgroup_hierarchy=1")
	}
	g := &cgroups{fs: cfs, root: root, parent: parent}
	b, err := os.ReadFile(filepath.Join(root, "cgroup.controllers"))
	if err != nil {
		return nil, cgroupFault(err, "make sure that flint may read and write "+root)
	}
	have := strings.Fields(string(b))
	for _, c := range neededControllers {
		if !slices.Contains(have, c) {
			return nil, cgroupFault(fmt.Errorf("%s has no %s controller", root, c),
				"boot the host with cgroup v2 only (systemd.unified_cgroup_hierarchy=1), and in a container delegate cpu, io, memory and pids to it")
		}
	}
	g.io = slices.Contains(have, "io")
	if err := g.delegate(); err != nil {
		return nil, cgroupFault(err, "make sure that flint may write "+root+" and that no process is in "+filepath.Join(root, parent)+" itself")
	}
	return g, nil
}

// delegate makes the parent and enables the controllers for its children.
func (g *cgroups) delegate() error {
	controllers := "+" + strings.Join(neededControllers[:], " +")
	if g.io {
		controllers += " +io"
	}
	dir := g.root
	for _, part := range strings.Split(g.parent, "/") {
		if err := vm.SetCgroup(dir, "cgroup.subtree_control", controllers); err != nil {
			return err
		}
		dir = filepath.Join(dir, part)
		if err := os.Mkdir(dir, 0o755); err != nil && !errors.Is(err, fs.ErrExist) {
			return fmt.Errorf("make cgroup: %w", err)
		}
	}
	return vm.SetCgroup(dir, "cgroup.subtree_control", controllers)
}

func (g *cgroups) dir(id string) string { return filepath.Join(g.root, g.parent, id) }

// Overhead is what a VM's cgroup may use beyond the guest's memory: Firecracker itself takes 5 MiB, the tables of the
// guest's memory a 256th of it, and the cache of its disks what is left.
func Overhead() flint.Overhead { return flint.Overhead{Fixed: 128 * flint.MiB, Share: 64} }

// create makes a VM's group with its limits, before there is a process to limit.
func (g *cgroups) create(s vm.Spec) error {
	dir := g.dir(s.ID)
	if err := os.Mkdir(dir, 0o755); err != nil {
		return cgroupFault(fmt.Errorf("make cgroup: %w", err), "make sure that nothing else makes cgroups in "+filepath.Dir(dir))
	}
	settings := [][2]string{
		{"memory.max", strconv.FormatInt(int64(s.Memory+Overhead().Of(s.Memory)), 10)},
		{"memory.oom.group", "1"},
		// One more than the guest has, for what the VMM does for it.
		{"cpu.max", fmt.Sprintf("%d %d", (s.CPUs+1)*cpuPeriod, cpuPeriod)},
		{"cpu.weight", strconv.Itoa(100 * s.CPUs)},
		{"pids.max", g.pids(s)},
	}
	for _, set := range settings {
		if err := vm.SetCgroup(dir, set[0], set[1]); err != nil {
			return cgroupFault(err, "make sure that the controllers of "+filepath.Dir(dir)+" stay enabled")
		}
	}
	if err := vm.SetCgroup(dir, "memory.swap.max", "0"); err != nil && !errors.Is(err, fs.ErrNotExist) && !errors.Is(err, fs.ErrPermission) {
		return cgroupFault(err, "turn swap off") // a kernel that does not count swap has no such file
	}
	return g.limitIO(dir, s)
}

func (g *cgroups) pids(s vm.Spec) string { return strconv.Itoa(s.CPUs + spareTasks) }

// limitIO holds the whole VMM to the disk limits, on the device of its scratch disk.
func (g *cgroups) limitIO(dir string, s vm.Spec) error {
	if !g.io || s.Limits.DiskBytes <= 0 && s.Limits.DiskOps <= 0 {
		return nil
	}
	for _, d := range s.Drives {
		if d.ReadOnly {
			continue
		}
		device, err := wholeDisk(d.Path)
		if err != nil {
			return nil // no device of its own (tmpfs, btrfs, zfs): Firecracker's own limiter remains
		}
		value := device
		if b := int64(s.Limits.DiskBytes); b > 0 {
			value += fmt.Sprintf(" rbps=%d wbps=%d", b, b)
		}
		if n := s.Limits.DiskOps; n > 0 {
			value += fmt.Sprintf(" riops=%d wiops=%d", n, n)
		}
		if err := vm.SetCgroup(dir, "io.max", value); err != nil {
			return cgroupFault(err, "take the pool's disk limits away, or enable io throttling in the host's kernel")
		}
	}
	return nil
}

// wholeDisk returns the device number, as MAJOR:MINOR, of the disk a file is on: limits are set on disks, not partitions.
func wholeDisk(path string) (string, error) {
	var st unix.Stat_t
	if err := unix.Stat(path, &st); err != nil {
		return "", err
	}
	number := fmt.Sprintf("%d:%d", unix.Major(st.Dev), unix.Minor(st.Dev))
	dir, err := filepath.EvalSymlinks("/sys/dev/block/" + number)
	if err != nil {
		return "", err
	}
	if _, err := os.Stat(filepath.Join(dir, "partition")); err != nil {
		return number, nil
	}
	b, err := os.ReadFile(filepath.Join(filepath.Dir(dir), "dev"))
	return strings.TrimSpace(string(b)), err
}

// usage is what a group knows of its VM.
func (g *cgroups) usage(id string) (peak flint.Bytes, oom bool) { return vm.CgroupUsage(g.dir(id)) }

// remove ends what is left in a VM's group, and the group.
func (g *cgroups) remove(ctx context.Context, id string) error {
	return vm.RemoveCgroup(ctx, g.dir(id), g.fs.remove)
}
