package vm

import "sync"

// Ring is a writer that keeps the last bytes written to it: the end of what a guest or a VMM says, however much that
// is. It is safe for concurrent use.
type Ring struct {
	mu    sync.Mutex
	limit int
	buf   []byte // a ring once it is full
	next  int    // where the ring's oldest byte is
}

// NewRing returns a ring that keeps limit bytes, at least 1. It takes memory as it fills.
func NewRing(limit int) *Ring { return &Ring{limit: limit} }

// Write implements io.Writer. It never fails.
func (r *Ring) Write(p []byte) (int, error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	n := len(p)
	p = p[max(0, n-r.limit):]
	fill := min(len(p), r.limit-len(r.buf))
	r.buf = append(r.buf, p[:fill]...)
	for p = p[fill:]; len(p) > 0; {
		c := copy(r.buf[r.next:], p)
		p = p[c:]
		r.next = (r.next + c) % r.limit
	}
	return n, nil
}

// Bytes returns a copy of what is kept, oldest first.
func (r *Ring) Bytes() []byte {
	r.mu.Lock()
	defer r.mu.Unlock()
	out := make([]byte, 0, len(r.buf))
	return append(append(out, r.buf[r.next:]...), r.buf[:r.next]...)
}
