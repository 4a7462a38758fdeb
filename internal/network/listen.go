package network

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"sync"
	"time"

	"github.com/miekg/dns"
	"golang.org/x/sync/errgroup"
	"golang.org/x/sys/unix"

	"flint"
)

const (
	// maxConns and shareConns bound the open TCP connections to the forwarder, of all guests and of one.
	maxConns, shareConns = 256, 32
	// idleFor is how long a guest may keep a TCP connection open without asking anything.
	idleFor = 5 * time.Second
	// stopWithin bounds how long answers under way delay the end of serve.
	stopWithin = time.Second
)

// listeners are the DNS sockets, bound before anything answers on them.
type listeners struct {
	udp []net.PacketConn
	tcp []net.Listener
}

// bind opens UDP and TCP on one address. What it opened stays open on error; the caller closes.
func (l *listeners) bind(ctx context.Context, at netip.AddrPort) error {
	var lc net.ListenConfig
	u, err := lc.ListenPacket(ctx, "udp", at.String())
	if err != nil {
		return bindFault(at, err)
	}
	l.udp = append(l.udp, u)
	t, err := lc.Listen(ctx, "tcp", at.String())
	if err != nil {
		return bindFault(at, err)
	}
	l.tcp = append(l.tcp, t)
	return nil
}

func bindFault(at netip.AddrPort, err error) error {
	if !errors.Is(err, unix.EADDRINUSE) {
		return fmt.Errorf("listen for DNS: %w", err)
	}
	return &flint.Fault{
		Code: "network.dns", What: fmt.Sprintf("listen for DNS on %s", at), Kind: flint.ErrConflict, Err: err,
		Fix: fmt.Sprintf("a DNS server of this host listens on every address: make it listen on its own only (dnsmasq: bind-interfaces, or except-interface; named: listen-on; unbound: interface); find it with: ss -lnup 'sport = :%d'", at.Port()),
	}
}

func (l *listeners) close() error {
	var errs []error
	for _, u := range l.udp {
		errs = append(errs, ignoreNetClosed(u.Close()))
	}
	for _, t := range l.tcp {
		errs = append(errs, ignoreNetClosed(t.Close()))
	}
	return errors.Join(errs...)
}

func ignoreNetClosed(err error) error {
	if errors.Is(err, net.ErrClosed) {
		return nil
	}
	return err
}

// serve answers on all sockets until ctx ends or stop is closed, and then closes them.
func (l *listeners) serve(ctx context.Context, stop <-chan struct{}, f *forwarder) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	handler := dns.HandlerFunc(func(w dns.ResponseWriter, q *dns.Msg) { f.answer(ctx, w, q) })
	var servers []*dns.Server
	for _, u := range l.udp {
		servers = append(servers, &dns.Server{PacketConn: u, Handler: handler, UDPSize: maxUDPAnswer})
	}
	conns := newGate(maxConns, shareConns)
	for _, t := range l.tcp {
		servers = append(servers, &dns.Server{Listener: &gatedListener{t, conns}, Handler: handler, IdleTimeout: func() time.Duration { return f.idle }})
	}
	g, gctx := errgroup.WithContext(ctx)
	for _, s := range servers {
		g.Go(func() error {
			err := s.ActivateAndServe()
			select {
			case <-gctx.Done():
				return nil
			case <-stop:
				return nil
			default:
				return errors.Join(err, errors.New("listener ended by itself"))
			}
		})
	}
	g.Go(func() error {
		select {
		case <-gctx.Done():
		case <-stop:
		}
		cancel()
		within, done := context.WithTimeout(context.WithoutCancel(ctx), stopWithin)
		defer done()
		for _, s := range servers {
			// A server that has not started yet refuses to stop; it ends when it finds its socket closed.
			_ = s.ShutdownContext(within)
		}
		return l.close()
	})
	return g.Wait()
}

// gatedListener closes at once what its gate does not let in.
type gatedListener struct {
	net.Listener
	gate *gate
}

// Accept implements net.Listener.
func (l *gatedListener) Accept() (net.Conn, error) {
	for {
		c, err := l.Listener.Accept()
		if err != nil {
			return nil, err
		}
		from := addrOf(c.RemoteAddr())
		if l.gate.enter(from) {
			return &gatedConn{Conn: c, leave: sync.OnceFunc(func() { l.gate.leave(from) })}, nil
		}
		c.Close()
	}
}

type gatedConn struct {
	net.Conn
	leave func()
}

// Close implements net.Conn.
func (c *gatedConn) Close() error {
	c.leave()
	return c.Conn.Close()
}

// gate counts what is under way, and how much of it is one guest's, so that no guest uses up everything.
type gate struct {
	max, share int

	mu    sync.Mutex
	total int
	by    map[netip.Addr]int
}

func newGate(max, share int) *gate { return &gate{max: max, share: share, by: map[netip.Addr]int{}} }

// enter reports whether there is room for one more of a; if so, leave must follow.
func (g *gate) enter(a netip.Addr) bool {
	g.mu.Lock()
	defer g.mu.Unlock()
	if g.total >= g.max || g.by[a] >= g.share {
		return false
	}
	g.total++
	g.by[a]++
	return true
}

func (g *gate) leave(a netip.Addr) {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.total--
	if g.by[a]--; g.by[a] == 0 {
		delete(g.by, a)
	}
}
