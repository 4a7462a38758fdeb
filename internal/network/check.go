package network

import (
	"context"
	"errors"
	"fmt"
	"net"
	"slices"
	"strings"

	"github.com/vishvananda/netlink"
)

// Check makes again what others removed: table, rules, bridge, addresses, ports, sysctls, and says in the log what that
// was. What a port that was closed could not remove, it removes. It follows the host's resolvers where the configuration names
// none, and says which firewalls of others are new and in the way. The error tells what could not be mended. It is for every
// few seconds.
func (n *Network) Check(ctx context.Context) error {
	if err := ctx.Err(); err != nil {
		return err
	}
	n.mu.Lock()
	defer n.mu.Unlock()
	if n.shut {
		return nil
	}
	err := n.home.do(func() error {
		bridge, err := n.ensureBridge()
		n.mended("bridge", bridge)
		errs := []error{err}
		if err == nil {
			ports, err := n.mendPorts(false)
			n.mended("ports", ports)
			errs = append(errs, err, n.removeStrays())
		}
		rules, err := n.mendRules()
		n.mended("rules", rules)
		return errors.Join(append(errs, err, n.lookForFirewalls())...)
	})
	n.readResolvers()
	if err != nil {
		return permission("check network "+n.cfg.Name, fmt.Errorf("check network %s: %w", n.cfg.Name, err))
	}
	return nil
}

func (n *Network) mended(part string, what []string) {
	if len(what) > 0 {
		n.cfg.Log.Warn("somebody removed a part of flint's network, and flint made it again", "network", n.cfg.Name, "part", part,
			"made", strings.Join(what, ", "))
	}
}

// mendRules makes the table again if a rule or an uplink is missing in it, and sets what sysctls are needed.
func (n *Network) mendRules() ([]string, error) {
	c, err := openNft(n.cfg.faults)
	if err != nil {
		return nil, err
	}
	var made []string
	rules, notes, err := rulesOf(c, n.cfg.Name)
	if err != nil {
		return nil, err
	}
	whole := len(n.rules) > 0 && !slices.ContainsFunc(n.rules, func(r string) bool { return !slices.Contains(rules, r) })
	if whole {
		n.notes = union(n.notes, notes) // another network's Close may have added some
		names, err := uplinksOf(c, n.cfg.Name)
		if err != nil {
			return nil, err
		}
		whole = slices.Equal(names, n.up.names())
	}
	if !whole {
		made = append(made, "the nftables table")
	}
	missing, err := planSysctls(n.up.names(), n.cfg.IPv6.IsValid(), n.cfg.forwardAll)
	if err != nil {
		return nil, err
	}
	for _, m := range missing {
		if m.new != "0" {
			made = append(made, "sysctl net/"+m.path)
		}
	}
	if len(made) == 0 {
		return nil, nil
	}
	if _, err := n.program(n.up); err != nil {
		return nil, err
	}
	return made, nil
}

// mendPorts connects the ports with the bridge, all of them or only those that are not. Where a veth pair is gone, it makes
// another. A port that somebody is making or closing is left alone.
func (n *Network) mendPorts(all bool) ([]string, error) {
	if len(n.ports) == 0 {
		return nil, nil
	}
	list, err := n.link.list()
	if err != nil {
		return nil, fmt.Errorf("list links: %w", err)
	}
	there := map[int]netlink.Link{}
	for _, l := range list {
		there[l.Attrs().Index] = l
	}
	var made []string
	var errs []error
	for p := range n.ports {
		if !p.mu.TryLock() {
			continue
		}
		if p.attached {
			what, err := p.mend(there[p.veth], all)
			made = append(made, what...)
			if err != nil {
				errs = append(errs, fmt.Errorf("connect guest %q: %w", strings.TrimPrefix(p.alias, aliasPrefix), err))
			}
		}
		p.mu.Unlock()
	}
	slices.Sort(made)
	return made, errors.Join(errs...)
}

// removeStrays takes away what bears our mark and no port has: a link whose removal failed when its port was closed. A port that
// is being made or closed has its number already, or still.
func (n *Network) removeStrays() error {
	all, err := ownLinks(n.link, n.cfg.Name)
	if err != nil {
		return err
	}
	has := map[int]bool{}
	for p := range n.ports {
		has[p.index] = true
	}
	var strays []netlink.Link
	for _, l := range all {
		if i, port := indexOf(l.Attrs().Name, n.cfg.Name); port && !has[i] && l.Attrs().Group == deviceGroup {
			n.cfg.Log.Warn("removing a link that a guest left", "network", n.cfg.Name, "link", l.Attrs().Name, "guest", strings.TrimPrefix(l.Attrs().Alias, aliasPrefix))
			strays = append(strays, l)
		}
	}
	return removeLinks(n.link, strays)
}

// mend connects the host's end of the port, which is nil if it is gone. The caller holds p.mu.
func (p *Port) mend(veth netlink.Link, always bool) ([]string, error) {
	guest := strings.TrimPrefix(p.alias, aliasPrefix)
	if veth == nil {
		if err := p.remake(); err != nil {
			return nil, err
		}
		return []string{"the link of guest " + guest}, nil
	}
	a := veth.Attrs()
	if !always && a.MasterIndex == int(p.n.bridge.Load()) && a.Flags&net.FlagUp != 0 {
		return nil, nil
	}
	if err := p.connect(veth); err != nil {
		return nil, err
	}
	return []string{"the connection of guest " + guest}, nil
}

// remake makes the veth pair of a port again, both its ends being gone.
func (p *Port) remake() error {
	if err := p.makeOutside(); err != nil {
		return errors.Join(err, p.removeVeth())
	}
	var inside links
	err := p.ns.do(func() (err error) {
		inside, err = openLinks(p.n.cfg.faults)
		return err
	})
	if err != nil {
		return errors.Join(fmt.Errorf("open route netlink: %w", err), p.removeVeth())
	}
	defer inside.close()
	br, err := inside.byName(guestBridgeDev)
	if err == nil {
		err = p.joinInside(inside, guestVethName, br.Attrs().Index)
	}
	if err != nil {
		return errors.Join(fmt.Errorf("join veth to guest namespace: %w", err), p.removeVeth())
	}
	return nil
}

// lookForFirewalls warns of other firewalls' chains that were not there before.
func (n *Network) lookForFirewalls() error {
	c, err := openNft(n.cfg.faults)
	if err != nil {
		return err
	}
	found, err := foreignDrops(c, n.cfg.Name, n.cfg.IPv6.IsValid())
	if err != nil {
		return err
	}
	for _, w := range found {
		if !slices.Contains(n.warn, w) {
			n.warn = append(n.warn, w)
			n.cfg.Log.Warn(w, "network", n.cfg.Name)
		}
	}
	return nil
}
