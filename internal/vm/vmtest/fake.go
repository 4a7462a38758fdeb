// Package vmtest holds every vm.Driver to the same suite, and has Fake, a driver without a VMM.
//
// The guest of a Fake is the real agent of package guest on a pipe, with a scripted system behind it; so a test that
// uses it goes through the real protocol, and only the machine is made up. Tests import this package; programs must not.
package vmtest

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"sync"
	"time"

	"flint"
	"flint/internal/guest"
	"flint/internal/vm"
)

// Fake is a vm.Driver whose guests are scripted. The zero value works: its guests answer at once and run Shell. The
// fields must not change once it is in use.
type Fake struct {
	// Exec is what the guest does for a command; nil: Shell. It must return when ctx ends, which is when the process
	// was sent a signal that ends one, or the machine ended. The Exit of a process that a signal ended is made up by the Fake.
	Exec func(ctx context.Context, c guest.Command, stdin io.Reader, stdout, stderr io.Writer) guest.Exit
	// Configure answers guest.Config; nil: everything is accepted.
	Configure func(c guest.Config) (guest.Configured, error)

	BootDelay   time.Duration // from Boot to the moment the agent answers
	FailBoot    error         // what Boot returns, having done nothing
	NeverAnswer bool          // the guest hangs: Dial works, but nobody answers
	DieAfter    time.Duration // the VMM dies this long after Boot; 0: it does not
	Death       error         // why it dies; nil: ErrCrash
	NoConsole   bool          // its guests have no console

	mu   sync.Mutex
	live map[*machine]bool
}

var _ vm.Driver = (*Fake)(nil)

// ErrCrash is what a machine ends with that DieAfter, Crash or a kernel panic ended.
var ErrCrash = errors.New("fake VMM died")

// Boot implements vm.Driver.
func (f *Fake) Boot(ctx context.Context, s vm.Spec) (vm.Machine, error) {
	if err := s.Validate(); err != nil {
		return nil, fmt.Errorf("check the spec of VM %s: %w", s.ID, err)
	}
	if err := ctx.Err(); err != nil {
		return nil, fmt.Errorf("boot VM %s: %w", s.ID, err)
	}
	if f.FailBoot != nil {
		return nil, fmt.Errorf("boot VM %s: %w", s.ID, f.FailBoot)
	}
	m := &machine{fake: f, spec: s, up: make(chan struct{}), ending: make(chan struct{}), done: make(chan struct{})}
	m.print("fake console of " + s.ID + "\n")
	m.agent = guest.NewAgent(&system{m}, guest.Hello{Agent: "fake", Boot: s.ID, Kernel: "fake", Arch: "fake", Init: "agent"}, nil)
	f.mu.Lock()
	if f.live == nil {
		f.live = map[*machine]bool{}
	}
	f.live[m] = true
	f.mu.Unlock()
	go m.run()
	return m, nil
}

// Running returns how many machines have not ended.
func (f *Fake) Running() int {
	f.mu.Lock()
	defer f.mu.Unlock()
	return len(f.live)
}

// Crash ends the machine with this ID as if its VMM died, and reports whether there was one.
func (f *Fake) Crash(id string) bool {
	f.mu.Lock()
	defer f.mu.Unlock()
	for m := range f.live {
		if m.spec.ID == id {
			m.end(f.death())
			return true
		}
	}
	return false
}

// HangUp ends the conversation of the agent in the machine with this ID, as one does that has not heard from its host for long. It
// reports whether there was one.
func (f *Fake) HangUp(id string) bool {
	f.mu.Lock()
	defer f.mu.Unlock()
	for m := range f.live {
		m.mu.Lock()
		talks := m.spec.ID == id && m.inside != nil
		if talks {
			m.inside.Close()
		}
		m.mu.Unlock()
		if talks {
			return true
		}
	}
	return false
}

func (f *Fake) death() error {
	if f.Death != nil {
		return f.Death
	}
	return ErrCrash
}

// machine implements vm.Machine, vm.Console and vm.Usage.
type machine struct {
	fake  *Fake
	spec  vm.Spec
	agent *guest.Agent
	up    chan struct{} // closed when the agent begins to answer

	ending chan struct{} // closed when the machine begins to end; err is set before
	done   chan struct{} // closed when nothing of it runs any more
	once   sync.Once
	err    error

	mu      sync.Mutex
	console []byte
	conn    net.Conn // the host's end of the newest stream
	inside  net.Conn // the agent's
	serving sync.WaitGroup
}

var (
	_ vm.Console = (*machine)(nil)
	_ vm.Usage   = (*machine)(nil)
)

// run is the machine's life.
func (m *machine) run() {
	boot := time.NewTimer(m.fake.BootDelay)
	defer boot.Stop()
	var death <-chan time.Time
	if m.fake.DieAfter > 0 {
		t := time.NewTimer(m.fake.DieAfter)
		defer t.Stop()
		death = t.C
	}
	for alive := true; alive; {
		select {
		case <-boot.C:
			if !m.fake.NeverAnswer {
				close(m.up)
			}
		case <-death:
			m.end(m.fake.death())
		case <-m.ending:
			alive = false
		}
	}
	m.mu.Lock()
	if m.conn != nil {
		m.conn.Close()
	}
	m.mu.Unlock()
	m.agent.Close()
	m.serving.Wait()
	m.fake.mu.Lock()
	delete(m.fake.live, m)
	m.fake.mu.Unlock()
	close(m.done)
}

// end begins the machine's end. The first reason counts.
func (m *machine) end(err error) {
	m.once.Do(func() {
		if err != nil {
			m.err = fmt.Errorf("VM %s: %w", m.spec.ID, err)
		}
		close(m.ending)
	})
}

// Dial implements vm.Machine as a virtio-serial port behaves: the stream exists before the guest is up.
func (m *machine) Dial(ctx context.Context, port uint32) (net.Conn, error) {
	if port != vm.AgentPort {
		return nil, fmt.Errorf("dial port %d of VM %s: it has port %d only", port, m.spec.ID, vm.AgentPort)
	}
	if err := ctx.Err(); err != nil {
		return nil, fmt.Errorf("dial VM %s: %w", m.spec.ID, err)
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	select {
	case <-m.ending:
		return nil, fmt.Errorf("dial VM %s: %w", m.spec.ID, net.ErrClosed)
	default:
	}
	if m.conn != nil {
		m.conn.Close()
	}
	host, inside := net.Pipe()
	m.conn, m.inside = host, inside
	m.serving.Go(func() {
		defer inside.Close()
		select {
		case <-m.up:
			_ = m.agent.Serve(context.Background(), inside) // its end is ours too: run closes the agent
		case <-m.ending:
		}
	})
	return host, nil
}

// Wait implements vm.Machine.
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
func (m *machine) Close(context.Context) error {
	m.end(nil)
	<-m.done
	return nil
}

// Console implements vm.Console.
func (m *machine) Console() []byte {
	m.mu.Lock()
	defer m.mu.Unlock()
	return append([]byte(nil), m.console...)
}

func (m *machine) print(s string) {
	if m.fake.NoConsole {
		return
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	m.console = append(m.console, s...)
	m.console = m.console[max(0, len(m.console)-64<<10):]
}

// PeakMemory implements vm.Usage: a quarter of what the guest may have, always.
func (m *machine) PeakMemory() flint.Bytes { return m.spec.Memory / 4 }
