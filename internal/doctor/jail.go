package doctor

import (
	"context"
	"fmt"
	"io/fs"
	"path"
	"path/filepath"
	"slices"
	"strconv"
	"strings"

	"flint"
)

// findCgroups returns where cgroup v2 is mounted, and whether it may be written: the first mount counts, as it does for
// the jailer.
func (e *exam) findCgroups() (root string, writable, ok bool) {
	for _, f := range e.lines("/proc/self/mounts") {
		if len(f) > 3 && f[2] == "cgroup2" {
			return unescape(f[1]), !slices.Contains(strings.Split(f[3], ","), "ro"), true
		}
	}
	return "", false, false
}

func (e *exam) cgroupV2(context.Context) Finding {
	if e.jailed() {
		return e.judgeCgroups().of(e.firecracker)
	}
	if e.qemu == unused {
		return skip("VMs of Firecracker without its jailer have no cgroups")
	}
	f := e.judgeCgroups()
	if f.Verdict == Fail { // QEMU does without
		return warn(f.Fix, "VMs are not limited by cgroups: %s", f.Text)
	}
	return f
}

func (e *exam) judgeCgroups() Finding {
	// As openCgroups of the driver has it.
	if p := e.ParentCgroup; !filepath.IsLocal(p) || filepath.Clean(p) != p || p == "." {
		return fail("set firecracker.parent_cgroup to something like flint", "%q is not a plain path below the root of cgroup v2", p)
	}
	root, writable, ok := e.findCgroups()
	const fix = "boot with systemd.unified_cgroup_hierarchy=1"
	if !ok {
		return fail(fix, "cgroup v2 is not mounted")
	}
	text, err := e.read(path.Join(root, "cgroup.controllers"))
	if err != nil {
		return fail("run flint as root, outside any container", "%s cannot be read: %v", root, err)
	}
	have := strings.Fields(text)
	var missing []string
	for _, c := range []string{"cpu", "memory", "pids"} {
		if !slices.Contains(have, c) {
			missing = append(missing, c)
		}
	}
	switch {
	case len(missing) > 0 && e.isCgroupRoot(root):
		return fail(fix+" and without cgroup_disable; nothing may have mounted cgroup v1", "%s lacks the controllers %s", root, strings.Join(missing, ", "))
	case len(missing) > 0:
		return fail("delegate cpu, io, memory and pids to this container", "%s lacks the controllers %s", root, strings.Join(missing, ", "))
	case !writable:
		return fail("run flint on the host, or in a container that may write its cgroups", "%s is mounted read-only", root)
	}
	if f := e.delegable(root); f.Verdict != Pass {
		return f
	}
	if !slices.Contains(have, "io") {
		return warn("use a kernel with CONFIG_BLK_CGROUP", "%s lacks the controller io: only Firecracker's own limiter holds disk limits", root)
	}
	return pass("%s has cpu, memory, pids and io", root)
}

// isCgroupRoot tells the root of all cgroups from one that only a container takes for the root.
func (e *exam) isCgroupRoot(root string) bool { return !e.exists(path.Join(root, "cgroup.type")) }

// delegable finds what keeps controllers from being handed down to the VMs' parent: a cgroup that holds processes cannot
// (the no-internal-process rule of cgroup v2, which the root of all is exempt from).
func (e *exam) delegable(root string) Finding {
	dir := root
	for i, part := range append([]string{""}, strings.Split(e.ParentCgroup, "/")...) {
		dir = path.Join(dir, part)
		if i > 0 && part == "" || !e.exists(dir) {
			break
		}
		procs, err := e.read(path.Join(dir, "cgroup.procs"))
		if err != nil || procs == "" || i == 0 && e.isCgroupRoot(root) {
			continue
		}
		n := len(strings.Fields(procs))
		if i == 0 {
			return fail("move the container's processes into a cgroup of their own below it, as systemd in a container does",
				"%s is a container's cgroup with %d processes in it, so it cannot hand controllers down", dir, n)
		}
		return fail("end or move them, or set firecracker.parent_cgroup to another name",
			"%d processes are in %s itself, so it cannot hand controllers down to the VMs", n, dir)
	}
	return pass("")
}

// idTables are the files that say whose a user or group id is, with the columns of the first id and of how many there are.
var idTables = [...]struct {
	file         string
	first, count int // count below 0: one
}{
	{"/etc/passwd", 2, -1},
	{"/etc/passwd", 3, -1},
	{"/etc/subuid", 1, 2},
	{"/etc/group", 2, -1},
	{"/etc/subgid", 1, 2},
}

func (e *exam) jailUIDs(context.Context) Finding {
	if !e.jailed() {
		return skip("only VMs in Firecracker's jailer have users of their own")
	}
	return e.judgeUIDs().of(e.firecracker)
}

func (e *exam) judgeUIDs() Finding {
	first, end := uint64(e.UIDFirst), uint64(e.UIDFirst)+uint64(e.UIDCount)
	const fix = "set firecracker.uid_first and uid_count to a range nothing else uses, such as 1000 from 1900000000"
	if first == 0 || end == first || end > 1<<32-1 {
		return fail(fix, "the range of %d from %d is empty, begins with root, or ends beyond what there is", e.UIDCount, e.UIDFirst)
	}
	for _, t := range idTables {
		if owner, id := e.overlap(t.file, t.first, t.count, first, end); owner != "" {
			return fail(fix, "%s gives %d to %s", t.file, id, owner)
		}
	}
	if pid, name, uid := e.stranger(first, end); pid != "" {
		return warn(fix+", or find out what runs there", "process %s (%s) runs as user %d and is no VM of this flint", pid, name, uid)
	}
	if want := e.runners(); uint64(want) > end-first {
		return warn(fix, "%d users for %d VMs, of which each needs its own", end-first, want)
	}
	return pass("%d to %d are nobody's", first, end-1)
}

// overlap returns who has an id of the range in a table, and which.
func (e *exam) overlap(file string, first, count int, from, to uint64) (owner string, id uint64) {
	text, err := e.read(file)
	if err != nil {
		return "", 0
	}
	for line := range strings.Lines(text) {
		f := strings.Split(strings.TrimSpace(line), ":")
		if len(f) <= max(first, count) {
			continue
		}
		start, err := strconv.ParseUint(f[first], 10, 32)
		if err != nil {
			continue
		}
		n := uint64(1)
		if count >= 0 {
			if n, err = strconv.ParseUint(f[count], 10, 32); err != nil {
				continue
			}
		}
		if start < to && from < start+n {
			return f[0], max(start, from)
		}
	}
	return "", 0
}

// stranger returns a process that runs as a user of the range for which flint has no reservation. Where one may not see
// the reservations, there is none to tell from flint's own.
func (e *exam) stranger(from, to uint64) (pid, name string, uid uint64) {
	reservations := path.Join(e.ChrootBase, "uids")
	if _, err := fs.ReadDir(e.Files, below(reservations)); err != nil && e.exists(e.ChrootBase) && !e.absent(reservations) {
		return "", "", 0
	}
	procs, err := fs.ReadDir(e.Files, "proc")
	if err != nil {
		return "", "", 0
	}
	for _, p := range procs {
		if p.Name()[0] < '1' || p.Name()[0] > '9' {
			continue
		}
		name, id := "", uint64(0)
		for _, f := range e.lines("/proc/" + p.Name() + "/status") {
			switch {
			case len(f) > 1 && f[0] == "Name:":
				name = f[1]
			case len(f) > 1 && f[0] == "Uid:":
				id, _ = strconv.ParseUint(f[1], 10, 32)
			}
		}
		if id >= from && id < to && !e.exists(path.Join(reservations, strconv.FormatUint(id, 10))) {
			return p.Name(), name, id
		}
	}
	return "", "", 0
}

// runners is how many VMs the configured pools may have at the same time.
func (e *exam) runners() int {
	n := 0
	for _, p := range e.Pools {
		n += p.Max
	}
	return n
}

// needs is what all VMs of the configured pools take when they run at the same time.
func (e *exam) needs() (memory, disk flint.Bytes) {
	for _, p := range e.Pools {
		memory += flint.Bytes(p.Max) * (p.Shape.Memory + e.overhead().Of(p.Shape.Memory))
		disk += flint.Bytes(p.Max) * p.Shape.Disk
	}
	return memory, disk
}

// overhead is what a VMM takes beyond its guest's memory.
func (e *exam) overhead() flint.Overhead {
	if e.firecracker == required {
		return e.FirecrackerOverhead
	}
	return e.QEMUOverhead
}

func plural(n int, what string) string {
	if n == 1 {
		return "1 " + what
	}
	return fmt.Sprintf("%d %ss", n, what)
}
