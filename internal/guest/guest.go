// Package guest is both halves of what the host and the agent in its VM say to each other.
//
// One multiplexed, framed, versioned protocol runs over any byte stream: a vsock connection under Firecracker, a
// virtio-serial port (which has no connections, so the framing resynchronises) under QEMU, a pipe in tests. The host
// half is Session, the guest half is Agent. Every field has a bound, because the guest is hostile. The package must not
// know what runs in the guest, nor touch the machine it is on: what the agent does there is behind System.
package guest

import (
	"net/netip"
	"time"
)

const (
	// Port is the vsock port the agent listens on, and what Machine.Dial is called with.
	Port = 1024
	// SerialName is the name of the virtio-serial port that carries the protocol where there is no vsock.
	SerialName = "flint.agent"
	// Version of the protocol. Host and agent refuse to talk when their versions differ.
	Version = 1
)

// Hello is what the agent says of itself when the host attaches.
type Hello struct {
	Version int           // of the protocol
	Agent   string        // the agent's build version
	Boot    string        // random, new at every boot of the guest: tells a reboot from a reconnection
	Kernel  string        // uname -r
	Arch    string        // GOARCH
	Init    string        // "agent" when the agent stayed PID 1, else the path of the init it handed over to
	Uptime  time.Duration // since the guest's kernel started
	Steps   []Step        // what the agent did before it answered, with the time each took
	Faults  []string      // what went wrong on the way but did not stop it
	// Processes are those of earlier sessions whose exit no session has collected yet: see Session.Resume.
	Processes []Running
}

// Running is a process that outlived the session it was started in.
type Running struct {
	ID     uint32
	Name   string // its Command's Name
	Stdin  int64  // bytes of its input that the agent has
	Closed bool   // its input was closed
	Stdout int64  // bytes of its output that are gone; those after it can still be had
	Stderr int64
}

// Step is one named piece of work and how long it took.
type Step struct {
	Name string
	Took time.Duration
}

// Config is what makes a booted guest this runner's guest. It is sent once, before anything is executed.
type Config struct {
	Hostname  string
	MachineID string    // 32 hex digits
	Time      time.Time // the host's clock
	Entropy   []byte    // at least 32 bytes; credited to the guest's pool
	Interface *Interface
	DNS       []netip.Addr // written to resolv.conf in this order
	Probe     string       // a name to look up by UDP and by TCP on every DNS server; empty: no probe
	// Settle is how long the agent may wait, before it answers, for the image's init to have started everything; at most
	// an hour. 0: not at all. An init that is not done by then is a fault.
	Settle time.Duration
}

// Interface is the guest's network interface.
type Interface struct {
	MAC      string // which interface is meant
	Prefixes []netip.Prefix
	Gateways []netip.Addr
	MTU      int // bytes; 0 leaves it
}

// Configured answers Config.
type Configured struct {
	Skew   time.Duration // how far the guest's clock was off before it was set
	Steps  []Step
	Faults []string // each a sentence; what failed but leaves a usable guest (a DNS server that does not answer by UDP, …)
}

// Command is a process to run in the guest, in a process group of its own.
type Command struct {
	Name string   // names the process to later sessions; empty: the last element of Args[0]
	Args []string // Args[0] is looked up in the Env's PATH inside the guest's root
	Env  []string // KEY=value, the whole environment; the agent adds HOME, USER, LOGNAME, SHELL, PATH and TERM where they are missing
	User string   // name or uid[:gid] in the guest's root; empty: root. "runner" is created where it is missing
	Dir  string   // working directory, made (owned by User) if it does not exist; empty: the user's home
	TTY  *Size    // non-nil: on a new pseudo-terminal of this size; stdout and stderr are then one
}

// Size is a terminal's size in cells.
type Size struct{ Cols, Rows uint16 }

// Exit is how a process in the guest ended.
type Exit struct {
	Code     int    // exit status; 128+signal when a signal ended it, 126 not executable, 127 not found, as a shell says
	Signal   string // "SIGKILL", …; empty when it exited by itself
	OOM      bool   // the guest's kernel killed something for want of memory while it ran
	PIDs     bool   `json:",omitempty"` // a process could not be started while it ran, because there were too many
	DiskFull bool   // a file system of the scratch disk had no space left at some time while it ran
	RootFull bool   `json:",omitempty"` // its root had no space left at some time while it ran, and the scratch disk had: it is kept in memory
	Err      string // why it could not be started (with Code 126 or 127)
}

// Stats is what the guest uses now, and at most used since boot.
type Stats struct {
	MemoryTotal int64 // bytes
	MemoryUsed  int64 // bytes; total less available
	MemoryPeak  int64 // bytes; highest MemoryUsed the agent sampled
	DiskTotal   int64 // bytes of the scratch disk
	DiskUsed    int64
	Uptime      time.Duration
	Load        float64 // 1 minute
}
