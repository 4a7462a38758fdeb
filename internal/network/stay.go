package network

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"flint"
)

// What outlives a process is in the kernel alone, and there is no file that could say something else: a port's alias is
// its guest's id, its name the guest's address, the bridge's alias the subnets, the table's undo chain the sysctls. The
// guest's namespace lives as long as its VMM, and the veth pair as long as the namespace.

// Leave ends Serve and gives up name and DNS addresses, but leaves bridge, table and ports as they are, for the next
// process to Open with Keep. Close after it does nothing, nor does Close of a port. The descriptors of all ports are
// closed: a guest whose VMM does not run yet is gone.
func (n *Network) Leave(ctx context.Context) error {
	if _, first := n.shutDown(); !first {
		return nil
	}
	return n.letGo(ctx)
}

// letGo releases what ends with this process and nothing else.
func (n *Network) letGo(ctx context.Context) error {
	n.mu.Lock()
	var ports []*Port
	for p := range n.ports {
		ports = append(ports, p)
	}
	n.mu.Unlock()
	var errs []error
	for _, p := range ports {
		errs = append(errs, p.letGo(ctx))
	}
	n.made.Take()
	return errors.Join(append(errs, n.undo.Run(ctx))...)
}

// Adopt returns the port that an earlier process attached for a guest in Config.Keep, at the address it had, once. If there
// is none, or what is there is not whole, the error is flint.ErrNotFound and nothing of it is left. Its Tap is nil.
func (n *Network) Adopt(ctx context.Context, id string) (*Port, error) {
	n.mu.Lock()
	p, shut := n.kept[id], n.shut
	delete(n.kept, id)
	n.mu.Unlock()
	if shut {
		return nil, fmt.Errorf("adopt guest %s: %w", id, os.ErrClosed)
	}
	if p == nil {
		return nil, fmt.Errorf("adopt guest %s: network port: %w", id, flint.ErrNotFound)
	}
	p.mu.Lock()
	damage, err := p.damage()
	p.mu.Unlock()
	if err != nil {
		n.mu.Lock()
		n.kept[id] = p // it may be whole: to be tried again
		n.mu.Unlock()
		return nil, fmt.Errorf("adopt guest %s: %w", id, err)
	}
	if damage != "" {
		return nil, errors.Join(fmt.Errorf("adopt guest %s: network port: %s: %w", id, damage, flint.ErrNotFound), p.Close(ctx))
	}
	return p, nil
}

// inherit finds the ports to keep and removes everything else an earlier process left under the name. Things of that name
// that do not bear flint's mark are refused before anything is touched.
func (n *Network) inherit() error {
	all, err := markedLinks(n.link, n.cfg.Name)
	if err != nil {
		return err
	}
	c, err := openNft(n.cfg.faults)
	if err != nil {
		return err
	}
	if _, err := findUndo(c, n.cfg.Name); err != nil {
		return err
	}
	if err := n.findKept(all); err != nil {
		return err
	}
	if len(n.ports) == 0 {
		if err := removeLinks(n.link, all); err != nil {
			return err
		}
		if err := removeTable(n.cfg.faults, n.cfg.Name); err != nil {
			return fmt.Errorf("remove left-over table: %w", err)
		}
		return nil
	}
	var rest []netlink.Link
	for _, l := range all {
		if l.Attrs().Name == n.cfg.Name {
			n.inheritBridge(l)
		} else if !n.keeps(l) {
			rest = append(rest, l)
		}
	}
	return removeLinks(n.link, rest)
}

// keeps reports whether the link is a kept port's.
func (n *Network) keeps(l netlink.Link) bool {
	for p := range n.ports {
		if p.veth == l.Attrs().Index {
			return true
		}
	}
	return false
}

// findKept looks among links for whole ports of the guests to keep, and puts them into n.kept and n.ports, with no address
// yet.
func (n *Network) findKept(all []netlink.Link) error {
	candidates := map[string]netlink.Link{}
	for _, id := range n.cfg.Keep {
		// Without the number of another namespace it is no veth whose peer is in one.
		if l, only := onlyOne(all, portAlias(id)); only && l.Attrs().Name != n.cfg.Name && l.Attrs().NetNsID >= 0 {
			candidates[id] = l
		}
	}
	if len(candidates) == 0 {
		return nil
	}
	numbers := map[int]bool{}
	for _, l := range candidates {
		numbers[l.Attrs().NetNsID] = true
	}
	found, err := findNamespaces(n.link, numbers)
	defer func() {
		for _, ns := range found {
			ns.Close() // those no port took
		}
	}()
	if err != nil {
		return err
	}
	for id, l := range candidates {
		ns, there := found[l.Attrs().NetNsID]
		if !there {
			n.cfg.Log.Warn("a guest's network cannot be kept", "guest", id, "err", "no process is in its namespace")
			continue
		}
		p := &Port{n: n, alias: portAlias(id), veth: l.Attrs().Index, ns: ns}
		p.index, _ = indexOf(l.Attrs().Name, n.cfg.Name)
		damage, err := p.damage()
		if err != nil {
			return err
		}
		if damage != "" {
			n.cfg.Log.Warn("a guest's network cannot be kept", "guest", id, "err", damage)
			continue
		}
		delete(found, l.Attrs().NetNsID)
		p.own.Push("close guest namespace", func(context.Context) error { return ignoreClosed(ns.Close()) })
		n.ports[p], n.kept[id] = struct{}{}, p
		n.mtu = l.Attrs().MTU
	}
	return nil
}

// onlyOne returns the link that alone has the alias.
func onlyOne(all []netlink.Link, alias string) (found netlink.Link, only bool) {
	for _, l := range all {
		if l.Attrs().Alias != alias {
			continue
		}
		if found != nil {
			return nil, false
		}
		found = l
	}
	return found, found != nil
}

// readmit gives the kept ports their addresses back, which their names tell. One that has none in these subnets, because
// somebody removed the bridge and configured others, is removed.
func (n *Network) readmit(ctx context.Context) error {
	n.mu.Lock()
	defer n.mu.Unlock()
	var errs []error
	for id, p := range n.kept {
		if n.pool.claim(p.index) {
			n.enter(p, p.index)
			p.attached = true
			continue
		}
		n.cfg.Log.Warn("a guest's network cannot be kept", "guest", id, "err", "the subnets have no such address")
		delete(n.kept, id)
		delete(n.ports, p)
		errs = append(errs, p.removeVeth(), p.own.Run(ctx))
	}
	return errors.Join(errs...)
}

// inheritBridge makes the subnets those that the kept guests were given.
func (n *Network) inheritBridge(br netlink.Link) {
	n.bridge.Store(int64(br.Attrs().Index))
	v4, v6, valid := parseBridgeAlias(br.Attrs().Alias)
	if !valid || v4 == n.cfg.IPv4.Masked() && v6 == n.cfg.IPv6.Masked() {
		return
	}
	old := n.cfg
	old.IPv4, old.IPv6, old.Services = v4, v6, nil
	if old.validate() != nil {
		return
	}
	old.Services = slices.DeleteFunc(slices.Clone(n.cfg.Services), func(s netip.AddrPort) bool {
		return s.Addr() != gatewayOf(v4) && s.Addr() != gatewayOf(v6)
	})
	n.warnf("Guests of an earlier flint still have addresses of %s: the network keeps its subnets. The configured ones are used once flint is started and no VM is left; flint host drain gets there.",
		strings.TrimPrefix(br.Attrs().Alias, aliasPrefix))
	n.cfg = old
}

const aliasPrefix = "flint "

// bridgeAlias tells the subnets.
func bridgeAlias(subnets []netip.Prefix) string {
	var s []string
	for _, p := range subnets {
		s = append(s, p.Masked().String())
	}
	return aliasPrefix + strings.Join(s, " ")
}

// parseBridgeAlias is bridgeAlias backwards.
func parseBridgeAlias(alias string) (v4, v6 netip.Prefix, valid bool) {
	words, ours := strings.CutPrefix(alias, aliasPrefix)
	fields := strings.Split(words, " ")
	if !ours || len(fields) > 2 {
		return v4, v6, false
	}
	var err error
	if v4, err = netip.ParsePrefix(fields[0]); err != nil || !v4.Addr().Is4() {
		return v4, v6, false
	}
	if len(fields) == 2 {
		if v6, err = netip.ParsePrefix(fields[1]); err != nil || !v6.Addr().Is6() {
			return v4, v6, false
		}
	}
	return v4.Masked(), v6.Masked(), true
}

// indexOf is portName backwards.
func indexOf(link, network string) (int, bool) {
	digits, ours := strings.CutPrefix(link, network+"-")
	i, err := strconv.ParseUint(digits, 36, 31)
	return int(i), ours && err == nil && portName(network, int(i)) == link
}

// damage says what keeps the port from working that only its making could have given it; empty: nothing. What the host's
// side lacks can be mended and is no damage.
func (p *Port) damage() (string, error) {
	var inside links
	var there []netlink.Link
	err := p.ns.do(func() (err error) {
		if inside, err = openLinks(p.n.cfg.faults); err != nil {
			return fmt.Errorf("open route netlink: %w", err)
		}
		defer inside.close()
		if there, err = inside.list(); err != nil {
			return fmt.Errorf("list links of guest namespace: %w", err)
		}
		return nil
	})
	if err != nil {
		return "", err
	}
	if i, ours := indexOf(portName(p.n.cfg.Name, p.index), p.n.cfg.Name); !ours || i < 2 || i > 1+maxPorts {
		return "its link is named after no address", nil
	}
	byName := map[string]*netlink.LinkAttrs{}
	for _, l := range there {
		byName[l.Attrs().Name] = l.Attrs()
	}
	br := byName[guestBridgeDev]
	for _, name := range []string{guestBridgeDev, tapName, guestVethName} {
		l := byName[name]
		switch {
		case l == nil:
			return "its namespace has no " + name, nil
		case l.Flags&net.FlagUp == 0:
			return name + " in its namespace is down", nil
		case name != guestBridgeDev && l.MasterIndex != br.Index:
			return name + " in its namespace is no port of " + guestBridgeDev, nil
		case name == guestVethName && l.ParentIndex != p.veth:
			return name + " in its namespace is not the other end of its link", nil
		}
	}
	return "", nil
}

// findNamespaces looks among all processes for the network namespaces with these numbers. The caller closes them, those
// that come with an error too.
func findNamespaces(h links, numbers map[int]bool) (map[int]namespace, error) {
	found := map[int]namespace{}
	processes, err := filepath.Glob("/proc/[0-9]*/ns/net")
	if err != nil {
		return found, err
	}
	var refused error
	seen := map[string]bool{}
	for _, path := range processes {
		name, err := os.Readlink(path) // net:[4026531840]
		if errors.Is(err, os.ErrPermission) {
			refused = err
		}
		if err != nil || seen[name] {
			continue // the process is gone by now, or another one told
		}
		f, err := os.Open(path)
		if err != nil {
			continue
		}
		ns := namespace{f}
		number, err := h.namespaceID(ns)
		if err != nil {
			ns.Close()
			return found, fmt.Errorf("number network namespace: %w", err)
		}
		seen[name] = true
		if _, twice := found[number]; twice || !numbers[number] {
			ns.Close()
			continue
		}
		found[number] = ns
	}
	// With the capability, only those refuse to tell who were never ours.
	if refused != nil && len(found) < len(numbers) && !hasCapability(unix.CAP_SYS_PTRACE) {
		return found, &flint.Fault{
			Code: "network.permission", What: "find the namespaces of running VMs", Kind: flint.ErrPermission, Err: refused,
			Fix: "run flint as root (sudo flint …), or give its service CAP_SYS_PTRACE",
		}
	}
	return found, nil
}
