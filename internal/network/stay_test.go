package network

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/miekg/dns"
	"github.com/vishvananda/netlink"
	"golang.org/x/sync/errgroup"
	"golang.org/x/sys/unix"

	"flint"
)

// inhabit starts a process in the port's namespace and gives it the tap, as a VMM's. It ends with the test.
func inhabit(t testing.TB, p *Port) (end func()) {
	t.Helper()
	cat := exec.Command("cat")
	in, err := cat.StdinPipe()
	ok(t, err)
	cat.ExtraFiles = []*os.File{p.Tap()}
	ok(t, namespace{p.Namespace()}.do(cat.Start))
	ended := false
	end = func() {
		if !ended {
			ended = true
			ok(t, errors.Join(in.Close(), cat.Wait()))
		}
	}
	t.Cleanup(end)
	return end
}

// dupTap makes the tests' "VM" have a descriptor of its own of the tap, as a VMM has. The port's own is closed by Leave.
func dupTap(t testing.TB, p *Port) *os.File {
	t.Helper()
	c, err := p.Tap().SyscallConn()
	ok(t, err)
	var fd int
	ok(t, c.Control(func(old uintptr) { fd, err = unix.FcntlInt(old, unix.F_DUPFD_CLOEXEC, 0) }))
	ok(t, err)
	return os.NewFile(uintptr(fd), tunDevice)
}

// newVM is a guest that does not need this process's descriptors: it outlives the network's.
func newVM(t testing.TB, p *Port) *guest {
	t.Helper()
	inhabit(t, p)
	return newGuestOn(t, p, dupTap(t, p))
}

// conversation is a TCP connection whose other end answers every line with the same line.
type conversation struct {
	net.Conn
	far net.Conn
	r   *bufio.Reader
	n   int
}

func converse(t testing.TB, from, in namespace, at netip.AddrPort) *conversation {
	t.Helper()
	var l net.Listener
	ok(t, in.do(func() (err error) { l, err = net.Listen("tcp", at.String()); return err }))
	var g errgroup.Group
	over, far := make(chan struct{}), make(chan net.Conn, 1)
	g.Go(func() error {
		defer close(far)
		c, err := l.Accept()
		if err != nil {
			return nil
		}
		far <- c
		g.Go(func() error { <-over; return c.Close() }) // the guest's FIN may have no way any more
		_, _ = io.Copy(c, c)
		return nil
	})
	ctx, cancel := context.WithTimeout(t.Context(), long)
	defer cancel()
	c, err := from.dialer()(ctx, "tcp", at.String())
	ok(t, err)
	t.Cleanup(func() { close(over); c.Close(); l.Close(); ok(t, g.Wait()) })
	talk := &conversation{Conn: c, far: <-far, r: bufio.NewReader(c)}
	talk.goesOn(t)
	return talk
}

// goesOn says one more line and hears it. Nothing is on the way then: what somebody's host sends again while the connection's
// address is not translated, the host would answer with a reset.
func (c *conversation) goesOn(t testing.TB) {
	t.Helper()
	c.n++
	line := fmt.Sprintf("line %d\n", c.n)
	ok(t, c.SetDeadline(time.Now().Add(long)))
	if _, err := io.WriteString(c, line); err != nil {
		t.Fatalf("the connection broke: %v", err)
	}
	if got, err := c.r.ReadString('\n'); err != nil || got != line {
		t.Fatalf("the connection broke: %q, %v", got, err)
	}
	tick, patience := time.NewTicker(time.Millisecond), time.After(long)
	defer tick.Stop()
	for unacknowledged(t, c.Conn)+unacknowledged(t, c.far) > 0 {
		select {
		case <-tick.C:
		case <-patience:
			t.Fatal("the last line is not acknowledged")
		}
	}
}

// unacknowledged is how many bytes the other end of a connection has not confirmed. This end confirms now what has come.
func unacknowledged(t testing.TB, c net.Conn) (n int) {
	t.Helper()
	raw, err := c.(*net.TCPConn).SyscallConn()
	ok(t, err)
	ok(t, raw.Control(func(fd uintptr) {
		if err = unix.SetsockoptInt(int(fd), unix.IPPROTO_TCP, unix.TCP_QUICKACK, 1); err == nil {
			n, err = unix.IoctlGetInt(int(fd), unix.SIOCOUTQ)
		}
	}))
	ok(t, err)
	return n
}

// chatter talks without a pause until stop, which returns how many lines made it.
func chatter(t testing.TB, talks ...*conversation) (stop func() int) {
	t.Helper()
	done := make(chan struct{})
	var g errgroup.Group
	counts := make([]int, len(talks))
	for i, c := range talks {
		g.Go(func() error {
			for {
				select {
				case <-done:
					return nil
				default:
				}
				line := fmt.Sprintf("chat %d\n", counts[i])
				if err := c.SetDeadline(time.Now().Add(long)); err != nil {
					return err
				}
				if _, err := io.WriteString(c, line); err != nil {
					return err
				}
				if got, err := c.r.ReadString('\n'); err != nil || got != line {
					return fmt.Errorf("said %q, heard %q: %w", line, got, err)
				}
				counts[i]++
			}
		})
	}
	return func() int {
		close(done)
		ok(t, g.Wait())
		return slices.Min(counts)
	}
}

// TestGuestsOutliveTheProcess takes the network from one process to the next, with Leave or by death, while guests talk.
func TestGuestsOutliveTheProcess(t *testing.T) {
	for name, end := range map[string]func(*testing.T, *Network){
		"leave": func(t *testing.T, n *Network) { ok(t, n.Leave(context.Background())) },
		"kill":  kill,
	} {
		for how, forwardAll := range map[string]bool{"per interface": false, "whole host": true} {
			t.Run(name+" "+how, func(t *testing.T) { outlive(t, forwardAll, end) })
		}
	}
}

func outlive(t *testing.T, forwardAll bool, end func(*testing.T, *Network)) {
	w := newWorld(t)
	before := state(t)
	resolver(t, w.internet, netip.AddrPortFrom(internet4, 53), echoResolver)
	cfg := config()
	cfg.forwardAll = forwardAll
	n, err := Open(t.Context(), cfg)
	ok(t, err)
	lives, err := n.Attach(t.Context(), "lives")
	ok(t, err)
	dies, err := n.Attach(t.Context(), "dies")
	ok(t, err)
	g, d := newVM(t, lives), newVM(t, dies)
	address := lives.Address()
	var talks []*conversation
	for _, a := range []netip.Addr{internet4, internet6} {
		talks = append(talks, converse(t, g.namespace, w.internet, netip.AddrPortFrom(a, 99)))
		greet(t, w.internet, netip.AddrPortFrom(a, 80))
	}
	stop := chatter(t, talks...)
	veth, err := handle(t).LinkByName("flint0-2")
	ok(t, err)

	for range 2 {
		end(t, n)
		cfg.Keep = []string{"lives", "never was"}
		n, err = Open(t.Context(), cfg)
		ok(t, err)
		p, err := n.Adopt(t.Context(), "lives")
		ok(t, err)
		if got := p.Address(); got.MAC != address.MAC || got.MTU != address.MTU || !slices.Equal(got.Prefixes, address.Prefixes) || !slices.Equal(got.Gateways, address.Gateways) {
			t.Errorf("the adopted port has address %+v, had %+v", got, address)
		}
		for _, id := range []string{"lives", "dies", "never was", "unknown"} { // once only
			if _, err := n.Adopt(t.Context(), id); !errors.Is(err, flint.ErrNotFound) {
				t.Errorf("adopt %s: %v", id, err)
			}
		}
	}
	if lines := stop(); lines == 0 {
		t.Error("nothing was said meanwhile")
	}
	if now, err := handle(t).LinkByName("flint0-2"); err != nil || now.Attrs().Index != veth.Attrs().Index {
		t.Errorf("the kept link is another: %v, %v", now, err)
	}
	left, err := Leftovers("flint0")
	ok(t, err)
	slices.Sort(left)
	if want := []string{"link flint0", "link flint0-2", "table inet flint0"}; !slices.Equal(left, want) {
		t.Errorf("there are %q, want %q", left, want)
	}
	mustNotReach(t, d.namespace, netip.AddrPortFrom(internet4, 80))

	// All is served again, and the next guest gets another address.
	served := make(chan error, 1)
	go func() { served <- n.Serve(t.Context()) }()
	for _, a := range []netip.Addr{internet4, internet6} {
		mustReach(t, g.namespace, netip.AddrPortFrom(a, 80))
	}
	q := new(dns.Msg).SetQuestion("flint.example.", dns.TypeTXT)
	if r, err := lookup(t, g.namespace, "udp", netip.AddrPortFrom(address.Gateways[0], 53), q); err != nil || len(r.Answer) != 1 {
		t.Errorf("look up after adoption: %v, %v", r, err)
	}
	next := attach(t, n, "next")
	if next.Address().Prefixes[0] == address.Prefixes[0] {
		t.Errorf("%s was given twice", address.Prefixes[0])
	}
	mustReach(t, newGuest(t, next).namespace, netip.AddrPortFrom(internet4, 80))
	ok(t, n.Close(context.Background()))
	ok(t, <-served)
	sameState(t, before, state(t))
}

// TestLeaveIsFinal closes everything after Leave, which must change nothing.
func TestLeaveIsFinal(t *testing.T) {
	newWorld(t)
	before := state(t)
	n, stop := serve(t, config())
	p, err := n.Attach(t.Context(), "one")
	ok(t, err)
	inhabit(t, p)
	lock := n.lock.Name()
	open := state(t)
	ok(t, n.Leave(context.Background()))
	stop() // Serve has ended, and Close does nothing
	ok(t, errors.Join(p.Close(context.Background()), n.Leave(context.Background())))
	sameState(t, open, state(t))
	if _, err := os.Stat(lock); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("the lock stays: %v", err)
	}
	if _, err := n.Attach(t.Context(), "late"); !errors.Is(err, os.ErrClosed) {
		t.Errorf("attach after Leave: %v", err)
	}
	if _, err := n.Adopt(t.Context(), "one"); !errors.Is(err, os.ErrClosed) {
		t.Errorf("adopt after Leave: %v", err)
	}
	ok(t, n.Check(t.Context()))

	// Kept but never adopted: it ends with the network.
	cfg := config()
	cfg.Keep = []string{"one"}
	n, err = Open(t.Context(), cfg)
	ok(t, err)
	ok(t, n.Close(context.Background()))
	sameState(t, before, state(t))
}

// TestDamagedPortIsNotKept spoils a port in every way, between two processes and between Open and Adopt.
func TestDamagedPortIsNotKept(t *testing.T) {
	del := func(name string) func(t *testing.T, ns namespace, end func()) {
		return func(t *testing.T, ns namespace, _ func()) {
			ok(t, ns.do(func() error {
				l, err := handle(t).LinkByName(name)
				ok(t, err)
				return handle(t).LinkDel(l)
			}))
		}
	}
	for name, spoil := range map[string]func(t *testing.T, ns namespace, end func()){
		"no bridge": del(guestBridgeDev), "no tap": del(tapName), "no veth": del(guestVethName),
		"veth down": func(t *testing.T, ns namespace, _ func()) {
			ok(t, ns.do(func() error {
				l, err := handle(t).LinkByName(guestVethName)
				ok(t, err)
				return handle(t).LinkSetDown(l)
			}))
		},
		"tap apart": func(t *testing.T, ns namespace, _ func()) {
			ok(t, ns.do(func() error {
				l, err := handle(t).LinkByName(tapName)
				ok(t, err)
				return handle(t).LinkSetNoMaster(l)
			}))
		},
		"VMM ended": func(_ *testing.T, _ namespace, end func()) { end() },
	} {
		t.Run(name, func(t *testing.T) {
			newWorld(t)
			before := state(t)
			n, err := Open(t.Context(), config())
			ok(t, err)
			p, err := n.Attach(t.Context(), "one")
			ok(t, err)
			end := inhabit(t, p)
			ns := namespace{p.Namespace()}
			hold, err := os.Open(fmt.Sprintf("/proc/self/fd/%d", ns.Fd()))
			ok(t, err)
			defer hold.Close()
			ok(t, n.Leave(context.Background()))
			spoil(t, namespace{hold}, end)
			cfg := config()
			cfg.Keep = []string{"one"}
			n, err = Open(t.Context(), cfg)
			ok(t, err)
			if _, err := n.Adopt(t.Context(), "one"); !errors.Is(err, flint.ErrNotFound) {
				t.Errorf("adopt: %v", err)
			}
			if left, err := Leftovers("flint0"); err != nil || len(left) != 2 {
				t.Errorf("there are %q, %v; want bridge and table", left, err)
			}
			ok(t, n.Close(context.Background()))
			sameState(t, before, state(t))
		})
	}
}

// TestDamagedBeforeAdopt damages a port that was whole when the network was opened.
func TestDamagedBeforeAdopt(t *testing.T) {
	newWorld(t)
	n, err := Open(t.Context(), config())
	ok(t, err)
	p, err := n.Attach(t.Context(), "one")
	ok(t, err)
	inhabit(t, p)
	ok(t, n.Leave(context.Background()))
	cfg := config()
	cfg.Keep = []string{"one"}
	n = open(t, cfg)
	ok(t, n.kept["one"].ns.do(func() error {
		l, err := handle(t).LinkByName(tapName)
		ok(t, err)
		return handle(t).LinkDel(l)
	}))
	if _, err := n.Adopt(t.Context(), "one"); !errors.Is(err, flint.ErrNotFound) || !strings.Contains(err.Error(), "no tap0") {
		t.Errorf("adopt: %v", err)
	}
	if left, err := Leftovers("flint0"); err != nil || len(left) != 2 {
		t.Errorf("there are %q, %v; want bridge and table", left, err)
	}
}

// TestTwoOfOneName has two guests of one id, of which nobody can tell which lives.
func TestTwoOfOneName(t *testing.T) {
	newWorld(t)
	n, err := Open(t.Context(), config())
	ok(t, err)
	for range 2 {
		p, err := n.Attach(t.Context(), "one")
		ok(t, err)
		inhabit(t, p)
	}
	ok(t, n.Leave(context.Background()))
	cfg := config()
	cfg.Keep = []string{"one"}
	n = open(t, cfg)
	if _, err := n.Adopt(t.Context(), "one"); !errors.Is(err, flint.ErrNotFound) {
		t.Errorf("adopt: %v", err)
	}
}

// TestStrangersAreSpared puts things beside and under the network's name that do not bear its mark.
func TestStrangersAreSpared(t *testing.T) {
	newWorld(t)
	h := handle(t)
	n, err := Open(t.Context(), config())
	ok(t, err)
	p, err := n.Attach(t.Context(), "one")
	ok(t, err)
	inhabit(t, p)
	ok(t, n.Leave(context.Background()))
	bridge := func(name string) netlink.Link {
		attrs := netlink.NewLinkAttrs()
		attrs.Name = name
		d := &netlink.Bridge{LinkAttrs: attrs}
		ok(t, h.LinkAdd(d))
		return d
	}
	bridge("flint00-2") // another network's, of nobody's
	under := bridge("flint0-zz")
	ok(t, h.LinkSetAlias(under, portAlias("one"))) // and it even says so
	before := state(t)
	cfg := config()
	cfg.Keep = []string{"one"}
	if _, err := Open(t.Context(), cfg); fault(err).Code != "network.name" {
		t.Errorf("open: %v", err)
	}
	sameState(t, before, state(t))
	ok(t, h.LinkDel(under))
	n, err = Open(t.Context(), cfg)
	ok(t, err)
	if _, err := n.Adopt(t.Context(), "one"); err != nil {
		t.Error(err)
	}
	ok(t, n.Close(context.Background()))
	if _, err := h.LinkByName("flint00-2"); err != nil {
		t.Error(err)
	}
}

// TestSubnetsStayWithGuests changes the configuration while a guest lives, and again when none does.
func TestSubnetsStayWithGuests(t *testing.T) {
	w := newWorld(t)
	greet(t, w.internet, netip.AddrPortFrom(internet4, 80))
	n, err := Open(t.Context(), config())
	ok(t, err)
	p, err := n.Attach(t.Context(), "one")
	ok(t, err)
	g := newVM(t, p)
	ok(t, n.Leave(context.Background()))
	cfg := config()
	cfg.Keep = []string{"one"}
	cfg.IPv4, cfg.IPv6 = netip.MustParsePrefix("10.99.0.0/24"), netip.Prefix{}
	cfg.Services = []netip.AddrPort{netip.MustParseAddrPort("10.99.0.1:80")}
	n, err = Open(t.Context(), cfg)
	ok(t, err)
	a, err := n.Adopt(t.Context(), "one")
	ok(t, err)
	if !slices.Equal(a.Address().Prefixes, p.Address().Prefixes) {
		t.Errorf("adopted at %s, was at %s", a.Address().Prefixes, p.Address().Prefixes)
	}
	if w := strings.Join(n.Warnings(), "\n"); !strings.Contains(w, "10.77.0.0/24 fd77::/64") {
		t.Errorf("warnings: %q", w)
	}
	mustReach(t, g.namespace, netip.AddrPortFrom(internet4, 80))
	ok(t, n.Leave(context.Background()))
	cfg.Keep = nil
	n = open(t, cfg)
	if got := attach(t, n, "two").Address().Prefixes; len(got) != 1 || got[0].String() != "10.99.0.2/24" {
		t.Errorf("a new guest has %s", got)
	}
}

// TestBridgeGoneBetween loses bridge and table while no flint is there.
func TestBridgeGoneBetween(t *testing.T) {
	w := newWorld(t)
	n, err := Open(t.Context(), config())
	ok(t, err)
	p, err := n.Attach(t.Context(), "one")
	ok(t, err)
	g := newVM(t, p)
	talk := converse(t, g.namespace, w.internet, netip.AddrPortFrom(internet4, 99))
	ok(t, n.Leave(context.Background()))
	vandalize(t)
	cfg := config()
	cfg.Keep = []string{"one"}
	n = open(t, cfg)
	_, err = n.Adopt(t.Context(), "one")
	ok(t, err)
	talk.goesOn(t)
	ok(t, n.Check(t.Context()))
}

// TestNeighboursGoOn has two networks, and restarts one.
func TestNeighboursGoOn(t *testing.T) {
	w := newWorld(t)
	before := state(t)
	first, err := Open(t.Context(), config())
	ok(t, err)
	cfg := config()
	cfg.Name, cfg.IPv4, cfg.IPv6 = "flint01", netip.MustParsePrefix("10.78.0.0/24"), netip.MustParsePrefix("fd78::/64")
	second, err := Open(t.Context(), cfg)
	ok(t, err)
	p, err := first.Attach(t.Context(), "one")
	ok(t, err)
	q, err := second.Attach(t.Context(), "one")
	ok(t, err)
	one, two := newVM(t, p), newVM(t, q)
	stop := chatter(t,
		converse(t, one.namespace, w.internet, netip.AddrPortFrom(internet4, 99)),
		converse(t, two.namespace, w.internet, netip.AddrPortFrom(internet6, 99)))
	for range 3 {
		ok(t, first.Leave(context.Background()))
		cfg := config()
		cfg.Keep = []string{"one"}
		first, err = Open(t.Context(), cfg)
		ok(t, err)
		_, err = first.Adopt(t.Context(), "one")
		ok(t, err)
		ok(t, errors.Join(first.Check(t.Context()), second.Check(t.Context())))
	}
	if stop() == 0 {
		t.Error("nothing was said meanwhile")
	}
	ok(t, first.Close(context.Background()))
	converse(t, two.namespace, w.internet, netip.AddrPortFrom(internet4, 98))
	ok(t, second.Close(context.Background()))
	sameState(t, before, state(t))
}

func TestBridgeAlias(t *testing.T) {
	for _, subnets := range [][]netip.Prefix{{guests4}, {guests4, guests6}} {
		v4, v6, valid := parseBridgeAlias(bridgeAlias(subnets))
		if got := slices.DeleteFunc([]netip.Prefix{v4, v6}, func(p netip.Prefix) bool { return !p.IsValid() }); !valid || !slices.Equal(got, subnets) {
			t.Errorf("%v came back as %v", subnets, got)
		}
	}
	for _, bad := range []string{"", "flint", "flint ", "flint fd77::/64", "flint 10.0.0.0/8 10.0.0.0/8", "flint 10.0.0.0/8 fd77::/64 x", "10.0.0.0/8"} {
		if v4, v6, valid := parseBridgeAlias(bad); valid {
			t.Errorf("%q was read as %s %s", bad, v4, v6)
		}
	}
	for _, bad := range []string{"flint0", "flint0-", "flint0-02", "flint0--1", "flint0-ZZ", "flint1-2", "flint0-zzzzzzzz"} {
		if i, valid := indexOf(bad, "flint0"); valid {
			t.Errorf("%q was read as %d", bad, i)
		}
	}
}
