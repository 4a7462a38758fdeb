package vm_test

import (
	"context"
	"testing"
	"time"

	"flint/internal/vm"
)

func TestProbeKVMComesBack(t *testing.T) {
	start := time.Now()
	s := vm.ProbeKVM(t.Context())
	t.Logf("%s after %s", s, time.Since(start))
	if s.State < vm.KVMWorks || s.State > vm.KVMBroken {
		t.Errorf("state %v is none of the outcomes", s.State)
	}
	if s.State == vm.KVMBroken && s.Reason == "" {
		t.Error("broken without a reason")
	}
}

func TestProbeKVMEndsWithItsContext(t *testing.T) {
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if s := vm.ProbeKVM(ctx); s.State == vm.KVMBroken && s.Reason == "" {
		t.Error("broken without a reason")
	}
}
