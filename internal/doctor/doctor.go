// Package doctor tells whether this machine is fit to run flint's VMs, and how to make it so.
//
// Each check looks at one thing and comes back with an id, a verdict, one line and a fix. The room reads files, asks
// programs for their version, and lets KVM run a loop of a few milliseconds; it must not change anything, start anything
// that lasts, or say what it has not seen. What the configuration asks for reaches it as plain values.
package doctor

import (
	"context"
	"errors"
	"fmt"
	"os/exec"
	"slices"

	"flint"
	"flint/internal/vm"
)

// Verdict is the outcome of a check. Its text is stable.
type Verdict string

// The verdicts. Only Fail means that flint does not work here as it is configured.
const (
	Pass Verdict = "PASS"
	Warn Verdict = "WARN" // works, but less safely, less well, or for fewer VMs than one may think
	Fail Verdict = "FAIL"
	Skip Verdict = "SKIP" // does not matter here, or cannot be told; the text says which
)

// Finding is what one check found. The JSON form is stable: ids do not change their meaning.
type Finding struct {
	ID      string  `json:"id"`
	Verdict Verdict `json:"verdict"`
	Text    string  `json:"text"` // one line; may quote what programs and files say, so it is untrusted
	Fix     string  `json:"fix"`  // what a person can do; empty with Pass and Skip
}

// Config is what of flint's configuration the checks depend on. Paths are absolute, or empty for the default.
type Config struct {
	StateDir string
	Driver   string // auto, firecracker or qemu
	Accel    string // of QEMU: auto, kvm or tcg
	QEMU     string // path; empty: looked up

	Firecracker, Jailer string // paths; empty: looked up
	NoJail              bool   // Firecracker without its jailer
	Serial              bool   // Firecracker's guests have a serial console
	ChrootBase          string
	UIDFirst, UIDCount  uint32 // the users reserved for VMs, and as groups too
	ParentCgroup        string // relative to the root of cgroup v2

	Memory                            flint.Bytes // over all VMs, with what their VMMs need
	QEMUOverhead, FirecrackerOverhead flint.Overhead
	Pools                             []flint.Pool
	Dockerfile                        bool // some pool's image is built from a Dockerfile
	Monolithic                        bool // the VMs' kernel has no modules, or they are sorted already
	Kernel                            Kernel
	Runners                           []Software
	IPv6                              bool // VMs get IPv6 addresses
}

// check is one entry of the list.
type check struct {
	id  string
	run func(*exam, context.Context) Finding
}

// checks returns the list, in the order in which a person would mend things.
func checks() []check {
	return []check{
		{"kvm.device", (*exam).kvmDevice},
		{"kvm.works", (*exam).kvmWorks},
		{"cpu.vulnerabilities", (*exam).vulnerabilities},
		{"smt", (*exam).smt},
		{"ksm", (*exam).ksm},
		{"swap", (*exam).swap},
		{"kernel.version", (*exam).kernelVersion},
		{"seccomp", (*exam).seccomp},
		{"serial", (*exam).serial},
		{"cgroup.v2", (*exam).cgroupV2},
		{"firecracker.binary", (*exam).firecrackerBinary},
		{"firecracker.jailer", (*exam).firecrackerJailer},
		{"jail.uids", (*exam).jailUIDs},
		{"qemu.binary", (*exam).qemuBinary},
		{"depmod", (*exam).depmod},
		{"kernel.pack", (*exam).kernelPack},
		{"runner.age", (*exam).runnerAge},
		{"builder", (*exam).builder},
		{"state.filesystem", (*exam).stateFilesystem},
		{"state.space", (*exam).stateSpace},
		{"memory.capacity", (*exam).memoryCapacity},
		{"limits.nofile", (*exam).openFiles},
		{"net.tun", (*exam).tun},
		{"net.forwarding", (*exam).forwarding},
		{"net.uplink", (*exam).uplink},
		{"net.dns", (*exam).resolvers},
	}
}

// IDs returns the ids of all checks, in the order Run reports them.
func IDs() []string {
	var ids []string
	for _, c := range checks() {
		ids = append(ids, c.id)
	}
	return ids
}

// Run makes every check and returns what each found. It takes what ProbeKVM takes (at most three seconds) and as long as
// a few programs need to say their version, each at most five seconds. The only error is the context's.
func Run(ctx context.Context, c Config, s System) ([]Finding, error) {
	e := newExam(ctx, c, s)
	var found []Finding
	for _, ch := range checks() {
		f := ch.run(e, ctx)
		if err := ctx.Err(); err != nil {
			return nil, fmt.Errorf("examine this machine: %w", err)
		}
		f.ID = ch.id
		found = append(found, f)
	}
	return found, nil
}

// Failed reports whether any check failed.
func Failed(found []Finding) bool {
	return slices.ContainsFunc(found, func(f Finding) bool { return f.Verdict == Fail })
}

// role says what a VMM is to this configuration.
type role int

const (
	unused   role = iota
	possible      // would be used if it were not for something else
	required      // without it there are no VMs
)

// exam is one run of the checks: what they are about, and what several of them want to know.
type exam struct {
	Config
	System
	kvm                 vm.KVMStatus
	firecracker, qemu   role
	fcProgram, fcJailer program
}

// newExam decides what would run the VMs, as flint does when it starts.
func newExam(ctx context.Context, c Config, s System) *exam {
	e := &exam{Config: c, System: s}
	if e.needsKVM() != unused {
		e.kvm = s.KVM(ctx)
	}
	if c.Driver == "qemu" || c.Driver != "firecracker" && c.Accel == "tcg" {
		e.qemu = required
		return e
	}
	e.fcProgram = e.find(ctx, c.Firecracker, "firecracker")
	if !c.NoJail {
		e.fcJailer = e.find(ctx, c.Jailer, "jailer")
	}
	switch {
	case c.Driver == "firecracker":
		e.firecracker = required
	case !e.firecrackerMeant():
		e.qemu = required
	case e.kvm.State == vm.KVMWorks:
		e.firecracker = required
	default:
		e.qemu, e.firecracker = required, possible
	}
	return e
}

// firecrackerMeant reports whether Firecracker is named or installed. Flint then uses it where KVM works, or says what is
// wrong with it, and never takes QEMU in its place.
func (e *exam) firecrackerMeant() bool {
	return e.Firecracker != "" || e.Jailer != "" || !errors.Is(e.fcProgram.missing, exec.ErrNotFound)
}

// needsKVM says what KVM is to this configuration.
func (e *exam) needsKVM() role {
	switch {
	case e.Driver == "firecracker" || e.Accel == "kvm":
		return required
	case e.Accel == "tcg":
		return unused
	}
	return possible
}

// jailed reports whether Firecracker may run here under its jailer.
func (e *exam) jailed() bool { return e.firecracker != unused && !e.NoJail }

func pass(format string, args ...any) Finding {
	return Finding{Verdict: Pass, Text: fmt.Sprintf(format, args...)}
}

func skip(format string, args ...any) Finding {
	return Finding{Verdict: Skip, Text: fmt.Sprintf(format, args...)}
}

func warn(fix, format string, args ...any) Finding {
	return Finding{Verdict: Warn, Text: fmt.Sprintf(format, args...), Fix: fix}
}

func fail(fix, format string, args ...any) Finding {
	return Finding{Verdict: Fail, Text: fmt.Sprintf(format, args...), Fix: fix}
}

// of turns a failure into a warning where what fails is not required.
func (f Finding) of(r role) Finding {
	if f.Verdict == Fail && r != required {
		f.Verdict = Warn
	}
	return f
}
