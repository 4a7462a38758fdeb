package main

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"time"

	"flint/internal/guest"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// linkWithin bounds the wait for the network interface, which may be probed after its driver was loaded.
const linkWithin = 5 * time.Second

// setUpLoopback brings lo up; nothing else does in an image without an init.
func setUpLoopback() error {
	lo, err := netlink.LinkByName("lo")
	if err == nil {
		err = netlink.LinkSetUp(lo)
	}
	if err != nil {
		return fmt.Errorf("set up loopback: %w", err)
	}
	return nil
}

// setUpInterface gives the interface with i's MAC address its addresses and routes.
func setUpInterface(ctx context.Context, i guest.Interface) error {
	link, err := findLink(ctx, i.MAC)
	if err != nil {
		return err
	}
	if i.MTU > 0 {
		if err := netlink.LinkSetMTU(link, i.MTU); err != nil {
			return fmt.Errorf("set MTU %d: %w", i.MTU, err)
		}
	}
	if err := netlink.LinkSetUp(link); err != nil {
		return fmt.Errorf("bring interface up: %w", err)
	}
	for _, p := range i.Prefixes {
		a := &netlink.Addr{IPNet: &net.IPNet{IP: p.Addr().AsSlice(), Mask: net.CIDRMask(p.Bits(), p.Addr().BitLen())}}
		if p.Addr().Is6() {
			a.Flags = unix.IFA_F_NODAD // the host gives every address once
		}
		if err := netlink.AddrReplace(link, a); err != nil {
			return fmt.Errorf("add address %s: %w", p, err)
		}
	}
	for _, g := range i.Gateways {
		if err := netlink.RouteReplace(defaultRoute(link.Attrs().Index, g)); err != nil {
			return fmt.Errorf("route through %s: %w", g, err)
		}
	}
	return nil
}

// defaultRoute goes through a gateway that is on the link whether or not a prefix says so.
func defaultRoute(link int, gateway netip.Addr) *netlink.Route {
	all := &net.IPNet{IP: net.IPv6zero, Mask: net.CIDRMask(0, 128)}
	if gateway.Is4() {
		all = &net.IPNet{IP: net.IPv4zero.To4(), Mask: net.CIDRMask(0, 32)}
	}
	return &netlink.Route{LinkIndex: link, Dst: all, Gw: gateway.AsSlice(), Flags: int(netlink.FLAG_ONLINK)}
}

func findLink(ctx context.Context, mac string) (netlink.Link, error) {
	want, err := net.ParseMAC(mac)
	if err != nil {
		return nil, fmt.Errorf("find interface: %w", err)
	}
	ctx, cancel := context.WithTimeout(ctx, linkWithin)
	defer cancel()
	var found netlink.Link
	err = retry(ctx, func() error {
		links, err := netlink.LinkList()
		if err != nil {
			return err
		}
		for _, l := range links {
			if l.Type() == "device" && l.Attrs().HardwareAddr.String() == want.String() {
				found = l
				return nil
			}
		}
		return errors.New("there is none")
	})
	if err != nil {
		return nil, fmt.Errorf("find interface with MAC address %s: %w", mac, err)
	}
	return found, nil
}
