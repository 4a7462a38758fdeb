package host

import (
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"

	"golang.org/x/sys/unix"

	"flint"
)

// leastInodes is how many files must be left to make: a VM needs some ten, an image less than that.
const leastInodes = 1000

// What a VM takes of what is counted, in this program or below it. More than was ever seen, so that it lasts.
const (
	filesOfVM   = 16 // sockets to VMM and agent, its console, its process, its record while it is written
	threadsOfVM = 24 // of the VMM beside one for each CPU: QEMU's workers for its disks
	sparePIDs   = 64 // for the tools that flint starts
	spareFiles  = 64 // for GitHub's connections, images being made
)

// Pressure is what this machine runs out of, beside the CPUs and the memory that VMs are admitted by. The zero value has
// not looked yet.
type Pressure struct {
	Machine Machine // the zero value: this one

	mu  sync.Mutex
	why flint.Reason
}

// Machine is where Pressure looks; tests have one of their own.
type Machine struct {
	Root   string // of /proc and /sys; empty: /
	Statfs func(path string, st *unix.Statfs_t) error
	Files  func() (limit uint64, err error) // how many this program may have open
}

// MinFree is what of a disk VMs leave free. Its text is the configuration's.
type MinFree interface {
	Of(disk flint.Bytes) flint.Bytes
	String() string
}

// Reason says why no new VM is started; zero when there is no pressure.
func (p *Pressure) Reason() flint.Reason {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.why
}

// Look looks once: at the disk of the state directory, and whether there is enough for one more VM of so many CPUs. It returns
// what Reason says from now on, and how much of the disk unused images should give back: what it is below twice minFree.
func (p *Pressure) Look(stateDir string, minFree MinFree, cpus int) (why flint.Reason, lacks flint.Bytes) {
	d, err := p.Machine.disk(stateDir)
	lacks = max(0, 2*minFree.Of(d.size)-d.free)
	why = d.refuses(minFree, p.Reason().Code == "host.disk")
	if err != nil {
		lacks = 0 // nobody knows
		why = flint.Because("host.disk", "the disk of state_dir cannot be looked at: %v", err)
	}
	if why.IsZero() {
		why = p.Machine.crowded(cpus)
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	p.why = why
	return why, lacks
}

// disk is the state of a file system.
type disk struct {
	size, free flint.Bytes // free is what ordinary users may still have: VMs' own users are such
	inodes     int64       // free ones; -1 where they are not counted
	readOnly   bool
}

func (m Machine) disk(dir string) (disk, error) {
	statfs := m.Statfs
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
func (d disk) refuses(minFree MinFree, refused bool) flint.Reason {
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

// crowded says what there is too little of for one more VM of so many CPUs: open files of this program, or processes.
func (m Machine) crowded(cpus int) flint.Reason {
	files := m.Files
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
func (m Machine) processLimits() (all []processLimit) {
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

func (m Machine) path(name string) string { return filepath.Join("/", m.Root, name) }

// read returns a small file of the kernel's without its newline; empty when it cannot be read.
func (m Machine) read(name string) string {
	b, err := os.ReadFile(m.path(name))
	if err != nil {
		return ""
	}
	return strings.TrimSpace(string(b))
}
