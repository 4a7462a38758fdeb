package vmtest

import (
	"context"
	"io"
	"sync"

	"flint/internal/guest"
)

// system implements guest.System for the machine it is in.
type system struct{ m *machine }

// Configure implements guest.System.
func (s *system) Configure(_ context.Context, c guest.Config) (guest.Configured, error) {
	if s.m.fake.Configure != nil {
		return s.m.fake.Configure(c)
	}
	return guest.Configured{}, nil
}

// Stats implements guest.System.
func (s *system) Stats() (guest.Stats, error) {
	total := int64(s.m.spec.Memory)
	return guest.Stats{MemoryTotal: total, MemoryUsed: total / 8, MemoryPeak: total / 4}, nil
}

// Reboot implements guest.System.
func (s *system) Reboot() error {
	s.m.end(nil)
	return nil
}

// Start implements guest.System.
func (s *system) Start(c guest.Command) (guest.Process, error) {
	body := s.m.fake.Exec
	if body == nil {
		body = s.m.shell
	}
	ctx, cancel := context.WithCancel(context.Background())
	p := &process{cancel: cancel, exit: make(chan guest.Exit, 1)}
	var in *io.PipeReader
	var out, errs *io.PipeWriter
	in, p.stdin = io.Pipe()
	p.stdout, out = io.Pipe()
	if c.TTY == nil {
		p.stderr, errs = io.Pipe()
	} else {
		errs = out
	}
	// A process ends when its pipes do, whatever its body waits for.
	context.AfterFunc(ctx, func() {
		in.CloseWithError(context.Canceled)
		out.CloseWithError(io.EOF)
		errs.CloseWithError(io.EOF)
	})
	go func() {
		defer cancel()
		e := body(ctx, c, in, out, errs)
		in.Close()
		out.Close()
		errs.Close()
		p.exit <- e
	}()
	return p, nil
}

// process is a scripted process. It implements guest.Process.
type process struct {
	stdin          *io.PipeWriter
	stdout, stderr *io.PipeReader
	cancel         context.CancelFunc
	exit           chan guest.Exit // one buffered element

	mu     sync.Mutex
	signal string
}

// Stdio implements guest.Process.
func (p *process) Stdio() (io.WriteCloser, io.Reader, io.Reader) {
	if p.stderr == nil {
		return p.stdin, p.stdout, nil
	}
	return p.stdin, p.stdout, p.stderr
}

// deadly are the signals a scripted process dies of, with their numbers.
func deadly(signal string) (int, bool) {
	n, ok := map[string]int{"SIGHUP": 1, "SIGINT": 2, "SIGQUIT": 3, "SIGKILL": 9, "SIGTERM": 15}[signal]
	return n, ok
}

// Signal implements guest.Process.
func (p *process) Signal(signal string) error {
	if _, ok := deadly(signal); !ok {
		return nil
	}
	p.mu.Lock()
	if p.signal == "" {
		p.signal = signal
	}
	p.mu.Unlock()
	p.cancel()
	return nil
}

// Resize implements guest.Process.
func (p *process) Resize(guest.Size) error { return nil }

// Wait implements guest.Process.
func (p *process) Wait() (guest.Exit, error) {
	e := <-p.exit
	p.mu.Lock()
	defer p.mu.Unlock()
	if n, ok := deadly(p.signal); ok {
		e.Code, e.Signal = 128+n, p.signal
	}
	return e, nil
}
