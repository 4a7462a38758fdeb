package network

import (
	"net/netip"

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
