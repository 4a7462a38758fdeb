package guest

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"net"
	"strings"
	"testing"
	"time"

	"flint"
)

// raw is a half that says whatever a test wants it to.
type raw struct {
	t    *testing.T
	conn net.Conn
	dec  *decoder
}

func (r *raw) say(f frame) {
	if f.version == 0 {
		f.version = Version
	}
	r.conn.Write(wire(f)) // the other half may have hung up by now; that is what is looked for elsewhere
}

// hear returns the next frame of the kind.
func (r *raw) hear(k kind) frame {
	r.t.Helper()
	for {
		f, err := r.dec.next()
		if err != nil {
			r.t.Fatalf("wait for a frame of kind %d: %v", k, err)
		}
		if f.kind == k {
			f.payload = bytes.Clone(f.payload)
			return f
		}
	}
}

// drain reads whatever comes until the other half hangs up.
func (r *raw) drain() {
	for {
		if _, err := r.dec.next(); err != nil {
			return
		}
	}
}

func at(pos uint64, data string) []byte {
	return append(binary.BigEndian.AppendUint64(nil, pos), data...)
}

// A guest that breaks the protocol ends its own session, with a fault that says so, and nothing else.
func TestHostileGuest(t *testing.T) {
	big := strings.Repeat("x", 32<<10)
	for name, attack := range map[string]func(r *raw, epoch uint64, stream uint32){
		"unknown kind":          func(r *raw, e uint64, s uint32) { r.say(frame{kind: 99, epoch: e, stream: s}) },
		"kind of the host's":    func(r *raw, e uint64, s uint32) { r.say(frame{kind: kindStart, epoch: e, stream: s}) },
		"data without position": func(r *raw, e uint64, s uint32) { r.say(frame{kind: kindStdout, epoch: e, stream: s}) },
		"hole in the output": func(r *raw, e uint64, s uint32) {
			r.say(frame{kind: kindStdout, epoch: e, stream: s, payload: at(5, "x")})
		},
		"negative position": func(r *raw, e uint64, s uint32) {
			r.say(frame{kind: kindStdout, epoch: e, stream: s, payload: at(1<<63, "x")})
		},
		"data beyond the window": func(r *raw, e uint64, s uint32) {
			for i := range uint64(2*window/len(big) + 2) {
				r.say(frame{kind: kindStdout, epoch: e, stream: s, payload: at(i*uint64(len(big)), big)})
			}
		},
		"data after the end": func(r *raw, e uint64, s uint32) {
			r.say(frame{kind: kindStdout, epoch: e, stream: s, payload: at(0, "")})
			r.say(frame{kind: kindStdout, epoch: e, stream: s, payload: at(0, "x")})
		},
		"exit before the output's end": func(r *raw, e uint64, s uint32) {
			r.say(frame{kind: kindExit, epoch: e, stream: s, payload: []byte(`{"Code":0}`)})
		},
		"exit that is no exit": func(r *raw, e uint64, s uint32) {
			r.say(frame{kind: kindStdout, epoch: e, stream: s, payload: at(0, "")})
			r.say(frame{kind: kindStderr, epoch: e, stream: s, payload: at(0, "")})
			r.say(frame{kind: kindExit, epoch: e, stream: s, payload: []byte(`{"Code":-1}`)})
		},
		"acknowledgement of what was not sent": func(r *raw, e uint64, s uint32) {
			r.say(frame{kind: kindAck, epoch: e, stream: s, payload: append(at(1<<40, ""), byte(kindStdin))})
		},
		"acknowledgement of nothing": func(r *raw, e uint64, s uint32) { r.say(frame{kind: kindAck, epoch: e, stream: s}) },
	} {
		t.Run(name, func(t *testing.T) {
			s, r := hostileGuest(t)
			stuck := newGate() // a writer that takes nothing, so that the window matters
			t.Cleanup(func() { close(stuck.open) })
			done := make(chan error, 1)
			go func() {
				_, err := s.Exec(t.Context(), Command{Args: []string{"x"}}, IO{Stdout: stuck})
				done <- err
			}()
			start := r.hear(kindStart)
			go attack(r, start.epoch, start.stream)
			r.drain()
			<-s.Done()
			var f *flint.Fault
			if !errors.As(s.Err(), &f) || f.Code != "guest.protocol" {
				t.Errorf("session ended by %v", s.Err())
			}
		})
	}
}

// hostileGuest attaches a session to a guest the test plays itself.
func hostileGuest(t *testing.T) (*Session, *raw) {
	t.Helper()
	host, guest := net.Pipe()
	r := &raw{t, guest, newDecoder(guest)}
	type result struct {
		s   *Session
		err error
	}
	attached := make(chan result, 1)
	go func() {
		s, err := Attach(t.Context(), host, Options{})
		attached <- result{s, err}
	}()
	greet := r.hear(kindGreet)
	r.say(frame{kind: kindStdout, epoch: greet.epoch ^ 1, payload: []byte("of another session")})
	r.say(frame{kind: kindHello, epoch: greet.epoch, payload: []byte(fmt.Sprintf(`{"Version":%d}`, Version))})
	got := <-attached
	if got.err != nil {
		t.Fatal(got.err)
	}
	t.Cleanup(func() {
		guest.Close()
		got.s.Close()
	})
	return got.s, r
}

// Frames for processes the host does not know, and of other epochs, do no harm.
func TestStrayFramesAreIgnored(t *testing.T) {
	s, r := hostileGuest(t)
	go func() {
		for _, k := range []kind{kindStdout, kindExit, kindResult, kindRefused, kindAck} {
			r.say(frame{kind: k, epoch: s.epoch, stream: 4711, payload: []byte("?")})
			r.say(frame{kind: k, epoch: s.epoch ^ 2, stream: 1, payload: []byte("?")})
		}
		r.say(frame{kind: kindHello, epoch: s.epoch, payload: []byte(`{"Version":1,"Kernel":"late"}`)})
		for range 1000 {
			r.say(frame{kind: kindHello})
		}
		f := r.hear(kindStats)
		r.say(frame{kind: kindResult, epoch: f.epoch, stream: f.stream, payload: []byte(`{"MemoryTotal":42}`)})
		r.drain()
	}()
	st, err := s.Stats(t.Context())
	if err != nil || st.MemoryTotal != 42 || s.Hello().Kernel != "" {
		t.Errorf("stats %+v, error %v, hello %+v", st, err, s.Hello())
	}
}

func TestAgentHangsUp(t *testing.T) {
	s, r := hostileGuest(t)
	go func() {
		r.say(frame{kind: kindBye, epoch: s.epoch, payload: []byte(`{"Error":"enough"}`)})
		r.drain()
	}()
	<-s.Done()
	var f *flint.Fault
	if !errors.As(s.Err(), &f) || f.Code != "guest.gone" || !strings.Contains(f.Error(), "enough") {
		t.Errorf("session ended by %v", s.Err())
	}
}

func TestVersionsThatDiffer(t *testing.T) {
	for name, answer := range map[string]frame{
		"in the hello": {kind: kindHello, payload: []byte(`{"Version":2}`)},
		"in the frame": {kind: kindHello, version: 2, payload: []byte(`{"Whatever":2}`)},
	} {
		host, guest := net.Pipe()
		r := &raw{t, guest, newDecoder(guest)}
		go func() {
			f := r.hear(kindGreet)
			answer.epoch = f.epoch
			r.say(answer)
			r.drain()
		}()
		_, err := Attach(t.Context(), host, Options{})
		var f *flint.Fault
		if !errors.As(err, &f) || f.Code != "guest.version" || !strings.Contains(err.Error(), "version 2") {
			t.Errorf("%s: error %v", name, err)
		}
	}
	// The other way round: an agent that meets a newer host says its own version, and stays.
	a := NewAgent(newScript(nil), Hello{}, nil)
	defer a.Close()
	host, guest := net.Pipe()
	go a.Serve(t.Context(), guest)
	r := &raw{t, host, newDecoder(host)}
	go r.say(frame{kind: kindGreet, version: 2, epoch: 5, payload: []byte(`{"New":true}`)})
	for f := r.hear(kindHello); f.epoch != 5; f = r.hear(kindHello) {
		if f.version != Version {
			t.Errorf("version %d", f.version)
		}
	}
	host.Close()
}

// A host that breaks the protocol loses its connection; the agent goes on.
func TestBadHost(t *testing.T) {
	for name, attack := range map[string]func(r *raw){
		"greeting of epoch 0":  func(r *raw) { r.say(frame{kind: kindGreet, payload: []byte(`{"Version":1}`)}) },
		"malformed greeting":   func(r *raw) { r.say(frame{kind: kindGreet, epoch: 9, payload: []byte(`{"Versions":1}`)}) },
		"unknown kind":         func(r *raw) { r.say(frame{kind: 99, epoch: 3}) },
		"resume of nothing":    func(r *raw) { r.say(frame{kind: kindResume, epoch: 3, stream: 5}) },
		"malformed ack":        func(r *raw) { r.say(frame{kind: kindAck, epoch: 3, stream: 5}) },
		"too many processes":   func(r *raw) { startMany(r, maxProcesses+1) },
		"a process twice":      func(r *raw) { startMany(r, 1); startMany(r, 1) },
		"questions, no ears":   func(r *raw) { ask(r, 2*maxQueued) },
		"input out of the air": func(r *raw) { startMany(r, 1); r.say(frame{kind: kindStdin, epoch: 3, stream: 1, payload: at(9, "x")}) },
	} {
		t.Run(name, func(t *testing.T) {
			hold := make(chan struct{})
			a := NewAgent(newScript(run(func(Command, *proc) Exit { <-hold; return Exit{} })), Hello{}, nil)
			defer a.Close()
			defer close(hold)
			host, guest := net.Pipe()
			served := make(chan error, 1)
			go func() { served <- a.Serve(t.Context(), guest) }()
			r := &raw{t, host, newDecoder(host)}
			go r.say(frame{kind: kindGreet, epoch: 3, payload: []byte(`{"Version":1}`)})
			for f := r.hear(kindHello); f.epoch != 3; f = r.hear(kindHello) {
			}
			go attack(r)
			if name == "resume of nothing" { // the host hears why
				if f := r.hear(kindBye); f.epoch != 3 || !strings.Contains(string(f.payload), "there is none") {
					t.Errorf("bye %q", f.payload)
				}
			}
			if name != "questions, no ears" {
				go r.drain()
			}
			if err := <-served; err == nil {
				t.Error("the connection ended well")
			}
			attach(t, a).Close()
		})
	}
}

func startMany(r *raw, n int) {
	for i := range n {
		r.say(frame{kind: kindStart, epoch: 3, stream: uint32(i + 1), payload: []byte(`{"Args":["x"]}`)})
	}
}

func ask(r *raw, n int) {
	for i := range n {
		r.say(frame{kind: kindPing, epoch: 3, stream: uint32(i)})
	}
}

// A writer on the host that fails does not end the process, but Exec tells.
func TestOutputThatCannotBeWritten(t *testing.T) {
	s, _ := pair(t, newScript(run(func(c Command, p *proc) Exit {
		p.out.Write(make([]byte, 1<<20))
		return Exit{Code: 5}
	})))
	e, err := s.Exec(t.Context(), Command{Args: []string{"x"}}, IO{Stdout: full{}})
	if e.Code != 5 || !errors.Is(err, errFull) {
		t.Errorf("exit %+v, error %v", e, err)
	}
}

var errFull = errors.New("disk is full")

type full struct{}

func (full) Write([]byte) (int, error) { return 0, errFull }

func TestCallsEndWithTheirContext(t *testing.T) {
	s, r := hostileGuest(t)
	go r.drain()
	ctx, cancel := context.WithTimeout(t.Context(), time.Millisecond)
	defer cancel()
	if err := s.Reboot(ctx); !errors.Is(err, context.DeadlineExceeded) {
		t.Error(err)
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if len(s.calls) != 0 {
		t.Errorf("%d calls are still remembered", len(s.calls))
	}
}
