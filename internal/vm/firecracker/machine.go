package firecracker

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"os/exec"
	"strings"
	"sync"
	"time"

	"flint"
	"flint/internal/undo"
	"flint/internal/vm"
)

const (
	outKept = 64 << 10 // bytes of the serial console
	logKept = 32 << 10 // bytes of Firecracker's log

	flushWithin = time.Second      // for the last report of the metrics, which takes milliseconds
	killGrace   = 10 * time.Second // from the kill to giving up; only a process stuck in the kernel takes so long
	diagnosing  = time.Second      // for a VMM that hung up to end, so that we know why
)

// panicMark is what a Linux kernel says before it dies. After it the guest resets, which alone looks like a reboot.
const panicMark = "Kernel panic - not syncing"

// machine is one Firecracker process. It implements vm.Machine, vm.Console, vm.Log, vm.Usage, vm.Process and vm.Metrics.
type machine struct {
	id      string
	log     *slog.Logger
	serial  bool
	uid     int          // the VM's user and group; -1: none of its own
	user    *reservation // of uid
	dir     place        // where its sockets and pipes are
	groups  *cgroups     // nil: no group
	pipes   []*pipe      // log, metrics, out
	out     *vm.Ring
	fclog   *vm.Ring
	meter   *meter
	api     *api
	version flint.Version
	proc    *process
	started time.Time

	done chan struct{} // closed when the process is gone; err, peak and oom are set before
	err  error
	peak flint.Bytes

	mu      sync.Mutex
	closing bool
	boot    time.Duration

	releasing sync.Mutex // held to run undo
	undo      undo.Stack
	left      bool // something of the jail could not be removed
}

var (
	_ vm.Console = (*machine)(nil)
	_ vm.Log     = (*machine)(nil)
	_ vm.Usage   = (*machine)(nil)
	_ vm.Process = (*machine)(nil)
	_ vm.Metrics = (*machine)(nil)
)

func newMachine(id string, log *slog.Logger, serial bool) *machine {
	m := &machine{
		id: id, log: log, serial: serial, uid: -1, out: vm.NewRing(outKept), fclog: vm.NewRing(logKept), meter: &meter{}, done: make(chan struct{}),
	}
	m.api = newAPI(func(ctx context.Context) (net.Conn, error) { return m.connect(ctx, apiSocket) })
	m.undo.Push("close API connection", func(context.Context) error { m.api.close(); return nil })
	return m
}

// watch reads the pipes and waits for the process.
func (m *machine) watch(p *process) {
	m.proc = p
	var readers sync.WaitGroup
	for i, to := range []io.Writer{m.fclog, m.meter, m.out} {
		readers.Go(func() { m.pipes[i].drain(to) })
	}
	go func() {
		ended := p.wait()
		for _, pipe := range m.pipes {
			pipe.finish()
		}
		readers.Wait()
		m.finish(ended)
	}()
}

// configure tells a Firecracker that has just begun what to run, and starts it.
func (m *machine) configure(ctx context.Context, s vm.Spec, args string, v view) error {
	ready := func() error {
		conn, err := m.connect(ctx, apiSocket)
		if err == nil {
			conn.Close()
		}
		return err
	}
	if err := m.retry(ctx, ready); err != nil {
		return fmt.Errorf("wait for Firecracker's API: %w", err)
	}
	var err error
	if m.version, err = m.api.version(ctx); err != nil {
		return err
	}
	if err := supported(m.version, "the one that runs"); err != nil {
		return err
	}
	for _, r := range requests(s, args, v, m.version) {
		if err := m.api.put(ctx, r.path, r.body); err != nil {
			return err
		}
	}
	m.mu.Lock()
	m.boot = time.Since(m.started)
	m.mu.Unlock()
	m.api.close()
	// Everything is open now. Without their names the files are gone with the process, whatever else dies; and who breaks out
	// of the guest finds no place to write to.
	if err := m.dir.remove(v.links...); err != nil || m.uid < 0 {
		return err
	}
	if err := m.dir.seal("dev", "dev/net", "run"); err != nil {
		return fmt.Errorf("seal its root directory: %w", err)
	}
	return nil
}

// finish records how the process ended and lets everybody who waits know.
func (m *machine) finish(ended error) {
	m.peak = m.proc.peak()
	var oom bool
	if m.groups != nil {
		var peak flint.Bytes
		// A child's count includes what this process had before the child became another program, and the group's the cache
		// of its disks: the lower of them is the nearer.
		if peak, oom = m.groups.usage(m.id); m.peak == 0 || peak > 0 && peak < m.peak {
			m.peak = peak
		}
	}
	m.proc.close()
	if !m.isClosing() {
		if err := m.verdict(ended, oom); err != nil {
			m.err = fmt.Errorf("VM %s: %w", m.id, err)
		}
	}
	close(m.done)
}

// exitNames are Firecracker's exit codes (FcExitCode in src/vmm/src/lib.rs) that mean something to a person.
var exitNames = map[int]string{
	148: "it made a system call its filter forbids", 149: "bus error (SIGBUS)", 150: "memory fault (SIGSEGV)",
	151: "it wrote beyond its file size limit (SIGXFSZ)", 152: "bad configuration", 153: "bad arguments",
	154: "processor time limit (SIGXCPU)", 155: "broken pipe (SIGPIPE)", 156: "hangup (SIGHUP)", 157: "illegal instruction (SIGILL)",
}

// verdict tells an end the guest asked for (nil) from all others.
func (m *machine) verdict(ended error, oom bool) error {
	// The console is the guest's to write. One that lies makes a failure of its own success, and nothing else.
	if m.serial && bytes.Contains(m.out.Bytes(), []byte(panicMark)) {
		return fmt.Errorf("the guest's kernel panicked (see its console): %w", flint.ErrGuest)
	}
	if oom {
		return &flint.Fault{
			Code: "firecracker.oom", What: "keep the VM within its memory", Err: fmt.Errorf("%w: it needed more than its guest's memory and what is spared for itself", vm.ErrMemory),
			Fix: "report this: a VMM should not need so much",
		}
	}
	if m.proc.cmd == nil {
		if log := m.fclog.Bytes(); !bytes.Contains(log, []byte("exiting successfully")) {
			return fmt.Errorf("the VMM, which was adopted, died%s", m.complaint())
		}
		return nil
	}
	if ended == nil {
		return nil
	}
	var exit *exec.ExitError
	if errors.As(ended, &exit) && exitNames[exit.ExitCode()] != "" {
		return fmt.Errorf("the VMM died: %w: %s%s", ended, exitNames[exit.ExitCode()], m.complaint())
	}
	return fmt.Errorf("the VMM died: %w%s", ended, m.complaint())
}

// complaint returns the end of what the VMM said, as ": text" on one line of printable characters. What a guest with a
// serial console says is not the VMM's.
func (m *machine) complaint() string {
	said := m.fclog.Bytes()
	if !m.serial || len(said) == 0 {
		said = append(said, m.out.Bytes()...)
	}
	lines := strings.FieldsFunc(string(said), func(r rune) bool { return r == '\n' })
	text := printable(strings.Join(lines[max(0, len(lines)-4):], "; "), 1000)
	if text == "" {
		return ""
	}
	return ": " + text
}

// explain makes a fault of an error of Boot, which ctx was for: why the process ended, if that is the reason, or what
// Firecracker's refusal means, or that it does not answer.
func (m *machine) explain(ctx context.Context, err error) error {
	var fault *flint.Fault
	var refused *apiError
	switch {
	case errors.As(err, &fault) || m.proc == nil || ctx.Err() != nil:
		return err
	case errors.As(err, &refused):
		return refusal(refused)
	case errors.Is(err, context.DeadlineExceeded): // of our own limits
		return &flint.Fault{
			Code: "firecracker.hung", What: "start Firecracker", Err: fmt.Errorf("it does not answer: %w%s", err, m.complaint()),
			Fix: "see whether this machine is overloaded or its disk stuck (`dmesg`), then try again",
		}
	}
	wait := time.NewTimer(diagnosing)
	defer wait.Stop()
	select {
	case <-m.done:
		if m.err != nil {
			err = m.err
		} else {
			err = fmt.Errorf("it ended at once%s", m.complaint())
		}
	case <-wait.C:
	}
	return &flint.Fault{
		Code: "firecracker.start", What: "start Firecracker", Err: err,
		Fix: "see what Firecracker or its jailer says above; `flint doctor` checks what they need",
	}
}

// refusal says what a person can do about what Firecracker refuses.
func refusal(e *apiError) error {
	f := &flint.Fault{
		Code: "firecracker.api", What: "configure Firecracker", Err: e,
		Fix: "report this with Firecracker's version and log: flint asked for what it does not do",
	}
	text := strings.ToLower(e.Message)
	switch {
	case outOfMemory(text):
		f.Code, f.What = "firecracker.memory", "give the guest its memory"
		f.Fix = "lower host.memory or the pool's vm.memory, or end what else uses this machine's memory; with vm.overcommit_memory=2 the kernel " +
			"refuses memory before it is used up"
	case strings.Contains(e.Call, "/network-interfaces"):
		f.Code, f.What = "firecracker.tap", "attach Firecracker to the network"
		f.Fix = "make sure that /dev/net/tun exists on the host (modprobe tun) and that nothing else has the VM's tap open"
	case strings.Contains(text, "kvm"):
		f.Code, f.What, f.Fix = "firecracker.kvm", "start the guest", "make KVM work on this host (`flint doctor` tells more), or use the qemu driver"
	case strings.Contains(text, "kernel") && strings.Contains(e.Call, "/actions"):
		f.Code, f.What = "firecracker.kernel", "load the guest's kernel"
		f.Fix = "give Firecracker an uncompressed ELF vmlinux on x86-64, an Image on arm64"
	}
	return f
}

// outOfMemory reports whether Firecracker's words, in lower case, are about ENOMEM, in any of the ways it prints an error.
func outOfMemory(text string) bool {
	for _, words := range []string{"os error 12)", "out of memory", "cannot allocate memory"} {
		if strings.Contains(text, words) {
			return true
		}
	}
	return false
}

func (m *machine) isClosing() bool {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.closing
}

// Wait implements vm.Machine. With a serial console a guest's panic is told from its reboot; without one both are nil,
// because Firecracker ends with 0 either way: then only the agent's word tells them apart. A machine that was adopted
// ended well if Firecracker's log says so.
func (m *machine) Wait(ctx context.Context) error {
	select {
	case <-m.done:
		return m.err
	default:
	}
	select {
	case <-m.done:
		return m.err
	case <-ctx.Done():
		return ctx.Err()
	}
}

// Close implements vm.Machine.
func (m *machine) Close(ctx context.Context) error {
	m.mu.Lock()
	m.closing = true
	m.mu.Unlock()
	if m.proc != nil {
		if err := m.end(ctx); err != nil {
			return fmt.Errorf("end Firecracker of VM %s: %w", m.id, err)
		}
	}
	m.releasing.Lock()
	defer m.releasing.Unlock()
	if err := m.undo.Run(context.WithoutCancel(ctx)); err != nil {
		return fmt.Errorf("release VM %s: %w", m.id, err)
	}
	return nil
}

// end makes the process end: it has nothing to save but the last report of its metrics.
func (m *machine) end(ctx context.Context) error {
	select {
	case <-m.done:
		return nil
	default:
	}
	flush, cancel := context.WithTimeout(ctx, flushWithin)
	defer cancel()
	if err := m.api.put(flush, "/actions", actionBody{"FlushMetrics"}); err != nil {
		m.log.Debug("the last report of the metrics is missing", "err", err)
	}
	if err := m.proc.kill(); err != nil {
		return fmt.Errorf("kill it: %w", err)
	}
	stuck := time.NewTimer(killGrace)
	defer stuck.Stop()
	select {
	case <-m.done:
		return nil
	case <-stuck.C:
		return fmt.Errorf("process %d is still there %s after it was killed", m.proc.pid, killGrace)
	}
}

// Console implements vm.Console. It is empty without a serial console.
func (m *machine) Console() []byte {
	if !m.serial {
		return nil
	}
	return m.out.Bytes()
}

// Log implements vm.Log.
func (m *machine) Log() []byte {
	if log := m.fclog.Bytes(); m.serial || len(log) > 0 {
		return log
	}
	return m.out.Bytes() // what it said before it had a log
}

// PeakMemory implements vm.Usage. It is 0 if it cannot be told. Of an adopted machine that has ended it is what the
// whole group used, the page cache of its disks included.
func (m *machine) PeakMemory() flint.Bytes {
	select {
	case <-m.done:
		return m.peak
	default:
		return vm.ResidentPeak(m.proc.pid)
	}
}

// Process implements vm.Process.
func (m *machine) Process() (pid int, start uint64) { return m.proc.pid, m.proc.start }

// Metrics implements vm.Metrics.
func (m *machine) Metrics() vm.Counters {
	c := m.meter.counters()
	m.mu.Lock()
	defer m.mu.Unlock()
	c.Boot = m.boot
	return c
}
