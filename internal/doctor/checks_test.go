package doctor

import (
	"errors"
	"io/fs"
	"slices"
	"strings"
	"syscall"
	"testing"
	"testing/fstest"

	"flint"
	"flint/internal/vm"
)

// verdict is one row of the tables: what differs from the healthy machine, and what is then said.
type verdict struct {
	name   string
	change func(*host)
	id     string
	want   Verdict
	text   string // part of the text
	fix    string // part of the fix
}

func runVerdicts(t *testing.T, rows []verdict) {
	t.Helper()
	for _, row := range rows {
		t.Run(row.id+"/"+row.name, func(t *testing.T) {
			h := healthy()
			row.change(h)
			f, ok := examineHost(t, h)[row.id]
			if !ok {
				t.Fatalf("no finding %s", row.id)
			}
			if f.Verdict != row.want || !strings.Contains(f.Text, row.text) || !strings.Contains(f.Fix, row.fix) {
				t.Errorf("%s %q, fix %q\nwant %s %q, fix %q", f.Verdict, f.Text, f.Fix, row.want, row.text, row.fix)
			}
		})
	}
}

func driver(name string) func(*host) { return func(h *host) { h.Driver = name } }

func file(path, text string) func(*host) { return func(h *host) { h.write(path, text) } }

func gone(path string) func(*host) { return func(h *host) { h.remove(path) } }

func all(changes ...func(*host)) func(*host) {
	return func(h *host) {
		for _, c := range changes {
			c(h)
		}
	}
}

func kvm(state vm.KVMState, reason string) func(*host) {
	return func(h *host) { h.kvm = vm.KVMStatus{State: state, Reason: reason} }
}

func noFirecracker(h *host) {
	delete(h.programs, "firecracker")
	delete(h.programs, "jailer")
}

func TestKVM(t *testing.T) {
	absent := all(gone("/dev/kvm"), kvm(vm.KVMAbsent, ""))
	runVerdicts(t, []verdict{
		{"absent", absent, "kvm.device", Warn, "in software", "modprobe kvm_intel"},
		{"absent on AMD", all(absent, file("/proc/cpuinfo", "flags : svm\n")), "kvm.device", Warn, "no /dev/kvm", "modprobe kvm_amd"},
		{"no flag", all(absent, file("/proc/cpuinfo", "flags : sse2\n")), "kvm.device", Warn, "no /dev/kvm", "nested virtualisation"},
		{"arm64", all(absent, file("/proc/cpuinfo", "Features : fp\n"), func(h *host) { h.arch = "arm64" }), "kvm.device", Warn, "no /dev/kvm", "kernel with KVM"},
		{"absent and required", all(absent, driver("firecracker")), "kvm.device", Fail, "there is no /dev/kvm", ""},
		{"absent and asked for", all(absent, func(h *host) { h.Accel = "kvm" }), "kvm.device", Fail, "there is no /dev/kvm", ""},
		{"a file", file("/dev/kvm", ""), "kvm.device", Warn, "not a device", ""},
		{"no driver", kvm(vm.KVMAbsent, ""), "kvm.device", Warn, "no driver behind it", "modprobe"},
		{"not ours", kvm(vm.KVMNoPermission, "permission denied"), "kvm.device", Warn, "may not be opened", "group"},
		{"tcg", func(h *host) { h.Accel = "tcg" }, "kvm.device", Skip, "vm.accel is tcg", ""},
		{"tcg is QEMU's matter", func(h *host) { h.Accel, h.Driver = "tcg", "firecracker" }, "kvm.device", Pass, "", ""},

		{"absent", absent, "kvm.works", Skip, "see kvm.device", ""},
		{"broken", kvm(vm.KVMBroken, "too slow"), "kvm.works", Warn, "too slow; VMs run in software", "bare metal"},
		{"broken and required", all(kvm(vm.KVMBroken, "too slow"), driver("firecracker")), "kvm.works", Fail, "too slow", "bare metal"},
		{"broken but unused", all(kvm(vm.KVMBroken, "too slow"), func(h *host) { h.Accel = "tcg" }), "kvm.works", Skip, "", ""},
		{"arm64", func(h *host) { h.arch = "arm64" }, "kvm.works", Pass, "no guest is run", ""},
	})
}

func TestProcessor(t *testing.T) {
	const dir = "/sys/devices/system/cpu/vulnerabilities"
	runVerdicts(t, []verdict{
		{"vulnerable", file(dir+"/retbleed", "Vulnerable"), "cpu.vulnerabilities", Warn, "vulnerable to retbleed", "microcode"},
		{"no microcode", file(dir+"/mds", "Vulnerable: Clear CPU buffers attempted, no microcode; SMT vulnerable"), "cpu.vulnerabilities", Warn, "to mds", "microcode"},
		{"by SMT", file(dir+"/mds", "Mitigation: Clear CPU buffers; SMT vulnerable"), "cpu.vulnerabilities", Warn, "mds (SMT vulnerable)", "see smt"},
		{"by KVM", file(dir+"/itlb_multihit", "KVM: Vulnerable"), "cpu.vulnerabilities", Warn, "itlb_multihit (KVM: Vulnerable)", ""},
		{"without KVM", file(dir+"/itlb_multihit", "Processor vulnerable"), "cpu.vulnerabilities", Warn, "itlb_multihit", ""},
		{"unmitigated", all(file(dir+"/mds", "Vulnerable"), file("/proc/cmdline", "quiet mitigations=off")), "cpu.vulnerabilities", Warn, "mds", "mitigations=off"},
		{"unknown", file(dir+"/gather_data_sampling", "Unknown: Dependent on hypervisor status"), "cpu.vulnerabilities", Pass, "cannot tell of gather_data_sampling", ""},
		{"old kernel", gone(dir), "cpu.vulnerabilities", Skip, "does not say", ""},

		{"on", all(file("/sys/devices/system/cpu/smt/control", "on\n"), file("/sys/devices/system/cpu/smt/active", "1\n")), "smt", Warn, "share a core", "nosmt=force"},
		{"on without siblings", file("/sys/devices/system/cpu/smt/control", "on\n"), "smt", Pass, "has none", ""},
		{"off", file("/sys/devices/system/cpu/smt/control", "off\n"), "smt", Pass, "off", ""},
		{"none", file("/sys/devices/system/cpu/smt/control", "notsupported\n"), "smt", Pass, "has none", ""},
		{"unknown", gone("/sys/devices/system/cpu/smt"), "smt", Skip, "does not say", ""},
	})
}

func TestKernel(t *testing.T) {
	const swaps = "Filename Type Size Used Priority\n"
	runVerdicts(t, []verdict{
		{"on", file("/sys/kernel/mm/ksm/run", "1\n"), "ksm", Warn, "on", "echo 2"},
		{"stopped", file("/sys/kernel/mm/ksm/run", "2\n"), "ksm", Pass, "off", ""},
		{"none", gone("/sys/kernel/mm/ksm"), "ksm", Pass, "no same-page merging", ""},

		{"partition", file("/proc/swaps", swaps+"/dev/sda2 partition 8 0 -2\n"), "swap", Warn, "/dev/sda2", "swapoff"},
		{"file", file("/proc/swaps", swaps+"/swap\\040file file 8 0 -2\n"), "swap", Warn, "/swap file", "swapoff"},
		{"zram", file("/proc/swaps", swaps+"/dev/zram0 partition 8 0 100\n"), "swap", Pass, "/dev/zram0", ""},
		{
			"encrypted", all(file("/proc/swaps", swaps+"/dev/dm-1 partition 8 0 -2\n"), file("/sys/block/dm-1/dm/uuid", "CRYPT-PLAIN-swap\n")),
			"swap", Pass, "/dev/dm-1", "",
		},
		{
			"LVM", all(file("/proc/swaps", swaps+"/dev/dm-1 partition 8 0 -2\n"), file("/sys/block/dm-1/dm/uuid", "LVM-x\n")),
			"swap", Warn, "/dev/dm-1", "",
		},
		{"no proc", gone("/proc/swaps"), "swap", Skip, "cannot be told", ""},

		{"too old", file("/proc/sys/kernel/osrelease", "4.19.0-27-amd64\n"), "kernel.version", Fail, "5.10 and newer", "6.1"},
		{"too old for what is not used", all(noFirecracker, file("/proc/sys/kernel/osrelease", "4.19.0\n")), "kernel.version", Warn, "5.10", ""},
		{"no peak", file("/proc/sys/kernel/osrelease", "5.10.0-33-amd64\n"), "kernel.version", Warn, "peak memory", ""},
		{"no peak to tell", all(noFirecracker, file("/proc/sys/kernel/osrelease", "5.10.0\n")), "kernel.version", Pass, "5.10.0", ""},
		{"release candidate", file("/proc/sys/kernel/osrelease", "7.0-rc1\n"), "kernel.version", Pass, "7.0-rc1", ""},
		{"garbage", file("/proc/sys/kernel/osrelease", "linux\n"), "kernel.version", Skip, "cannot be told", ""},

		{"none", gone("/proc/sys/kernel/seccomp"), "seccomp", Fail, "cannot filter", "CONFIG_SECCOMP_FILTER"},

		{"loud", file("/proc/sys/kernel/printk", "7\t4\t1\t7\n"), "serial", Warn, "ttyS0", "quiet"},
		{"loud on a screen", all(file("/proc/consoles", "tty0 -WU (EC p) 4:1\n"), file("/proc/sys/kernel/printk", "7 4 1 7\n")), "serial", Pass, "", ""},
		{"disabled", all(file("/proc/consoles", "ttyS0 -W- ( C p) 4:64\n"), file("/proc/sys/kernel/printk", "7 4 1 7\n")), "serial", Pass, "", ""},
		{"guests have one", func(h *host) { h.Serial = true }, "serial", Pass, "within bounds", ""},
	})
}

func TestCgroups(t *testing.T) {
	const root = "/sys/fs/cgroup"
	container := file(root+"/cgroup.type", "domain\n")
	runVerdicts(t, []verdict{
		{"QEMU", driver("qemu"), "cgroup.v2", Pass, "", ""},
		{"QEMU, hybrid", all(driver("qemu"), file(root+"/cgroup.controllers", "rdma\n")), "cgroup.v2", Warn, "not limited by cgroups", "unified_cgroup_hierarchy"},
		{"not mounted", file("/proc/self/mounts", "cgroup /sys/fs/cgroup/cpu cgroup rw,cpu 0 0\n"), "cgroup.v2", Fail, "not mounted", "unified_cgroup_hierarchy"},
		{"hybrid", file(root+"/cgroup.controllers", "rdma\n"), "cgroup.v2", Fail, "lacks the controllers cpu, memory, pids", "unified_cgroup_hierarchy"},
		{"not delegated", all(container, file(root+"/cgroup.controllers", "cpu pids\n")), "cgroup.v2", Fail, "lacks the controllers memory", "delegate"},
		{"read-only", file("/proc/self/mounts", "cgroup /sys/fs/cgroup cgroup2 ro,nosuid 0 0\n"), "cgroup.v2", Fail, "read-only", ""},
		{"crowded container", container, "cgroup.v2", Fail, "3 processes", "cgroup of their own"},
		{"empty container", all(container, file(root+"/cgroup.procs", "")), "cgroup.v2", Pass, "", ""},
		{"crowded parent", file(root+"/flint/cgroup.procs", "77\n"), "cgroup.v2", Fail, "1 processes are in /sys/fs/cgroup/flint", "parent_cgroup"},
		{"no io", file(root+"/cgroup.controllers", "cpu memory pids\n"), "cgroup.v2", Warn, "lacks the controller io", "CONFIG_BLK_CGROUP"},
		{"not to be read", gone(root + "/cgroup.controllers"), "cgroup.v2", Fail, "cannot be read", ""},
		{"absolute parent", func(h *host) { h.ParentCgroup = "/flint" }, "cgroup.v2", Fail, `"/flint" is not a plain path`, "parent_cgroup"},
		{"parent outside", func(h *host) { h.ParentCgroup = "../flint" }, "cgroup.v2", Fail, "not a plain path", ""},
		{"would be used", all(kvm(vm.KVMAbsent, ""), file(root+"/cgroup.controllers", "rdma\n")), "cgroup.v2", Warn, "lacks", ""},
		{"no jail", func(h *host) { h.NoJail = true }, "cgroup.v2", Skip, "", ""},
	})
}

func TestPrograms(t *testing.T) {
	const fc, jailer, qemu = "/usr/local/bin/firecracker", "/usr/local/bin/jailer", "/usr/bin/qemu-system-x86_64"
	renamed := func(h *host) {
		h.program("/opt/fc-1.16", "Firecracker v1.16.1", true)
		h.Firecracker, h.programs["/opt/fc-1.16"] = "/opt/fc-1.16", "/opt/fc-1.16"
	}
	docker := func(h *host) {
		delete(h.programs, "podman")
		h.programs["docker"] = "/usr/bin/docker"
	}
	runVerdicts(t, []verdict{
		{"none", noFirecracker, "firecracker.binary", Skip, "not installed", ""},
		{"QEMU", driver("qemu"), "firecracker.binary", Skip, "vm.driver is qemu", ""},
		{"tcg", func(h *host) { h.Accel = "tcg" }, "firecracker.binary", Skip, "vm.accel is tcg", ""},
		{"missing", all(noFirecracker, driver("firecracker")), "firecracker.binary", Fail, "no firecracker in PATH", "1.16.1"},
		{"named and missing", func(h *host) { h.Firecracker = "/opt/firecracker" }, "firecracker.binary", Fail, "no /opt/firecracker", "vm.driver: qemu"},
		{"named and missing without KVM", all(kvm(vm.KVMAbsent, ""), func(h *host) { h.Firecracker = "/opt/firecracker" }), "firecracker.binary", Warn, "no /opt/firecracker", "firecracker.binary"},
		{"only its jailer is named", all(noFirecracker, func(h *host) { h.Jailer = "/usr/local/bin/jailer" }), "firecracker.binary", Fail, "no firecracker in PATH", ""},
		{"somebody's", func(h *host) { h.files[below(fc)].Sys = &syscall.Stat_t{Uid: 1000} }, "firecracker.binary", Warn, "user 1000 can change", "chown root: /usr/local/bin /usr/local/bin/firecracker"},
		{"somebody's directory", func(h *host) {
			h.files["usr/local/bin"] = &fstest.MapFile{Mode: fs.ModeDir | 0o755, Sys: &syscall.Stat_t{Uid: 7}}
		}, "firecracker.jailer", Warn, "user 7 can change", "chown"},
		{"this user's", func(h *host) { h.files[below(fc)].Sys, h.user = &syscall.Stat_t{Uid: 1000}, 1000 }, "firecracker.binary", Pass, "", ""},
		{"somebody's and old", func(h *host) {
			h.files[below(fc)].Sys = &syscall.Stat_t{Uid: 1000}
			h.versions[fc] = "Firecracker v1.12.1"
		}, "firecracker.binary", Fail, "1.12.1", ""},
		{"old", func(h *host) { h.versions[fc], h.versions[jailer] = "Firecracker v1.12.1", "Jailer v1.12.1" }, "firecracker.binary", Fail, "1.12.1; flint needs 1.13", ""},
		{"old enough", func(h *host) { h.versions[fc], h.versions[jailer] = "Firecracker v1.13.0", "Jailer v1.13.0" }, "firecracker.binary", Pass, "1.16.1 is recommended", ""},
		{"old and idle", all(kvm(vm.KVMAbsent, ""), func(h *host) { h.versions[fc] = "Firecracker v1.12.1" }), "firecracker.binary", Warn, "1.12.1", ""},
		{"other architecture", func(h *host) { delete(h.versions, fc) }, "firecracker.binary", Fail, "exec format error", "architecture"},
		{"silent", func(h *host) { h.versions[fc] = "hello" }, "firecracker.binary", Fail, "does not say its version", ""},
		{"dynamic", func(h *host) { h.program(fc, "Firecracker v1.16.1", false) }, "firecracker.binary", Fail, "shared libraries", ""},
		{"dynamic without jail", func(h *host) { h.program(fc, "Firecracker v1.16.1", false); h.NoJail = true }, "firecracker.binary", Pass, "", ""},
		{"script", file(fc, "#!/bin/sh\n"), "firecracker.binary", Fail, "cannot run alone in its jail", "no script around it"},
		{"script without jail", all(file(fc, "#!/bin/sh\n"), func(h *host) { h.NoJail = true }), "firecracker.binary", Pass, "", ""},
		{"too many CPUs", func(h *host) { h.Pools[0].Shape.CPUs = 33 }, "firecracker.binary", Fail, "pool big has 33 CPUs", "vm.cpus"},
		{"as many CPUs as can be", func(h *host) { h.Pools[0].Shape.CPUs = 32 }, "firecracker.binary", Pass, "", ""},
		{"too many CPUs for what is not used", all(noFirecracker, func(h *host) { h.Pools[0].Shape.CPUs = 33 }), "firecracker.binary", Skip, "", ""},
		{"root's alone", func(h *host) { h.files[below(fc)].Mode = 0o750 }, "firecracker.binary", Fail, "users of VMs cannot execute", "chmod a+rx"},
		{"renamed", renamed, "firecracker.binary", Fail, "lacks the word firecracker", "rename"},
		{"everyone's", func(h *host) { h.files[below(fc)].Mode = 0o777 }, "firecracker.binary", Fail, "everyone can change", "chmod o-w"},
		{"link", func(h *host) { h.programs["firecracker"], h.links["/bin/fc"] = "/bin/fc", fc }, "firecracker.binary", Pass, fc, ""},

		{"none", noFirecracker, "firecracker.jailer", Skip, "not installed", ""},
		{"only Firecracker", func(h *host) { delete(h.programs, "jailer") }, "firecracker.jailer", Fail, "no jailer in PATH", "vm.driver: qemu"},
		{"only Firecracker, and no KVM", all(kvm(vm.KVMAbsent, ""), func(h *host) { delete(h.programs, "jailer") }), "firecracker.jailer", Warn, "no jailer in PATH", ""},
		{"only Firecracker, required", func(h *host) { delete(h.programs, "jailer"); h.Driver = "firecracker" }, "firecracker.jailer", Fail, "no jailer in PATH", ""},
		{"other release", func(h *host) { h.versions[jailer] = "Jailer v1.15.0" }, "firecracker.jailer", Fail, "is 1.15.0, but Firecracker is 1.16.1", "one release"},
		{"dynamic", func(h *host) { h.program(jailer, "Jailer v1.16.1", false) }, "firecracker.jailer", Warn, "not a static program", ""},
		{"off", func(h *host) { h.NoJail = true }, "firecracker.jailer", Warn, "breaks out", ""},
		{
			"everyone's directory", func(h *host) { h.files["usr/local/bin"] = &fstest.MapFile{Mode: fs.ModeDir | 0o777} },
			"firecracker.jailer", Fail, "everyone can change", "",
		},
		{
			"everyone's sticky directory", func(h *host) { h.files["usr/local/bin"] = &fstest.MapFile{Mode: fs.ModeDir | fs.ModeSticky | 0o777} },
			"firecracker.jailer", Pass, "", "",
		},

		{"used", noFirecracker, "qemu.binary", Pass, "7.2.22", ""},
		{"unused", driver("firecracker"), "qemu.binary", Skip, "under Firecracker", ""},
		{"not in place of Firecracker without jailer", func(h *host) { delete(h.programs, "jailer") }, "qemu.binary", Skip, "under Firecracker", ""},
		{"where Firecracker has no KVM", kvm(vm.KVMAbsent, ""), "qemu.binary", Pass, "7.2.22", ""},
		{"missing", func(h *host) { noFirecracker(h); delete(h.programs, "qemu-system-x86_64") }, "qemu.binary", Fail, "no qemu-system-x86_64 in PATH", "qemu-system-x86"},
		{"missing on arm64", func(h *host) { noFirecracker(h); h.arch = "arm64" }, "qemu.binary", Fail, "no qemu-system-aarch64 in PATH", "qemu-system-arm"},
		{"old", func(h *host) { noFirecracker(h); h.versions[qemu] = "QEMU emulator version 4.2.1" }, "qemu.binary", Fail, "5.2 or newer", ""},
		{"named and missing", func(h *host) { noFirecracker(h); h.QEMU = "/opt/qemu" }, "qemu.binary", Fail, "no /opt/qemu", "vm.qemu"},
		{"a pipe", func(h *host) { noFirecracker(h); h.files[qemu[1:]] = &fstest.MapFile{Mode: fs.ModeNamedPipe | 0o755} }, "qemu.binary", Fail, "no ordinary file", "qemu-system-x86"},
		{"broken", func(h *host) { noFirecracker(h); delete(h.versions, qemu) }, "qemu.binary", Fail, "exec format error", "reinstall"},

		{"missing", func(h *host) { delete(h.programs, "depmod") }, "depmod", Fail, "not installed", "kmod"},
		{"not needed", func(h *host) { delete(h.programs, "depmod"); h.Monolithic = true }, "depmod", Skip, "no modules", ""},

		{"none", func(h *host) { delete(h.programs, "podman") }, "builder", Warn, "none of", "buildah"},
		{"none for a Dockerfile", func(h *host) { delete(h.programs, "podman"); h.Dockerfile = true }, "builder", Fail, "none of", "buildah"},
		{"docker without its daemon", docker, "builder", Warn, "does not listen", "start docker"},
		{"docker", all(docker, file("/run/docker.sock", "")), "builder", Pass, "docker", ""},
	})
}

func TestWhatEveryoneCanChangeIsNotRun(t *testing.T) {
	h := healthy()
	h.files["usr/local/bin/firecracker"].Mode = 0o757
	examineHost(t, h)
	if slices.Contains(h.askedToSay, "/usr/local/bin/firecracker") || !slices.Contains(h.askedToSay, "/usr/local/bin/jailer") {
		t.Errorf("run: %v", h.askedToSay)
	}
}

func TestUsers(t *testing.T) {
	const vmStatus = "Name:\tfirecracker\nState:\tS\nUid:\t1900000007\t1900000007\t1900000007\t1900000007\n"
	runVerdicts(t, []verdict{
		{"QEMU", driver("qemu"), "jail.uids", Skip, "", ""},
		{"account", file("/etc/passwd", "root:x:0:0::/:\nci:x:1900000999:1900000999::/:\n"), "jail.uids", Fail, "/etc/passwd gives 1900000999 to ci", "uid_first"},
		{"next to it", file("/etc/passwd", "a:x:1899999999:1::/:\nb:x:1900001000:1::/:\n"), "jail.uids", Pass, "nobody's", ""},
		{"containers", file("/etc/subuid", "pod:1800000000:200000000\n"), "jail.uids", Fail, "/etc/subuid gives 1900000000 to pod", ""},
		{"containers up to it", file("/etc/subuid", "pod:1899999000:1000\n"), "jail.uids", Pass, "", ""},
		{"group", file("/etc/group", "ci:x:1900000001:\n"), "jail.uids", Fail, "/etc/group gives 1900000001 to ci", ""},
		{"account's group", file("/etc/passwd", "ci:x:1000:1900000003::/:\n"), "jail.uids", Fail, "/etc/passwd gives 1900000003 to ci", ""},
		{"containers' groups", file("/etc/subgid", "pod:1900000500:1\n"), "jail.uids", Fail, "/etc/subgid gives 1900000500 to pod", ""},
		{"empty", func(h *host) { h.UIDCount = 0 }, "jail.uids", Fail, "is empty", ""},
		{"root", func(h *host) { h.UIDFirst = 0 }, "jail.uids", Fail, "begins with root", ""},
		{"beyond", func(h *host) { h.UIDFirst = 1<<32 - 10 }, "jail.uids", Fail, "beyond", ""},
		{"a stranger's process", file("/proc/77/status", vmStatus), "jail.uids", Warn, "process 77 (firecracker) runs as user 1900000007", ""},
		{"our own VM", all(file("/proc/77/status", vmStatus), file("/var/lib/flint/jail/uids/1900000007", "x")), "jail.uids", Pass, "", ""},
		{"few", func(h *host) { h.UIDCount = 3 }, "jail.uids", Warn, "3 users for 4 VMs", ""},
		{"would be used", all(kvm(vm.KVMAbsent, ""), func(h *host) { h.UIDFirst = 0 }), "jail.uids", Warn, "root", ""},
	})
}

func TestState(t *testing.T) {
	at := func(state, jail string) func(*host) {
		return func(h *host) {
			h.remove("/var/lib/flint")
			h.StateDir, h.ChrootBase = state, jail
		}
	}
	dir := func(path string, mode fs.FileMode, dev uint64) func(*host) {
		return func(h *host) {
			h.files[below(path)] = &fstest.MapFile{Mode: fs.ModeDir | mode, Sys: &syscall.Stat_t{Dev: dev}}
		}
	}
	ext4 := func(image string, mode fs.FileMode) func(*host) {
		return func(h *host) {
			content := make([]byte, 2048)
			content[1080], content[1081] = 0x53, 0xef
			h.files[below(image)] = &fstest.MapFile{Data: content, Mode: mode}
			h.Pools[0].Image = image
		}
	}
	qemu := driver("qemu")
	runVerdicts(t, []verdict{
		{"not made yet", at("/srv/flint", "/srv/flint/jail"), "state.filesystem", Pass, "ext4 at /", ""},
		{"a name with a space", all(at("/srv/big disk/flint", "/srv/big disk/flint/jail"), dir("/srv/big disk", 0o755, 1)), "state.filesystem", Pass, "xfs at /srv/big disk", ""},
		{"NFS", all(at("/mnt/nas/flint", "/mnt/nas/flint/jail"), dir("/mnt/nas", 0o755, 1)), "state.filesystem", Fail, "not on a local disk", "local disk"},
		{"memory", all(qemu, at("/tmp/flint", ""), dir("/tmp", 0o777, 1)), "state.filesystem", Warn, "noexec", ""},
		{"read-only", all(at("/mnt/readonly/flint", "/jail"), dir("/mnt/readonly", 0o755, 1)), "state.filesystem", Fail, "read-only", ""},
		{"jail noexec", all(at("/tmp/flint", "/tmp/flint/jail"), dir("/tmp", 0o777, 1)), "state.filesystem", Fail, "mounted noexec", "without noexec"},
		{"jail nodev", all(at("/mnt/nodev/flint", "/mnt/nodev/flint/jail"), dir("/mnt/nodev", 0o755, 1)), "state.filesystem", Fail, "mounted nodev", "without nodev"},
		{"jail nodev, but unused", all(qemu, at("/mnt/nodev/flint", "/mnt/nodev/flint/jail"), dir("/mnt/nodev", 0o755, 1)), "state.filesystem", Pass, "", ""},
		{"another mount", all(at("/srv/flint", "/srv/big disk/jail"), dir("/srv/big disk", 0o755, 1)), "state.filesystem", Fail, "cannot be linked", "chroot_base"},
		{"another volume", all(dir("/var/lib/flint", 0o755, 1), dir("/var/lib/flint/jail", 0o755, 2)), "state.filesystem", Fail, "cannot be linked", ""},
		{"same volume", all(dir("/var/lib/flint", 0o755, 1), dir("/var/lib/flint/jail", 0o755, 1)), "state.filesystem", Pass, "", ""},
		{"everyone's jail", dir("/var/lib/flint/jail", 0o777, 1), "state.filesystem", Fail, "others than root", "chmod"},
		{"somebody's jail", func(h *host) {
			h.files["var/lib/flint/jail"] = &fstest.MapFile{Mode: fs.ModeDir | 0o755, Sys: &syscall.Stat_t{Uid: 1000}}
		}, "state.filesystem", Fail, "others than root", "chown"},
		{"an image beside", ext4("/srv/rootfs.ext4", 0o644), "state.filesystem", Pass, "", ""},
		{"an image elsewhere", ext4("/srv/big disk/rootfs.ext4", 0o644), "state.filesystem", Fail, "the image /srv/big disk/rootfs.ext4 of pool big cannot be linked", "copy it into /var/lib/flint"},
		{"an image elsewhere, unjailed", all(qemu, ext4("/srv/big disk/rootfs.ext4", 0o644)), "state.filesystem", Pass, "", ""},
		{"a private image", ext4("/srv/rootfs.ext4", 0o600), "state.filesystem", Fail, "cannot read the image", "chmod a+r"},
		{"everyone's image", ext4("/srv/rootfs.ext4", 0o666), "state.filesystem", Fail, "everyone can change the image", "chmod o-w"},
		{"an archive elsewhere", all(ext4("/srv/big disk/rootfs.tar", 0o600), file("/srv/big disk/rootfs.tar", "ustar")), "state.filesystem", Pass, "", ""},
		{"a link elsewhere", func(h *host) { h.links["/var/lib/flint"] = "/mnt/nas/flint" }, "state.filesystem", Fail, "nfs4", ""},
		{"no mountinfo", gone("/proc/self/mountinfo"), "state.filesystem", Skip, "cannot be told", ""},

		{"full", func(h *host) { h.free = flint.GiB }, "state.space", Fail, "1GiB free", "make room"},
		{"little for the pools", func(h *host) { h.free = 100 * flint.GiB }, "state.space", Warn, "4 VMs could write 160GiB", "lower disk"},
		{"little", func(h *host) { h.free, h.Pools = 10*flint.GiB, nil }, "state.space", Warn, "10GiB free", ""},
		{"unknown", func(h *host) { h.spaceFailed = errors.New("no") }, "state.space", Skip, "", ""},
	})
}

func TestCapacity(t *testing.T) {
	runVerdicts(t, []verdict{
		{"many", func(h *host) { h.Pools[0].Max = 8 }, "memory.capacity", Warn, "8 VMs could run at the same time", ""},
		{"just", func(h *host) { h.Memory = 4 * (8*flint.GiB + 32*flint.MiB) }, "memory.capacity", Pass, "", ""},
		{"not with QEMU's overhead", all(driver("qemu"), func(h *host) { h.Memory = 4 * (8*flint.GiB + 32*flint.MiB) }), "memory.capacity", Warn, "", ""},
		{"none fits", func(h *host) { h.Memory = 8 * flint.GiB }, "memory.capacity", Fail, "wait for ever", "vm.memory"},
		{"more than there is", func(h *host) { h.Memory = 64 * flint.GiB }, "memory.capacity", Fail, "host.memory is 64GiB", ""},
		{"unknown", gone("/proc/meminfo"), "memory.capacity", Skip, "", ""},

		{"few", file("/proc/self/limits", "Max open files 1024 256 files\n"), "limits.nofile", Warn, "256 files; flint could need 384", "LimitNOFILE"},
		{"no limit", file("/proc/self/limits", "Max open files 1024 unlimited files\n"), "limits.nofile", Pass, "no limit", ""},
		{"unknown", gone("/proc/self/limits"), "limits.nofile", Skip, "", ""},
	})
}

func TestNetwork(t *testing.T) {
	header4, _, _ := strings.Cut(route4, "\n")
	const stub = "nameserver 127.0.0.53\noptions edns0\n"
	runVerdicts(t, []verdict{
		{"none", gone("/dev/net/tun"), "net.tun", Fail, "no /dev/net/tun", "modprobe tun"},

		{"on", file("/proc/sys/net/ipv4/ip_forward", "1\n"), "net.forwarding", Pass, "on", ""},
		{"off", func(*host) {}, "net.forwarding", Pass, "turns it on", ""},
		{
			"container", all(file("/proc/self/mountinfo", mountinfo+"50 22 0:21 /sys /proc/sys ro,relatime - proc proc rw\n"), file("/proc/sys/net/ipv4/x", "")),
			"net.forwarding", Fail, "/proc/sys is mounted read-only", "",
		},
		{
			"deepest mount", file("/proc/self/mountinfo", strings.Replace(mountinfo, "/proc rw", "/proc ro", 1)),
			"net.forwarding", Fail, "/proc is mounted read-only", "",
		},
		{"no IPv6", file("/proc/sys/net/ipv6/conf/all/disable_ipv6", "1\n"), "net.forwarding", Warn, "IPv6 is off", "disable_ipv6=0"},
		{"no IPv6 in the kernel", gone("/proc/sys/net/ipv6"), "net.forwarding", Warn, "IPv6 is off", ""},
		{"no IPv6 wanted", func(h *host) { h.remove("/proc/sys/net/ipv6"); h.IPv6 = false }, "net.forwarding", Pass, "", ""},

		{"both", func(*host) {}, "net.uplink", Pass, "IPv4 by eth0, IPv6 by eth0", ""},
		{"IPv4", gone("/proc/net/ipv6_route"), "net.uplink", Pass, "no default route for IPv6", ""},
		{"IPv4 wanted", func(h *host) { h.remove("/proc/net/ipv6_route"); h.IPv6 = false }, "net.uplink", Pass, "IPv4 by eth0", ""},
		{"IPv6", file("/proc/net/route", header4+"\n"), "net.uplink", Warn, "IPv6 only", ""},
		{"none", all(file("/proc/net/route", header4+"\n"), gone("/proc/net/ipv6_route")), "net.uplink", Warn, "no default route", "default route"},
		{
			"unreachable", all(file("/proc/net/route", header4+"\n*\t00000000\t00000000\t0201\t0\t0\t0\t00000000\t0\t0\t0\n"), gone("/proc/net/ipv6_route")),
			"net.uplink", Warn, "no default route", "",
		},

		{"two", func(*host) {}, "net.dns", Pass, "192.0.2.53, 2001:db8::53", ""},
		{"stub", all(file("/etc/resolv.conf", stub), file("/run/systemd/resolve/resolv.conf", "nameserver 192.0.2.99\n")), "net.dns", Pass, "192.0.2.99", ""},
		{"stub alone", file("/etc/resolv.conf", stub), "net.dns", Pass, "127.0.0.53", ""},
		{"not only the stub", all(file("/etc/resolv.conf", stub+"nameserver 192.0.2.1\n"), file("/run/systemd/resolve/resolv.conf", "nameserver 192.0.2.99\n")), "net.dns", Pass, "127.0.0.53, 192.0.2.1", ""},
		{"none", file("/etc/resolv.conf", "nameserver nonsense\n"), "net.dns", Fail, "no name servers", "resolv.conf"},
	})
}
