package network

import (
	"net/netip"
	"slices"

	"github.com/miekg/dns"
)

const (
	// resolvConf is where the host's resolvers are written (resolv.conf(5)).
	resolvConf = "/etc/resolv.conf"
	// resolvedConf is where systemd-resolved writes the servers behind its stub (systemd-resolved.service(8)).
	resolvedConf = "/run/systemd/resolve/resolv.conf"
)

// hostResolvers reads the host's name servers. Where the only one is systemd-resolved's stub, those behind it are used if
// they are known. A file that is missing or names nothing usable gives none.
func hostResolvers(etc, resolved string) []netip.AddrPort {
	servers := readResolvers(etc)
	for _, s := range servers {
		if !isStub(s.Addr()) {
			return servers
		}
	}
	if behind := readResolvers(resolved); len(behind) > 0 {
		return behind
	}
	return servers
}

// isStub reports whether the address is one systemd-resolved's stub listens on.
func isStub(a netip.Addr) bool {
	return a == netip.AddrFrom4([4]byte{127, 0, 0, 53}) || a == netip.AddrFrom4([4]byte{127, 0, 0, 54})
}

func readResolvers(path string) []netip.AddrPort {
	conf, err := dns.ClientConfigFromFile(path)
	if err != nil {
		return nil
	}
	var servers []netip.AddrPort
	for _, s := range conf.Servers {
		if a, err := netip.ParseAddr(s); err == nil {
			servers = append(servers, netip.AddrPortFrom(a, dnsPort))
		}
	}
	return servers
}

// resolvFiles are the paths of the two files.
type resolvFiles struct{ etc, resolved string }

// readResolvers follows the host's resolvers, unless the configuration names others. While the files name none, as in
// the middle of a change, those before stay. The caller holds n.mu.
func (n *Network) readResolvers() {
	if !n.hostDNS {
		return
	}
	now, before := n.usable(hostResolvers(n.cfg.resolv.etc, n.cfg.resolv.resolved)), n.dns.servers()
	if len(now) == 0 || slices.Equal(now, before) {
		return
	}
	n.dns.resolvers.Store(&now)
	n.cfg.Log.Info("the host's DNS resolvers changed", "network", n.cfg.Name, "from", before, "to", now)
}

// usable leaves out resolvers in the guests' subnets: queries to those would come back here.
func (n *Network) usable(servers []netip.AddrPort) []netip.AddrPort {
	return slices.DeleteFunc(servers, func(s netip.AddrPort) bool {
		return slices.ContainsFunc(n.prefixes(), func(p netip.Prefix) bool { return p.Contains(s.Addr()) })
	})
}
