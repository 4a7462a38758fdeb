package guest

import (
	"net"
	"sync"
)

// port is a byte stream whose host ends come and go while its guest end stays.
type port struct{ down, up *pipe }

func newPort() *port { return &port{newPipe(), newPipe()} }

func (p *port) guest() *end { return &end{r: p.down, w: p.up, closed: make(chan struct{})} }
func (p *port) host() *end  { return &end{r: p.up, w: p.down, closed: make(chan struct{})} }

// pipe is a queue of bytes.
type pipe struct {
	mu   sync.Mutex
	lost bool // what is written comes to nothing
	b    []byte
	more chan struct{}
}

func newPipe() *pipe { return &pipe{more: make(chan struct{}, 1)} }

func (p *pipe) write(b []byte) {
	p.mu.Lock()
	if !p.lost {
		p.b = append(p.b, b...)
	}
	p.mu.Unlock()
	select {
	case p.more <- struct{}{}:
	default:
	}
}

type end struct {
	net.Conn // nil: for the methods nobody calls
	r, w     *pipe
	closed   chan struct{}
	once     sync.Once
}

func (e *end) Read(b []byte) (int, error) {
	for {
		select {
		case <-e.closed:
			return 0, net.ErrClosed
		default:
		}
		e.r.mu.Lock()
		n := copy(b, e.r.b)
		e.r.b = e.r.b[n:]
		e.r.mu.Unlock()
		if n > 0 {
			return n, nil
		}
		select {
		case <-e.r.more:
		case <-e.closed:
		}
	}
}

func (e *end) Write(b []byte) (int, error) {
	select {
	case <-e.closed:
		return 0, net.ErrClosed
	default:
		e.w.write(b)
		return len(b), nil
	}
}

func (e *end) Close() error {
	e.once.Do(func() { close(e.closed) })
	return nil
}
