package qemu

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"time"

	"flint"
	"flint/internal/vm"
)

const (
	quitGrace = 500 * time.Millisecond // from the request to end to the kill
	killGrace = 10 * time.Second       // from the kill to giving up; only a process stuck in the kernel takes so long
)

// panicMark is what a Linux kernel says before it dies. After it the guest resets, which alone looks like a reboot.
const panicMark = "Kernel panic - not syncing"

// machine is one QEMU process. It implements vm.Machine, vm.Console, vm.Usage and vm.Process.
type machine struct {
	id, dir     string
	sockets     []string  // those in dir to remove
	spawned     time.Time // just before the process was made
	proc        *process
	cgroups     *cgroups // nil: it has no cgroup of its own
	console     *vm.Ring
	stderr      *vm.Ring
	consoleConn net.Conn
	qmp         *qmp

	done chan struct{} // closed when the process is gone; err and peak are set before
	err  error
	peak flint.Bytes

	mu      sync.Mutex
	closing bool
	seen    flint.Bytes // the most memory sample has found
	agent   net.Conn    // the newest stream to the agent
}

var (
	_ vm.Console = (*machine)(nil)
	_ vm.Usage   = (*machine)(nil)
	_ vm.Process = (*machine)(nil)
)

func newMachine(s vm.Spec) *machine {
	return &machine{id: s.ID, dir: s.Dir, console: vm.NewRing(consoleKept), stderr: vm.NewRing(stderrKept), done: make(chan struct{})}
}

// connect connects to console and monitor. Once the sockets are there it works, whether QEMU runs yet or not.
func (m *machine) connect(ctx context.Context) error {
	var err error
	if m.consoleConn, err = dial(ctx, m.dir, consoleSocket); err != nil {
		return err
	}
	monitor, err := dial(ctx, m.dir, monitorSocket)
	if err != nil {
		return err
	}
	m.qmp = newQMP(monitor)
	return nil
}

// watch begins to watch the process, which runs.
func (m *machine) watch() {
	var readers sync.WaitGroup
	var monitor error
	readers.Go(func() { _, _ = io.Copy(m.console, m.consoleConn) })
	readers.Go(func() {
		monitor = m.qmp.listen()
		// Nobody would hear from a monitor that speaks nonsense; but it must not block on us either.
		_, _ = io.Copy(io.Discard, m.qmp.conn)
	})
	go func() {
		ended := m.proc.wait()
		readers.Wait() // QEMU's ends of the sockets are closed now
		m.finish(ended, monitor)
	}()
}

// finish records how the process ended and lets everybody who waits know.
func (m *machine) finish(ended, monitor error) {
	m.proc.close()
	m.mu.Lock()
	closing := m.closing
	m.peak = max(m.seen, m.proc.peak())
	m.mu.Unlock()
	if !closing {
		err := m.verdict(ended)
		if m.cgroups != nil && m.cgroups.killedForMemory(m.id) {
			err = memoryFault()
		}
		if err != nil {
			m.err = fmt.Errorf("VM %s: %w", m.id, errors.Join(err, monitor))
		}
	}
	close(m.done)
}

// verdict tells an end the guest asked for (nil) from all others.
func (m *machine) verdict(ended error) error {
	reason, panicked := m.qmp.ended()
	// The console is the guest's to write. One that lies makes a failure of its own success, and nothing else.
	if panicked || reason == "guest-panic" || bytes.Contains(m.console.Bytes(), []byte(panicMark)) {
		return fmt.Errorf("the guest's kernel panicked (see its console): %w", flint.ErrGuest)
	}
	switch {
	case ended != nil:
		return fmt.Errorf("QEMU died: %w%s", ended, m.complaint())
	case reason == "guest-reset" || reason == "guest-shutdown":
		return nil
	case reason == "" && m.proc.adopted() && !m.qmp.answered():
		return errors.New("QEMU, which was adopted, ended; how cannot be told, as its monitor never answered")
	case reason == "":
		return fmt.Errorf("QEMU ended without giving a reason%s", m.complaint())
	}
	return fmt.Errorf("QEMU ended because of %q%s", reason, m.complaint())
}

// complaint returns the end of what QEMU wrote to stderr, as ": text" on one line of printable characters.
func (m *machine) complaint() string {
	var lines []string
	for line := range strings.Lines(string(m.stderr.Bytes())) {
		line = strings.Map(func(r rune) rune {
			if r < ' ' || r > '~' {
				return -1
			}
			return r
		}, line)
		if line != "" && !strings.Contains(line, "warning: TCG doesn't support requested feature") {
			lines = append(lines, line)
		}
	}
	if len(lines) == 0 {
		return ""
	}
	return ": " + strings.Join(lines[max(0, len(lines)-5):], "; ")
}

// Dial implements vm.Machine. The connection is made before the guest is up: QEMU holds what is written until the agent
// opens its end.
func (m *machine) Dial(ctx context.Context, port uint32) (net.Conn, error) {
	if port != vm.AgentPort {
		return nil, fmt.Errorf("dial port %d of VM %s: it has port %d only", port, m.id, vm.AgentPort)
	}
	if err := ctx.Err(); err != nil {
		return nil, fmt.Errorf("dial VM %s: %w", m.id, err)
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	select {
	case <-m.done:
		return nil, fmt.Errorf("dial VM %s: %w", m.id, net.ErrClosed)
	default:
	}
	if m.closing {
		return nil, fmt.Errorf("dial VM %s: %w", m.id, net.ErrClosed)
	}
	// QEMU serves one connection; the next waits in its queue until this one is closed.
	if m.agent != nil {
		m.agent.Close()
		m.agent = nil
	}
	conn, err := dial(ctx, m.dir, agentSocket)
	if err != nil {
		return nil, fmt.Errorf("dial VM %s: %w", m.id, err)
	}
	m.agent = conn
	return conn, nil
}

// Wait implements vm.Machine. Of a machine that was adopted only the monitor can tell how it ended. So a QEMU that
// crashes after it has said that the guest rebooted goes for a reboot; and if the monitor never answered there is an
// error that says so.
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
	if err := m.end(ctx); err != nil {
		return fmt.Errorf("end QEMU of VM %s: %w", m.id, err)
	}
	return m.release(context.WithoutCancel(ctx))
}

// end makes the process end: by request, and by force when it does not within quitGrace, or when ctx ends.
func (m *machine) end(ctx context.Context) error {
	select {
	case <-m.done:
		return nil
	default:
	}
	m.sample()
	grace := time.NewTimer(quitGrace)
	defer grace.Stop()
	if err := m.qmp.send("quit"); err == nil {
		select {
		case <-m.done:
			return nil
		case <-grace.C:
		case <-ctx.Done():
		}
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

// disconnect closes our ends of the sockets. It may be called more than once.
func (m *machine) disconnect() {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.agent != nil {
		m.agent.Close()
		m.agent = nil
	}
	if m.consoleConn != nil {
		m.consoleConn.Close()
	}
	if m.qmp != nil {
		m.qmp.conn.Close()
	}
}

// release closes and removes what the process leaves. It may be called more than once.
func (m *machine) release(ctx context.Context) error {
	m.disconnect()
	m.mu.Lock()
	defer m.mu.Unlock()
	var errs []error
	if m.cgroups != nil {
		errs = append(errs, m.cgroups.remove(ctx, m.id))
	}
	for _, name := range m.sockets {
		if err := os.Remove(filepath.Join(m.dir, name)); err != nil && !errors.Is(err, fs.ErrNotExist) {
			errs = append(errs, fmt.Errorf("remove socket: %w", err))
		}
	}
	m.sockets = nil
	return errors.Join(errs...)
}

// Console implements vm.Console.
func (m *machine) Console() []byte { return m.console.Bytes() }

// PeakMemory implements vm.Usage. It is 0 if it cannot be told. Of an adopted machine that has ended it is the most that
// was found while it ran: at the adoption, when asked, and at the guest's request to end or ours.
func (m *machine) PeakMemory() flint.Bytes {
	select {
	case <-m.done:
		return m.peak
	default:
		return m.sample()
	}
}

// sample looks how much memory the process, which must not be known to be gone, has had at once.
func (m *machine) sample() flint.Bytes {
	now := vm.ResidentPeak(m.proc.pid)
	m.mu.Lock()
	defer m.mu.Unlock()
	m.seen = max(m.seen, now)
	return m.seen
}

// Process implements vm.Process.
func (m *machine) Process() (pid int, start uint64) { return m.proc.pid, m.proc.start }
