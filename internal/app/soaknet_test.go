package app

import (
	"context"
	"fmt"
	"net"
	"net/http"
	"sync"
	"syscall"
)

// memory is a network without sockets, so that everything on it can live in a synctest bubble, and be cut off.
type memory struct {
	mu        sync.Mutex
	listeners map[string]*ear // by address
}

// ear is a listener of a memory.
type ear struct {
	net     *memory
	address string
	calls   chan net.Conn
	closed  chan struct{}
	once    sync.Once

	mu    sync.Mutex
	deaf  bool
	conns map[*wire]bool
}

// wire is a connection that its owner's end can cut.
type wire struct {
	net.Conn
	gone func()
}

func newMemory() *memory { return &memory{listeners: map[string]*ear{}} }

// listen takes the place of net.Listen.
func (m *memory) listen(_ context.Context, _, address string) (net.Listener, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.listeners[address] != nil {
		return nil, fmt.Errorf("listen on %s: %w", address, syscall.EADDRINUSE)
	}
	e := &ear{net: m, address: address, calls: make(chan net.Conn), closed: make(chan struct{}), conns: map[*wire]bool{}}
	m.listeners[address] = e
	return e, nil
}

func (m *memory) dial(ctx context.Context, _, address string) (net.Conn, error) {
	m.mu.Lock()
	e := m.listeners[address]
	m.mu.Unlock()
	if e == nil {
		return nil, fmt.Errorf("dial %s: %w", address, syscall.ECONNREFUSED)
	}
	near, far := net.Pipe()
	w := &wire{Conn: far}
	w.gone = func() {
		e.mu.Lock()
		defer e.mu.Unlock()
		delete(e.conns, w)
	}
	e.mu.Lock()
	if e.deaf {
		e.mu.Unlock()
		return nil, fmt.Errorf("dial %s: %w", address, syscall.ECONNREFUSED)
	}
	e.conns[w] = true
	e.mu.Unlock()
	select {
	case e.calls <- w:
		return near, nil
	case <-e.closed:
		w.gone()
		return nil, fmt.Errorf("dial %s: %w", address, syscall.ECONNREFUSED)
	case <-ctx.Done():
		w.gone()
		return nil, fmt.Errorf("dial %s: %w", address, ctx.Err())
	}
}

// cut breaks the connections of a listener and refuses all further ones, while its owner notices nothing.
func (m *memory) cut(address string) {
	m.mu.Lock()
	e := m.listeners[address]
	m.mu.Unlock()
	if e != nil {
		e.cut()
	}
}

func (e *ear) cut() {
	e.mu.Lock()
	e.deaf = true
	var conns []*wire
	for w := range e.conns {
		conns = append(conns, w)
	}
	e.mu.Unlock()
	for _, w := range conns {
		w.Conn.Close()
	}
}

// Close implements net.Conn.
func (w *wire) Close() error {
	w.gone()
	return w.Conn.Close()
}

// Accept implements net.Listener.
func (e *ear) Accept() (net.Conn, error) {
	select {
	case c := <-e.calls:
		return c, nil
	case <-e.closed:
		return nil, net.ErrClosed
	}
}

// Close implements net.Listener.
func (e *ear) Close() error {
	e.once.Do(func() {
		e.net.mu.Lock()
		delete(e.net.listeners, e.address)
		e.net.mu.Unlock()
		close(e.closed)
	})
	return nil
}

// Addr implements net.Listener.
func (e *ear) Addr() net.Addr { return earAddr(e.address) }

// earAddr is the address of an ear.
type earAddr string

// Network implements net.Addr.
func (earAddr) Network() string { return "memory" }

// String implements net.Addr.
func (n earAddr) String() string { return string(n) }

// line is one party's way into a memory: it can be cut.
type line struct {
	*http.Transport
	mu    sync.Mutex
	down  bool
	conns map[*wire]bool
}

// client returns a transport of its own.
func (m *memory) client() *line {
	l := &line{conns: map[*wire]bool{}}
	l.Transport = &http.Transport{MaxIdleConnsPerHost: 64, DisableCompression: true, DialContext: func(ctx context.Context, network, address string) (net.Conn, error) {
		c, err := m.dial(ctx, network, address)
		if err != nil {
			return nil, err
		}
		w := &wire{Conn: c}
		w.gone = func() {
			l.mu.Lock()
			defer l.mu.Unlock()
			delete(l.conns, w)
		}
		l.mu.Lock()
		defer l.mu.Unlock()
		if l.down {
			c.Close()
			return nil, syscall.ENETUNREACH
		}
		l.conns[w] = true
		return w, nil
	}}
	return l
}

// cut breaks all connections and lets no other come up.
func (l *line) cut() {
	l.mu.Lock()
	l.down = true
	var conns []*wire
	for w := range l.conns {
		conns = append(conns, w)
	}
	l.mu.Unlock()
	for _, w := range conns {
		w.Conn.Close()
	}
}

// while carries requests as long as a machine lives: its death sends nothing.
type while struct {
	context.Context
	http.RoundTripper
}

// RoundTrip implements http.RoundTripper.
func (w while) RoundTrip(r *http.Request) (*http.Response, error) {
	if err := w.Err(); err != nil {
		return nil, err
	}
	return w.RoundTripper.RoundTrip(r)
}
