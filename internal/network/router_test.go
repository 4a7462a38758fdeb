package network

import (
	"context"
	"errors"
	"net/netip"
	"strings"
	"testing"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"flint"
)

// lan puts a second network behind the host, besides the internet, and makes the internet's machine a neighbour that
// uses the host as its router. It returns the namespace of the second network and its addresses.
func (w *world) lan(t *testing.T) (namespace, []netip.Addr) {
	t.Helper()
	var other namespace
	ok(t, newNamespace(func(ns namespace) error { other = ns; return nil }))
	t.Cleanup(func() { other.Close() })
	h := handle(t)
	attrs := netlink.NewLinkAttrs()
	attrs.Name = "lan0"
	veth := netlink.NewVeth(attrs)
	veth.PeerName, veth.PeerNamespace = "lan1", netlink.NsFd(int(other.Fd()))
	ok(t, h.LinkAdd(veth))
	mine := []netip.Prefix{netip.MustParsePrefix("192.0.2.1/24"), netip.MustParsePrefix("2001:db8:1::1/64")}
	theirs := []netip.Prefix{netip.MustParsePrefix("192.0.2.2/24"), netip.MustParsePrefix("2001:db8:1::2/64")}
	configure(t, h, "lan0", mine, nil)
	ok(t, other.do(func() error {
		configure(t, handle(t), "lan1", theirs, []netip.Addr{mine[0].Addr(), mine[1].Addr()})
		return nil
	}))
	ok(t, w.internet.do(func() error {
		configure(t, handle(t), "inet0", nil, []netip.Addr{host4, host6})
		return nil
	}))
	return other, []netip.Addr{theirs[0].Addr(), theirs[1].Addr()}
}

// TestNeighbourGetsNothing plays a machine on the host's own network that uses the host as its router, which it was not
// before the network was opened.
func TestNeighbourGetsNothing(t *testing.T) {
	for name, wholeHost := range map[string]bool{"per interface": false, "whole host": true} {
		t.Run(name, func(t *testing.T) {
			w := newWorld(t)
			other, theirs := w.lan(t)
			cfg := config()
			cfg.forwardAll = wholeHost
			g := newGuest(t, attach(t, open(t, cfg), "one"))
			for _, a := range theirs {
				at := netip.AddrPortFrom(a, 80)
				mustHear(t, other, at, here(t))
				mustNotHear(t, other, at, w.internet)
			}
			for _, p := range g.port.Address().Prefixes {
				at := netip.AddrPortFrom(p.Addr(), 80)
				mustHear(t, g.namespace, at, here(t))
				mustNotHear(t, g.namespace, at, w.internet)
			}
			for _, gw := range g.port.Address().Gateways {
				at := netip.AddrPortFrom(gw, 8080)
				greet(t, here(t), at)
				mustReach(t, here(t), at)
				mustNotReach(t, w.internet, at)
			}
		})
	}
}

// TestRouterStaysRouter opens a network on a host that forwarded before: it goes on, but not to guests.
func TestRouterStaysRouter(t *testing.T) {
	w := newWorld(t)
	ok(t, setSysctl("ipv4/ip_forward", "1"))
	ok(t, setSysctl(forwarding6("all"), "1"))
	other, theirs := w.lan(t)
	before := state(t)
	n, err := Open(t.Context(), config())
	ok(t, err)
	g := newGuest(t, attach(t, n, "one"))
	for _, a := range theirs {
		greet(t, other, netip.AddrPortFrom(a, 80))
		mustReach(t, w.internet, netip.AddrPortFrom(a, 80))
		// The other network is no uplink: it is none of the guests' business.
		mustNotReach(t, g.namespace, netip.AddrPortFrom(a, 80))
	}
	for _, p := range g.port.Address().Prefixes {
		at := netip.AddrPortFrom(p.Addr(), 80)
		mustHear(t, g.namespace, at, here(t))
		mustNotHear(t, g.namespace, at, w.internet)
	}
	ok(t, n.Close(context.Background()))
	sameState(t, before, state(t))
}

// TestForwardingOfTheWholeHost is what happens before Linux 6.17, where IPv6 does not forward per interface.
func TestForwardingOfTheWholeHost(t *testing.T) {
	w := newWorld(t)
	ok(t, setSysctl(acceptRA("up0"), "1"))
	ok(t, setSysctl(forwarding6("lo"), "1")) // somebody's odd setting, which must survive
	before := state(t)
	cfg := config()
	cfg.forwardAll = true
	n, err := Open(t.Context(), cfg)
	ok(t, err)
	if v, _ := readSysctl(acceptRA("up0")); v != "2" {
		t.Errorf("uplink's accept_ra is %q: it would lose its default route", v)
	}
	g := newGuest(t, attach(t, n, "one"))
	greet(t, w.internet, netip.AddrPortFrom(internet6, 80))
	mustReach(t, g.namespace, netip.AddrPortFrom(internet6, 80))
	ok(t, n.Close(context.Background()))
	sameState(t, before, state(t))
}

// TestSysctlThatWasTouchedSince is left as somebody else made it.
func TestSysctlThatWasTouchedSince(t *testing.T) {
	newWorld(t)
	ok(t, setSysctl(acceptRA("up0"), "1"))
	cfg := config()
	cfg.forwardAll = true
	n, err := Open(t.Context(), cfg)
	ok(t, err)
	ok(t, setSysctl(acceptRA("up0"), "0"))
	ok(t, n.Close(context.Background()))
	if v, _ := readSysctl(acceptRA("up0")); v != "0" {
		t.Errorf("accept_ra is %q, somebody had set it to 0", v)
	}
}

func TestSysctlsCannotBeWritten(t *testing.T) {
	enterNamespace(t)
	ok(t, unix.Unshare(unix.CLONE_FS|unix.CLONE_NEWNS))
	ok(t, unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, ""))
	ok(t, unix.Mount("/proc/sys", "/proc/sys", "", unix.MS_BIND, ""))
	ok(t, unix.Mount("", "/proc/sys", "", unix.MS_BIND|unix.MS_REMOUNT|unix.MS_RDONLY, ""))
	err := setSysctl(forwarding4("lo"), "1")
	if f := fault(err); f.Code != "network.sysctl" || !strings.Contains(f.Fix, "sysctl -w net/ipv4/conf/lo/forwarding=1") {
		t.Errorf("set a sysctl on a read-only /proc/sys: %v", err)
	}
}

func TestWithoutCapabilities(t *testing.T) {
	enterNamespace(t)
	hdr := unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}
	var caps [2]unix.CapUserData
	ok(t, unix.Capget(&hdr, &caps[0]))
	caps[0].Effective &^= 1 << unix.CAP_NET_ADMIN
	ok(t, unix.Capset(&hdr, &caps[0]))
	_, err := Open(t.Context(), config())
	if f := fault(err); f.Code != "network.permission" || !errors.Is(err, flint.ErrPermission) || !strings.Contains(err.Error(), "lacks CAP_NET_ADMIN:") {
		t.Errorf("open without CAP_NET_ADMIN: %v", err)
	}
}
