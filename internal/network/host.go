package network

import (
	"fmt"
	"net/netip"
	"slices"
	"strings"

	"github.com/google/nftables"
	"github.com/google/nftables/expr"
	"github.com/vishvananda/netlink"

	"flint"
)

const (
	// maxName is the longest network name: an interface name has 15 bytes (IFNAMSIZ less the zero), a port's adds 4.
	maxName = 11
	// deviceGroup is the interface group of every flint bridge and port (`ip link show group`), their mark.
	deviceGroup = 0xf117
	// minMTU6 is the smallest MTU IPv6 runs on (RFC 8200, section 5).
	minMTU6 = 1280
	// maxMTU is what a tap and a veth can have (65521 for a tap; ETH_MAX_MTU less an Ethernet header).
	maxMTU = 65521
	// defaultMTU is Ethernet's.
	defaultMTU = 1500
)

// guestMTU derives the bridge's MTU from the uplinks', so that guests need no path MTU discovery to get out.
func guestMTU(uplink int, v6 bool) (int, error) {
	mtu := uplink
	if mtu == 0 {
		mtu = defaultMTU
	}
	mtu = min(mtu, maxMTU)
	if v6 && mtu < minMTU6 {
		return 0, &flint.Fault{
			Code: "network.mtu", What: "choose the guests' MTU", Kind: flint.ErrConfig,
			Err: fmt.Errorf("the uplink's MTU is %d bytes and IPv6 needs %d", uplink, minMTU6),
			Fix: "turn IPv6 off in flint's network configuration, or raise the uplink's MTU",
		}
	}
	return mtu, nil
}

// checkOverlap refuses a subnet that the host already has a route or an address in: one of the two would be cut off.
// Routes of our own bridge, whose index is own, do not count.
func checkOverlap(h links, p netip.Prefix, own int) error {
	family := netlink.FAMILY_V4
	if p.Addr().Is6() {
		family = netlink.FAMILY_V6
	}
	routes, err := h.routes(family)
	if err != nil {
		return fmt.Errorf("list routes: %w", err)
	}
	for _, r := range routes {
		if r.Dst == nil || isDefault(r) || own != 0 && r.LinkIndex == own {
			continue
		}
		addr, ok := netip.AddrFromSlice(r.Dst.IP)
		ones, _ := r.Dst.Mask.Size()
		if !ok || !netip.PrefixFrom(addr, ones).Overlaps(p) {
			continue
		}
		via := ""
		if l, err := h.byIndex(r.LinkIndex); err == nil {
			via = " on " + l.Attrs().Name
		}
		return &flint.Fault{
			Code: "network.overlap", What: fmt.Sprintf("use %s for guests", p), Kind: flint.ErrConflict,
			Err: fmt.Errorf("this host already uses %s%s", netip.PrefixFrom(addr, ones), via),
			Fix: "choose another subnet in flint's network configuration",
		}
	}
	return nil
}

// ownLinks returns the bridge and the ports that carry the network's name, ports first.
func ownLinks(h links, name string) ([]netlink.Link, error) {
	all, err := h.list()
	if err != nil {
		return nil, fmt.Errorf("list links: %w", err)
	}
	var ports, bridges []netlink.Link
	for _, l := range all {
		switch n := l.Attrs().Name; {
		case n == name:
			bridges = append(bridges, l)
		case strings.HasPrefix(n, name+"-"):
			ports = append(ports, l)
		}
	}
	return append(ports, bridges...), nil
}

// markedLinks is ownLinks, and a Fault if one of them does not bear flint's mark.
func markedLinks(h links, name string) ([]netlink.Link, error) {
	all, err := ownLinks(h, name)
	if err != nil {
		return nil, err
	}
	for _, l := range all {
		if l.Attrs().Group != deviceGroup {
			return nil, taken(name, "network interface "+l.Attrs().Name)
		}
	}
	return all, nil
}

// removeLinks takes away what an earlier process left.
func removeLinks(h links, left []netlink.Link) error {
	for _, l := range left {
		if err := ignoreGone(h.del(l)); err != nil {
			return fmt.Errorf("remove left-over link %s: %w", l.Attrs().Name, err)
		}
	}
	return nil
}

// foreignDrops looks for chains of others that drop what they do not accept themselves, and that no rule of theirs
// opens for our bridge. In netfilter an accept ends only its own chain: such a chain overrules ours.
func foreignDrops(c nft, name string, v6 bool) ([]string, error) {
	chains, err := c.ListChains()
	if err != nil {
		return nil, nftMissing("list nftables chains", err)
	}
	mine, err := undoChains(c)
	if err != nil {
		return nil, err
	}
	var warnings []string
	for _, ch := range chains {
		family, relevant := familyName(ch.Table.Family, v6)
		isOurs := func(u *nftables.Chain) bool {
			return ch.Table.Family == nftables.TableFamilyINet && u.Table.Name == ch.Table.Name
		}
		if ch.Hooknum == nil || !relevant || slices.ContainsFunc(mine, isOurs) {
			continue
		}
		forward := *ch.Hooknum == *nftables.ChainHookForward
		if !forward && *ch.Hooknum != *nftables.ChainHookInput {
			continue
		}
		rules, err := c.GetRules(ch.Table, ch)
		if err != nil {
			rules = nil // the policy still tells something
		}
		if !dropsByDefault(ch, rules) || mentions(rules, name) {
			continue
		}
		warnings = append(warnings, foreignWarning(family, ch, name, forward))
	}
	return warnings, nil
}

func familyName(f nftables.TableFamily, v6 bool) (string, bool) {
	switch f {
	case nftables.TableFamilyIPv4:
		return "ip", true
	case nftables.TableFamilyIPv6:
		return "ip6", v6
	case nftables.TableFamilyINet:
		return "inet", true
	}
	return "", false
}

// dropsByDefault reports whether a packet that no rule singles out is dropped or rejected.
func dropsByDefault(ch *nftables.Chain, rules []*nftables.Rule) bool {
	if ch.Policy != nil && *ch.Policy == nftables.ChainPolicyDrop {
		return true
	}
	return slices.ContainsFunc(rules, func(r *nftables.Rule) bool {
		for _, e := range r.Exprs {
			switch e := e.(type) {
			case *expr.Counter, *expr.Log:
			case *expr.Verdict:
				return e.Kind == expr.VerdictDrop
			case *expr.Reject:
				return true
			case *expr.Target:
				return e.Name == "REJECT"
			default:
				return false
			}
		}
		return false
	})
}

// mentions reports whether a rule compares something with the interface name: its author knows of our bridge.
func mentions(rules []*nftables.Rule, name string) bool {
	return slices.ContainsFunc(rules, func(r *nftables.Rule) bool {
		return slices.ContainsFunc(r.Exprs, func(e expr.Any) bool {
			cmp, ok := e.(*expr.Cmp)
			return ok && strings.TrimRight(string(cmp.Data), "\x00") == name
		})
	})
}

func foreignWarning(family string, ch *nftables.Chain, name string, forward bool) string {
	where := fmt.Sprintf("%s %s %s", family, ch.Table.Name, ch.Name)
	if forward {
		return fmt.Sprintf("Another firewall's chain (%s) drops forwarded packets that it does not accept itself, and flint's accept cannot overrule it: "+
			"guests may not reach the internet. Let it accept them: nft insert rule %s iifname %s accept; nft insert rule %s oifname %s accept", where, where, name, where, name)
	}
	return fmt.Sprintf("Another firewall's chain (%s) drops packets to this host that it does not accept itself, and flint's accept cannot overrule it: "+
		"guests may get no DNS. Let it accept them: nft insert rule %s iifname %s accept (flint's own table still limits what guests reach)", where, where, name)
}
