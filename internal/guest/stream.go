package guest

import (
	"encoding/binary"
	"errors"
	"fmt"
	"sync"
)

const (
	// window bounds, in bytes, what a sender keeps until it is acknowledged and a receiver keeps until it is consumed.
	window = 256 << 10
	// chunk is the most one data frame carries. It bounds how long a control frame waits for its turn.
	chunk = 32 << 10
)

// ring is a queue of bytes that grows up to a limit its owner keeps.
type ring struct {
	buf   []byte
	start int
	n     int
}

// write appends p.
func (r *ring) write(p []byte) {
	if need := r.n + len(p); need > len(r.buf) {
		size := max(4<<10, len(r.buf))
		for size < need {
			size *= 2
		}
		buf := make([]byte, size)
		r.copyAt(buf, 0)
		r.buf, r.start = buf, 0
	}
	if len(p) == 0 {
		return
	}
	end := (r.start + r.n) % len(r.buf)
	copy(r.buf, p[copy(r.buf[end:], p):])
	r.n += len(p)
}

// copyAt fills dst with the bytes from offset off on and says how many there were.
func (r *ring) copyAt(dst []byte, off int) int {
	n := min(len(dst), r.n-off)
	if n <= 0 {
		return 0
	}
	from := (r.start + off) % len(r.buf)
	done := copy(dst[:n], r.buf[from:])
	copy(dst[done:n], r.buf)
	return n
}

// discard drops the first n bytes.
func (r *ring) discard(n int) {
	if r.n -= n; r.n == 0 {
		r.start = 0
		return
	}
	r.start = (r.start + n) % len(r.buf)
}

// sender is the sending end of one numbered stream: it keeps what the other half has not acknowledged, at most a
// window of it, and makes its writer wait meanwhile. It is safe for concurrent use.
type sender struct {
	kind kind
	wake func() // called without locks when there may be something to take

	mu      sync.Mutex
	room    sync.Cond
	ring    ring
	base    int64 // position of the ring's first byte
	acked   int64 // below base only until a resumed stream's first acknowledgement
	sent    int64
	ended   bool // the end follows the ring's last byte
	endSent bool
	dropped bool // nobody takes it any more
}

func newSender(k kind, wake func()) *sender {
	s := &sender{kind: k, wake: wake}
	s.room.L = &s.mu
	return s
}

var errDropped = errors.New("stream is closed")

// Write implements io.Writer. It blocks while the window is full, and fails once the stream was dropped.
func (s *sender) Write(p []byte) (int, error) {
	total := 0
	for len(p) > 0 {
		s.mu.Lock()
		for s.ring.n >= window && !s.dropped {
			s.room.Wait()
		}
		if s.dropped || s.ended {
			s.mu.Unlock()
			return total, errDropped
		}
		n := min(len(p), window-s.ring.n)
		s.ring.write(p[:n])
		s.mu.Unlock()
		s.wake()
		p, total = p[n:], total+n
	}
	return total, nil
}

// end says that nothing more will be written.
func (s *sender) end() {
	s.mu.Lock()
	s.ended = true
	s.mu.Unlock()
	s.wake()
}

// drop frees the writer, whatever was not sent.
func (s *sender) drop() {
	s.mu.Lock()
	s.dropped, s.ring = true, ring{}
	s.mu.Unlock()
	s.room.Broadcast()
}

// take returns the payload of the next data frame, in buf, if one may be sent.
func (s *sender) take(buf []byte) ([]byte, bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	left := s.base + int64(s.ring.n) - s.sent
	n := min(left, s.acked+window-s.sent, chunk)
	atEnd := s.ended && left == 0 && !s.endSent
	if s.dropped || n <= 0 && !atEnd {
		return nil, false
	}
	buf = binary.BigEndian.AppendUint64(buf[:0], uint64(s.sent))
	if n <= 0 {
		s.endSent = true
		return buf, true
	}
	buf = buf[:8+n]
	s.ring.copyAt(buf[8:], int(s.sent-s.base))
	s.sent += n
	return buf, true
}

// drained reports whether everything including the end was taken.
func (s *sender) drained() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.endSent || s.dropped
}

// ack records that the other half consumed everything before pos.
func (s *sender) ack(pos int64) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.dropped {
		return nil
	}
	if pos < s.acked || pos > s.sent {
		return fmt.Errorf("position %d acknowledged, of %d sent and %d acknowledged before", pos, s.sent, s.acked)
	}
	s.acked = pos
	if pos > s.base {
		s.ring.discard(int(pos - s.base))
		s.base = pos
		s.room.Broadcast()
	}
	return nil
}

// rewind makes everything that is not acknowledged be sent again.
func (s *sender) rewind() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.sent, s.endSent = s.base, false
}

// position says from where on the stream can still be had.
func (s *sender) position() int64 {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.base
}

// receiver is the receiving end of one numbered stream: it keeps what came and was not consumed, at most a window of
// it. It is safe for concurrent use by one that pushes and one that takes.
type receiver struct {
	kind kind
	wake func()        // called without locks when an acknowledgement may be due
	more chan struct{} // one buffered element: take is worth another try

	mu       sync.Mutex
	ring     ring
	received int64
	acked    int64
	ended    bool // the end came
	dropped  bool // nobody consumes it any more
}

func newReceiver(k kind, at int64, wake func()) *receiver {
	return &receiver{kind: k, wake: wake, more: make(chan struct{}, 1), received: at, acked: at}
}

// push takes a data frame's payload. What it already has it skips; a hole, or more than the window, is an error.
func (r *receiver) push(payload []byte) error {
	pos, p, err := position(payload)
	if err != nil {
		return err
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	if pos > r.received {
		return fmt.Errorf("%d bytes are missing before position %d", pos-r.received, pos)
	}
	if len(p) == 0 {
		r.ended = r.ended || pos == r.received
	} else {
		p = p[min(int64(len(p)), r.received-pos):]
	}
	if len(p) > 0 && (r.ended || r.ring.n+len(p) > window) {
		return fmt.Errorf("%d bytes came after the end or beyond the window", len(p))
	}
	r.received += int64(len(p))
	if !r.dropped {
		r.ring.write(p)
	}
	r.signal()
	return nil
}

func (r *receiver) signal() {
	select {
	case r.more <- struct{}{}:
	default:
	}
}

// take copies what came into buf. With done, everything up to the end was consumed.
func (r *receiver) take(buf []byte) (n int, done bool) {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.ring.copyAt(buf, 0), r.dropped || r.ended && r.ring.n == 0
}

// consume says that the n bytes taken are where they belong.
func (r *receiver) consume(n int) {
	r.mu.Lock()
	if !r.dropped {
		r.ring.discard(n)
	}
	r.mu.Unlock()
	r.wake()
}

// drop consumes everything that came and will come.
func (r *receiver) drop() {
	r.mu.Lock()
	r.dropped, r.ring = true, ring{}
	r.signal()
	r.mu.Unlock()
	r.wake()
}

// due returns the payload of an acknowledgement, in buf, if one should be sent: when much was consumed since the last
// one, or all.
func (r *receiver) due(buf []byte) ([]byte, bool) {
	r.mu.Lock()
	defer r.mu.Unlock()
	consumed := r.received - int64(r.ring.n)
	if consumed == r.acked || r.ring.n > 0 && consumed-r.acked < window/4 {
		return nil, false
	}
	r.acked = consumed
	buf = binary.BigEndian.AppendUint64(buf[:0], uint64(consumed))
	return append(buf, uint8(r.kind)), true
}

// atEnd reports whether the end came.
func (r *receiver) atEnd() bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.ended
}

// position says how much came.
func (r *receiver) position() int64 {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.received
}

// reannounce makes an acknowledgement due at once, for a sender that does not know the last one.
func (r *receiver) reannounce() {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.acked = r.received - int64(r.ring.n) - window
}
