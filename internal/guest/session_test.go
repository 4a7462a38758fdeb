package guest

import (
	"bytes"
	"context"
	"errors"
	"io"
	"net"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"flint"
)

// gate is a Writer that takes nothing until it is opened.
type gate struct {
	open    chan struct{}
	entered chan struct{}
	once    sync.Once
	n       atomic.Int64
}

func newGate() *gate { return &gate{open: make(chan struct{}), entered: make(chan struct{})} }

func (g *gate) Write(p []byte) (int, error) {
	g.once.Do(func() { close(g.entered) })
	<-g.open
	g.n.Add(int64(len(p)))
	return len(p), nil
}

// A host that does not read makes the process wait, with bounded memory on both sides, while other traffic passes.
func TestFloodStaysWithinWindow(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		const size = 8 << 20
		var written atomic.Int64
		s, a := pair(t, newScript(run(func(c Command, p *proc) Exit {
			if c.Args[0] != "flood" {
				io.WriteString(p.out, "here")
				return Exit{}
			}
			for written.Load() < size {
				n, err := p.out.Write(make([]byte, 16<<10))
				written.Add(int64(n))
				if err != nil {
					return Exit{Code: 1}
				}
			}
			return Exit{}
		})))
		g := newGate()
		done := make(chan error, 1)
		go func() {
			_, err := s.Exec(t.Context(), Command{Args: []string{"flood"}}, IO{Stdout: g})
			done <- err
		}()
		<-g.entered
		synctest.Wait() // everything that can move has moved
		// Two windows, the agent's and the host's, and what is under way in copy buffers.
		if n := written.Load(); n > 2*window+4*chunk || n < window {
			t.Errorf("the process wrote %d bytes to a host that does not read; the window is %d", n, window)
		}
		s.mu.Lock()
		for _, p := range s.procs {
			if p.out.ring.n > window || len(p.out.ring.buf) > window {
				t.Errorf("host holds %d bytes in %d", p.out.ring.n, len(p.out.ring.buf))
			}
		}
		s.mu.Unlock()
		a.mu.Lock()
		for _, p := range a.procs {
			if p.out.ring.n > window || len(p.out.ring.buf) > window {
				t.Errorf("agent holds %d bytes in %d", p.out.ring.n, len(p.out.ring.buf))
			}
		}
		a.mu.Unlock()
		var out bytes.Buffer
		if _, err := s.Exec(t.Context(), Command{Args: []string{"other"}}, IO{Stdout: &out}); err != nil || out.String() != "here" {
			t.Errorf("beside the flood: %v, %q", err, &out)
		}
		if _, err := s.Stats(t.Context()); err != nil {
			t.Errorf("beside the flood: %v", err)
		}
		time.Sleep(10 * defaultHeartbeat) // in the bubble: the session must live on, blocked as it is
		close(g.open)
		if err := <-done; err != nil {
			t.Error(err)
		}
		if g.n.Load() != size {
			t.Errorf("%d bytes of %d came", g.n.Load(), size)
		}
	})
}

// A process that does not read makes the host's input wait.
func TestInputStaysWithinWindow(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		release := make(chan struct{})
		s, _ := pair(t, newScript(run(func(c Command, p *proc) Exit {
			<-release
			n, _ := io.Copy(io.Discard, p.in)
			return Exit{Code: int(n >> 20)}
		})))
		in := &countingReader{left: 5 << 20}
		done := make(chan Exit, 1)
		go func() {
			e, err := s.Exec(t.Context(), Command{Args: []string{"x"}}, IO{Stdin: in})
			if err != nil {
				t.Error(err)
			}
			done <- e
		}()
		synctest.Wait()
		if n := in.n.Load(); n > 2*window+4*chunk || n < window {
			t.Errorf("%d bytes were read for a process that does not read", n)
		}
		close(release)
		if e := <-done; e.Code != 5 {
			t.Errorf("process read %d MiB of 5", e.Code)
		}
	})
}

type countingReader struct {
	left int
	n    atomic.Int64
}

func (c *countingReader) Read(p []byte) (int, error) {
	if c.left == 0 {
		return 0, io.EOF
	}
	n := min(len(p), c.left)
	c.left -= n
	c.n.Add(int64(n))
	return n, nil
}

func TestCancelEndsTheProcessGroup(t *testing.T) {
	for _, stubborn := range []bool{false, true} {
		synctest.Test(t, func(t *testing.T) {
			var got []string
			s, _ := pair(t, newScript(run(func(c Command, p *proc) Exit {
				for {
					sig := <-p.signals
					got = append(got, sig)
					io.WriteString(p.out, sig)
					if !stubborn || sig == "SIGKILL" {
						return Exit{Code: 143, Signal: sig, PIDs: true}
					}
				}
			})))
			ctx, cancel := context.WithCancel(t.Context())
			begin := time.Now()
			time.AfterFunc(time.Second, cancel)
			var out strings.Builder
			e, err := s.Exec(ctx, Command{Args: []string{"x"}}, IO{Stdout: &out})
			took := time.Since(begin)
			want := []string{"SIGTERM"}
			if stubborn {
				want = append(want, "SIGKILL")
			}
			if !errors.Is(err, context.Canceled) || strings.Join(got, " ") != strings.Join(want, " ") {
				t.Errorf("error %v after %v, signals %v", err, took, got)
			}
			if said := strings.Join(want, ""); out.String() != said || e.Code != 143 || !e.PIDs {
				t.Errorf("output %q, want %q; exit %+v", &out, said, e)
			}
			if stubborn != (took >= time.Second+killAfter) {
				t.Errorf("took %v", took)
			}
		})
	}
}

// A cancelled Exec returns even if the guest never ends the process.
func TestCancelOfImmortal(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		end := make(chan struct{})
		defer close(end)
		s, _ := pair(t, newScript(run(func(Command, *proc) Exit { <-end; return Exit{} })))
		ctx, cancel := context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		if _, err := s.Exec(ctx, Command{Args: []string{"x"}}, IO{}); !errors.Is(err, context.DeadlineExceeded) {
			t.Error(err)
		}
	})
}

func TestTerminal(t *testing.T) {
	s, _ := pair(t, newScript(func(c Command) (Process, error) {
		p := newProc(func(p *proc) Exit {
			first := *c.TTY
			second := <-p.sizes
			if first != (Size{80, 24}) || second != (Size{132, 50}) {
				return Exit{Code: 1}
			}
			io.WriteString(p.out, "resized")
			return Exit{}
		})
		p.tty = true
		return p, nil
	}))
	sizes := make(chan Size, 1)
	sizes <- Size{132, 50}
	close(sizes)
	var out bytes.Buffer
	e, err := s.Exec(t.Context(), Command{Args: []string{"sh"}, TTY: &Size{80, 24}}, IO{Stdout: &out, Resize: sizes})
	if err != nil || e.Code != 0 || out.String() != "resized" {
		t.Errorf("exit %+v, error %v, output %q", e, err, &out)
	}
}

func TestStartThatFails(t *testing.T) {
	fail := error(&ExitError{Exit{Code: 127, Err: "nope: not found"}})
	s, a := pair(t, newScript(func(Command) (Process, error) { return nil, fail }))
	e, err := s.Exec(t.Context(), Command{Args: []string{"nope"}}, IO{Stdin: strings.NewReader("ignored")})
	if err != nil || e != (Exit{Code: 127, Err: "nope: not found"}) {
		t.Errorf("exit %+v, error %v", e, err)
	}
	fail = errors.New("out of pids\x00\xff" + strings.Repeat("x", 5000))
	e, err = s.Exec(t.Context(), Command{Args: []string{"nope"}}, IO{})
	if err != nil || e.Code != 126 || !strings.HasPrefix(e.Err, "out of pids\uFFFDx") {
		t.Errorf("exit %+v, error %v", e, err)
	}
	if _, err := s.Stats(t.Context()); err != nil { // by now the host's last word on the processes has arrived
		t.Fatal(err)
	}
	a.mu.Lock()
	defer a.mu.Unlock()
	if len(a.procs) != 0 {
		t.Errorf("agent still knows %d processes", len(a.procs))
	}
}

func TestRequestsTheProtocolCannotCarry(t *testing.T) {
	s, _ := pair(t, newScript(nil))
	for _, c := range []Command{
		{},
		{Args: []string{"a\x00b"}},
		{Args: []string{"a"}, Env: []string{"novalue"}},
		{Args: []string{strings.Repeat("x", maxPayload)}},
		{Args: make([]string, maxArgs+1)},
	} {
		if _, err := s.Exec(t.Context(), c, IO{}); !errors.Is(err, flint.ErrUsage) {
			t.Errorf("command of %d arguments: error %v", len(c.Args), err)
		}
	}
	if s.Err() != nil {
		t.Errorf("session ended: %v", s.Err())
	}
}

// Output of a process outlives its session: nothing is lost, nothing comes twice.
func TestResume(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		const lines = 100_000
		s, a := pair(t, newScript(run(func(c Command, p *proc) Exit {
			for i := range lines {
				if _, err := io.WriteString(p.out, line(i)); err != nil {
					return Exit{Code: 1}
				}
			}
			in, _ := io.ReadAll(p.in)
			return Exit{Code: len(in)}
		})))
		g := newGate()
		ended := make(chan error, 1)
		in, stdin := io.Pipe()
		defer stdin.Close() // so it never ends during the session
		go func() {
			_, err := s.Exec(t.Context(), Command{Args: []string{"/bin/lines"}}, IO{Stdout: g, Stdin: in})
			ended <- err
		}()
		<-g.entered
		synctest.Wait()
		s.link.fail(errors.New("the daemon died"))
		close(g.open)
		if err := <-ended; !errors.Is(err, flint.ErrGuest) {
			t.Fatalf("error %v", err)
		}

		s2 := attach(t, a)
		ps := s2.Hello().Processes
		if len(ps) != 1 || ps[0].Name != "lines" || ps[0].Stdout != 0 || ps[0].Closed {
			t.Fatalf("processes %+v", ps)
		}
		var out bytes.Buffer
		e, err := s2.Resume(t.Context(), ps[0], IO{Stdout: &out, Stdin: strings.NewReader("four")})
		if err != nil || e.Code != 4 {
			t.Errorf("exit %+v, error %v", e, err)
		}
		checkLines(t, out.String(), lines)
		if _, err := s2.Resume(t.Context(), ps[0], IO{}); !errors.Is(err, flint.ErrNotFound) {
			t.Errorf("second resume: %v", err)
		}
	})
}

// A process that ended while no host was there is collected by the next.
func TestResumeOfTheDead(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		finish := make(chan struct{})
		s, a := pair(t, newScript(run(func(c Command, p *proc) Exit {
			<-finish
			io.WriteString(p.out, "done")
			return Exit{Code: 9}
		})))
		go s.Exec(t.Context(), Command{Name: "job", Args: []string{"x"}}, IO{}) // without input
		synctest.Wait()
		s.Close()
		close(finish)
		synctest.Wait()
		s2 := attach(t, a)
		ps := s2.Hello().Processes
		if len(ps) != 1 || ps[0].Name != "job" || !ps[0].Closed {
			t.Fatalf("processes %+v", ps)
		}
		var out bytes.Buffer
		e, err := s2.Resume(t.Context(), ps[0], IO{Stdout: &out, Stdin: strings.NewReader("too late")})
		if err != nil || e.Code != 9 || out.String() != "done" {
			t.Errorf("exit %+v, error %v, output %q", e, err, &out)
		}
		var again bytes.Buffer // a new process must not take the number of the old one
		if e, err := s2.Exec(t.Context(), Command{Args: []string{"x"}}, IO{Stdout: &again}); err != nil || e.Code != 9 || again.String() != "done" {
			t.Errorf("exit %+v, error %v, output %q", e, err, &again)
		}
	})
}

func line(i int) string { return "line " + strings.Repeat("x", i%50) + "\n" }

func checkLines(t *testing.T, s string, n int) {
	t.Helper()
	var want strings.Builder
	for i := range n {
		want.WriteString(line(i))
	}
	if s != want.String() {
		t.Errorf("%d bytes came, of %d, or they differ", len(s), want.Len())
	}
}

// A byte stream without connections: a second session on it follows the first, whatever is left of that.
func TestNewGreetingOnTheSameStream(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		a := NewAgent(newScript(run(func(c Command, p *proc) Exit {
			io.WriteString(p.out, c.Args[0])
			return Exit{}
		})), Hello{}, nil)
		defer a.Close()
		port := newPort()
		served := make(chan error, 1)
		go func() { served <- a.Serve(t.Context(), port.guest()) }()
		for i, word := range []string{"first", "second", "third"} {
			host := port.host()
			s, err := Attach(t.Context(), host, Options{})
			if err != nil {
				t.Fatal(err)
			}
			var out bytes.Buffer
			if _, err := s.Exec(t.Context(), Command{Args: []string{word}}, IO{Stdout: &out}); err != nil || out.String() != word {
				t.Fatalf("session %d: %v, %q", i, err, &out)
			}
			torn := wire(frame{version: Version, kind: kindStart, epoch: s.epoch, payload: []byte("{}")})
			s.link.fail(errors.New("the daemon died")) // without a goodbye
			s.running.Wait()
			port.down.write(torn[:len(torn)-5+i])
			port.up.write([]byte("half a fra\xF1lnt\x01"))
		}
		a.Close()
		if err := <-served; !errors.Is(err, errClosed) {
			t.Errorf("serve ended by %v", err)
		}
	})
}

func TestSilence(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		a := NewAgent(newScript(nil), Hello{}, nil)
		defer a.Close()
		port := newPort()
		served := make(chan error, 1)
		go func() { served <- a.Serve(t.Context(), port.guest()) }()
		s, err := Attach(t.Context(), port.host(), Options{Heartbeat: 6 * time.Second})
		if err != nil {
			t.Fatal(err)
		}
		defer s.Close()
		time.Sleep(time.Hour) // in the bubble
		if s.Err() != nil {
			t.Fatalf("an idle session ended: %v", s.Err())
		}
		for _, p := range []*pipe{port.down, port.up} {
			p.mu.Lock()
			p.lost = true
			p.mu.Unlock()
		}
		begin := time.Now()
		<-s.Done()
		if d := time.Since(begin); d < 4*time.Second || d > 9*time.Second {
			t.Errorf("host noticed the silence after %v", d)
		}
		var f *flint.Fault
		if !errors.As(s.Err(), &f) || f.Code != "guest.silent" || !errors.Is(f, flint.ErrGuest) || f.Fix == "" {
			t.Errorf("session ended by %#v", s.Err())
		}
		if err := <-served; !errors.Is(err, errSilent) {
			t.Errorf("agent's connection ended by %v", err)
		}
		if d := time.Since(begin); d < 10*time.Second || d > 21*time.Second {
			t.Errorf("agent noticed the silence after %v", d)
		}
	})
}

// Before the guest is up, greetings are lost; the first after counts, and the agent's own hello brings it at once.
func TestAttachBeforeTheGuestIsUp(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		port := newPort()
		type result struct {
			s   *Session
			err error
		}
		attached := make(chan result, 1)
		go func() {
			s, err := Attach(t.Context(), port.host(), Options{})
			attached <- result{s, err}
		}()
		time.Sleep(3*time.Second + greetEvery/2)
		port.down.mu.Lock()
		port.down.b = nil // the guest's port was not open
		port.down.mu.Unlock()
		a := NewAgent(newScript(nil), Hello{Kernel: "k", Uptime: time.Second}, nil)
		defer a.Close()
		begin := time.Now()
		go a.Serve(t.Context(), port.guest())
		r := <-attached
		if r.err != nil || r.s.Hello().Kernel != "k" || r.s.Hello().Uptime != time.Second {
			t.Fatalf("%v", r.err)
		}
		if d := time.Since(begin); d != 0 {
			t.Errorf("it took %v of waiting", d)
		}
		r.s.Close()
	})
}

func TestAttachGivesUp(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
		defer cancel()
		host := newPort().host()
		if _, err := Attach(ctx, host, Options{}); !errors.Is(err, context.DeadlineExceeded) {
			t.Error(err)
		}
		if _, err := host.Write(nil); err == nil {
			t.Error("the connection is still open")
		}
	})
}

func TestCloseTellsTheAgent(t *testing.T) {
	a := NewAgent(newScript(nil), Hello{}, nil)
	defer a.Close()
	host, guest := net.Pipe()
	served := make(chan error, 1)
	go func() { served <- a.Serve(t.Context(), guest) }()
	s, err := Attach(t.Context(), host, Options{})
	if err != nil {
		t.Fatal(err)
	}
	for range 2 {
		if err := s.Close(); err != nil {
			t.Error(err)
		}
	}
	if err := <-served; err != nil {
		t.Errorf("serve ended by %v", err)
	}
	if _, err := s.Stats(t.Context()); !errors.Is(err, flint.ErrGuest) {
		t.Errorf("call on a closed session: %v", err)
	}
}

func TestAgentCloseKillsProcesses(t *testing.T) {
	killed := make(chan string, 1)
	s, a := pair(t, newScript(run(func(c Command, p *proc) Exit {
		killed <- <-p.signals
		return Exit{}
	})))
	done := make(chan error, 1)
	go func() {
		_, err := s.Exec(t.Context(), Command{Args: []string{"x"}}, IO{})
		done <- err
	}()
	for { // until it was started
		a.mu.Lock()
		n := len(a.procs)
		a.mu.Unlock()
		if n == 1 {
			break
		}
		if _, err := s.Stats(t.Context()); err != nil {
			t.Fatal(err)
		}
	}
	if _, err := s.Stats(t.Context()); err != nil { // after the start in the agent's order
		t.Fatal(err)
	}
	a.Close()
	if sig := <-killed; sig != "SIGKILL" {
		t.Errorf("signal %s", sig)
	}
	if err := <-done; !errors.Is(err, flint.ErrGuest) {
		t.Errorf("exec ended by %v", err)
	}
}
