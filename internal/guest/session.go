package guest

import (
	"context"
	"crypto/rand"
	"encoding/binary"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"sync"
	"time"

	"flint"
)

const (
	greetEvery = 100 * time.Millisecond
	// maxNudges bounds how many unasked hellos are answered at once. One comes when the agent's channel opens; a
	// channel may open a few times.
	maxNudges = 16
	// byeWithin is how long Close waits for the goodbye to be written.
	byeWithin = 250 * time.Millisecond
)

// Options tune a Session.
type Options struct {
	Log       *slog.Logger  // nil: discarded
	Heartbeat time.Duration // a peer silent for this long is dead; 0: 15 s
}

// Session is the host's half of the protocol: one conversation with the agent of one guest. Its methods are safe for
// concurrent use. Its errors are *flint.Fault of kind flint.ErrGuest, but for the caller's own: its context's, or a
// request the protocol cannot carry (flint.ErrUsage).
type Session struct {
	log     *slog.Logger
	link    *link
	epoch   uint64
	running sync.WaitGroup
	greeted chan Hello    // one buffered element
	nudge   chan struct{} // one buffered element: the agent's channel opened, greet at once

	hello Hello // constant once Attach returned

	mu     sync.Mutex
	nudges int
	nextID uint32
	calls  map[uint32]chan frame // each with one buffered element
	procs  map[uint32]*remote
	old    map[uint32]bool // processes of earlier sessions that were not resumed yet
	turn   uint32          // last process that sent a data frame
}

// Attach shakes hands with the agent on conn, which it owns from then on, also when it fails. It greets until answered
// (a guest's port that is not open yet may lose what is sent to it) or ctx ends.
func Attach(ctx context.Context, conn net.Conn, o Options) (*Session, error) {
	var seed [8]byte
	_, _ = rand.Read(seed[:]) // crypto/rand.Read never fails
	s := &Session{
		log: o.Log, epoch: binary.BigEndian.Uint64(seed[:]) | 1, // 0 is the unasked hello's
		greeted: make(chan Hello, 1), nudge: make(chan struct{}, 1),
		calls: map[uint32]chan frame{}, procs: map[uint32]*remote{}, old: map[uint32]bool{},
	}
	if s.log == nil {
		s.log = slog.New(slog.DiscardHandler)
	}
	s.link = newLink(conn, o.Heartbeat, s.data)
	s.running.Go(s.link.write)
	s.running.Go(func() { s.link.read(s.handle) })
	h, err := s.greet(ctx)
	if err != nil {
		s.link.fail(errClosed)
		s.running.Wait()
		return nil, err
	}
	s.mu.Lock()
	s.hello = h
	for _, p := range h.Processes {
		s.nextID = max(s.nextID, p.ID)
		s.old[p.ID] = true
	}
	s.mu.Unlock()
	s.log.Debug("agent answered", "kernel", h.Kernel, "init", h.Init, "uptime", h.Uptime)
	return s, nil
}

func (s *Session) greet(ctx context.Context) (Hello, error) {
	greeting, err := encodeControl(&greeting{Version: Version})
	if err != nil {
		return Hello{}, err
	}
	again := time.NewTicker(greetEvery)
	defer again.Stop()
	for {
		if s.link.idle() {
			s.link.send(frame{kind: kindGreet, epoch: s.epoch, payload: greeting})
		}
		select {
		case h := <-s.greeted:
			s.link.begin(s.epoch)
			return h, checkVersion(h.Version)
		case <-s.nudge:
		case <-again.C:
		case <-ctx.Done():
			return Hello{}, fmt.Errorf("wait for the agent's hello: %w", ctx.Err())
		case <-s.link.done:
			return Hello{}, s.Err()
		}
	}
}

func checkVersion(v int) error {
	if v == Version {
		return nil
	}
	return &flint.Fault{
		Code: "guest.version",
		What: "talk to the agent",
		Fix:  "rebuild the kernel pack, so that its initramfs holds the flint-agent that belongs to this flint",
		Kind: flint.ErrGuest,
		Err:  fmt.Errorf("it speaks version %d of the protocol, this flint version %d", v, Version),
	}
}

// Hello returns what the agent said of itself when the session began.
func (s *Session) Hello() Hello { return s.hello }

// Done is closed when the session is over.
func (s *Session) Done() <-chan struct{} { return s.link.done }

// Err says why the session is over, once Done is closed; nil before.
func (s *Session) Err() error {
	err := s.link.reason()
	var p *protocolError
	f := &flint.Fault{What: "talk to the agent", Kind: flint.ErrGuest, Err: err}
	switch {
	case err == nil:
		return nil
	case errors.As(err, &f):
	case errors.Is(err, errSilent):
		f.Code, f.Fix = "guest.silent", "look at the guest's console; a guest that has far too little memory or CPU looks like this"
	case errors.As(err, &p):
		f.Code, f.Fix = "guest.protocol", "if the kernel pack is of this flint's version, treat the guest as compromised"
	default:
		f.Code, f.Fix = "guest.gone", "look at the guest's console for why its agent, its kernel or its VMM ended"
	}
	return f
}

// Close says goodbye and ends the session; the processes in the guest go on. It returns when nothing of the session
// runs any more, and never an error: a session that was over already is closed too.
func (s *Session) Close() error {
	s.link.send(frame{kind: kindBye, epoch: s.epoch})
	s.link.flush(byeWithin)
	s.link.fail(errClosed)
	s.running.Wait()
	return nil
}

// Configure makes the guest this runner's guest.
func (s *Session) Configure(ctx context.Context, c Config) (Configured, error) {
	var out Configured
	return out, s.call(ctx, "configure guest", kindConfigure, &c, &out)
}

// Stats asks what the guest uses.
func (s *Session) Stats(ctx context.Context) (Stats, error) {
	var out Stats
	return out, s.call(ctx, "ask the guest for its statistics", kindStats, &empty{}, &out)
}

// Reboot makes the guest write its disks and reboot. It returns when the agent acknowledged.
func (s *Session) Reboot(ctx context.Context) error {
	return s.call(ctx, "reboot guest", kindReboot, &empty{}, &empty{})
}

// call sends a request and waits for its answer. The errors it returns name what was asked.
func (s *Session) call(ctx context.Context, what string, k kind, in, out bounded) error {
	payload, err := encodeControl(in)
	if err != nil {
		return &flint.Fault{Code: "guest.request", What: what, Fix: "shorten or correct the named field", Kind: flint.ErrUsage, Err: err}
	}
	answer := make(chan frame, 1)
	s.mu.Lock()
	s.nextID++
	id := s.nextID
	s.calls[id] = answer
	s.mu.Unlock()
	defer func() {
		s.mu.Lock()
		delete(s.calls, id)
		s.mu.Unlock()
	}()
	s.link.send(frame{kind: k, epoch: s.epoch, stream: id, payload: payload})
	select {
	case f := <-answer:
		return s.settle(what, f, out)
	case <-ctx.Done():
		return fmt.Errorf("%s: %w", what, ctx.Err())
	case <-s.link.done:
	}
	select {
	case f := <-answer: // the last thing the agent said, as after a reboot
		return s.settle(what, f, out)
	default:
		return fmt.Errorf("%s: %w", what, s.Err())
	}
}

func (s *Session) settle(what string, f frame, out bounded) error {
	refused := f.kind == kindRefused
	var r refusal
	if refused {
		out = &r
	}
	if err := decodeControl(f.payload, out); err != nil {
		s.link.fail(&protocolError{err})
		return fmt.Errorf("%s: %w", what, s.Err())
	}
	if !refused {
		return nil
	}
	return &flint.Fault{
		Code: "guest.refused", What: what, Fix: "mend what the guest says it lacks, in the image or the pool's shape",
		Kind: flint.ErrGuest, Err: errors.New(r.Error),
	}
}

// handle takes a frame from the agent. It must not block.
func (s *Session) handle(f frame) error {
	if f.epoch == 0 && f.kind == kindHello {
		s.nudged()
		return nil
	}
	if f.epoch != s.epoch {
		return nil // left over from an earlier session
	}
	if f.version != Version {
		return checkVersion(int(f.version))
	}
	s.link.heard()
	var err error
	switch f.kind {
	case kindPing:
		s.link.send(frame{kind: kindPong, epoch: f.epoch, stream: f.stream})
	case kindPong:
	case kindHello:
		err = s.handleHello(f)
	case kindResult, kindRefused:
		s.mu.Lock()
		answer := s.calls[f.stream]
		delete(s.calls, f.stream)
		s.mu.Unlock()
		if answer != nil {
			f.payload = append([]byte(nil), f.payload...)
			answer <- f
		}
	case kindBye:
		var r refusal
		if err = decodeControl(f.payload, &r); err == nil {
			return fmt.Errorf("agent ended the session: %s", r.Error)
		}
	case kindStdout, kindStderr, kindAck, kindExit:
		s.mu.Lock()
		p := s.procs[f.stream]
		s.mu.Unlock()
		if p != nil {
			err = p.handle(f)
		}
	default:
		err = fmt.Errorf("frame of kind %d", f.kind)
	}
	if err != nil {
		return &protocolError{err}
	}
	return nil
}

func (s *Session) nudged() {
	s.mu.Lock()
	s.nudges++
	few := s.nudges <= maxNudges
	s.mu.Unlock()
	if few {
		select {
		case s.nudge <- struct{}{}:
		default:
		}
	}
}

// handleHello takes the answer to a greeting. Greetings that crossed bring more than one; the first counts.
func (s *Session) handleHello(f frame) error {
	var h Hello
	if err := decodeControl(f.payload, &h); err != nil {
		return err
	}
	select {
	case s.greeted <- h:
	default:
	}
	return nil
}

// data returns the next data or acknowledgement frame, taking the processes in turns.
func (s *Session) data(buf []byte) (frame, bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, id := range inTurn(s.procs, s.turn) {
		p := s.procs[id]
		if payload, k, ok := p.next(buf); ok {
			s.turn = id
			return frame{kind: k, epoch: s.epoch, stream: id, payload: payload}, true
		}
	}
	return frame{}, false
}
