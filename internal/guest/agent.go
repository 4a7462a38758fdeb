package guest

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"maps"
	"slices"
	"sync"
	"time"
)

// System is what an Agent acts on: the guest's machine, or a script in tests. Its methods may be called from several
// goroutines, but Configure, Start and Reboot of one Agent never overlap.
type System interface {
	// Configure's error refuses the configuration; what leaves a usable guest is a fault in Configured.
	Configure(ctx context.Context, c Config) (Configured, error)
	// Start's error is told to the host as an Exit: as it is if it is an *ExitError, with code 126 otherwise.
	Start(c Command) (Process, error)
	Stats() (Stats, error)
	// Reboot is called after its request was acknowledged to the host. It may return, or not.
	Reboot() error
}

// Process is a running process of a System.
type Process interface {
	// Stdio returns the process's ends; stderr is nil with a TTY. The agent reads the outputs to their end and closes
	// all three, the readers where they are io.Closers. A reader that still gives nothing a second after the process
	// ended is closed first: something in the background may hold its other end. If something goes on to write, the
	// process group is sent SIGKILL, and the reader is closed within 5 s of the process's end.
	Stdio() (stdin io.WriteCloser, stdout, stderr io.Reader)
	// Signal sends a signal, named "SIGTERM" and so on, to the process group, also to what is left of it after Wait.
	// That there is nobody to get it is no error.
	Signal(sig string) error
	Resize(size Size) error
	// Wait blocks until the process ended. It is called once.
	Wait() (Exit, error)
}

// ExitError is a Start that failed as a shell would report it: Code 127 not found, 126 not executable.
type ExitError struct{ Exit Exit }

// Error returns why.
func (e *ExitError) Error() string { return e.Exit.Err }

// agentSilence is how long a host may be silent before its connection is given up.
const agentSilence = defaultHeartbeat

// hangUpWithin is how long a host that broke the protocol has to hear so.
const hangUpWithin = 250 * time.Millisecond

// maxCalls bounds the requests that wait for their turn.
const maxCalls = 256

// Agent is the guest's half of the protocol. It outlives its connections, and so do its processes.
type Agent struct {
	sys   System
	log   *slog.Logger
	hello Hello
	born  time.Time
	tasks sync.WaitGroup // of the processes

	serving sync.Mutex // held by Serve
	mu      sync.Mutex
	link    *link  // of the Serve that runs; nil between
	epoch   uint64 // of the session; 0 before a greeting
	procs   map[uint32]*process
	turn    uint32
	closed  bool
}

// call is a request that waits for its turn, so that requests are done in the order they were made.
type call struct {
	frame frame
	link  *link
}

// NewAgent returns an agent that acts on sys and presents itself with hello, whose Uptime is as of this call and whose
// Version and Processes the agent sets itself.
func NewAgent(sys System, hello Hello, log *slog.Logger) *Agent {
	if log == nil {
		log = slog.New(slog.DiscardHandler)
	}
	hello.Version = Version
	hello.Steps, hello.Faults = clipReport(hello.Steps, hello.Faults)
	for _, s := range []*string{&hello.Agent, &hello.Boot, &hello.Kernel, &hello.Arch, &hello.Init} {
		*s = clip(*s, maxName)
	}
	return &Agent{sys: sys, log: log, hello: hello, born: time.Now(), procs: map[uint32]*process{}}
}

// Serve talks to one host on conn, which it owns, until conn or ctx ends, the host falls silent, or says goodbye (nil).
// Processes go on; their output waits, at most a window of it, for a session that resumes them. A second Serve waits
// for the first to return.
func (a *Agent) Serve(ctx context.Context, conn io.ReadWriteCloser) error {
	a.serving.Lock()
	defer a.serving.Unlock()
	l := newLink(conn, agentSilence, a.data)
	a.mu.Lock()
	if a.closed {
		a.mu.Unlock()
		return errors.Join(errClosed, conn.Close())
	}
	a.link = l
	a.mu.Unlock()

	stop := context.AfterFunc(ctx, func() { l.fail(ctx.Err()) })
	defer stop()
	working, cancel := context.WithCancel(ctx)
	defer cancel()
	calls := make(chan call, maxCalls)
	var tasks sync.WaitGroup
	tasks.Go(l.write)
	tasks.Go(func() { a.work(working, l, calls) })
	a.sendHello(l, 0)
	l.read(func(f frame) error {
		err := a.handle(l, f, calls)
		if err != nil && !errors.Is(err, errBye) {
			a.hangUp(l, err)
		}
		return err
	})
	cancel()
	a.detach(l, 0)
	tasks.Wait()
	for len(calls) > 0 {
		a.do(working, <-calls) // of no session any more, so it only lets go of what was admitted
	}
	if err := l.reason(); !errors.Is(err, errBye) {
		return err
	}
	return nil
}

// Close kills every process and returns when nothing of the agent runs any more.
func (a *Agent) Close() error {
	a.mu.Lock()
	a.closed = true
	l := a.link
	a.mu.Unlock()
	if l != nil {
		l.fail(errClosed)
	}
	a.serving.Lock() // no Start is under way any more
	defer a.serving.Unlock()
	a.mu.Lock()
	procs := slices.Collect(maps.Values(a.procs))
	a.mu.Unlock()
	for _, p := range procs {
		p.abandon()
		p.kill()
	}
	a.tasks.Wait()
	return nil
}

// hangUp tells the host why its session is over. A virtio-serial port has no other way.
func (a *Agent) hangUp(l *link, why error) {
	payload, err := encodeControl(&refusal{clip(why.Error(), maxText)})
	if err != nil {
		return // clipped, so it fits
	}
	l.send(frame{kind: kindBye, epoch: a.current(), payload: payload})
	l.flush(hangUpWithin)
}

// poke wakes the writer of the connection, if there is one.
func (a *Agent) poke() {
	a.mu.Lock()
	l := a.link
	a.mu.Unlock()
	if l != nil {
		l.poke()
	}
}

// detach leaves every process to itself until a session resumes it, and begins a new epoch.
func (a *Agent) detach(l *link, epoch uint64) {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.epoch = epoch
	for _, p := range a.procs {
		p.attached = false
	}
	if epoch == 0 {
		a.link = nil
		return
	}
	l.begin(epoch)
}

func (a *Agent) sendHello(l *link, epoch uint64) {
	h := a.hello
	h.Uptime += time.Since(a.born)
	if epoch != 0 {
		a.mu.Lock()
		for id, p := range a.procs {
			h.Processes = append(h.Processes, p.view(id))
		}
		a.mu.Unlock()
	}
	payload, err := encodeControl(&h)
	if err != nil {
		a.log.Error("say hello", "error", err) // its parts were clipped, so only all together are too much
		h.Steps, h.Faults = nil, []string{"the report of the boot is too long to send"}
		payload, _ = encodeControl(&h)
	}
	l.send(frame{kind: kindHello, epoch: epoch, payload: payload})
}

// handle takes a frame from the host. It must not block.
func (a *Agent) handle(l *link, f frame, calls chan<- call) error {
	if f.kind == kindGreet {
		return a.greeted(l, f)
	}
	a.mu.Lock()
	epoch, p := a.epoch, a.procs[f.stream]
	a.mu.Unlock()
	if f.epoch != epoch || epoch == 0 || f.version != Version {
		return nil // left over from an earlier session, or from a host that will refuse our hello
	}
	l.heard()
	var err error
	switch f.kind {
	case kindPing:
		l.send(frame{kind: kindPong, epoch: epoch, stream: f.stream})
	case kindPong:
	case kindBye:
		return errBye
	case kindStdin:
		if p != nil {
			err = p.in.push(f.payload)
		}
	case kindAck:
		err = p.ack(f.payload)
	case kindResume:
		err = a.resume(l, f.stream, p)
	case kindStart:
		err = a.admit(l, f, calls)
	case kindConfigure, kindStats, kindReboot, kindSignal, kindResize, kindForget:
		err = enqueue(l, f, calls)
	default:
		err = fmt.Errorf("frame of kind %d", f.kind)
	}
	if err != nil {
		return &protocolError{err}
	}
	return nil
}

// greeted begins a session. A greeting that is repeated before the hello reached the host is answered again.
func (a *Agent) greeted(l *link, f frame) error {
	var g greeting
	if f.version != Version {
		l.send(frame{kind: kindHello, epoch: f.epoch, payload: []byte("{}")}) // its frame says our version
		return nil
	}
	if err := decodeControl(f.payload, &g); err != nil || f.epoch == 0 {
		return &protocolError{errors.Join(errors.New("malformed greeting"), err)}
	}
	a.mu.Lock()
	again := a.epoch == f.epoch
	a.mu.Unlock()
	if !again {
		a.detach(l, f.epoch)
		a.log.Debug("host attached")
	}
	l.heard()
	a.sendHello(l, f.epoch)
	return nil
}

func enqueue(l *link, f frame, calls chan<- call) error {
	f.payload = append([]byte(nil), f.payload...)
	select {
	case calls <- call{f, l}:
		return nil
	default:
		return fmt.Errorf("more than %d requests at once", maxCalls)
	}
}

// work does the requests of one connection, one after the other.
func (a *Agent) work(ctx context.Context, l *link, calls <-chan call) {
	for {
		select {
		case c := <-calls:
			a.do(ctx, c)
		case <-l.done:
			return
		}
	}
}

func (a *Agent) do(ctx context.Context, c call) {
	a.mu.Lock()
	p := a.procs[c.frame.stream]
	stale := a.epoch != c.frame.epoch
	a.mu.Unlock()
	if stale {
		if c.frame.kind == kindStart {
			a.forget(c.frame.stream, p)
		}
		return
	}
	switch f := c.frame; f.kind {
	case kindConfigure:
		var in Config
		a.answer(c, &in, func() (bounded, error) {
			out, err := a.sys.Configure(ctx, in)
			out.Steps, out.Faults = clipReport(out.Steps, out.Faults)
			return &out, err
		})
	case kindStats:
		a.answer(c, &empty{}, func() (bounded, error) {
			out, err := a.sys.Stats()
			return &out, err
		})
	case kindReboot:
		a.answer(c, &empty{}, func() (bounded, error) { return &empty{}, nil })
		c.link.flush(time.Second)
		if err := a.sys.Reboot(); err != nil {
			a.log.Error("reboot", "error", err)
		}
	case kindStart:
		a.start(f, p)
	case kindForget:
		a.forget(f.stream, p)
	default:
		if p == nil {
			return // it ended meanwhile
		}
		if err := p.control(f); err != nil {
			a.log.Warn("control process", "process", f.stream, "error", err)
		}
	}
}

// answer decodes a request, does it, and sends what came of it.
func (a *Agent) answer(c call, in bounded, do func() (bounded, error)) {
	var payload []byte
	err := decodeControl(c.frame.payload, in)
	if err == nil {
		var out bounded
		if out, err = do(); err == nil {
			payload, err = encodeControl(out)
		}
	}
	k := kindResult
	if err != nil {
		k = kindRefused
		payload, _ = encodeControl(&refusal{clip(err.Error(), maxText)}) // clipped, so it fits
	}
	c.link.send(frame{kind: k, epoch: c.frame.epoch, stream: c.frame.stream, payload: payload})
}

// data returns the next data, acknowledgement or exit frame, taking the processes in turns.
func (a *Agent) data(buf []byte) (frame, bool) {
	a.mu.Lock()
	defer a.mu.Unlock()
	for _, id := range inTurn(a.procs, a.turn) {
		p := a.procs[id]
		if !p.attached {
			continue
		}
		if payload, k, ok := p.next(buf); ok {
			a.turn = id
			return frame{kind: k, epoch: a.epoch, stream: id, payload: payload}, true
		}
	}
	return frame{}, false
}

func (a *Agent) current() uint64 {
	a.mu.Lock()
	defer a.mu.Unlock()
	return a.epoch
}
