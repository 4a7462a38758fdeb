package guest

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"path"
	"sync"
	"sync/atomic"
	"time"
)

const (
	// outputGrace is how long an output may give nothing after its process ended before it is closed.
	outputGrace = time.Second
	// outputLimit is how long after its process ended an output may go on. Then what is left of the process group is
	// killed; what others still write is cut off within another outputGrace.
	outputLimit = 4 * time.Second
	// pipeSize is the most bytes a pipe holds that an ordinary process made as large as it may: the kernel's default of
	// fs.pipe-max-size (pipe(7)). Whatever a process wrote before it ended is within so many bytes of where it is read.
	pipeSize = 1 << 20
)

// process is the agent's view of one process. Its attached, ended, exit and exitSent belong to Agent.mu.
type process struct {
	name string
	in   *receiver
	out  *sender
	err  *sender

	attached bool // a session takes its output
	ended    bool
	exit     []byte // encoded
	exitSent bool

	mu      sync.Mutex
	running Process // nil before it was started and after its output ended
}

// admit makes room for a process the host starts; what runs it follows when its turn comes. Its input may come at once.
func (a *Agent) admit(l *link, f frame, calls chan<- call) error {
	a.mu.Lock()
	if a.procs[f.stream] != nil {
		a.mu.Unlock()
		return fmt.Errorf("process %d is started twice", f.stream)
	}
	room := len(a.procs) < maxProcesses
	if room {
		a.procs[f.stream] = &process{
			attached: true, in: newReceiver(kindStdin, 0, a.poke),
			out: newSender(kindStdout, a.poke), err: newSender(kindStderr, a.poke),
		}
	}
	a.mu.Unlock()
	if !room {
		return fmt.Errorf("more than %d processes", maxProcesses)
	}
	return enqueue(l, f, calls)
}

// start runs what the host asked for as p.
func (a *Agent) start(f frame, p *process) {
	if p == nil {
		return // forgotten before its turn came
	}
	var c Command
	err := decodeControl(f.payload, &c)
	var running Process
	if err == nil {
		if c.Name == "" {
			c.Name = path.Base(c.Args[0])
		}
		running, err = a.sys.Start(c)
	}
	p.mu.Lock()
	p.name, p.running = clip(c.Name, maxName), running
	p.mu.Unlock()
	if err != nil {
		a.finish(p, failedStart(err))
		return
	}
	a.tasks.Go(func() { a.run(p, running) })
}

func failedStart(err error) Exit {
	var e *ExitError
	if errors.As(err, &e) {
		return e.Exit
	}
	return Exit{Code: 126, Err: err.Error()}
}

// run stays with a process until it ended and its output is read.
func (a *Agent) run(p *process, running Process) {
	stdin, stdout, stderr := running.Stdio()
	var outputs, input sync.WaitGroup
	sources := []*source{newSource(stdout, p.out)}
	if stderr != nil {
		sources = append(sources, newSource(stderr, p.err))
	}
	for _, s := range sources {
		outputs.Go(s.copy)
	}
	input.Go(func() { p.feed(stdin) })

	exit, err := running.Wait()
	if err != nil {
		exit.Err = err.Error()
	}
	p.in.drop()
	drained := make(chan struct{})
	outputs.Go(func() { p.settle(sources, drained) })
	for _, s := range sources {
		<-s.ended
	}
	close(drained)
	outputs.Wait()
	p.mu.Lock()
	p.running = nil // who is left of its group no longer matters to anybody
	p.mu.Unlock()
	_ = stdin.Close() // frees feed from a process that does not read
	input.Wait()
	a.finish(p, exit)
}

// finish ends p's streams and leaves its exit to be sent.
func (a *Agent) finish(p *process, exit Exit) {
	exit.Err, exit.Signal = clip(exit.Err, maxText), clip(exit.Signal, maxName)
	payload, err := encodeControl(&exit)
	if err != nil {
		payload, _ = json.Marshal(Exit{Code: 126, Err: "the process's exit is out of range"})
	}
	p.in.drop()
	p.out.end()
	p.err.end()
	a.mu.Lock()
	p.ended, p.exit = true, payload
	a.mu.Unlock()
	a.poke()
}

// forget drops a process whose host has, or wants, no more of it. One that still runs goes on until it ends by itself,
// unheard.
func (a *Agent) forget(id uint32, p *process) {
	if p == nil {
		return
	}
	a.mu.Lock()
	delete(a.procs, id)
	a.mu.Unlock()
	p.abandon()
}

func (p *process) abandon() {
	p.in.drop()
	p.out.drop()
	p.err.drop()
}

func (p *process) kill() {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.running != nil {
		_ = p.running.Signal("SIGKILL") // one that just ended needs none
	}
}

// resume lets a session take over p, from what no session acknowledged on.
func (a *Agent) resume(l *link, id uint32, p *process) error {
	if p == nil {
		return fmt.Errorf("process %d is resumed, but there is none", id)
	}
	p.out.rewind()
	p.err.rewind()
	p.in.reannounce()
	a.mu.Lock()
	p.attached, p.exitSent = true, false
	a.mu.Unlock()
	l.poke()
	return nil
}

// view returns what another session must know to resume p.
func (p *process) view(id uint32) Running {
	p.mu.Lock()
	defer p.mu.Unlock()
	return Running{
		ID: id, Name: p.name, Stdin: p.in.position(), Closed: p.in.atEnd(), Stdout: p.out.position(), Stderr: p.err.position(),
	}
}

// next returns the next frame to send for the process. Agent.mu is held.
func (p *process) next(buf []byte) ([]byte, kind, bool) {
	if payload, ok := p.in.due(buf); ok {
		return payload, kindAck, true
	}
	for _, s := range []*sender{p.out, p.err} {
		if payload, ok := s.take(buf); ok {
			return payload, s.kind, true
		}
	}
	if p.ended && !p.exitSent && p.out.drained() && p.err.drained() {
		p.exitSent = true
		return p.exit, kindExit, true
	}
	return nil, 0, false
}

func (p *process) ack(payload []byte) error {
	pos, rest, err := position(payload)
	if err != nil || len(rest) != 1 {
		return errors.New("malformed acknowledgement")
	}
	if p == nil {
		return nil // forgotten
	}
	switch kind(rest[0]) {
	case kindStdout:
		return p.out.ack(pos)
	case kindStderr:
		return p.err.ack(pos)
	}
	return errors.New("acknowledgement of something the agent does not send")
}

// control does what the host asks of a process that runs.
func (p *process) control(f frame) error {
	var sig signal
	var size Size
	var err error
	if f.kind == kindSignal {
		err = decodeControl(f.payload, &sig)
	} else {
		err = decodeControl(f.payload, &size)
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	switch {
	case err != nil:
		return err
	case p.running == nil:
		return nil
	case f.kind == kindSignal:
		return p.running.Signal(sig.Signal)
	}
	return p.running.Resize(size)
}

// feed writes the process's input. It closes stdin at its end, or when the process reads no more.
func (p *process) feed(stdin io.WriteCloser) {
	buf := make([]byte, chunk)
	for {
		n, done := p.in.take(buf)
		if n > 0 {
			if _, err := stdin.Write(buf[:n]); err != nil {
				p.in.drop()
			}
			p.in.consume(n)
			continue
		}
		if done {
			_ = stdin.Close() // what it says does not matter to a process that needs no more input
			return
		}
		<-p.in.more
	}
}

// source copies one output of a process to its stream.
type source struct {
	from  io.Reader
	to    *sender
	ended chan struct{}
	reads atomic.Int64 // odd while in Read
	late  atomic.Bool  // only what the process itself may have written is still read
}

func newSource(from io.Reader, to *sender) *source {
	return &source{from: from, to: to, ended: make(chan struct{})}
}

func (s *source) copy() {
	buf := make([]byte, chunk)
	for left := pipeSize; ; {
		s.reads.Add(1)
		n, err := s.from.Read(buf)
		s.reads.Add(1)
		if n > 0 {
			_, _ = s.to.Write(buf[:n]) // a dropped stream takes nothing, but the process must not block
		}
		if s.late.Load() {
			left -= n
		}
		// A read that does not fill the buffer has emptied the pipe.
		if err != nil || left <= 0 || left < pipeSize && n < len(buf) {
			s.to.end()
			s.close()
			close(s.ended)
			return
		}
	}
}

func (s *source) close() {
	if c, ok := s.from.(io.Closer); ok {
		_ = c.Close() // it was only read from
	}
}

// settle ends the outputs of a process that ended: those that still give nothing a while later, for something in the
// background holds them open, and in the end those that something in the background goes on to write to. An output that
// waits for the host to take it stays: nothing the process wrote itself is lost.
func (p *process) settle(sources []*source, drained <-chan struct{}) {
	was := make([]int64, len(sources))
	t := time.NewTicker(outputGrace)
	defer t.Stop()
	for since := outputGrace; ; since += outputGrace {
		select {
		case <-drained:
			return
		case <-t.C:
		}
		for i, s := range sources {
			now := s.reads.Load()
			if now%2 == 1 && (now == was[i] || s.late.Load()) {
				s.close()
			}
			was[i] = now
		}
		if since == outputLimit {
			p.kill()
			for _, s := range sources {
				s.late.Store(true)
			}
		}
	}
}
