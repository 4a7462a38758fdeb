package vm

import "fmt"

// KVMState tells the outcomes of ProbeKVM apart.
type KVMState int

// The outcomes. Only with KVMWorks is it any use to start a VMM with hardware virtualisation.
const (
	KVMWorks        KVMState = iota + 1 // a guest loop ran at the speed of a processor
	KVMAbsent                           // there is no /dev/kvm
	KVMNoPermission                     // there is one, but this process may not open it
	KVMBroken                           // it opens, but does not run guests, or runs them instruction by instruction
)

var kvmStateNames = [...]string{"", "works", "absent", "no permission", "broken"}

// String returns the outcome in words.
func (s KVMState) String() string {
	if s < KVMWorks || s > KVMBroken {
		return fmt.Sprintf("kvm state %d", int(s))
	}
	return kvmStateNames[s]
}

// KVMStatus is what ProbeKVM found.
type KVMStatus struct {
	State  KVMState
	Reason string // with KVMBroken and KVMNoPermission: why, for a person
}

// String returns the outcome and its reason.
func (s KVMStatus) String() string {
	if s.Reason == "" {
		return s.State.String()
	}
	return s.State.String() + ": " + s.Reason
}

const kvmDevice = "/dev/kvm"
