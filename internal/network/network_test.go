package network

import (
	"bytes"
	"context"
	"crypto/rand"
	"errors"
	"io"
	"net"
	"net/netip"
	"os"
	"slices"
	"strings"
	"testing"

	"github.com/google/nftables"
	"github.com/google/nftables/expr"
	"github.com/miekg/dns"
	"github.com/vishvananda/netlink"
	"golang.org/x/sync/errgroup"
	"golang.org/x/sys/unix"

	"flint"
)

func TestGuestReachesWhatItMay(t *testing.T) {
	w := newWorld(t)
	gw4, gw6 := gatewayOf(guests4), gatewayOf(guests6)
	cfg := config()
	cfg.Services = []netip.AddrPort{netip.AddrPortFrom(gw4, 8080), netip.AddrPortFrom(gw6, 8080)}
	resolver(t, w.internet, netip.AddrPortFrom(internet4, 53), echoResolver)
	n := open(t, cfg)
	g := newGuest(t, attach(t, n, "one"))
	host := here(t)

	for _, a := range []struct{ internet, seen netip.Addr }{{internet4, host4}, {internet6, host6}} {
		at := netip.AddrPortFrom(a.internet, 80)
		greet(t, w.internet, at)
		if got := mustReach(t, g.namespace, at); got != a.seen.String() {
			t.Errorf("internet saw %q, want the host's %s", got, a.seen)
		}
	}
	for _, s := range cfg.Services {
		greet(t, host, s)
		mustReach(t, g.namespace, s)
	}
	for _, gw := range []netip.Addr{gw4, gw6} {
		for _, network := range []string{"udp", "tcp"} {
			q := new(dns.Msg).SetQuestion("flint.example.", dns.TypeTXT)
			r, err := lookup(t, g.namespace, network, netip.AddrPortFrom(gw, 53), q)
			if err != nil {
				t.Errorf("look up by %s at %s: %v", network, gw, err)
			} else if len(r.Answer) != 1 || r.Answer[0].(*dns.TXT).Txt[0] != network {
				t.Errorf("query by %s at %s: %v", network, gw, r)
			}
		}
	}
}

func TestGuestDoesNotReachWhatItMayNot(t *testing.T) {
	w := newWorld(t)
	// Where bridged frames pass netfilter, the table alone would keep guests apart; isolation must do without.
	ok(t, ignoreMissing(setSysctl("bridge/bridge-nf-call-iptables", "0")))
	ok(t, ignoreMissing(setSysctl("bridge/bridge-nf-call-ip6tables", "0")))
	n := open(t, config())
	one, two := newGuest(t, attach(t, n, "one")), newGuest(t, attach(t, n, "two"))
	host := here(t)
	gw4, gw6 := gatewayOf(guests4), gatewayOf(guests6)

	for _, c := range []struct {
		what    string
		listen  namespace
		at      netip.AddrPort
		from    namespace
		control namespace // reaches it, so that it is there to be reached
	}{
		{"host on gateway", host, netip.AddrPortFrom(gw4, 2222), one.namespace, host},
		{"host on gateway v6", host, netip.AddrPortFrom(gw6, 2222), one.namespace, host},
		{"host on uplink", host, netip.AddrPortFrom(host4, 2222), one.namespace, w.internet},
		{"host on uplink v6", host, netip.AddrPortFrom(host6, 2222), one.namespace, w.internet},
		{"another guest", two.namespace, netip.AddrPortFrom(two.port.Address().Prefixes[0].Addr(), 2222), one.namespace, host},
		{"another guest v6", two.namespace, netip.AddrPortFrom(two.port.Address().Prefixes[1].Addr(), 2222), one.namespace, host},
		{"metadata service", w.internet, netip.AddrPortFrom(metadata, 80), one.namespace, host},
	} {
		greet(t, c.listen, c.at)
		mustReach(t, c.control, c.at)
		if _, err := reach(t, c.from, c.at, short); err == nil {
			t.Errorf("guest reaches %s (%s)", c.what, c.at)
		}
	}
}

// TestGuestsStayApartWhenRouted sends between guests by way of the gateway, which port isolation cannot prevent.
func TestGuestsStayApartWhenRouted(t *testing.T) {
	newWorld(t)
	n := open(t, config())
	one, two := newGuest(t, attach(t, n, "one")), newGuest(t, attach(t, n, "two"))
	to := two.port.Address().Prefixes
	ok(t, one.do(func() error {
		h := handle(t)
		l, err := h.LinkByName("eth0")
		ok(t, err)
		for i, p := range to {
			dst := &net.IPNet{IP: p.Addr().AsSlice(), Mask: net.CIDRMask(p.Addr().BitLen(), p.Addr().BitLen())}
			ok(t, h.RouteAdd(&netlink.Route{LinkIndex: l.Attrs().Index, Dst: dst, Gw: one.port.Address().Gateways[i].AsSlice()}))
		}
		return nil
	}))
	for _, p := range to {
		at := netip.AddrPortFrom(p.Addr(), 2222)
		greet(t, two.namespace, at)
		mustReach(t, here(t), at)
		mustNotReach(t, one.namespace, at)
	}
}

// TestBulkTransfer moves enough both ways that segmentation and checksum offload take part.
func TestBulkTransfer(t *testing.T) {
	w := newWorld(t)
	n := open(t, config())
	g := newGuest(t, attach(t, n, "one"))
	sent := make([]byte, 8<<20)
	rand.Read(sent)
	for _, a := range []netip.Addr{internet4, internet6} {
		at := netip.AddrPortFrom(a, 81)
		var l net.Listener
		ok(t, w.internet.do(func() (err error) { l, err = net.Listen("tcp", at.String()); return err }))
		var eg errgroup.Group
		eg.Go(func() error {
			c, err := l.Accept()
			if err != nil {
				return err
			}
			defer c.Close()
			_, err = io.Copy(c, c)
			return err
		})
		c, err := g.dialer()(t.Context(), "tcp", at.String())
		ok(t, err)
		eg.Go(func() error {
			_, err := c.Write(sent)
			return errors.Join(err, c.(*net.TCPConn).CloseWrite())
		})
		got, err := io.ReadAll(c)
		ok(t, errors.Join(err, eg.Wait(), c.Close(), l.Close()))
		if !bytes.Equal(got, sent) {
			t.Errorf("%s: %d bytes came back, not the %d sent", a, len(got), len(sent))
		}
	}
}

func TestNothingIsLeft(t *testing.T) {
	newWorld(t)
	before := state(t)
	n, err := Open(t.Context(), config())
	ok(t, err)
	for _, id := range []string{"one", "two", "three"} {
		_, err := n.Attach(t.Context(), id)
		ok(t, err)
	}
	left, err := Leftovers("flint0")
	ok(t, err)
	want := []string{"link flint0-2", "link flint0-3", "link flint0-4", "link flint0", "table inet flint0"}
	slices.Sort(left)
	slices.Sort(want)
	if !slices.Equal(left, want) {
		t.Errorf("while open, leftovers are %q, want %q", left, want)
	}
	if v, err := readSysctl(forwarding4("up0")); v != "1" {
		t.Errorf("uplink does not forward while open: %q %v", v, err)
	}
	ok(t, n.Close(context.Background()))
	ok(t, n.Close(context.Background()))
	sameState(t, before, state(t))
	if left, err := Leftovers("flint0"); err != nil || len(left) > 0 {
		t.Errorf("after close, leftovers are %q, %v", left, err)
	}
	if _, err := n.Attach(t.Context(), "late"); !errors.Is(err, os.ErrClosed) {
		t.Errorf("attach to a closed network: %v", err)
	}
}

// TestTakesOverFromTheDead opens a network over what a killed process leaves: everything but its descriptors.
func TestTakesOverFromTheDead(t *testing.T) {
	newWorld(t)
	before := state(t)
	dead, err := Open(t.Context(), config())
	ok(t, err)
	_, err = dead.Attach(t.Context(), "one")
	ok(t, err)
	if _, err := Open(t.Context(), config()); !errors.Is(err, flint.ErrConflict) || fault(err).Code != "network.busy" {
		t.Errorf("open under a live network: %v", err)
	}
	kill(t, dead)

	n, err := Open(t.Context(), config())
	ok(t, err)
	if left, err := Leftovers("flint0"); err != nil || len(left) != 2 {
		t.Errorf("after taking over there are %q, %v; want bridge and table only", left, err)
	}
	ok(t, n.Close(context.Background()))
	sameState(t, before, state(t))
}

// kill closes what the kernel would if the network's process died: every descriptor and nothing else.
func kill(t *testing.T, n *Network) {
	t.Helper()
	ok(t, errors.Join(n.servers.close(), ignoreClosed(n.watch.Close()), n.home.Close()))
	n.link.close()
	for p := range n.ports {
		ok(t, p.ns.Close())
		if p.tap != nil {
			ok(t, ignoreClosed(p.tap.Close()))
		}
	}
	lock := n.lock
	ok(t, lock.Close())
}

func TestSideBySide(t *testing.T) {
	for name, forwardAll := range map[string]bool{"per interface": false, "whole host": true} {
		t.Run(name, func(t *testing.T) { sideBySide(t, forwardAll) })
	}
}

func sideBySide(t *testing.T, forwardAll bool) {
	w := newWorld(t)
	before := state(t)
	cfg := config()
	cfg.forwardAll = forwardAll
	first, err := Open(t.Context(), cfg)
	ok(t, err)
	cfg.Name, cfg.IPv4, cfg.IPv6 = "other", netip.MustParsePrefix("10.78.0.0/24"), netip.MustParsePrefix("fd78::/64")
	second, err := Open(t.Context(), cfg)
	ok(t, err)
	g := newGuest(t, attach(t, second, "two"))
	for _, a := range []netip.Addr{internet4, internet6} {
		greet(t, w.internet, netip.AddrPortFrom(a, 80))
		mustReach(t, g.namespace, netip.AddrPortFrom(a, 80))
	}
	ok(t, first.Close(context.Background())) // which turned forwarding on; the other still needs it
	for _, a := range []netip.Addr{internet4, internet6} {
		mustReach(t, g.namespace, netip.AddrPortFrom(a, 80))
	}
	ok(t, second.Close(context.Background()))
	sameState(t, before, state(t))
}

func TestAttachMany(t *testing.T) {
	newWorld(t)
	n := open(t, config())
	const many = 50
	ports := make([]*Port, many)
	var g errgroup.Group
	for i := range ports {
		g.Go(func() (err error) {
			ports[i], err = n.Attach(t.Context(), "runner")
			return err
		})
	}
	ok(t, g.Wait())
	seen := map[string]bool{}
	for _, p := range ports {
		a := p.Address()
		for _, s := range append([]string{a.MAC}, a.Prefixes[0].String(), a.Prefixes[1].String()) {
			if seen[s] {
				t.Errorf("%s was given twice", s)
			}
			seen[s] = true
		}
		if a.MTU != 1500 || len(a.Gateways) != 2 {
			t.Errorf("address is incomplete: %+v", a)
		}
	}
	for _, p := range ports {
		g.Go(func() error { return errors.Join(p.Close(context.Background()), p.Close(context.Background())) })
	}
	ok(t, g.Wait())
	if left, err := Leftovers("flint0"); err != nil || len(left) != 2 {
		t.Errorf("after closing every port there are %q, %v; want bridge and table only", left, err)
	}
}

// TestNamespaceIsBare looks at what an escaped VMM would find.
func TestNamespaceIsBare(t *testing.T) {
	newWorld(t)
	n := open(t, config())
	p := attach(t, n, "one")
	ok(t, namespace{p.Namespace()}.do(func() error {
		h := handle(t)
		links, err := h.LinkList()
		ok(t, err)
		var names []string
		for _, l := range links {
			names = append(names, l.Attrs().Name)
		}
		slices.Sort(names)
		if !slices.Equal(names, []string{"br0", "lo", "tap0", "veth0"}) {
			t.Errorf("links in the guest's namespace: %q", names)
		}
		addrs, err := h.AddrList(nil, netlink.FAMILY_ALL)
		ok(t, err)
		if len(addrs) > 0 {
			t.Errorf("addresses in the guest's namespace: %v", addrs)
		}
		return nil
	}))
	l, err := handle(t).LinkByName("flint0-2")
	ok(t, err)
	if l.Attrs().Alias != "flint one" {
		t.Errorf("port's alias is %q", l.Attrs().Alias)
	}
}

// TestTapOpensByName does as a VMM that is given a name and a namespace.
func TestTapOpensByName(t *testing.T) {
	newWorld(t)
	p := attach(t, open(t, config()), "one")
	ok(t, p.Tap().Close())
	ok(t, namespace{p.Namespace()}.do(func() error {
		f, err := createTap(p.TapName())
		ok(t, err)
		return f.Close()
	}))
	ok(t, p.Close(context.Background()))
}

func TestThreadsComeBack(t *testing.T) {
	newWorld(t)
	n := open(t, config())
	before, err := os.Readlink("/proc/thread-self/ns/net")
	ok(t, err)
	attach(t, n, "one")
	after, err := os.Readlink("/proc/thread-self/ns/net")
	ok(t, err)
	if before != after {
		t.Errorf("attach moved the caller from %s to %s", before, after)
	}
}

func TestOverlap(t *testing.T) {
	newWorld(t)
	before := state(t)
	for _, c := range []struct {
		v4, v6 string
		names  string
	}{
		{"198.51.100.0/28", "fd77::/64", "198.51.100.0/24 on up0"},
		{"10.77.0.0/24", "2001:db8::/48", "2001:db8::"},
		{"127.0.0.0/16", "fd77::/64", "on lo"},
	} {
		cfg := config()
		cfg.IPv4, cfg.IPv6 = netip.MustParsePrefix(c.v4), netip.MustParsePrefix(c.v6)
		cfg.Resolvers = nil
		_, err := Open(t.Context(), cfg)
		if f := fault(err); f.Code != "network.overlap" || !strings.Contains(err.Error(), c.names) {
			t.Errorf("%s %s: %v", c.v4, c.v6, err)
		}
	}
	sameState(t, before, state(t))
}

func TestForeignNameIsLeftAlone(t *testing.T) {
	newWorld(t)
	h := handle(t)
	attrs := netlink.NewLinkAttrs()
	attrs.Name = "flint0"
	ok(t, h.LinkAdd(&netlink.Bridge{LinkAttrs: attrs}))
	c, err := nftables.New()
	ok(t, err)
	c.AddTable(&nftables.Table{Name: "theirs", Family: nftables.TableFamilyINet})
	ok(t, c.Flush())
	before := state(t)
	for _, name := range []string{"flint0", "theirs"} {
		cfg := config()
		cfg.Name = name
		if _, err := Open(t.Context(), cfg); fault(err).Code != "network.name" {
			t.Errorf("open network %s: %v", name, err)
		}
	}
	sameState(t, before, state(t))
}

func TestFullThenAgain(t *testing.T) {
	newWorld(t)
	cfg := config()
	cfg.IPv4 = netip.MustParsePrefix("10.77.0.0/29")
	n := open(t, cfg)
	var ports []*Port
	for range 5 {
		ports = append(ports, attach(t, n, "x"))
	}
	if _, err := n.Attach(t.Context(), "x"); fault(err).Code != "network.full" {
		t.Errorf("sixth guest in a /29: %v", err)
	}
	ok(t, ports[3].Close(context.Background()))
	if p := attach(t, n, "x"); p.Address().Prefixes[0] != ports[3].Address().Prefixes[0] {
		t.Errorf("got %s, the only free one is %s", p.Address().Prefixes[0], ports[3].Address().Prefixes[0])
	}
}

func TestPortInUse(t *testing.T) {
	newWorld(t)
	c, err := net.ListenPacket("udp", "0.0.0.0:53")
	ok(t, err)
	defer c.Close()
	before := state(t)
	if _, err := Open(t.Context(), config()); fault(err).Code != "network.dns" {
		t.Errorf("open beside a DNS server on every address: %v", err)
	}
	sameState(t, before, state(t))
}

func TestWarnsOfForeignDrops(t *testing.T) {
	newWorld(t)
	c, err := nftables.New()
	ok(t, err)
	policy := nftables.ChainPolicyDrop
	filter := c.AddTable(&nftables.Table{Name: "filter", Family: nftables.TableFamilyIPv4})
	fwd := c.AddChain(&nftables.Chain{
		Name: "FORWARD", Table: filter, Type: nftables.ChainTypeFilter,
		Hooknum: nftables.ChainHookForward, Priority: nftables.ChainPriorityFilter, Policy: &policy,
	})
	wall := c.AddTable(&nftables.Table{Name: "wall", Family: nftables.TableFamilyINet})
	in := c.AddChain(&nftables.Chain{
		Name: "in", Table: wall, Type: nftables.ChainTypeFilter,
		Hooknum: nftables.ChainHookInput, Priority: nftables.ChainPriorityFilter,
	})
	c.AddRule(&nftables.Rule{Table: wall, Chain: in, Exprs: slices.Concat(iif("lo"), accept())})
	c.AddRule(&nftables.Rule{Table: wall, Chain: in, Exprs: []expr.Any{&expr.Counter{}, &expr.Reject{Type: unix.NFT_REJECT_ICMPX_UNREACH, Code: unix.NFT_REJECT_ICMPX_ADMIN_PROHIBITED}}})
	open6 := c.AddChain(&nftables.Chain{
		Name: "harmless", Table: wall, Type: nftables.ChainTypeFilter,
		Hooknum: nftables.ChainHookForward, Priority: nftables.ChainPriorityFilter,
	})
	c.AddRule(&nftables.Rule{Table: wall, Chain: open6, Exprs: slices.Concat(iif("nowhere"), drop())})
	ok(t, c.Flush())

	n, err := Open(t.Context(), config())
	ok(t, err)
	warnings := n.Warnings()
	ok(t, n.Close(context.Background()))
	if len(warnings) != 2 || !strings.Contains(strings.Join(warnings, "\n"), "nft insert rule ip filter FORWARD iifname flint0 accept") ||
		!strings.Contains(strings.Join(warnings, "\n"), "nft insert rule inet wall in iifname flint0 accept") {
		t.Errorf("warnings: %q", warnings)
	}

	// Once their owner has let our bridge through, there is nothing to say.
	c.AddRule(&nftables.Rule{Table: filter, Chain: fwd, Exprs: slices.Concat(iif("flint0"), accept())})
	c.InsertRule(&nftables.Rule{Table: wall, Chain: in, Exprs: slices.Concat(iif("flint0"), accept())})
	ok(t, c.Flush())
	if n := open(t, config()); len(n.Warnings()) > 0 {
		t.Errorf("warnings: %q", n.Warnings())
	}
}

func TestWithoutIPv6(t *testing.T) {
	w := newWorld(t)
	cfg := config()
	cfg.IPv6 = netip.Prefix{}
	before := state(t)
	n, err := Open(t.Context(), cfg)
	ok(t, err)
	g := newGuest(t, attach(t, n, "one"))
	greet(t, w.internet, netip.AddrPortFrom(internet4, 80))
	mustReach(t, g.namespace, netip.AddrPortFrom(internet4, 80))
	if a := g.port.Address(); len(a.Prefixes) != 1 || len(a.Gateways) != 1 {
		t.Errorf("address without IPv6: %+v", a)
	}
	if v, _ := readSysctl(forwarding6("all")); v != "0" {
		t.Errorf("IPv6 forwarding is %q", v)
	}
	ok(t, n.Close(context.Background()))
	sameState(t, before, state(t))
}

func TestHostWithoutIPv6(t *testing.T) {
	enterNamespace(t)
	ok(t, setSysctl("ipv6/conf/all/disable_ipv6", "1"))
	ok(t, setSysctl("ipv6/conf/default/disable_ipv6", "1"))
	n := open(t, config())
	if w := strings.Join(n.Warnings(), "\n"); !strings.Contains(w, "IPv6 is off") || !strings.Contains(w, "no default route") {
		t.Errorf("warnings: %q", w)
	}
	if a := attach(t, n, "one").Address(); len(a.Prefixes) != 1 {
		t.Errorf("address: %+v", a)
	}
}

func TestConfigIsChecked(t *testing.T) {
	for name, spoil := range map[string]func(*Config){
		"no name":          func(c *Config) { c.Name = "" },
		"long name":        func(c *Config) { c.Name = "flintflintfl" },
		"odd name":         func(c *Config) { c.Name = "../x" },
		"no subnet":        func(c *Config) { c.IPv4 = netip.Prefix{} },
		"tiny subnet":      func(c *Config) { c.IPv4 = netip.MustParsePrefix("10.0.0.0/31") },
		"families swapped": func(c *Config) { c.IPv4, c.IPv6 = c.IPv6, c.IPv4 },
		"foreign service":  func(c *Config) { c.Services = []netip.AddrPort{netip.MustParseAddrPort("10.77.0.2:80")} },
		"looping resolver": func(c *Config) { c.Resolvers = []netip.AddrPort{netip.MustParseAddrPort("10.77.0.1:53")} },
	} {
		cfg := config()
		spoil(&cfg)
		if _, err := Open(t.Context(), cfg); !errors.Is(err, flint.ErrConfig) || fault(err).Code != "network.config" {
			t.Errorf("%s: %v", name, err)
		}
	}
}

// fault is the first fault in an error, or an empty one.
func fault(err error) *flint.Fault {
	var f *flint.Fault
	if errors.As(err, &f) {
		return f
	}
	return &flint.Fault{}
}

// echoResolver answers every TXT query with the transport it came by.
func echoResolver(w dns.ResponseWriter, q *dns.Msg) {
	r := new(dns.Msg).SetReply(q)
	hdr := dns.RR_Header{Name: q.Question[0].Name, Rrtype: dns.TypeTXT, Class: dns.ClassINET}
	r.Answer = []dns.RR{&dns.TXT{Hdr: hdr, Txt: []string{w.LocalAddr().Network()}}}
	_ = w.WriteMsg(r)
}

func BenchmarkAttachClose(b *testing.B) {
	newWorld(b)
	n := open(b, config())
	for b.Loop() {
		p, err := n.Attach(b.Context(), "bench")
		if err != nil {
			b.Fatal(err)
		}
		if err := p.Close(b.Context()); err != nil {
			b.Fatal(err)
		}
	}
}
