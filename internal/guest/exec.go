package guest

import (
	"context"
	"errors"
	"fmt"
	"io"
	"maps"
	"slices"
	"sync"
	"time"

	"flint"
)

const (
	killAfter  = 10 * time.Second // from TERM to KILL
	giveUpWait = 8 * time.Second  // from KILL to leaving the process to its fate; its output may take outputLimit of that
)

// IO connects a Command to the host. The fields may be used for as long as Exec runs; one Read of Stdin may outlive it.
type IO struct {
	Stdin          io.Reader // nil: closed at once
	Stdout, Stderr io.Writer // nil: discarded; both written to by one goroutine, in the order things came
	Resize         <-chan Size
	// Ended is told how the process ended, before the agent is told to forget it: what it notes is not lost with this
	// process. It is not called beside an error. nil: nobody wants to know.
	Ended func(Exit)
}

// remote is the host's view of one process.
type remote struct {
	id    uint32
	stdin *sender
	out   *receiver
	err   *receiver
	ended chan Exit // one buffered element
}

func newRemote(wake func(), r Running) *remote {
	p := &remote{
		id: r.ID, stdin: newSender(kindStdin, wake),
		out: newReceiver(kindStdout, r.Stdout, wake), err: newReceiver(kindStderr, r.Stderr, wake),
		ended: make(chan Exit, 1),
	}
	p.stdin.base, p.stdin.sent = r.Stdin, r.Stdin
	return p
}

// handle takes a frame of the process from the agent.
func (p *remote) handle(f frame) error {
	switch f.kind {
	case kindStdout:
		return p.out.push(f.payload)
	case kindStderr:
		return p.err.push(f.payload)
	case kindAck:
		pos, rest, err := position(f.payload)
		if err != nil || len(rest) != 1 || kind(rest[0]) != kindStdin {
			return errors.New("malformed acknowledgement")
		}
		return p.stdin.ack(pos)
	}
	if !p.out.atEnd() || !p.err.atEnd() {
		return errors.New("process ended before its output did")
	}
	var e Exit
	if err := decodeControl(f.payload, &e); err != nil {
		return err
	}
	select {
	case p.ended <- e:
	default:
		return errors.New("process ended twice")
	}
	return nil
}

// next returns the next frame to send for the process.
func (p *remote) next(buf []byte) ([]byte, kind, bool) {
	for _, r := range []*receiver{p.out, p.err} {
		if payload, ok := r.due(buf); ok {
			return payload, kindAck, true
		}
	}
	payload, ok := p.stdin.take(buf)
	return payload, kindStdin, ok
}

// inTurn returns the keys of m in order, beginning with the one after last.
func inTurn[V any](m map[uint32]V, last uint32) []uint32 {
	ids := slices.Sorted(maps.Keys(m))
	i, found := slices.BinarySearch(ids, last)
	if found {
		i++
	}
	return append(ids[i:], ids[:i]...)
}

// Exec runs c and blocks until it ended and all its output is written. Cancelling ctx ends the process group (TERM,
// then KILL after 10 s), and returns ctx's error beside the Exit, which is zero if it is not known within 18 s; what the
// process still says until then is delivered. A Writer that fails does not end the
// process; the error is returned when the process ended, beside its Exit. A session that ends returns its Err; the
// process then goes on, and another session may Resume it.
func (s *Session) Exec(ctx context.Context, c Command, io IO) (Exit, error) {
	payload, err := encodeControl(&c)
	if err != nil {
		return Exit{}, &flint.Fault{
			Code: "guest.request", What: "run a command in the guest", Fix: "shorten or correct the named field",
			Kind: flint.ErrUsage, Err: err,
		}
	}
	s.mu.Lock()
	s.nextID++
	p := newRemote(s.link.poke, Running{ID: s.nextID})
	s.procs[p.id] = p
	s.mu.Unlock()
	return s.follow(ctx, p, frame{kind: kindStart, payload: payload}, io)
}

// Resume takes over a process that an earlier session started (Hello.Processes) as Exec would have gone on with it. Its
// output begins at the positions in r; io.Stdin goes on where the earlier one stopped, and is not read if that was
// closed.
func (s *Session) Resume(ctx context.Context, r Running, io IO) (Exit, error) {
	p := newRemote(s.link.poke, r)
	p.stdin.acked = r.Stdin - window // until the agent says how much of it was consumed
	if r.Closed {
		p.stdin.drop()
		io.Stdin = nil
	}
	s.mu.Lock()
	there := s.old[r.ID]
	delete(s.old, r.ID)
	if there {
		s.procs[r.ID] = p
	}
	s.mu.Unlock()
	if !there {
		return Exit{}, fmt.Errorf("resume process %d: %w, or was resumed before", r.ID, flint.ErrNotFound)
	}
	return s.follow(ctx, p, frame{kind: kindResume}, io)
}

// follow starts p with the frame first and stays with it to its end.
func (s *Session) follow(ctx context.Context, p *remote, first frame, io IO) (Exit, error) {
	first.epoch, first.stream = s.epoch, p.id
	s.link.send(first)
	pump(p.stdin, io.Stdin)
	delivered := make(chan error, 1)
	var copied sync.WaitGroup
	copied.Go(func() { delivered <- p.deliver(io, s.link.done) })
	exit, err := s.await(ctx, p, delivered, io.Resize)
	p.drop()
	copied.Wait()
	if io.Ended != nil && err == nil {
		io.Ended(exit)
	}

	s.mu.Lock()
	delete(s.procs, p.id)
	s.mu.Unlock()
	s.link.send(frame{kind: kindForget, epoch: s.epoch, stream: p.id})
	return exit, err
}

// pump feeds the process's input, until its reader or the process ends. It is not waited for: nothing can end another's
// Read.
func pump(to *sender, from io.Reader) {
	if from == nil {
		to.end()
		return
	}
	go func() {
		_, _ = io.Copy(to, from) // a reader that fails ends the input
		to.end()
	}()
}

// await returns when the process ended and its output is delivered, or the session is over.
func (s *Session) await(ctx context.Context, p *remote, delivered <-chan error, resize <-chan Size) (Exit, error) {
	var exit Exit
	var outputErr error
	var patience <-chan time.Time
	ended, cancelled, over, stage := p.ended, ctx.Done(), s.link.done, 0
	for ended != nil || delivered != nil {
		select {
		case exit = <-ended:
			ended = nil
		case outputErr = <-delivered:
			delivered = nil
		case <-over:
			over = nil
			select {
			case exit = <-ended:
				ended = nil
			default:
				if ended != nil {
					return exit, s.Err()
				}
			}
		case size, ok := <-resize:
			if !ok {
				resize = nil
				continue
			}
			s.control(p, kindResize, &size)
		case <-cancelled:
			if cancelled = nil; ended == nil {
				return exit, ctx.Err()
			}
			s.control(p, kindSignal, &signal{"SIGTERM"})
			patience = time.After(killAfter)
		case <-patience:
			if stage++; stage > 1 || ended == nil {
				return exit, ctx.Err()
			}
			s.control(p, kindSignal, &signal{"SIGKILL"})
			patience = time.After(giveUpWait)
		}
	}
	return exit, errors.Join(outputErr, ctx.Err())
}

// drop lets go of all that waits for the process.
func (p *remote) drop() {
	p.stdin.drop()
	p.out.drop()
	p.err.drop()
}

func (s *Session) control(p *remote, k kind, v bounded) {
	payload, err := encodeControl(v)
	if err != nil {
		s.log.Error("encode control frame", "error", err)
		return
	}
	s.link.send(frame{kind: k, epoch: s.epoch, stream: p.id, payload: payload})
}

// deliver writes the process's output until both of its ends were reached, they were dropped, or the session is over.
// A writer that fails gets no more.
func (p *remote) deliver(to IO, over <-chan struct{}) error {
	buf := make([]byte, chunk)
	var failed error
	outs := []struct {
		from *receiver
		to   io.Writer
	}{{p.out, to.Stdout}, {p.err, to.Stderr}}
	for {
		open, moved := false, false
		for i := range outs {
			o := &outs[i]
			n, done := o.from.take(buf)
			open = open || !done
			if n == 0 {
				continue
			}
			moved = true
			if o.to != nil {
				if _, err := o.to.Write(buf[:n]); err != nil {
					failed = errors.Join(failed, fmt.Errorf("write output: %w", err))
					o.to = nil
				}
			}
			o.from.consume(n)
		}
		switch {
		case !open:
			return failed
		case moved:
			continue
		}
		select {
		case <-p.out.more:
		case <-p.err.more:
		case <-over:
			return failed
		}
	}
}
