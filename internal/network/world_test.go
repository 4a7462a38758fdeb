package network

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/nftables"
	"github.com/miekg/dns"
	"github.com/vishvananda/netlink"
	"golang.org/x/sync/errgroup"
	"golang.org/x/sys/unix"
)

// Addresses of the tests' world: documentation prefixes for the internet, as flint would use for guests.
var (
	guests4   = netip.MustParsePrefix("10.77.0.0/24")
	guests6   = netip.MustParsePrefix("fd77::/64")
	internet4 = netip.MustParseAddr("198.51.100.1")
	internet6 = netip.MustParseAddr("2001:db8::1")
	host4     = netip.MustParseAddr("198.51.100.2")
	host6     = netip.MustParseAddr("2001:db8::2")
	metadata  = netip.MustParseAddr("169.254.169.254")
)

// enterNamespace moves the test to a network namespace of its own, with lo up, on a thread that ends with the test.
func enterNamespace(t testing.TB) {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("needs root: makes network namespaces")
	}
	if _, err := os.Stat(tunDevice); err != nil {
		t.Skipf("needs %s: %v", tunDevice, err)
	}
	runtime.LockOSThread()
	if err := unix.Unshare(unix.CLONE_NEWNET); err != nil {
		t.Skipf("needs network namespaces: %v", err)
	}
	// A new namespace has the IPv4 sysctls of the machine that runs the tests: where docker runs, it forwards.
	ok(t, setSysctl("ipv4/ip_forward", "0"))
	h := handle(t)
	lo, err := h.LinkByName("lo")
	ok(t, err)
	ok(t, h.LinkSetUp(lo))
}

// world is a host with an uplink to a small internet. The test's thread is the host's.
type world struct {
	internet namespace
}

func newWorld(t testing.TB) *world {
	t.Helper()
	enterNamespace(t)
	w := &world{}
	ok(t, newNamespace(func(ns namespace) error { w.internet = ns; return nil }))
	t.Cleanup(func() { w.internet.Close() })
	h := handle(t)
	attrs := netlink.NewLinkAttrs()
	attrs.Name = "up0"
	veth := netlink.NewVeth(attrs)
	veth.PeerName, veth.PeerNamespace = "inet0", netlink.NsFd(int(w.internet.Fd()))
	ok(t, h.LinkAdd(veth))
	t.Cleanup(func() { ok(t, ignoreGone(h.LinkDel(veth))) })
	configure(t, h, "up0", []netip.Prefix{netip.PrefixFrom(host4, 24), netip.PrefixFrom(host6, 64)}, nil)
	ok(t, w.internet.do(func() error {
		h := handle(t)
		configure(t, h, "lo", []netip.Prefix{netip.PrefixFrom(metadata, 32)}, nil)
		configure(t, h, "inet0", []netip.Prefix{netip.PrefixFrom(internet4, 24), netip.PrefixFrom(internet6, 64)}, nil)
		return nil
	}))
	configure(t, h, "up0", nil, []netip.Addr{internet4, internet6})
	return w
}

// configure adds addresses, sets the link up, adds default routes.
func configure(t testing.TB, h *netlink.Handle, name string, addrs []netip.Prefix, gateways []netip.Addr) {
	t.Helper()
	l, err := h.LinkByName(name)
	ok(t, err)
	for _, a := range addrs {
		flags := 0
		if a.Addr().Is6() {
			flags = unix.IFA_F_NODAD
		}
		ok(t, h.AddrAdd(l, &netlink.Addr{IPNet: &net.IPNet{IP: a.Addr().AsSlice(), Mask: net.CIDRMask(a.Bits(), a.Addr().BitLen())}, Flags: flags}))
	}
	ok(t, h.LinkSetUp(l))
	for _, g := range gateways {
		ok(t, h.RouteAdd(&netlink.Route{LinkIndex: l.Attrs().Index, Gw: g.AsSlice()}))
	}
}

// guest is a kernel's network stack behind a port: a namespace with a tap whose queue is spliced to the port's, as a
// VMM would.
type guest struct {
	namespace
	port *Port
}

func newGuest(t testing.TB, p *Port) *guest {
	t.Helper()
	return newGuestOn(t, p, p.Tap())
}

// newGuestOn is a guest behind this descriptor of the port's tap, which ends with the test.
func newGuestOn(t testing.TB, p *Port, queue *os.File) *guest {
	t.Helper()
	g := &guest{port: p}
	var tap *os.File
	ok(t, newNamespace(func(ns namespace) (err error) {
		g.namespace = ns
		if tap, err = createTap("eth0"); err != nil {
			return err
		}
		h := handle(t)
		l, err := h.LinkByName("eth0")
		if err != nil {
			return err
		}
		mac, err := net.ParseMAC(p.Address().MAC)
		if err != nil {
			return err
		}
		return errors.Join(h.LinkSetHardwareAddr(l, mac), h.LinkSetMTU(l, p.Address().MTU))
	}))
	splice(t, tap, queue)
	ok(t, g.do(func() error {
		configure(t, handle(t), "eth0", p.Address().Prefixes, p.Address().Gateways)
		return nil
	}))
	return g
}

// splice copies frames with their virtio headers both ways until a side is closed.
func splice(t testing.TB, a, b *os.File) {
	t.Helper()
	for _, f := range []*os.File{a, b} {
		c, err := f.SyscallConn()
		ok(t, err)
		var ioctl error
		ok(t, c.Control(func(fd uintptr) {
			ioctl = unix.IoctlSetInt(int(fd), unix.TUNSETOFFLOAD, unix.TUN_F_CSUM|unix.TUN_F_TSO4|unix.TUN_F_TSO6)
		}))
		ok(t, ioctl)
	}
	var g errgroup.Group
	pump := func(dst, src *os.File) error {
		buf := make([]byte, 1<<17)
		for {
			n, err := src.Read(buf)
			if err != nil {
				return nil
			}
			// A frame the other side cannot take is lost, as on a wire.
			_, _ = dst.Write(buf[:n])
		}
	}
	g.Go(func() error { return pump(a, b) })
	g.Go(func() error { return pump(b, a) })
	t.Cleanup(func() {
		a.Close()
		_ = b.Close() // the port may have closed it
		ok(t, g.Wait())
	})
}

// reach dials from a namespace and returns what the server says first (see greet), or an error after a short while.
func reach(t testing.TB, from namespace, to netip.AddrPort, patience time.Duration) (string, error) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	c, err := from.dialer()(ctx, "tcp", to.String())
	if err != nil {
		return "", err
	}
	defer c.Close()
	b, err := io.ReadAll(c)
	return string(b), err
}

const (
	long  = time.Minute            // for what must work
	short = 400 * time.Millisecond // for what must not
)

func mustReach(t testing.TB, from namespace, to netip.AddrPort) string {
	t.Helper()
	s, err := reach(t, from, to, long)
	if err != nil {
		t.Errorf("reach %s: %v", to, err)
	}
	return s
}

func mustNotReach(t testing.TB, from namespace, to netip.AddrPort) {
	t.Helper()
	if _, err := reach(t, from, to, short); err == nil {
		t.Errorf("%s can be reached", to)
	}
}

// hears reports whether a datagram sent from one namespace arrives in another.
func hears(t testing.TB, in namespace, at netip.AddrPort, from namespace, patience time.Duration) bool {
	t.Helper()
	var l net.PacketConn
	ok(t, in.do(func() (err error) {
		l, err = net.ListenPacket("udp", at.String())
		return err
	}))
	defer l.Close()
	c, err := from.dialer()(t.Context(), "udp", at.String())
	ok(t, err)
	defer c.Close()
	_, err = c.Write([]byte("hello"))
	ok(t, err)
	ok(t, l.SetReadDeadline(time.Now().Add(patience)))
	_, _, err = l.ReadFrom(make([]byte, 16))
	return err == nil
}

func mustHear(t testing.TB, in namespace, at netip.AddrPort, from namespace) {
	t.Helper()
	if !hears(t, in, at, from, long) {
		t.Errorf("nothing arrives at %s", at)
	}
}

func mustNotHear(t testing.TB, in namespace, at netip.AddrPort, from namespace) {
	t.Helper()
	if hears(t, in, at, from, short) {
		t.Errorf("a stranger's datagram arrives at %s", at)
	}
}

// greet serves TCP in a namespace: it tells each peer the peer's own address.
func greet(t testing.TB, in namespace, at netip.AddrPort) {
	t.Helper()
	var l net.Listener
	ok(t, in.do(func() (err error) {
		l, err = net.Listen("tcp", at.String())
		return err
	}))
	var g errgroup.Group
	g.Go(func() error {
		for {
			c, err := l.Accept()
			if err != nil {
				return nil
			}
			fmt.Fprint(c, addrOf(c.RemoteAddr()))
			c.Close()
		}
	})
	t.Cleanup(func() { l.Close(); ok(t, g.Wait()) })
}

// resolver serves DNS in a namespace.
func resolver(t testing.TB, in namespace, at netip.AddrPort, h dns.HandlerFunc) {
	t.Helper()
	var u net.PacketConn
	var l net.Listener
	ok(t, in.do(func() (err error) {
		if u, err = net.ListenPacket("udp", at.String()); err != nil {
			return err
		}
		l, err = net.Listen("tcp", at.String())
		return err
	}))
	serveDNS(t, u, l, h)
}

// serveDNS answers what comes by UDP and TCP until the test ends.
func serveDNS(t testing.TB, u net.PacketConn, l net.Listener, h dns.HandlerFunc) {
	t.Helper()
	udp, tcp := &dns.Server{Handler: h, PacketConn: u}, &dns.Server{Handler: h, Listener: l}
	var g errgroup.Group
	for _, s := range []*dns.Server{udp, tcp} {
		started := make(chan struct{})
		s.NotifyStartedFunc = func() { close(started) }
		g.Go(s.ActivateAndServe)
		<-started
	}
	t.Cleanup(func() {
		ok(t, errors.Join(udp.Shutdown(), tcp.Shutdown(), g.Wait()))
	})
}

// lookup asks a DNS server from a namespace.
func lookup(t testing.TB, from namespace, network string, server netip.AddrPort, q *dns.Msg) (*dns.Msg, error) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), long)
	defer cancel()
	c, err := from.dialer()(ctx, network, server.String())
	if err != nil {
		return nil, err
	}
	defer c.Close()
	r, _, err := (&dns.Client{Timeout: long}).ExchangeWithConnContext(ctx, q, &dns.Conn{Conn: c})
	return r, err
}

// state lists what of the namespace's network flint could have changed: links, tables, sysctls of all interfaces.
func state(t testing.TB) []string {
	t.Helper()
	var s []string
	links, err := handle(t).LinkList()
	ok(t, err)
	for _, l := range links {
		s = append(s, "link "+l.Attrs().Name)
	}
	c, err := nftables.New()
	ok(t, err)
	tables, err := c.ListTables()
	ok(t, err)
	for _, tb := range tables {
		s = append(s, fmt.Sprintf("table %d %s", tb.Family, tb.Name))
	}
	for _, pattern := range []string{"ipv4/conf/*/*", "ipv6/conf/*/*", "ipv4/ip_forward", "bridge/*"} {
		files, err := filepath.Glob(sysctlRoot + pattern)
		ok(t, err)
		for _, f := range files {
			if strings.HasSuffix(f, "stable_secret") {
				continue // cannot be read before it is set
			}
			b, err := os.ReadFile(f)
			ok(t, err)
			s = append(s, f+" "+strings.TrimSpace(string(b)))
		}
	}
	slices.Sort(s)
	return s
}

func sameState(t testing.TB, before, after []string) {
	t.Helper()
	for _, s := range after {
		if !slices.Contains(before, s) {
			t.Errorf("new: %s", s)
		}
	}
	for _, s := range before {
		if !slices.Contains(after, s) {
			t.Errorf("gone: %s", s)
		}
	}
}

func handle(t testing.TB) *netlink.Handle {
	t.Helper()
	h, err := netlink.NewHandle(unix.NETLINK_ROUTE)
	ok(t, err)
	t.Cleanup(h.Close)
	return h
}

func ok(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// here is the namespace of the test's thread.
func here(t testing.TB) namespace {
	t.Helper()
	ns, err := currentNamespace()
	ok(t, err)
	t.Cleanup(func() { ns.Close() })
	return ns
}

// open opens a network in the test's namespace and serves DNS on it; both end with the test.
func open(t testing.TB, cfg Config) *Network {
	t.Helper()
	cfg.Log = slog.New(slog.NewTextHandler(t.Output(), &slog.HandlerOptions{Level: slog.LevelDebug}))
	n, err := Open(t.Context(), cfg)
	ok(t, err)
	ctx, cancel := context.WithCancel(t.Context())
	var g errgroup.Group
	g.Go(func() error { return n.Serve(ctx) })
	t.Cleanup(func() {
		cancel()
		ok(t, errors.Join(g.Wait(), n.Close(context.Background())))
	})
	return n
}

func attach(t testing.TB, n *Network, id string) *Port {
	t.Helper()
	p, err := n.Attach(t.Context(), id)
	ok(t, err)
	t.Cleanup(func() { ok(t, p.Close(context.Background())) })
	return p
}

func config() Config {
	return Config{
		Name: "flint0", IPv4: guests4, IPv6: guests6,
		Resolvers: []netip.AddrPort{netip.AddrPortFrom(internet4, 53)},
	}
}
