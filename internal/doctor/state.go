package doctor

import (
	"context"
	"io"
	"path"
	"slices"
	"strconv"
	"strings"
	"syscall"

	"flint"
)

// remote are file systems on other machines: locks, sparse files and hard links are not what they are on a disk.
var remote = []string{"nfs", "nfs4", "cifs", "smb3", "9p", "ceph", "afs", "glusterfs", "lustre", "gfs2", "ocfs2", "virtiofs"}

func (e *exam) stateFilesystem(context.Context) Finding {
	m, err := e.mountOf(e.StateDir)
	if err != nil {
		return skip("cannot be told: %v", err)
	}
	where := e.StateDir + " (" + m.kind + " at " + m.point + ")"
	switch {
	case m.options["ro"]:
		return fail("mount it writable, or set state_dir to a directory elsewhere", "%s is mounted read-only", where)
	case slices.Contains(remote, m.kind) || strings.HasPrefix(m.kind, "fuse.") && m.kind != "fuse.fuse-overlayfs":
		return fail("set state_dir to a directory on a local disk", "%s is not on a local disk", where)
	}
	if e.jailed() {
		if f := e.chrootFilesystem(m).of(e.firecracker); f.Verdict != Pass {
			return f
		}
	}
	switch {
	case m.options["noexec"]:
		return warn("mount it without noexec, or set state_dir to a directory elsewhere",
			"%s is mounted noexec: images cannot be built there", where)
	case m.kind == "tmpfs" || m.kind == "ramfs":
		return warn("set state_dir to a directory on a disk", "%s is in memory: images and what jobs write take memory from VMs", where)
	}
	return pass("%s", where)
}

// chrootFilesystem looks at where the jails are, given the mount of the state directory.
func (e *exam) chrootFilesystem(state mount) Finding {
	jails, err := e.mountOf(e.ChrootBase)
	if err != nil {
		return pass("") // nothing to tell
	}
	for _, flag := range []string{"noexec", "nodev"} {
		if jails.options[flag] {
			return fail("mount "+jails.point+" without "+flag+", or set firecracker.chroot_base to a directory elsewhere",
				"the jails in %s are on a file system mounted %s, where Firecracker cannot run", e.ChrootBase, flag)
		}
	}
	// A hard link cannot cross a mount, even one of the same file system, nor a volume within one.
	if jails.id != state.id || e.otherDevice(e.StateDir, e.ChrootBase) {
		return fail("set firecracker.chroot_base to a directory within "+e.StateDir,
			"images in %s cannot be linked into jails in %s: they are on different file systems or mounts", e.StateDir, e.ChrootBase)
	}
	if info, err := e.stat(e.ChrootBase); err == nil {
		st, known := info.Sys().(*syscall.Stat_t)
		if info.Mode().Perm()&0o022 != 0 || known && st.Uid != 0 {
			return fail("chown root: "+e.ChrootBase+" && chmod 755 "+e.ChrootBase, "others than root can write to %s", e.ChrootBase)
		}
	}
	for _, p := range e.Pools {
		if f := e.linkable(p, jails); f.Verdict != Pass {
			return f
		}
	}
	return pass("")
}

// linkable looks at a pool's image that is a file system to be used as it is, wherever it lies; all other images end in the
// state directory.
func (e *exam) linkable(p flint.Pool, jails mount) Finding {
	info, err := e.stat(p.Image)
	if err != nil || !path.IsAbs(p.Image) || !info.Mode().IsRegular() || !e.isExt4(p.Image) {
		return pass("")
	}
	if m, err := e.mountOf(p.Image); err == nil && m.id != jails.id || e.otherDevice(p.Image, e.ChrootBase) {
		return fail("copy it into "+e.StateDir+", and name the copy in the pool",
			"the image %s of pool %s cannot be linked into jails in %s: they are on different file systems or mounts", p.Image, p.Name, e.ChrootBase)
	}
	switch mode := info.Mode().Perm(); {
	case mode&0o004 == 0:
		return fail("chmod a+r "+p.Image, "the users of VMs cannot read the image %s of pool %s", p.Image, p.Name)
	case mode&0o002 != 0:
		return fail("chmod o-w "+p.Image, "everyone can change the image %s of pool %s, VMs too", p.Image, p.Name)
	}
	return pass("")
}

// isExt4 looks for the magic number of ext4's superblock.
func (e *exam) isExt4(file string) bool {
	f, err := e.open(file)
	if err != nil {
		return false
	}
	defer f.Close()
	at, ok := f.(io.ReaderAt)
	var magic [2]byte
	if !ok {
		return false
	}
	_, err = at.ReadAt(magic[:], 1024+56)
	return err == nil && magic == [2]byte{0x53, 0xef}
}

// otherDevice reports whether two paths, or what there is of them, are known to be on different devices.
func (e *exam) otherDevice(a, b string) bool {
	device := func(name string) (uint64, bool) {
		info, err := e.stat(e.nearest(name))
		if err != nil {
			return 0, false
		}
		st, ok := info.Sys().(*syscall.Stat_t)
		if !ok {
			return 0, false
		}
		return st.Dev, true
	}
	x, xok := device(a)
	y, yok := device(b)
	return xok && yok && x != y
}

// Free space below which images cannot be built, and below which they may soon fill the disk.
const (
	leastSpace  = 4 * flint.GiB
	decentSpace = 20 * flint.GiB
)

func (e *exam) stateSpace(context.Context) Finding {
	free, total, err := e.Space(e.nearest(e.StateDir))
	if err != nil {
		return skip("cannot be told: %v", err)
	}
	const fix = "make room, or set state_dir to a directory on a larger disk"
	_, disk := e.needs()
	switch {
	case free < leastSpace:
		return fail(fix, "%s free of %s for %s, which is not enough for an image and a VM", free, total, e.StateDir)
	case disk > 0 && free < disk:
		return warn(fix+", or lower disk or max of the pools",
			"%s free of %s for %s; %s could write %s between them", free, total, e.StateDir, plural(e.runners(), "VM"), disk)
	case free < decentSpace:
		return warn(fix, "%s free of %s for %s: a few images fill that", free, total, e.StateDir)
	}
	return pass("%s free of %s for %s", free, total, e.StateDir)
}

func (e *exam) memoryCapacity(context.Context) Finding {
	var total flint.Bytes
	for _, f := range e.lines("/proc/meminfo") {
		if f[0] == "MemTotal:" && len(f) == 3 && f[2] == "kB" {
			n, _ := strconv.ParseUint(f[1], 10, 40)
			total = flint.Bytes(n) * flint.KiB
		}
	}
	if total == 0 {
		return skip("cannot be told from /proc/meminfo")
	}
	if e.Memory > total {
		return fail("lower host.memory, or leave it out: then it is nine tenths of what there is", "host.memory is %s, but this machine has %s", e.Memory, total)
	}
	for _, p := range e.Pools {
		if need := p.Shape.Memory + e.overhead().Of(p.Shape.Memory); need > e.Memory {
			return fail("lower the pool's vm.memory, or raise host.memory",
				"a VM of pool %s takes %s with its VMM, but all may have %s: its jobs would wait for ever", p.Name, need, e.Memory)
		}
	}
	if need, _ := e.needs(); need > e.Memory {
		return warn("lower memory or max of the pools; or let jobs wait",
			"%s could run at the same time and take %s, but all may have %s of %s", plural(e.runners(), "VM"), need, e.Memory, total)
	}
	return pass("VMs may have %s of %s", e.Memory, total)
}

// Descriptors flint itself needs: some for the daemon, and for each VM its disks, sockets, pipes and namespace.
const (
	daemonFiles = 256
	filesPerVM  = 32
)

func (e *exam) openFiles(context.Context) Finding {
	limit := uint64(0)
	for _, f := range e.lines("/proc/self/limits") {
		// "Max open files  <soft>  <hard>  files": Go raises the soft limit to the hard one.
		if len(f) == 6 && strings.Join(f[:3], " ") == "Max open files" {
			if limit, _ = strconv.ParseUint(f[4], 10, 64); f[4] == "unlimited" {
				limit = 1 << 63
			}
		}
	}
	if limit == 0 {
		return skip("cannot be told from /proc/self/limits")
	}
	if need := uint64(daemonFiles + filesPerVM*e.runners()); limit < need {
		return warn("ulimit -Hn 65536, or in a systemd unit LimitNOFILE=65536",
			"a process may open %d files; flint could need %d for %s", limit, need, plural(e.runners(), "VM"))
	}
	if limit == 1<<63 {
		return pass("no limit")
	}
	return pass("a process may open %d files", limit)
}
