package qemu

import "sync"

// tail is a writer that keeps the last bytes written to it. It is safe for concurrent use.
type tail struct {
	mu    sync.Mutex
	limit int
	buf   []byte // a ring once it is full
	next  int    // where the ring's oldest byte is
}

func newTail(limit int) *tail { return &tail{limit: limit} }

// Write implements io.Writer. It never fails.
func (t *tail) Write(p []byte) (int, error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	n := len(p)
	p = p[max(0, n-t.limit):]
	fill := min(len(p), t.limit-len(t.buf))
	t.buf = append(t.buf, p[:fill]...)
	for p = p[fill:]; len(p) > 0; {
		c := copy(t.buf[t.next:], p)
		p = p[c:]
		t.next = (t.next + c) % t.limit
	}
	return n, nil
}

// Bytes returns a copy of what is kept, oldest first.
func (t *tail) Bytes() []byte {
	t.mu.Lock()
	defer t.mu.Unlock()
	out := make([]byte, 0, len(t.buf))
	return append(append(out, t.buf[t.next:]...), t.buf[:t.next]...)
}
