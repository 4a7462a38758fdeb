package doctor

import (
	"context"
	"errors"
	"io/fs"
	"path"
	"slices"
	"strconv"
	"strings"

	"flint/internal/vm"
)

const kvmDevice = "/dev/kvm"

func (e *exam) kvmDevice(context.Context) Finding {
	need := e.needsKVM()
	if need == unused {
		return skip("vm.accel is tcg: VMs run in software")
	}
	info, err := e.stat(kvmDevice)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return fail(e.kvmFix(), "there is no %s%s", kvmDevice, inSoftware(need)).of(need)
	case err != nil:
		return fail("run flint as root", "%s: %v", kvmDevice, err).of(need)
	case info.Mode()&fs.ModeCharDevice == 0:
		return fail("remove it and load the module kvm again", "%s is not a device", kvmDevice).of(need)
	case e.kvm.State == vm.KVMAbsent:
		return fail(e.kvmFix(), "%s is there, but no driver behind it%s", kvmDevice, inSoftware(need)).of(need)
	case e.kvm.State == vm.KVMNoPermission:
		return fail("run flint as root, or add its user to the group that owns "+kvmDevice, "%s may not be opened: %s", kvmDevice, e.kvm.Reason).of(need)
	}
	return pass("%s is there", kvmDevice)
}

func inSoftware(need role) string {
	if need == required {
		return ""
	}
	return "; VMs run in software, many times slower"
}

// kvmFix says how to get a /dev/kvm, as far as the processor's flags tell.
func (e *exam) kvmFix() string {
	module := ""
	for _, f := range e.lines("/proc/cpuinfo") {
		if f[0] != "flags" {
			continue
		}
		if slices.Contains(f, "vmx") {
			module = "kvm_intel"
		} else if slices.Contains(f, "svm") {
			module = "kvm_amd"
		}
		break
	}
	switch {
	case module != "":
		return "modprobe " + module
	case e.Arch == "amd64":
		return "enable virtualisation (VT-x, AMD-V) in the firmware, or nested virtualisation for this machine if it is a VM itself"
	}
	return "use a machine and a kernel with KVM"
}

func (e *exam) kvmWorks(context.Context) Finding {
	need := e.needsKVM()
	switch {
	case need == unused:
		return skip("vm.accel is tcg: VMs run in software")
	case e.kvm.State == vm.KVMWorks && e.Arch != "amd64":
		return pass("KVM can be opened; on this architecture no guest is run to see whether it works")
	case e.kvm.State == vm.KVMWorks:
		return pass("a guest ran 20 million iterations of a loop at the speed of a processor")
	case e.kvm.State != vm.KVMBroken:
		return skip("there is no KVM to try, see kvm.device")
	}
	return fail("use bare metal, or a machine whose hypervisor has real nested virtualisation",
		"KVM answers, but does not run guests: %s%s", e.kvm.Reason, inSoftware(need)).of(need)
}

const vulnerabilityDir = "/sys/devices/system/cpu/vulnerabilities"

// vulnerabilities repeats what the kernel says of the processor's flaws (admin-guide/hw-vuln in its documentation).
func (e *exam) vulnerabilities(context.Context) Finding {
	entries, err := fs.ReadDir(e.Files, below(vulnerabilityDir))
	if err != nil || len(entries) == 0 {
		return skip("the kernel does not say what it mitigates")
	}
	var open, unknown []string
	for _, entry := range entries {
		text, err := e.read(path.Join(vulnerabilityDir, entry.Name()))
		switch {
		case err != nil || strings.HasPrefix(text, "Unknown"):
			unknown = append(unknown, entry.Name())
		case strings.HasPrefix(text, "Vulnerable") || strings.Contains(text, "Processor vulnerable"):
			open = append(open, entry.Name())
		default:
			// "Mitigation: …; SMT vulnerable", "KVM: Vulnerable": one part is open.
			for part := range strings.SplitSeq(text, ";") {
				if strings.Contains(strings.ToLower(part), "vulnerable") {
					open = append(open, entry.Name()+" ("+strings.TrimSpace(part)+")")
				}
			}
		}
	}
	if len(open) > 0 {
		fix := "install the processor's microcode update and a current kernel; for what names SMT, see smt"
		if cmdline, err := e.read("/proc/cmdline"); err == nil && mitigationsOff(cmdline) {
			fix = "take mitigations=off out of the kernel's command line; then look again"
		}
		return warn(fix, "a job could read other VMs' or the host's memory: vulnerable to %s", strings.Join(open, ", "))
	}
	if len(unknown) > 0 {
		return pass("%d known flaws mitigated or absent; this kernel cannot tell of %s", len(entries)-len(unknown), strings.Join(unknown, ", "))
	}
	return pass("all %d flaws the kernel knows are mitigated or absent", len(entries))
}

func mitigationsOff(cmdline string) bool {
	return slices.ContainsFunc(strings.Fields(cmdline), func(a string) bool {
		return a == "mitigations=off" || strings.HasPrefix(a, "mitigations=off,")
	})
}

func (e *exam) smt(context.Context) Finding {
	control, err := e.read("/sys/devices/system/cpu/smt/control")
	if err != nil {
		return skip("the kernel does not say whether processors share cores")
	}
	active, _ := e.read("/sys/devices/system/cpu/smt/active")
	switch {
	case control == "forceoff" || control == "off":
		return pass("off")
	case control == "notsupported" || control == "notimplemented" || active == "0":
		return pass("this machine has none")
	}
	return warn("boot with nosmt=force, or echo forceoff > /sys/devices/system/cpu/smt/control; it costs throughput, and matters less where all jobs are your own",
		"on: VMs that share a core can spy on each other")
}

func (e *exam) ksm(context.Context) Finding {
	run, err := e.read("/sys/kernel/mm/ksm/run")
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return pass("the kernel has no same-page merging")
	case err != nil:
		return skip("cannot be told: %v", err)
	case run == "0" || run == "2":
		return pass("off")
	}
	return warn("echo 2 > /sys/kernel/mm/ksm/run, and disable what turned it on (ksm or ksmtuned)",
		"on: a VM can find out what others have in memory by the time its writes take")
}

func (e *exam) swap(context.Context) Finding {
	rows := e.lines("/proc/swaps")
	if len(rows) == 0 {
		return skip("cannot be told: /proc/swaps cannot be read")
	}
	var plain, safe []string
	for _, f := range rows[1:] {
		device := path.Base(unescape(f[0]))
		uuid, _ := e.read("/sys/block/" + device + "/dm/uuid")
		if strings.HasPrefix(device, "zram") || strings.HasPrefix(uuid, "CRYPT-") {
			safe = append(safe, unescape(f[0]))
			continue
		}
		plain = append(plain, unescape(f[0]))
	}
	switch {
	case len(plain) > 0:
		return warn("swapoff -a and take swap out of /etc/fstab, or put it on an encrypted device",
			"what VMs and flint have in memory, secrets too, can end in clear on %s", strings.Join(plain, ", "))
	case len(safe) > 0:
		return pass("only in memory or encrypted: %s", strings.Join(safe, ", "))
	}
	return pass("off")
}

// Linux releases that matter, as major*1000+minor. Firecracker's kernel policy names 5.10 as the oldest host kernel its
// releases are tried on; memory.peak came with 5.19.
const (
	oldestKernel = 5_010
	peakKernel   = 5_019
)

func (e *exam) kernelVersion(context.Context) Finding {
	release, err := e.read("/proc/sys/kernel/osrelease")
	if err != nil {
		return skip("cannot be told: %v", err)
	}
	v, ok := parseKernel(release)
	switch {
	case !ok:
		return skip("cannot be told from %q", release)
	case v < oldestKernel:
		return fail("use a distribution with Linux 6.1 or newer (Debian 12, Ubuntu 24.04)",
			"Linux %s; Firecracker is made for 5.10 and newer", release).of(e.firecracker)
	case v < peakKernel && e.jailed():
		return warn("use a distribution with Linux 6.1 or newer (Debian 12, Ubuntu 24.04)",
			"Linux %s; before 5.19 the peak memory of a job under Firecracker cannot be told", release)
	}
	return pass("Linux %s", release)
}

func parseKernel(release string) (int, bool) {
	major, rest, _ := strings.Cut(release, ".")
	if i := strings.IndexFunc(rest, func(r rune) bool { return r < '0' || r > '9' }); i >= 0 {
		rest = rest[:i]
	}
	a, aerr := strconv.ParseUint(major, 10, 16)
	b, berr := strconv.ParseUint(rest, 10, 16)
	return int(a)*1000 + min(int(b), 999), aerr == nil && berr == nil
}

func (e *exam) seccomp(context.Context) Finding {
	actions, err := e.read("/proc/sys/kernel/seccomp/actions_avail")
	if err == nil && slices.Contains(strings.Fields(actions), "trap") {
		return pass("the kernel filters system calls; Firecracker and QEMU bring their filters")
	}
	return fail("use a kernel with CONFIG_SECCOMP_FILTER",
		"the kernel cannot filter system calls, which confines a VMM that a guest has taken over")
}

// verboseConsole is the console log level from which the kernel's KERN_INFO messages reach its consoles.
const verboseConsole = 7

// serial looks at the host's own serial console. What guests write to theirs ends in a ring of memory, where they have one
// at all.
func (e *exam) serial(context.Context) Finding {
	var slow []string
	for _, f := range e.lines("/proc/consoles") {
		// The flags are in parentheses, E for enabled: "ttyS0 -W- (EC p a) 4:64". tty0 is the screen, hvc0 a virtual one.
		if (strings.HasPrefix(f[0], "ttyS") || strings.HasPrefix(f[0], "ttyAMA")) && strings.Contains(strings.Join(f, " "), "(E") {
			slow = append(slow, f[0])
		}
	}
	level := 0
	if rows := e.lines("/proc/sys/kernel/printk"); len(rows) > 0 {
		level, _ = strconv.Atoi(rows[0][0])
	}
	if len(slow) > 0 && level >= verboseConsole {
		return warn("sysctl -w kernel.printk=4, or boot with quiet",
			"every VM's start writes some lines to the host's serial console %s, and waits for it", strings.Join(slow, ", "))
	}
	if e.firecracker != unused && e.Serial {
		return pass("what guests write to theirs is kept within bounds; the host's own does not slow VMs")
	}
	return pass("guests have none that could fill the host; the host's own does not slow VMs")
}
