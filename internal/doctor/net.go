package doctor

import (
	"context"
	"io/fs"
	"net/netip"
	"slices"
	"strconv"
	"strings"
)

func (e *exam) tun(context.Context) Finding {
	const device = "/dev/net/tun"
	if info, err := e.stat(device); err != nil || info.Mode()&fs.ModeCharDevice == 0 {
		return fail("modprobe tun; in a container, pass the device on: --device "+device, "there is no %s, so VMs cannot have network interfaces", device)
	}
	return pass("%s is there", device)
}

// forwarding says whether packets of VMs can be let through. Flint turns forwarding on where it needs it and back off when
// it ends, so what is off now is no fault; what cannot be turned on is.
func (e *exam) forwarding(context.Context) Finding {
	now, err := e.read("/proc/sys/net/ipv4/ip_forward")
	if err != nil {
		return skip("cannot be told: %v", err)
	}
	if m, err := e.mountOf("/proc/sys/net/ipv4"); err == nil && m.options["ro"] {
		return fail("run flint on the host, or in a container with a writable /proc/sys", "%s is mounted read-only: flint cannot turn forwarding on", m.point)
	}
	if e.IPv6 {
		off, err := e.read("/proc/sys/net/ipv6/conf/all/disable_ipv6")
		if err != nil || off != "0" {
			return warn("sysctl -w net.ipv6.conf.all.disable_ipv6=0, or do without: IPv4 works", "IPv6 is off on this machine, so VMs have none")
		}
	}
	if now == "1" {
		return pass("on")
	}
	return pass("off; flint turns it on for its own interfaces and the uplink while it runs")
}

// Columns and flags of /proc/net/route and /proc/net/ipv6_route (net/ipv4/fib_trie.c, net/ipv6/route.c in the kernel).
const (
	routeUp     = 0x1
	routeReject = 0x200
)

func (e *exam) uplink(context.Context) Finding {
	var v4, v6 []string
	usable := func(hex string) bool {
		flags, err := strconv.ParseUint(hex, 16, 32)
		return err == nil && flags&routeUp != 0 && flags&routeReject == 0
	}
	add := func(links []string, link string) []string {
		if link == "lo" || slices.Contains(links, link) {
			return links
		}
		return append(links, link)
	}
	for _, f := range e.lines("/proc/net/route") {
		if len(f) > 7 && f[1] == "00000000" && f[7] == "00000000" && usable(f[3]) {
			v4 = add(v4, f[0])
		}
	}
	for _, f := range e.lines("/proc/net/ipv6_route") {
		if len(f) == 10 && strings.Trim(f[0], "0") == "" && f[1] == "00" && usable(f[8]) {
			v6 = add(v6, f[9])
		}
	}
	switch {
	case len(v4) == 0 && len(v6) == 0:
		return warn("give the machine a default route", "there is no default route, so VMs reach only networks this machine is in itself")
	case len(v4) == 0:
		return warn("give the machine an IPv4 default route", "there is a default route for IPv6 only, by %s; not all of GitHub answers by it", strings.Join(v6, ", "))
	case len(v6) == 0 && e.IPv6:
		return pass("IPv4 by %s; no default route for IPv6, so VMs reach nothing by it", strings.Join(v4, ", "))
	case len(v6) == 0:
		return pass("IPv4 by %s", strings.Join(v4, ", "))
	}
	return pass("IPv4 by %s, IPv6 by %s", strings.Join(v4, ", "), strings.Join(v6, ", "))
}

// resolvers looks for the name servers that flint's forwarder asks on behalf of VMs. It asks them nothing.
func (e *exam) resolvers(context.Context) Finding {
	const etc, resolved = "/etc/resolv.conf", "/run/systemd/resolve/resolv.conf"
	servers := e.nameservers(etc)
	// systemd-resolved's stub hides the servers behind it; those are asked directly where it tells them.
	if behind := e.nameservers(resolved); len(behind) > 0 && !slices.ContainsFunc(servers, func(a string) bool { return a != "127.0.0.53" && a != "127.0.0.54" }) {
		servers = behind
	}
	if len(servers) == 0 {
		return fail("write name servers into "+etc+", or set up systemd-resolved", "this machine has no name servers, so VMs could not resolve names")
	}
	return pass("VMs' questions go to %s", strings.Join(servers, ", "))
}

func (e *exam) nameservers(file string) []string {
	var servers []string
	for _, f := range e.lines(file) {
		if len(f) < 2 || f[0] != "nameserver" {
			continue
		}
		if a, err := netip.ParseAddr(f[1]); err == nil {
			servers = append(servers, a.String())
		}
	}
	return servers
}
