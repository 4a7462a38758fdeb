package guest

import (
	"errors"
	"fmt"
	"io"
	"sync"
	"time"
)

const (
	defaultHeartbeat = 15 * time.Second
	// maxQueued bounds the control frames that wait for a peer that does not read. Only a peer that asks and never
	// reads the answers gets there.
	maxQueued = 512
)

var (
	errSilent = errors.New("no sign of life")
	errClosed = errors.New("session was closed")
	errBye    = errors.New("the other half said goodbye")
)

// protocolError is a peer that does not keep to the protocol.
type protocolError struct{ err error }

func (e *protocolError) Error() string { return "protocol violation: " + e.err.Error() }
func (e *protocolError) Unwrap() error { return e.err }

// link is one half's connection: it writes control frames before data frames, beats, and notices silence. Readers never
// write, so that two halves that both have much to say cannot lock each other up.
type link struct {
	conn io.ReadWriteCloser
	// data returns the next data or acknowledgement frame, its payload in buf, when no control frame waits.
	data func(buf []byte) (frame, bool)
	wake chan struct{} // one buffered element: there may be something to write
	done chan struct{} // closed when the link is over

	mu      sync.Mutex
	queue   []frame
	writing bool
	flushed chan struct{} // closed when nothing is queued any more; nil when nobody waits
	epoch   uint64        // of the pings
	pings   uint32
	misses  int // beats since the peer was last heard of
	err     error
	beat    *time.Timer
	every   time.Duration
}

// beatsPerExpiry is how many beats of silence end a session.
const beatsPerExpiry = 3

func newLink(conn io.ReadWriteCloser, silence time.Duration, data func([]byte) (frame, bool)) *link {
	if silence <= 0 {
		silence = defaultHeartbeat
	}
	return &link{
		conn: conn, data: data, every: silence / beatsPerExpiry,
		wake: make(chan struct{}, 1), done: make(chan struct{}),
	}
}

func (l *link) poke() {
	select {
	case l.wake <- struct{}{}:
	default:
	}
}

// send queues a control frame. Its payload must not change any more.
func (l *link) send(f frame) {
	f.version = Version
	l.mu.Lock()
	full := len(l.queue) >= maxQueued
	if !full && l.err == nil {
		l.queue = append(l.queue, f)
	}
	l.mu.Unlock()
	if full {
		l.fail(fmt.Errorf("%d control frames wait for a peer that does not read", maxQueued))
		return
	}
	l.poke()
}

// idle reports whether every control frame was handed to the connection.
func (l *link) idle() bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	return len(l.queue) == 0 && !l.writing
}

// flush waits until every control frame was handed to the connection, the link is over, or the time is up.
func (l *link) flush(limit time.Duration) {
	l.mu.Lock()
	if len(l.queue) == 0 && !l.writing {
		l.mu.Unlock()
		return
	}
	if l.flushed == nil {
		l.flushed = make(chan struct{})
	}
	flushed := l.flushed
	l.mu.Unlock()
	timer := time.NewTimer(limit)
	defer timer.Stop()
	select {
	case <-flushed:
	case <-l.done:
	case <-timer.C:
	}
}

// fail ends the link; the first reason stays.
func (l *link) fail(err error) {
	l.mu.Lock()
	first := l.err == nil
	if first {
		l.err = err
		l.queue = nil
		if l.beat != nil {
			l.beat.Stop()
		}
	}
	l.mu.Unlock()
	if first {
		close(l.done)
		_ = l.conn.Close() // unblocks whoever reads or writes; what it says does not matter any more
	}
}

func (l *link) reason() error {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.err
}

// begin starts an epoch: what was queued for another is dropped, and from now on silence is noticed.
func (l *link) begin(epoch uint64) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.err != nil {
		return
	}
	l.epoch, l.queue, l.misses = epoch, nil, 0
	if l.beat == nil {
		l.beat = time.AfterFunc(l.every, l.tick)
	}
}

// heard records a sign of life.
func (l *link) heard() {
	l.mu.Lock()
	l.misses = 0
	l.mu.Unlock()
}

// tick counts beats rather than time, so that a process that was stopped for long does not blame its peer.
func (l *link) tick() {
	l.mu.Lock()
	if l.err != nil {
		l.mu.Unlock()
		return
	}
	l.misses++
	dead := l.misses > beatsPerExpiry
	l.pings++
	ping := frame{kind: kindPing, epoch: l.epoch, stream: l.pings}
	if !dead {
		l.beat.Reset(l.every)
	}
	l.mu.Unlock()
	if dead {
		l.fail(fmt.Errorf("%w for %v", errSilent, beatsPerExpiry*l.every))
		return
	}
	l.send(ping)
}

// control returns the next control frame to write.
func (l *link) control() (frame, bool) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if len(l.queue) > 0 {
		f := l.queue[0]
		l.queue[0] = frame{}
		l.queue = l.queue[1:]
		l.writing = true
		return f, true
	}
	l.queue, l.writing = nil, false
	if l.flushed != nil {
		close(l.flushed)
		l.flushed = nil
	}
	return frame{}, false
}

// write runs until the link is over.
func (l *link) write() {
	var wire, scratch []byte
	buf := make([]byte, 0, 8+chunk)
	var data frame
	var have bool
	for {
		f, ok := l.control()
		switch {
		case ok:
		case have:
			f, have = data, false
			f.version = Version
		default:
			if data, have = l.data(buf); have {
				continue // what was queued meanwhile goes first: the start of the process whose input this may be
			}
			select {
			case <-l.wake:
				continue
			case <-l.done:
				return
			}
		}
		wire = appendFrame(wire[:0], f, &scratch)
		if _, err := l.conn.Write(wire); err != nil {
			l.fail(fmt.Errorf("write to peer: %w", err))
			return
		}
	}
}

// read hands every frame to handle until the link is over or handle returns an error.
func (l *link) read(handle func(frame) error) {
	d := newDecoder(l.conn)
	for {
		f, err := d.next()
		if err != nil {
			l.fail(fmt.Errorf("read from peer: %w", err))
			return
		}
		if err := handle(f); err != nil {
			l.fail(err)
			return
		}
	}
}
