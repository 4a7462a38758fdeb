package guest

import (
	"bytes"
	"context"
	"errors"
	"io"
	"net"
	"strings"
	"sync"
	"testing"
	"time"
)

// script is a System whose processes are functions.
type script struct {
	start      func(c Command) (Process, error)
	configured chan Config
	rebooted   chan struct{}
	refuse     error
}

func newScript(start func(Command) (Process, error)) *script {
	return &script{start: start, configured: make(chan Config, 8), rebooted: make(chan struct{}, 8)}
}

func (s *script) Configure(_ context.Context, c Config) (Configured, error) {
	s.configured <- c
	return Configured{Skew: time.Second, Faults: []string{"no DNS"}}, s.refuse
}
func (s *script) Start(c Command) (Process, error) { return s.start(c) }
func (s *script) Stats() (Stats, error)            { return Stats{MemoryTotal: 1 << 30, Load: 0.5}, nil }
func (s *script) Reboot() error                    { s.rebooted <- struct{}{}; return nil }

// proc is a scripted process: body is its program.
type proc struct {
	in             *io.PipeReader
	stdin          *io.PipeWriter
	stdout, stderr *io.PipeReader
	out, err       *io.PipeWriter
	signals        chan string
	sizes          chan Size
	exit           chan Exit
	tty            bool
}

func newProc(body func(p *proc) Exit) *proc {
	p := &proc{signals: make(chan string, 16), sizes: make(chan Size, 16), exit: make(chan Exit, 1)}
	p.in, p.stdin = io.Pipe()
	p.stdout, p.out = io.Pipe()
	p.stderr, p.err = io.Pipe()
	go func() {
		e := body(p)
		p.in.Close()
		p.out.Close()
		p.err.Close()
		p.exit <- e
	}()
	return p
}

func (p *proc) Stdio() (io.WriteCloser, io.Reader, io.Reader) {
	if p.tty {
		return p.stdin, p.stdout, nil
	}
	return p.stdin, p.stdout, p.stderr
}
func (p *proc) Signal(sig string) error { p.signals <- sig; return nil }
func (p *proc) Resize(s Size) error     { p.sizes <- s; return nil }
func (p *proc) Wait() (Exit, error)     { return <-p.exit, nil }

func run(body func(c Command, p *proc) Exit) func(Command) (Process, error) {
	return func(c Command) (Process, error) { return newProc(func(p *proc) Exit { return body(c, p) }), nil }
}

// pair attaches a session to an agent over a pipe.
func pair(t *testing.T, sys System) (*Session, *Agent) {
	t.Helper()
	a := NewAgent(sys, Hello{Agent: "test", Kernel: "6.1"}, nil)
	t.Cleanup(func() { a.Close() })
	return attach(t, a), a
}

// attach connects a new session to a, whose Serve ends with it.
func attach(t *testing.T, a *Agent) *Session {
	t.Helper()
	host, guest := net.Pipe()
	served := make(chan struct{})
	go func() {
		defer close(served)
		a.Serve(t.Context(), guest)
	}()
	s, err := Attach(t.Context(), host, Options{})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		s.Close()
		<-served
	})
	return s
}

func TestExec(t *testing.T) {
	s, _ := pair(t, newScript(run(func(c Command, p *proc) Exit {
		in, _ := io.ReadAll(p.in)
		io.WriteString(p.out, strings.ToUpper(string(in)))
		io.WriteString(p.err, strings.Join(c.Args, " "))
		return Exit{Code: 7, OOM: true}
	})))
	var out, errs bytes.Buffer
	exit, err := s.Exec(t.Context(), Command{Args: []string{"a", "b"}}, IO{Stdin: strings.NewReader("hello"), Stdout: &out, Stderr: &errs})
	if err != nil || exit != (Exit{Code: 7, OOM: true}) || out.String() != "HELLO" || errs.String() != "a b" {
		t.Fatalf("exit %+v, error %v, stdout %q, stderr %q", exit, err, &out, &errs)
	}
	if h := s.Hello(); h.Version != Version || h.Kernel != "6.1" {
		t.Errorf("hello %+v", h)
	}
}

func TestManyProcessesAtOnce(t *testing.T) {
	const n, size = 8, 600 << 10 // each more than two windows, both ways
	s, _ := pair(t, newScript(run(func(c Command, p *proc) Exit {
		_, err := io.Copy(p.out, p.in)
		if err != nil {
			return Exit{Code: 1}
		}
		return Exit{}
	})))
	var wg sync.WaitGroup
	for i := range n {
		wg.Go(func() {
			want := bytes.Repeat([]byte{byte(i), 0xF1, 'l', 'n', 't'}, size/5)
			var out bytes.Buffer
			exit, err := s.Exec(t.Context(), Command{Args: []string{"cat"}}, IO{Stdin: bytes.NewReader(want), Stdout: &out})
			if err != nil || exit.Code != 0 || !bytes.Equal(out.Bytes(), want) {
				t.Errorf("process %d: exit %+v, error %v, %d of %d bytes", i, exit, err, out.Len(), len(want))
			}
		})
	}
	wg.Wait()
}

func TestCalls(t *testing.T) {
	sys := newScript(nil)
	s, _ := pair(t, sys)
	good := Config{Hostname: "vm-1", MachineID: strings.Repeat("0a", 16)}
	out, err := s.Configure(t.Context(), good)
	if err != nil || out.Skew != time.Second || len(out.Faults) != 1 || (<-sys.configured).Hostname != "vm-1" {
		t.Fatalf("configured %+v, %v", out, err)
	}
	if _, err := s.Configure(t.Context(), Config{Hostname: "two words"}); err == nil || len(sys.configured) != 0 {
		t.Errorf("a bad configuration reached the guest, or gave no error: %v", err)
	}
	for settle, ok := range map[time.Duration]bool{-1: false, time.Minute: true, time.Hour + 1: false} {
		c := good
		c.Settle = settle
		if _, err := s.Configure(t.Context(), c); (err == nil) != ok {
			t.Errorf("%v to settle: %v", settle, err)
		}
	}
	sys.refuse = errors.New("clock is stuck")
	if _, err := s.Configure(t.Context(), good); err == nil || !strings.Contains(err.Error(), "clock is stuck") {
		t.Errorf("refusal came as %v", err)
	}
	st, err := s.Stats(t.Context())
	if err != nil || st.MemoryTotal != 1<<30 || st.Load != 0.5 {
		t.Errorf("stats %+v, %v", st, err)
	}
	if err := s.Reboot(t.Context()); err != nil {
		t.Error(err)
	}
	<-sys.rebooted
}
