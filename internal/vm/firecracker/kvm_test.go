package firecracker

import (
	"errors"
	"strings"
	"testing"

	"flint"
	"flint/internal/vm"
)

func TestNeedKVM(t *testing.T) {
	if err := NeedKVM(vm.KVMStatus{State: vm.KVMWorks}); err != nil {
		t.Error(err)
	}
	for state, want := range map[vm.KVMState]struct {
		kind error
		fix  string
	}{
		vm.KVMAbsent:       {flint.ErrConfig, "firmware"},
		vm.KVMNoPermission: {flint.ErrPermission, "as root"},
		vm.KVMBroken:       {flint.ErrConfig, "nested virtualisation"},
	} {
		err := NeedKVM(vm.KVMStatus{State: state, Reason: "as the test has it"})
		var f *flint.Fault
		if !errors.As(err, &f) || f.Code != "firecracker.kvm" || !errors.Is(err, want.kind) || !strings.Contains(f.Fix, want.fix) || !strings.Contains(err.Error(), "as the test has it") {
			t.Errorf("%s: %v", state, err)
		}
	}
}
