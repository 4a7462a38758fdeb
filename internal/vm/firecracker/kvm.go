package firecracker

import (
	"fmt"

	"flint"
	"flint/internal/vm"
)

// NeedKVM returns a fault where every VM would fail or hang by itself later: without a KVM that works.
func NeedKVM(s vm.KVMStatus) error {
	f := &flint.Fault{Code: "firecracker.kvm", What: "run VMs under Firecracker", Kind: flint.ErrConfig, Err: fmt.Errorf("it needs KVM: %s", s)}
	const instead = "; or set vm.driver: auto, to do without Firecracker here"
	switch s.State {
	case vm.KVMWorks:
		return nil
	case vm.KVMNoPermission:
		f.Kind, f.Fix = flint.ErrPermission, "run flint as root"
	case vm.KVMBroken:
		f.Fix = "use bare metal, or a machine whose hypervisor has real nested virtualisation" + instead
	default:
		f.Fix = "enable virtualisation in the firmware and load kvm_intel or kvm_amd (`flint doctor` says which)" + instead
	}
	return f
}
