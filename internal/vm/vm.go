// Package vm is the contract between the host and whatever runs a virtual machine.
//
// A Driver starts a VMM process for a Spec; the Machine it returns is the handle to that process and to the agent in its
// guest. Drivers live in the packages below this one and are all held to the suite in vmtest. This package knows no
// VMM, no GitHub and no image format, and must not grow a method that some driver would have to refuse: extras are
// optional interfaces.
package vm

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"strings"

	"flint"
)

// The agent's end of Dial. This package may not know the protocol, so the values are repeated here; a test in vmtest
// holds them equal to guest.Port and guest.SerialName.
const (
	// AgentPort is the only port the agent listens on.
	AgentPort = 1024
	// AgentPortName is the name of the virtio-serial port where the transport has names instead of numbers.
	AgentPortName = "flint.agent"
)

// ErrMemory is in what Wait returns of a VMM that the host's kernel killed because it needed more memory than it may have.
var ErrMemory = errors.New("killed for memory")

// Driver starts virtual machines.
type Driver interface {
	// Boot returns once the VMM runs; the guest may still be on its way. On error nothing is left behind: no process,
	// no file, no descriptor. The files and descriptors of the Spec stay the caller's, who may close them after Boot.
	Boot(ctx context.Context, s Spec) (Machine, error)
}

// Machine is a running VM. Its methods are safe for concurrent use.
type Machine interface {
	// Dial opens a byte stream to a port of the agent (guest.Port). It waits until there is something to talk to, or
	// ctx ends. A transport without connections (virtio-serial) has one stream: a second Dial to the same port ends
	// the first. Bytes of an earlier stream may precede the new one's; the guest protocol resynchronises.
	Dial(ctx context.Context, port uint32) (net.Conn, error)
	// Wait blocks until the VMM process has ended and returns nil if the guest ended it (reboot, power off), or if Close did, and
	// an error that says how the VMM died otherwise. Any number of callers may wait. Ending ctx ends only the wait, with ctx's error.
	Wait(ctx context.Context) error
	// Close ends the VMM, by force if it must, and returns when the process is gone and everything the driver made is
	// released. It is idempotent.
	Close(ctx context.Context) error
}

// Console is implemented by machines that keep the end of the guest's console. It may be called after the VM ended.
type Console interface {
	Console() []byte // empty where the guest has none; bounded; untrusted bytes
}

// Log is implemented by machines whose VMM keeps a log of its own. It may be called after the VM ended.
type Log interface {
	Log() []byte // the end of it; bounded; untrusted bytes
}

// Usage is implemented by machines that can tell what their VMM process used. It may be called after the VM ended.
type Usage interface {
	PeakMemory() flint.Bytes // peak resident memory of the VMM process
}

// Process is implemented by machines whose VMM is a process of this host.
type Process interface {
	// Process returns the pid and the start time in clock ticks since boot (field 22 of /proc/pid/stat): together they name a process for ever.
	Process() (pid int, start uint64)
}

// Metrics is implemented by machines whose VMM counts what goes through it. It may be called after the VM ended.
type Metrics interface {
	Metrics() Counters
}

// Counters are what a VMM counted from its start to the newest report.
type Counters = flint.Counters

// Adopter is implemented by drivers that can go on with a machine an earlier process of ours booted.
type Adopter interface {
	// Adopt returns the machine of the VMM process that vm.Process named, booted from s. Of s it uses ID and Dir: the files
	// may be gone by now. The error is flint.ErrNotFound when that process is gone or is not that VM's: then Sweep
	// removes what it left. Nothing is killed.
	Adopt(ctx context.Context, s Spec, pid int, start uint64) (Machine, error)
}

// Sweeper is implemented by drivers that keep things outside of Spec.Dir.
type Sweeper interface {
	// Sweep removes what machines of earlier processes left. It kills nothing: what a running VMM holds stays.
	Sweep(ctx context.Context) error
}

// Spec says what to boot. All paths are absolute.
type Spec struct {
	ID     string      // names the VM in process titles and messages; [a-z0-9-], at most 63 bytes
	Kernel string      // an uncompressed ELF vmlinux (x86-64) or Image (arm64)
	Initrd string      // initramfs whose /init is flint-agent
	Args   []string    // kernel arguments beside the driver's own
	CPUs   int         // at least 1
	Memory flint.Bytes // a multiple of 1 MiB
	Drives []Drive     // in the order the guest numbers them
	NIC    *NIC        // nil: no network
	Limits Limits      // what the VMM holds the guest to, where it can; zero: nothing
	Dir    string      // an existing private directory (0700) for the driver's sockets; the caller removes it after Close
}

// Drive is a virtual disk. The guest finds it by its ID where the VMM can pass one on (virtio serial), else by its position in Spec.Drives:
// drivers add `flint.drives=<id>,<id>,…` to the kernel arguments (see DrivesArg).
type Drive struct {
	ID       string // base, scratch, modules, runner, tools; at most 20 bytes (virtio's limit)
	Path     string
	ReadOnly bool
}

// Limits are rates, each per second; 0 does not limit.
type Limits struct {
	DiskBytes flint.Bytes // read and written, for each drive by itself
	DiskOps   int64
	NetRx     flint.Bytes // to the guest
	NetTx     flint.Bytes
}

// NIC is the guest's network interface. The descriptors belong to the caller. But a tap has one queue: a driver that
// opens the tap by its name closes Tap before.
type NIC struct {
	Tap       *os.File // an attached tap queue (IFF_TAP|IFF_NO_PI|IFF_VNET_HDR) for drivers that take a descriptor
	Name      string   // the tap's name inside Namespace, for drivers that open it by name
	Namespace *os.File // network namespace the VMM runs in; nil: the caller's own
	MAC       net.HardwareAddr
	MTU       int // bytes; 0: the driver's default
}

// DrivesArg is the kernel argument that tells the agent the order of the drives.
func DrivesArg(drives []Drive) string {
	arg := "flint.drives="
	for i, d := range drives {
		if i > 0 {
			arg += ","
		}
		arg += d.ID
	}
	return arg
}

// Validate reports what is wrong with the spec before anything is started.
func (s Spec) Validate() error {
	var errs []error
	bad := func(format string, args ...any) { errs = append(errs, fmt.Errorf(format, args...)) }
	if len(s.ID) > 63 || !plain(s.ID) {
		bad("id %q is not 1 to 63 of a-z, 0-9 and -", s.ID)
	}
	if s.CPUs < 1 {
		bad("%d cpus: at least 1 is needed", s.CPUs)
	}
	if s.Memory < 64*flint.MiB || s.Memory%flint.MiB != 0 {
		bad("memory %s is not a multiple of 1MiB of at least 64MiB", s.Memory)
	}
	for _, f := range []struct{ what, path string }{{"kernel", s.Kernel}, {"initrd", s.Initrd}, {"directory", s.Dir}} {
		if err := present(f.path); err != nil {
			bad("%s: %w", f.what, err)
		}
	}
	for _, a := range s.Args {
		if strings.ContainsFunc(a, func(r rune) bool { return r < ' ' || r > '~' }) {
			bad("kernel argument %q has characters outside printable ASCII", a)
		}
	}
	seen := map[string]bool{}
	for _, d := range s.Drives {
		if len(d.ID) > 20 || !plain(d.ID) || seen[d.ID] {
			bad("drive id %q is not 1 to 20 of a-z, 0-9 and -, or is used twice", d.ID)
		}
		seen[d.ID] = true
		if err := present(d.Path); err != nil {
			bad("drive %s: %w", d.ID, err)
		}
	}
	if s.NIC != nil && len(s.NIC.MAC) != 6 {
		bad("network interface has MAC %q, which is not 6 bytes", s.NIC.MAC)
	}
	return errors.Join(errs...)
}

// plain reports whether id is safe to put into any VMM's options and any file name.
func plain(id string) bool {
	return id != "" && !strings.ContainsFunc(id, func(r rune) bool {
		return (r < 'a' || r > 'z') && (r < '0' || r > '9') && r != '-'
	})
}

func present(path string) error {
	if !filepath.IsAbs(path) {
		return fmt.Errorf("path %q is not absolute", path)
	}
	_, err := os.Stat(path)
	return err
}

// BootError says that the VMM ran but the guest did not come up: the fault of kernel, image or agent, not of the host.
type BootError struct {
	Err     error
	Console []byte // end of the guest's console; untrusted bytes
}

// Error returns the cause.
func (e *BootError) Error() string { return "guest did not come up: " + e.Err.Error() }

// Unwrap returns the cause and flint.ErrGuest.
func (e *BootError) Unwrap() []error { return []error{e.Err, flint.ErrGuest} }

// LostError says that a guest that had come up ended, or fell silent, under its work.
type LostError struct {
	Err     error
	Console []byte // end of the guest's console; untrusted bytes
}

// Error returns the cause.
func (e *LostError) Error() string { return e.Err.Error() }

// Unwrap returns the cause and flint.ErrGuest.
func (e *LostError) Unwrap() []error { return []error{e.Err, flint.ErrGuest} }
