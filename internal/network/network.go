// Package network gives every guest a network of its own and takes it away again.
//
// One bridge on the host holds the gateway addresses. Each guest gets an anonymous network namespace with nothing in it
// but a tap, one end of a veth pair and a bridge without addresses between them; the other end of the veth is an
// isolated port of the host's bridge, so a VMM that is broken out of sees no network of the host. One nftables table
// translates addresses and says what guests may reach, and a DNS forwarder answers on the gateway addresses. All of it
// lives in the kernel under one name and is gone after Close. After Leave, or a process's death, the next process goes on
// with the guests that live and removes the rest.
//
// The package must not run external programs, must not know what runs behind a tap, and must not touch a link, a table
// or a sysctl that is not its own without noting how it was.
package network

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"net"
	"net/netip"
	"os"
	"slices"
	"sync"
	"sync/atomic"

	"github.com/vishvananda/netlink"
	"golang.org/x/sync/errgroup"
	"golang.org/x/sys/unix"

	"flint"
	"flint/internal/undo"
)

// Config says what network to make.
type Config struct {
	Name      string           // of the bridge and the table: a letter, then letters and digits, at most 11 bytes; "flint0"
	IPv4      netip.Prefix     // the guests' subnet, at most /30; its first host address is the gateway
	IPv6      netip.Prefix     // the same for IPv6, a ULA prefix as a rule; the zero value turns IPv6 off
	Services  []netip.AddrPort // TCP services on the gateway addresses that guests may reach
	Resolvers []netip.AddrPort // where DNS queries go; empty: the host's own resolvers
	Log       *slog.Logger     // nil discards

	// Keep names the guests that live on from an earlier process: their ports stay exactly as they are, to be adopted. Where
	// there are such, the subnets and the MTU stay theirs too, whatever is configured.
	Keep []string

	forwardAll bool        // for tests: forward IPv6 as on kernels that cannot do it per interface
	faults     faults      // for tests
	resolv     resolvFiles // for tests; empty: the host's
}

// Network is an open network. Its methods are safe for concurrent use. Everything it does happens in the network
// namespace of the thread that called Open.
type Network struct {
	cfg     Config
	home    namespace
	lock    *os.File     // holds the name
	link    links        // route netlink in home
	watch   *routeWatch  // of home's routes
	bridge  atomic.Int64 // interface index
	mtu     int          // bytes, of bridge, veths and taps
	dns     *forwarder
	servers listeners
	hostDNS bool          // the resolvers are the host's own
	closing chan struct{} // closed by Close and Leave

	mu      sync.Mutex
	undo    undo.Stack // what ends with this process: descriptors and the lock
	made    undo.Stack // what can outlive it: table and bridge
	pool    *pool
	ports   map[*Port]struct{}
	kept    map[string]*Port // by id: those of ports that wait for Adopt
	shut    bool
	warn    []string
	up      uplinks  // as table and sysctls have them
	notes   []change // noted in the table when it was looked at last
	guarded []change // that the table guards
	rules   []string // of the table, as rulesOf names them
}

// gatewayOf returns the first host address of a subnet: the address the host has in it, also the guests' DNS server.
func gatewayOf(p netip.Prefix) netip.Addr { return p.Masked().Addr().Next() }

// Open makes the network: bridge, table, sysctls, DNS listeners. What an earlier process left under the same name is
// removed first, except what belongs to the guests in cfg.Keep whose ports are whole: these wait for Adopt, and their
// connections go on. A live process that uses the name is a Fault. On error nothing is left behind, and guests to keep are
// as they were. The DNS listeners are bound, but nothing answers before Serve. It needs CAP_NET_ADMIN and CAP_SYS_ADMIN,
// and with guests to keep CAP_SYS_PTRACE.
func Open(ctx context.Context, cfg Config) (*Network, error) {
	if err := cfg.validate(); err != nil {
		return nil, err
	}
	if err := checkHost(); err != nil {
		return nil, err
	}
	if cfg.Log == nil {
		cfg.Log = slog.New(slog.DiscardHandler)
	}
	if cfg.resolv == (resolvFiles{}) {
		cfg.resolv = resolvFiles{resolvConf, resolvedConf}
	}
	n := &Network{cfg: cfg, ports: map[*Port]struct{}{}, kept: map[string]*Port{}, closing: make(chan struct{})}
	var err error
	if n.home, err = currentNamespace(); err != nil {
		return nil, err
	}
	n.undo.Push("close namespace descriptor", func(context.Context) error { return n.home.Close() })
	if err := n.home.do(func() error { return n.open(ctx) }); err != nil {
		err = permission("open network "+cfg.Name, err)
		if len(n.ports) == 0 {
			err = errors.Join(err, n.made.Run(ctx))
		}
		return nil, errors.Join(err, n.letGo(ctx))
	}
	for _, w := range n.warn {
		cfg.Log.Warn(w, "network", cfg.Name)
	}
	return n, nil
}

// open runs on a thread that is in n.home.
func (n *Network) open(ctx context.Context) error {
	var err error
	if n.lock, err = lockName(ctx, lockDir, n.cfg.Name, n.home); err != nil {
		return err
	}
	n.undo.Push("unlock name", func(context.Context) error { return unlockName(n.lock) })
	if n.link, err = openLinks(n.cfg.faults); err != nil {
		return fmt.Errorf("open route netlink: %w", err)
	}
	n.undo.Push("close route netlink", func(context.Context) error { n.link.close(); return nil })
	if err := n.inherit(); err != nil {
		return err
	}
	if n.watch, err = openRouteWatch(); err != nil { // before the routes are looked at, so that no change is missed
		return err
	}
	n.undo.Push("close watch of routes", func(context.Context) error { return ignoreClosed(n.watch.Close()) })
	up, err := n.survey(ctx)
	if err != nil {
		return err
	}
	if err := ctx.Err(); err != nil {
		return err
	}
	n.made.Push("remove table and restore sysctls", func(context.Context) error {
		return n.home.do(func() error { return removeTable(n.cfg.faults, n.cfg.Name) })
	})
	n.made.Push("remove bridge", func(context.Context) error { return n.removeBridge() })
	// What keeps strangers out comes before what lets packets through.
	if _, err := n.program(up); err != nil {
		return err
	}
	if _, err := n.ensureBridge(); err != nil {
		return err
	}
	if _, err := n.mendPorts(true); err != nil {
		return err
	}
	return n.listen(ctx)
}

// survey looks at the host and decides what follows from it: whether IPv6 can be had, the uplinks, the MTU, the
// resolvers, and what the operator should know.
func (n *Network) survey(ctx context.Context) (uplinks, error) {
	if n.cfg.IPv6.IsValid() && !hostHasIPv6() {
		n.warnf("IPv6 is off on this host (the kernel has none, or net.ipv6.conf.all.disable_ipv6 is 1): guests get IPv4 only.")
		n.cfg.IPv6 = netip.Prefix{}
	}
	for _, p := range n.prefixes() {
		if err := checkOverlap(n.link, p, int(n.bridge.Load())); err != nil {
			return uplinks{}, err
		}
	}
	up, err := findUplinks(n.link)
	if err != nil {
		return up, err
	}
	if len(up.links) == 0 {
		n.warnf("This host has no default route: guests reach nothing but the host's gateway addresses until there is one.")
	}
	if n.mtu == 0 {
		if n.mtu, err = guestMTU(up.mtu, n.cfg.IPv6.IsValid()); err != nil {
			return up, err
		}
	}
	if n.pool, err = newPool(n.cfg.IPv4, n.cfg.IPv6); err != nil {
		return up, err
	}
	if err := n.readmit(ctx); err != nil {
		return up, err
	}
	if n.hostDNS = len(n.cfg.Resolvers) == 0; n.hostDNS {
		n.cfg.Resolvers = n.usable(hostResolvers(n.cfg.resolv.etc, n.cfg.resolv.resolved))
	}
	if len(n.cfg.Resolvers) == 0 {
		n.warnf("No DNS resolver is known (%s names none): every DNS query of a guest will fail. Name resolvers there.", n.cfg.resolv.etc)
	}
	c, err := openNft(n.cfg.faults)
	if err != nil {
		return up, err
	}
	foreign, err := foreignDrops(c, n.cfg.Name, n.cfg.IPv6.IsValid())
	if err != nil {
		return up, err
	}
	n.warn = append(n.warn, foreign...)
	return up, nil
}

// program makes table and sysctls what these uplinks need, and reports which sysctls that changed.
func (n *Network) program(up uplinks) ([]change, error) {
	changes, err := planSysctls(up.names(), n.cfg.IPv6.IsValid(), n.cfg.forwardAll)
	if err != nil {
		return nil, err
	}
	c, err := openNft(n.cfg.faults)
	if err != nil {
		return nil, err
	}
	notes, guarded, err := writeTable(c, n.cfg, up.names(), union(n.notes, changes), n.guarded)
	if err != nil {
		return nil, err
	}
	n.notes, n.guarded, n.rules = notes, guarded, nil
	if err := n.cfg.faults.at("set sysctls"); err != nil {
		return nil, err
	}
	if err := applySysctls(changes); err != nil {
		return nil, err
	}
	if n.rules, _, err = rulesOf(c, n.cfg.Name); err != nil {
		return nil, err
	}
	n.up = up
	return changes, nil
}

func (n *Network) warnf(format string, args ...any) {
	n.warn = append(n.warn, fmt.Sprintf(format, args...))
}

// prefixes returns the subnets in use.
func (n *Network) prefixes() []netip.Prefix {
	if n.cfg.IPv6.IsValid() {
		return []netip.Prefix{n.cfg.IPv4, n.cfg.IPv6}
	}
	return []netip.Prefix{n.cfg.IPv4}
}

// ensureBridge makes of the host's bridge what is missing: itself, the gateway addresses, its being up. It reports what it
// had to make.
func (n *Network) ensureBridge() (made []string, err error) {
	br, err := n.link.byName(n.cfg.Name)
	switch {
	case notFound(err):
		if br, err = n.createBridge(); err != nil {
			return nil, err
		}
		made = append(made, "the bridge")
	case err != nil:
		return nil, fmt.Errorf("find bridge: %w", err)
	case br.Attrs().Group != deviceGroup || br.Type() != "bridge":
		return nil, taken(n.cfg.Name, "network interface "+n.cfg.Name)
	}
	n.bridge.Store(int64(br.Attrs().Index))
	if err := n.cfg.faults.at("set sysctls of bridge"); err != nil {
		return made, err
	}
	changed, err := bridgeSysctls(n.cfg.Name, n.cfg.IPv6.IsValid())
	if err != nil {
		return made, err
	}
	if changed {
		made = append(made, "the bridge's sysctls")
	}
	there, err := n.link.addrs(br)
	if err != nil {
		return made, fmt.Errorf("list addresses of bridge: %w", err)
	}
	for _, p := range n.prefixes() {
		addr := gatewayAddr(p)
		if slices.ContainsFunc(there, func(a netlink.Addr) bool { return a.IPNet.String() == addr.IPNet.String() }) {
			continue
		}
		if err := n.link.addAddr(br, addr); err != nil {
			return made, fmt.Errorf("add %s to bridge: %w", addr.IPNet, err)
		}
		made = append(made, "the address "+addr.IPNet.String())
	}
	if br.Attrs().Flags&net.FlagUp == 0 {
		if err := n.link.setUp(br); err != nil {
			return made, fmt.Errorf("set bridge up: %w", err)
		}
		made = append(made, "the bridge's being up")
	}
	return made, nil
}

func (n *Network) createBridge() (netlink.Link, error) {
	off := false
	attrs := netlink.NewLinkAttrs()
	attrs.Name, attrs.MTU, attrs.Group = n.cfg.Name, n.mtu, deviceGroup
	attrs.HardwareAddr = hardwareAddr(gatewayOf(n.cfg.IPv4)) // fixed, or it would follow the ports' and guests would lose their gateway
	br := &netlink.Bridge{LinkAttrs: attrs, MulticastSnooping: &off}
	if err := n.link.add(br); err != nil {
		return nil, missingModule("create bridge", "bridge", err)
	}
	if err := n.link.setAlias(br, bridgeAlias(n.prefixes())); err != nil {
		return nil, fmt.Errorf("label bridge: %w", err)
	}
	return br, nil
}

// removeBridge takes the bridge away if there is one of ours.
func (n *Network) removeBridge() error {
	br, err := n.link.byName(n.cfg.Name)
	if notFound(err) || err == nil && br.Attrs().Group != deviceGroup {
		return nil
	}
	if err != nil {
		return fmt.Errorf("find bridge: %w", err)
	}
	return ignoreGone(n.link.del(br))
}

func gatewayAddr(p netip.Prefix) *netlink.Addr {
	gw := gatewayOf(p)
	addr := &netlink.Addr{IPNet: &net.IPNet{IP: gw.AsSlice(), Mask: net.CIDRMask(p.Bits(), gw.BitLen())}}
	if gw.Is6() {
		addr.Flags = unix.IFA_F_NODAD // usable at once: nobody else on this bridge may have it
	}
	return addr
}

// listen binds the DNS listeners to the gateway addresses.
func (n *Network) listen(ctx context.Context) error {
	n.dns = newForwarder(n.cfg.Resolvers, n.home.dialer(), n.cfg.Log)
	for _, p := range n.prefixes() {
		if err := n.cfg.faults.at("listen for DNS"); err != nil {
			return errors.Join(err, n.servers.close())
		}
		if err := n.servers.bind(ctx, netip.AddrPortFrom(gatewayOf(p), dnsPort)); err != nil {
			return errors.Join(err, n.servers.close())
		}
	}
	n.undo.Push("close DNS listeners", func(context.Context) error { return n.servers.close() })
	return nil
}

// Serve forwards the guests' DNS queries, and follows changes of the host's default routes, until ctx ends or the
// network is closed, then returns nil. It is called once: the listeners are closed when it returns.
func (n *Network) Serve(ctx context.Context) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	g, ctx := errgroup.WithContext(ctx)
	g.Go(func() error {
		defer cancel()
		return n.servers.serve(ctx, n.closing, n.dns)
	})
	g.Go(func() error { return n.followUplinks(ctx) })
	if err := g.Wait(); err != nil {
		return fmt.Errorf("serve network %s: %w", n.cfg.Name, err)
	}
	return nil
}

// Warnings returns what an operator should know although the network works as far as flint can see: one or two
// sentences each, with what to do.
func (n *Network) Warnings() []string {
	n.mu.Lock()
	defer n.mu.Unlock()
	return slices.Clone(n.warn)
}

// Close detaches every port, adopted or not, and removes bridge and table. Sysctls that Open changed, and that still are
// what it made them, get their old values back; if another flint network on this host still needs them, they become its to
// restore. It is idempotent, and does nothing after Leave. The errors of all steps come back joined.
func (n *Network) Close(ctx context.Context) error {
	ports, first := n.shutDown()
	if !first {
		return nil
	}
	var errs []error
	for _, p := range ports {
		errs = append(errs, p.Close(ctx))
	}
	return errors.Join(append(errs, n.made.Run(ctx), n.undo.Run(ctx))...)
}

// shutDown ends Serve and Attach. It returns the ports, and whether it is the first to do so.
func (n *Network) shutDown() ([]*Port, bool) {
	n.mu.Lock()
	defer n.mu.Unlock()
	if n.shut {
		return nil, false
	}
	n.shut = true
	close(n.closing)
	return slices.Collect(maps.Keys(n.ports)), true
}

// Leftovers lists the links and tables in the caller's network namespace that carry the name: after Close, none.
func Leftovers(name string) ([]string, error) {
	h, err := openLinks(nil)
	if err != nil {
		return nil, fmt.Errorf("open route netlink: %w", err)
	}
	defer h.close()
	links, err := ownLinks(h, name)
	if err != nil {
		return nil, err
	}
	var left []string
	for _, l := range links {
		left = append(left, "link "+l.Attrs().Name)
	}
	c, err := openNft(nil)
	if err != nil {
		return nil, err
	}
	found, err := tableExists(c, name)
	if err != nil {
		return nil, err
	}
	if found {
		left = append(left, "table inet "+name)
	}
	return left, nil
}

// validate reports what is wrong with the configuration.
func (c Config) validate() error {
	var errs []error
	bad := func(format string, args ...any) { errs = append(errs, fmt.Errorf(format, args...)) }
	if !validName(c.Name) {
		bad("name %q is not a letter followed by at most 10 letters and digits", c.Name)
	}
	if !c.IPv4.IsValid() || !c.IPv4.Addr().Is4() || c.IPv4.Bits() > 30 || c.IPv4.Bits() < 8 {
		bad("IPv4 subnet %s is not an IPv4 prefix between /8 and /30", c.IPv4)
	}
	if c.IPv6.IsValid() && (!c.IPv6.Addr().Is6() || c.IPv6.Addr().Is4In6() || c.IPv6.Bits() > 120 || c.IPv6.Bits() < 32) {
		bad("IPv6 subnet %s is not an IPv6 prefix between /32 and /120", c.IPv6)
	}
	for _, s := range c.Services {
		if s.Port() == 0 || !(c.IPv4.IsValid() && s.Addr() == gatewayOf(c.IPv4) || c.IPv6.IsValid() && s.Addr() == gatewayOf(c.IPv6)) {
			bad("service %s is not a port on a gateway address", s)
		}
	}
	for _, r := range c.Resolvers {
		if r.Port() == 0 || !r.Addr().IsValid() || c.IPv4.Contains(r.Addr()) || c.IPv6.Contains(r.Addr()) {
			bad("resolver %s is not an address and port outside the guests' subnets", r)
		}
	}
	if len(errs) == 0 {
		return nil
	}
	return &flint.Fault{
		Code: "network.config", What: "open network", Kind: flint.ErrConfig, Err: errors.Join(errs...),
		Fix: "correct the network section of flint's configuration",
	}
}

// validName accepts what can be an interface name, a table name and a prefix of port names without any quoting.
func validName(s string) bool {
	for i, r := range s {
		letter := r >= 'a' && r <= 'z' || r >= 'A' && r <= 'Z'
		if !letter && (i == 0 || r < '0' || r > '9') {
			return false
		}
	}
	return s != "" && len(s) <= maxName
}

// checkHost reports what this process or this kernel lacks before anything is touched.
func checkHost() error {
	if err := checkCapabilities(); err != nil {
		return err
	}
	if _, err := os.Stat(tunDevice); err != nil {
		return &flint.Fault{
			Code: "network.tun", What: "open " + tunDevice, Err: err,
			Fix: "load the kernel module: modprobe tun (in a container, pass the device on: --device " + tunDevice + ")",
		}
	}
	return nil
}
