// Package flint holds the nouns every room of flint shares: pools, demand, runners, phases, results, reasons, faults.
//
// It uses the standard library only and has no side effects: nothing here opens a file, starts a goroutine or knows
// GitHub, QEMU or Firecracker. A type belongs here when two rooms must agree on it.
package flint

import (
	"fmt"
	"log/slog"
	"net/netip"
	"slices"
	"strings"
	"time"
)

// Pool is one kind of runner.
type Pool struct {
	Name string
	// Labels are what runs-on: may ask for. A scale set has one, which is its name; a pool fed by webhooks has all that its
	// runners are registered with, self-hosted included.
	Labels  []string
	Image   string // a Dockerfile's directory, an OCI layout directory, or an OCI reference
	Shape   Shape  // what each of its VMs gets
	Max     int    // runners at the same time, on all hosts
	Account string // name of the configured GitHub account it serves; empty: the one that has no name
	Scope   string // URL of the organisation, repository or enterprise on the GitHub server
	Group   string // runner group; "default" when empty
	Held    Reason // non-zero: no runner is started, and why
}

// Misses returns those of a job's labels that the pool does not have. GitHub gives a job to runners that have them all,
// without regard to case.
func (p Pool) Misses(labels []string) []string {
	var missing []string
	for _, want := range labels {
		if !slices.ContainsFunc(p.Labels, func(have string) bool { return strings.EqualFold(have, want) }) {
			missing = append(missing, want)
		}
	}
	return missing
}

// Shape is the size of one VM.
type Shape struct {
	CPUs   int
	Memory Bytes
	Disk   Bytes // size of the scratch disk as the job sees it
}

// Demand is how many jobs GitHub has given to a pool, and since when we know.
type Demand struct {
	Pool     string
	Assigned int // jobs assigned to the pool, those that run already included
	// Available is how many more jobs GitHub says it holds for the pool and has not assigned: for want of capacity, as a
	// rule. It explains waiting; nothing is started for it.
	Available int
	At        time.Time // since when GitHub has said Assigned; what it repeats keeps its time
}

// Job identifies a job as GitHub names it. Which runner takes a job is learnt only when it starts.
type Job struct {
	ID         string `json:"id"`         // GitHub's job id
	RequestID  int64  `json:"request_id"` // the scale set's runnerRequestId; 0 where GitHub assigns by itself
	Name       string `json:"name"`       // display name
	Repository string `json:"repository"` // owner/name
	RunID      int64  `json:"run_id"`
}

// JobStatus is what GitHub knows of one job, whoever runs it.
type JobStatus struct {
	Job
	State      string    `json:"state"`                // queued, waiting, in_progress, completed
	Conclusion string    `json:"conclusion,omitempty"` // of a completed one: success, failure, cancelled, ...
	Labels     []string  `json:"labels"`               // what its runs-on: asks for
	Runner     string    `json:"runner,omitempty"`     // name of the runner that has it
	Public     bool      `json:"public"`               // its repository is public
	Queued     time.Time `json:"queued"`
	Account    string    `json:"account,omitempty"` // name of the configured account that sees it
	URL        string    `json:"url,omitempty"`     // of its page
}

// Explanation says why one thing is as it is: a job, or a pool whose jobs wait.
type Explanation struct {
	Job    *JobStatus `json:"job,omitempty"` // nil where it is about a pool as a whole
	Pool   string     `json:"pool,omitempty"`
	Reason Reason     `json:"reason"`
}

// JobEvent is what GitHub says of a job that met one of our runners.
type JobEvent struct {
	Kind       JobEventKind
	Pool       string
	Runner     string // Runner.ID, which is the name it is registered under
	Job        Job
	Conclusion string // for JobCompleted: succeeded, failed, canceled, ...
	At         time.Time
}

// JobEventKind tells the job events apart.
type JobEventKind int

// The job events GitHub reports.
const (
	JobStarted JobEventKind = iota + 1
	JobCompleted
)

// Runner is one promise to run one job in one VM.
type Runner struct {
	ID       string   `json:"id"` // unique for ever; also the registration's name and the guest's host name
	Pool     string   `json:"pool"`
	Host     string   `json:"host"`
	Phase    Phase    `json:"phase"`
	Timeline Timeline `json:"timeline"`
	Reason   Reason   `json:"reason"` // why it was started
	Job      *Job     `json:"job,omitempty"`
}

// Phase is a step in a runner's life.
type Phase int

// The phases, in order. A runner may go from any of them to Finishing.
const (
	Planned    Phase = iota + 1 // decided, its record is written
	Preparing                   // disks and network are being made
	Booting                     // the VMM runs
	Ready                       // the agent answers
	Registered                  // GitHub knows it
	Running                     // it has a job
	Finishing                   // the guest is done; everything it held is being released
	Gone                        // nothing of it is left
)

var phaseNames = [...]string{"", "planned", "preparing", "booting", "ready", "registered", "running", "finishing", "gone"}

// String returns the phase's name in lower case.
func (p Phase) String() string {
	if p < Planned || p > Gone {
		return fmt.Sprintf("phase(%d)", int(p))
	}
	return phaseNames[p]
}

// MarshalText implements encoding.TextMarshaler.
func (p Phase) MarshalText() ([]byte, error) { return []byte(p.String()), nil }

// UnmarshalText implements encoding.TextUnmarshaler.
func (p *Phase) UnmarshalText(b []byte) error {
	for i, n := range phaseNames {
		if i > 0 && n == string(b) {
			*p = Phase(i)
			return nil
		}
	}
	return fmt.Errorf("unknown phase %q", b)
}

// Timeline says when each phase began.
type Timeline map[Phase]time.Time

// Registration is a runner GitHub knows, and the secret that lets a guest be it.
type Registration struct {
	Runner   string // Runner.ID
	GitHubID int64  // 0 where the guest registers itself: GitHub gives it one later
	// Credential is the line the runner program reads from its standard input: the encoded JIT configuration, which holds a
	// private key; or, for servers without that, a JSON object with which it registers itself (docs/reference.md).
	Credential Secret
}

// RunnerStatus is what GitHub says of a registration.
type RunnerStatus struct {
	Online bool // its runner program has a session
	Busy   bool // it has a job
}

// Result is how a runner ended.
type Result struct {
	Runner      Runner   `json:"runner"`
	Conclusion  string   `json:"conclusion,omitempty"` // what GitHub said of its job; empty when it had none
	ExitCode    int      `json:"exit_code"`            // of the runner program; 0 says nothing about the job
	Signal      string   `json:"signal,omitempty"`     // the signal that ended the runner program
	Unstarted   string   `json:"unstarted,omitempty"`  // why the program could not be started, with exit code 126 or 127
	OOM         bool     `json:"oom,omitempty"`        // the guest's kernel killed something for memory, or the host's the VMM
	PIDs        bool     `json:"pids,omitempty"`       // the guest could not start a process, because it had too many
	DiskFull    bool     `json:"disk_full,omitempty"`  // the scratch disk was full while the program ran
	RootFull    bool     `json:"root_full,omitempty"`  // its root, kept in memory, was full while the program ran
	Lost        bool     `json:"lost,omitempty"`       // its VM or program ended under a job that GitHub had not concluded, and nobody had ended it
	PeakMemory  Bytes    `json:"peak_memory"`          // peak resident memory of the VMM process
	GuestMemory Bytes    `json:"guest_memory"`         // peak memory in use inside the guest
	VMM         Counters `json:"vmm"`                  // zero where the VMM does not count
	Output      string   `json:"output,omitempty"`     // end of what the runner program printed
	Console     string   `json:"console,omitempty"`    // end of the guest's console
	Reason      Reason   `json:"reason"`               // why it ended
	Timeline    Timeline `json:"timeline"`
}

// Counters are what a VMM counted from its start to the newest report.
type Counters struct {
	Boot       time.Duration `json:"boot"` // from the start of the VMM's process to the guest's first instruction
	NetRx      Bytes         `json:"net_rx"`
	NetTx      Bytes         `json:"net_tx"`
	BlockRead  Bytes         `json:"block_read"`
	BlockWrite Bytes         `json:"block_write"`
}

// HostState is what a host has and does. Its runners are the supply the scheduler counts.
type HostState struct {
	Name    string
	Runners []Runner // all that are not gone
	Free    Shape    // what admission would still grant; Disk is not promised away, only watched
	// Overhead is the memory each VM costs beyond its shape. Free has room for the fixed part of the next one's.
	Overhead Overhead
	Refuses  Reason // non-zero when the host takes no new runner at all, and why
}

// Overhead is the memory a VMM needs beyond its guest's.
type Overhead struct {
	Fixed Bytes
	Share Bytes // one part in so many of the guest's memory comes on top; 0: none does
}

// Of returns the overhead of a guest with this memory.
func (o Overhead) Of(memory Bytes) Bytes { return o.Fixed + o.Growing(memory) }

// Growing returns the part of the overhead that grows with the guest.
func (o Overhead) Growing(memory Bytes) Bytes {
	if o.Share <= 0 {
		return 0
	}
	return memory / o.Share
}

// Reason is the typed answer to "why was this done" and "why is this waiting".
type Reason struct {
	Code string `json:"code"` // stable, lower-case, dotted: pool.max, host.memory
	Text string `json:"text"` // one sentence for a person
}

// Because makes a Reason.
func Because(code, format string, args ...any) Reason {
	return Reason{Code: code, Text: fmt.Sprintf(format, args...)}
}

// IsZero reports whether there is no reason.
func (r Reason) IsZero() bool { return r.Code == "" }

// String returns the sentence.
func (r Reason) String() string { return r.Text }

// LogValue logs the reason as its code and sentence.
func (r Reason) LogValue() slog.Value {
	return slog.GroupValue(slog.String("code", r.Code), slog.String("text", r.Text))
}

// Secret is a string that no formatting, logging or encoding reveals. Only an explicit string(s) does.
type Secret string

const redacted = "[secret]"

// String returns a placeholder.
func (Secret) String() string { return redacted }

// GoString returns a placeholder, for %#v.
func (Secret) GoString() string { return redacted }

// LogValue logs a placeholder.
func (Secret) LogValue() slog.Value { return slog.StringValue(redacted) }

// MarshalText encodes a placeholder, so that JSON and YAML do not reveal the secret either.
func (Secret) MarshalText() ([]byte, error) { return []byte(redacted), nil }

// Address is what a guest is told about its network.
type Address struct {
	MAC      string         // of the guest's interface, colon-separated
	Prefixes []netip.Prefix // its addresses, v4 and v6
	Gateways []netip.Addr   // one per family, also the DNS servers
	MTU      int            // bytes; 0 leaves the interface's own
}

// Progress receives the milestones of long work, for a person who waits. A nil Progress is never called: use Report.
type Progress func(Milestone)

// Milestone is one report of long work.
type Milestone struct {
	Step   string        // what is being done: "build image images/demo"
	Line   string        // output of a tool that does it; empty otherwise
	Done   bool          // the step ended
	Detail string        // with Done: what came of it: "sha256:12ab…, 310 MiB", or "cached"
	Err    error         // with Done: why it failed
	Took   time.Duration // with Done
}

// Report calls p unless it is nil.
func (p Progress) Report(m Milestone) {
	if p != nil {
		p(m)
	}
}

// Step reports that step begins and returns what to call when it ended.
func (p Progress) Step(step string) func(detail string, err error) {
	start := time.Now()
	p.Report(Milestone{Step: step})
	return func(detail string, err error) {
		p.Report(Milestone{Step: step, Done: true, Detail: detail, Err: err, Took: time.Since(start)})
	}
}
