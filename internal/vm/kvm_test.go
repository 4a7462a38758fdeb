package vm_test

import (
	"context"
	"os"
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

// TestProbeKVMKnowsKVMThatWorks runs where somebody vouches for the host's KVM, as make test-kvm does.
func TestProbeKVMKnowsKVMThatWorks(t *testing.T) {
	if os.Getenv("FLINT_TEST_KVM") != "works" {
		t.Skip("needs a host whose KVM is known to work: FLINT_TEST_KVM=works, which make test-kvm sets in a host of its own")
	}
	start := time.Now()
	s := vm.ProbeKVM(t.Context())
	t.Logf("%s after %s", s, time.Since(start))
	if s.State != vm.KVMWorks {
		t.Errorf("KVM that works is said to be %s", s)
	}
}
