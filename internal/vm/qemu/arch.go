package qemu

import (
	"context"
	"errors"
	"runtime"

	"flint"
	"flint/internal/vm"
)

// target is what depends on the guest's architecture.
type target struct {
	arch     string   // GOARCH
	program  string   // QEMU's
	packaged string   // Debian's package with it
	firmware []string // where to look for a firmware that starts faster than the one QEMU takes by itself
	machine  string
	kvm, tcg []string // further options under that accelerator
	kernel   []string // kernel arguments
	emulated []string // further kernel arguments under TCG
	// The guest numbers its devices from the last of QEMU's command line to the first.
	reversed bool
}

// common are the options of both machines.
const common = ",mem-merge=off,dump-guest-core=off"

// targetFor returns what runs guests of an architecture; empty means this program's own.
func targetFor(arch string) (target, error) {
	if arch == "" {
		arch = runtime.GOARCH
	}
	switch arch {
	case "amd64":
		return target{
			arch: arch, program: "qemu-system-x86_64", packaged: "qemu-system-x86",
			firmware: []string{"/usr/share/qemu/qboot.rom", "/usr/share/qboot/qboot.rom", "/usr/share/seabios/qboot.rom"},
			machine:  "microvm,acpi=on" + common,
			kvm:      []string{"-cpu", "host"},
			// Nehalem is x86-64-v2, the newest that starts quickly: richer models cost more to emulate. rdrand gives the
			// guest entropy from its first moment.
			tcg: []string{"-cpu", "Nehalem,+rdrand"},
			// One port to look for, not four; and a triple fault, which ends QEMU at once.
			kernel: []string{"console=ttyS0", "8250.nr_uarts=1", "reboot=t"},
			// Rewriting the kernel's code for a single processor costs more translations than it ever saves.
			emulated: []string{"noreplace-smp"},
		}, nil
	case "arm64":
		return target{
			arch: arch, program: "qemu-system-aarch64", packaged: "qemu-system-arm",
			// Without firmware, QEMU describes the virtio-mmio slots, and a seed of entropy, in a device tree.
			machine: "virt" + common,
			// A guest sees the interrupt controller the host has.
			kvm:    []string{"-machine", "gic-version=host", "-cpu", "host"},
			tcg:    []string{"-cpu", "cortex-a72"},
			kernel: []string{"console=ttyAMA0"}, reversed: true,
		}, nil
	}
	return target{}, &flint.Fault{
		Code: "qemu.arch", What: "run guests of architecture " + arch, Kind: flint.ErrConfig,
		Fix: "use a machine, a kernel and an agent for amd64 or arm64", Err: errors.New("flint has no machine for it"),
	}
}

// probeKVM tells whether KVM runs guests of this architecture.
func (t target) probeKVM(ctx context.Context) vm.KVMStatus {
	if t.arch != runtime.GOARCH {
		return vm.KVMStatus{State: vm.KVMAbsent, Reason: "KVM on " + runtime.GOARCH + " runs no guests for " + t.arch}
	}
	return vm.ProbeKVM(ctx)
}
