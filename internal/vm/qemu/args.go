package qemu

import (
	"fmt"
	"slices"
	"strconv"
	"strings"

	"flint"
	"flint/internal/vm"
)

// maxCommandLine is what an x86 or arm64 kernel takes (COMMAND_LINE_SIZE), in bytes without the final zero.
const maxCommandLine = 2047

// handles are the child's descriptor numbers of what a QEMU is given.
type handles struct {
	kernel, initrd          int
	agent, monitor, console int
	drives                  []int
	tap                     int
}

// arguments returns QEMU's command line without the program's name.
func (d *Driver) arguments(s vm.Spec, h handles) ([]string, error) {
	kernelArgs, err := d.kernelArgs(s)
	if err != nil {
		return nil, err
	}
	// QEMU opens these two by name. A descriptor's name needs no access to the directories above the file, but needs
	// /proc, which a private root has not.
	kernel, initrd := fmt.Sprintf("/proc/self/fd/%d", h.kernel), fmt.Sprintf("/proc/self/fd/%d", h.initrd)
	if d.isolate {
		kernel, initrd = rootKernel, rootInitrd
	}
	a := []string{
		"-name", s.ID,
		"-no-user-config", "-nodefaults", "-display", "none", "-no-reboot",
		"-machine", d.target.machine,
		"-m", strconv.FormatInt(int64(s.Memory/flint.MiB), 10) + "M",
		"-smp", strconv.Itoa(s.CPUs),
		"-sandbox", "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny",
		"-kernel", kernel, "-initrd", initrd, "-append", kernelArgs,
	}
	if d.accel == KVM {
		a = append(append(a, "-accel", "kvm"), d.target.kvm...)
	} else {
		// The translation cache is 1 GiB unless told otherwise.
		a = append(append(a, "-accel", "tcg,tb-size=128"), d.target.tcg...)
	}
	if d.firmware != "" {
		a = append(a, "-bios", d.firmware)
	}
	a = append(a,
		"-chardev", fmt.Sprintf("socket,id=console,fd=%d,server=on,wait=off", h.console), "-serial", "chardev:console",
		"-chardev", fmt.Sprintf("socket,id=monitor,fd=%d,server=on,wait=off", h.monitor), "-mon", "chardev=monitor,mode=control",
		"-chardev", fmt.Sprintf("socket,id=agent,fd=%d,server=on,wait=off", h.agent), "-device", "virtio-serial-device",
		"-device", "virtserialport,chardev=agent,name="+vm.AgentPortName,
	)
	for i, drive := range s.Drives {
		if d.target.reversed {
			i = len(s.Drives) - 1 - i
			drive = s.Drives[i]
		}
		access := "readonly=on"
		if !drive.ReadOnly {
			access = "readonly=off,auto-read-only=off,discard=unmap"
		}
		a = append(
			a, "-add-fd", fmt.Sprintf("fd=%d,set=%d", h.drives[i], i),
			// The disk is thrown away with the VM, so nothing needs to be flushed; and a full host must be an error
			// in the guest, not a guest that stands still.
			"-drive", fmt.Sprintf("id=drive%d,if=none,file=/dev/fdset/%d,format=raw,%s,cache=unsafe,aio=threads,file.locking=off,werror=report,rerror=report", i, i, access),
			"-device", fmt.Sprintf("virtio-blk-device,drive=drive%d,serial=%s", i, drive.ID),
		)
	}
	if s.NIC != nil {
		nic := "virtio-net-device,netdev=net0,mac=" + s.NIC.MAC.String()
		if s.NIC.MTU > 0 {
			nic += ",host_mtu=" + strconv.Itoa(s.NIC.MTU)
		}
		a = append(a, "-netdev", fmt.Sprintf("tap,id=net0,fd=%d,vhost=off", h.tap), "-device", nic)
	}
	return a, nil
}

// kernelArgs returns the guest kernel's command line: the driver's own arguments, then the spec's.
func (d *Driver) kernelArgs(s vm.Spec) (string, error) {
	a := append(slices.Clone(d.target.kernel),
		"panic=-1", // ends QEMU at once
		"quiet", "loglevel=3", "cryptomgr.notests", "random.trust_cpu=on",
		"flint.channel=serial", vm.DrivesArg(s.Drives),
	)
	if d.accel == TCG {
		// Without ACPI timers nothing in the guest can measure its time stamp counter, which under TCG is the host's;
		// without tsc=reliable the kernel would distrust it later and lose time.
		if d.tscKHz > 0 {
			a = append(a, "tsc_early_khz="+strconv.FormatUint(d.tscKHz, 10), "tsc=reliable")
		}
		// There is no speculation in software.
		a = append(append(a, "mitigations=off"), d.target.emulated...)
	}
	line := strings.Join(append(a, s.Args...), " ")
	if len(line) > maxCommandLine {
		return "", fmt.Errorf("kernel arguments are %d bytes long: at most %d are possible", len(line), maxCommandLine)
	}
	return line, nil
}
