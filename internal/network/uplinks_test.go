package network

import (
	"context"
	"net"
	"net/netip"
	"os"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// A second way to the same internet, and addresses there that are reached by default routes only.
var (
	second4 = netip.MustParsePrefix("203.0.113.2/24")
	second6 = netip.MustParsePrefix("2001:db8:2::2/64")
	far4    = netip.MustParseAddr("198.18.0.80")
	far6    = netip.MustParseAddr("2001:db8:80::80")
)

// secondUplink connects the host to the internet once more, without default routes, and puts the far addresses there.
func (w *world) secondUplink(t *testing.T, name string) netlink.Link {
	t.Helper()
	h := handle(t)
	attrs := netlink.NewLinkAttrs()
	attrs.Name = name
	veth := netlink.NewVeth(attrs)
	veth.PeerName, veth.PeerNamespace = "inet1", netlink.NsFd(int(w.internet.Fd()))
	ok(t, h.LinkAdd(veth))
	t.Cleanup(func() { _ = h.LinkDel(veth) }) // unless the test did
	configure(t, h, name, []netip.Prefix{second4, second6}, nil)
	ok(t, w.internet.do(func() error {
		h := handle(t)
		theirs := []netip.Prefix{netip.PrefixFrom(second4.Addr().Prev(), 24), netip.PrefixFrom(second6.Addr().Prev(), 64)}
		configure(t, h, "inet1", theirs, nil)
		lo, err := h.LinkByName("lo")
		ok(t, err)
		for _, a := range []netip.Addr{far4, far6} {
			ip := &net.IPNet{IP: a.AsSlice(), Mask: net.CIDRMask(a.BitLen(), a.BitLen())}
			ok(t, h.AddrReplace(lo, &netlink.Addr{IPNet: ip, Flags: unix.IFA_F_NODAD}))
		}
		return h.LinkSetUp(lo)
	}))
	l, err := h.LinkByName(name)
	ok(t, err)
	return l
}

// moveTo makes the default routes leave by another link.
func moveTo(t *testing.T, name string, gateways ...netip.Addr) {
	t.Helper()
	h := handle(t)
	routes, err := h.RouteList(nil, netlink.FAMILY_ALL)
	ok(t, err)
	for _, r := range routes {
		if r.Dst == nil || isDefault(r) {
			ok(t, h.RouteDel(&r))
		}
	}
	configure(t, h, name, nil, gateways)
}

// TestUplinkMoves takes the default routes from one link to another while a guest is there.
func TestUplinkMoves(t *testing.T) {
	for name, forwardAll := range map[string]bool{"per interface": false, "whole host": true} {
		t.Run(name, func(t *testing.T) { uplinkMoves(t, forwardAll) })
	}
}

func uplinkMoves(t *testing.T, forwardAll bool) {
	w := newWorld(t)
	w.secondUplink(t, "up1")
	other, theirs := w.lan(t)
	before := state(t)
	cfg := config()
	cfg.forwardAll = forwardAll
	n, stop := serve(t, cfg)
	g := newGuest(t, attach(t, n, "one"))
	far := []netip.AddrPort{netip.AddrPortFrom(far4, 80), netip.AddrPortFrom(far6, 80)}
	for i, at := range far {
		greet(t, w.internet, at)
		if got, want := mustReach(t, g.namespace, at), []netip.Addr{host4, host6}[i]; got != want.String() {
			t.Errorf("%s saw %q, want %s", at, got, want)
		}
	}

	moveTo(t, "up1", second4.Addr().Prev(), second6.Addr().Prev())
	await(t, n, "up1")
	for i, at := range far {
		if got, want := mustReach(t, g.namespace, at), []netip.Addr{second4.Addr(), second6.Addr()}[i]; got != want.String() {
			t.Errorf("%s saw %q after the move, want %s", at, got, want)
		}
	}
	// The new uplink's neighbours get no more of the host than the old one's.
	ok(t, w.internet.do(func() error {
		h := handle(t)
		for i, a := range theirs {
			via := []netip.Addr{second4.Addr(), second6.Addr()}[i]
			dst := &net.IPNet{IP: a.AsSlice(), Mask: net.CIDRMask(a.BitLen(), a.BitLen())}
			ok(t, h.RouteAdd(&netlink.Route{Dst: dst, Gw: via.AsSlice()}))
		}
		return nil
	}))
	for _, a := range theirs {
		at := netip.AddrPortFrom(a, 80)
		mustHear(t, other, at, here(t))
		mustNotHear(t, other, at, w.internet)
	}
	// The old uplink is a network like any other now, and the guests' business no longer.
	greet(t, w.internet, netip.AddrPortFrom(internet4, 80))
	mustNotReach(t, g.namespace, netip.AddrPortFrom(internet4, 80))

	moveTo(t, "up0", internet4, internet6)
	await(t, n, "up0")
	if got := mustReach(t, g.namespace, far[0]); got != host4.String() {
		t.Errorf("internet saw %q after the move back, want %s", got, host4)
	}
	stop()
	sameState(t, before, state(t))
}

// TestUplinkAppears opens the network before the host has any, as at boot, and lets it come, go, and come again under
// its name, as a dialled line does.
func TestUplinkAppears(t *testing.T) {
	w := newWorld(t)
	moveTo(t, "up0")
	before := state(t)
	n, stop := serve(t, config())
	if warnings := strings.Join(n.Warnings(), "\n"); !strings.Contains(warnings, "no default route") {
		t.Errorf("warnings: %q", warnings)
	}
	g := newGuest(t, attach(t, n, "one"))
	for range 2 {
		l := w.secondUplink(t, "up1")
		moveTo(t, "up1", second4.Addr().Prev(), second6.Addr().Prev())
		await(t, n, "up1")
		t.Run("there", func(t *testing.T) {
			for i, a := range []netip.Addr{far4, far6} {
				at := netip.AddrPortFrom(a, 80)
				greet(t, w.internet, at)
				if got, want := mustReach(t, g.namespace, at), []netip.Addr{second4.Addr(), second6.Addr()}[i]; got != want.String() {
					t.Errorf("%s saw %q, want %s", at, got, want)
				}
			}
		})
		ok(t, handle(t).LinkDel(l))
		await(t, n)
	}
	if notes := notes(t, n); len(notes) != 2 {
		t.Errorf("notes: %v; want one for each family, however often the link comes", notes)
	}
	stop()
	sameState(t, before, state(t))
}

// TestUplinkOfAnother closes the one of two networks that changed the sysctls of a new uplink: they are the other's to
// guard and to restore.
func TestUplinkOfAnother(t *testing.T) {
	w := newWorld(t)
	moveTo(t, "up0")
	before := state(t)
	first, err := Open(t.Context(), config())
	ok(t, err)
	cfg := config()
	cfg.Name, cfg.IPv4, cfg.IPv6 = "other", netip.MustParsePrefix("10.78.0.0/24"), netip.MustParsePrefix("fd78::/64")
	second, err := Open(t.Context(), cfg)
	ok(t, err)
	w.secondUplink(t, "up1")
	moveTo(t, "up1", second4.Addr().Prev(), second6.Addr().Prev())
	at := netip.AddrPortFrom(far4, 80)
	greet(t, w.internet, at)
	for _, n := range []*Network{first, second} {
		ok(t, n.refresh())
		mustReach(t, newGuest(t, attach(t, n, "one")).namespace, at)
	}
	ok(t, first.Close(context.Background()))
	other, theirs := w.lan(t)
	ok(t, w.internet.do(func() error {
		dst := &net.IPNet{IP: theirs[0].AsSlice(), Mask: net.CIDRMask(32, 32)}
		return handle(t).RouteAdd(&netlink.Route{Dst: dst, Gw: second4.Addr().AsSlice()})
	}))
	mustHear(t, other, netip.AddrPortFrom(theirs[0], 80), here(t))
	mustNotHear(t, other, netip.AddrPortFrom(theirs[0], 80), w.internet)
	ok(t, second.Close(context.Background()))
	for _, l := range []string{"up1", "lan0"} {
		link, err := handle(t).LinkByName(l)
		ok(t, err)
		ok(t, handle(t).LinkDel(link))
	}
	sameState(t, before, state(t))
}

// TestLinksToComeTakeRoutes is about IPv6 forwarding of the whole host, which would make a link that appears later deaf
// to the router advertisement that brings its default route.
func TestLinksToComeTakeRoutes(t *testing.T) {
	w := newWorld(t)
	cfg := config()
	cfg.forwardAll = true
	before := state(t)
	n, err := Open(t.Context(), cfg)
	ok(t, err)
	l := w.secondUplink(t, "up1")
	if v, _ := readSysctl(acceptRA("up1")); v != "2" {
		t.Errorf("accept_ra of a new link is %q", v)
	}
	ok(t, n.Close(context.Background()))
	ok(t, handle(t).LinkDel(l))
	sameState(t, before, state(t))
}

func TestConcerned(t *testing.T) {
	up := uplinks{links: map[int]string{7: "eth0"}}
	link := func(index byte) []byte { return append([]byte{0, 0, 0, 0, index, 0, 0, 0}, make([]byte, 8)...) }
	for name, c := range map[string]struct {
		datagram []byte
		want     bool
	}{
		"default route":       {message(unix.RTM_NEWROUTE, make([]byte, 12)), true},
		"default route gone":  {message(unix.RTM_DELROUTE, make([]byte, 12)), true},
		"another route":       {message(unix.RTM_NEWROUTE, append([]byte{2, 24}, make([]byte, 10)...)), false},
		"uplink":              {message(unix.RTM_NEWLINK, link(7)), true},
		"uplink gone":         {message(unix.RTM_DELLINK, link(7)), true},
		"another link":        {message(unix.RTM_NEWLINK, link(8)), false},
		"short route":         {message(unix.RTM_NEWROUTE, nil), true},
		"short link":          {message(unix.RTM_NEWLINK, make([]byte, 4)), true},
		"nonsense":            {[]byte("nonsense of some length"), true},
		"two, the second one": {append(message(unix.RTM_NEWLINK, link(8)), message(unix.RTM_DELLINK, link(7))...), true},
	} {
		if got := up.concerned(c.datagram); got != c.want {
			t.Errorf("%s: %v", name, got)
		}
	}
}

// message is a netlink message in the byte order of the machines flint runs on.
func message(typ uint16, data []byte) []byte {
	b := make([]byte, unix.SizeofNlMsghdr, unix.SizeofNlMsghdr+len(data))
	b[0], b[4], b[5] = byte(unix.SizeofNlMsghdr+len(data)), byte(typ), byte(typ>>8)
	return append(b, data...)
}

// TestWaitIsBounded has changes come without end.
func TestWaitIsBounded(t *testing.T) {
	r, w, err := os.Pipe()
	ok(t, err)
	defer r.Close()
	stopped := make(chan struct{})
	go func() {
		defer close(stopped)
		for {
			if _, err := w.Write(message(unix.RTM_NEWROUTE, make([]byte, 12))); err != nil {
				return
			}
		}
	}()
	watch := &routeWatch{r, make([]byte, 28)}
	ok(t, watch.wait(uplinks{}, 0))
	ok(t, w.Close())
	<-stopped
}

func TestWaitEndsWithoutChanges(t *testing.T) {
	r, w, err := os.Pipe()
	ok(t, err)
	defer r.Close()
	defer w.Close()
	ok(t, (&routeWatch{r, make([]byte, 28)}).wait(uplinks{}, time.Millisecond))
}

// serve opens a network and serves it until stop, which also closes it.
func serve(t *testing.T, cfg Config) (n *Network, stop func()) {
	t.Helper()
	n, err := Open(t.Context(), cfg)
	ok(t, err)
	served := make(chan error, 1)
	go func() { served <- n.Serve(t.Context()) }()
	closed := false
	stop = func() {
		if !closed {
			closed = true
			ok(t, n.Close(context.Background()))
			ok(t, <-served)
		}
	}
	t.Cleanup(stop)
	return n, stop
}

// await waits until the network's uplinks are these.
func await(t *testing.T, n *Network, names ...string) {
	t.Helper()
	tick, patience := time.NewTicker(time.Millisecond), time.After(long)
	defer tick.Stop()
	for {
		n.mu.Lock()
		now := n.up.names()
		n.mu.Unlock()
		if slices.Equal(now, names) {
			return
		}
		select {
		case <-tick.C:
		case <-patience:
			t.Fatalf("uplinks are %q, want %q", now, names)
		}
	}
}

// notes are the changes the network's table has noted.
func notes(t *testing.T, n *Network) []string {
	t.Helper()
	c, err := openNft(nil)
	ok(t, err)
	undo, err := findUndo(c, n.cfg.Name)
	ok(t, err)
	changes, err := notedChanges(c, undo)
	ok(t, err)
	var s []string
	for _, ch := range changes {
		s = append(s, ch.path)
	}
	slices.Sort(s)
	return s
}
