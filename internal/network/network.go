// Package network gives every guest a network of its own and takes it away again.
//
// One bridge on the host holds the gateway addresses. Each guest gets an anonymous network namespace with nothing in it
// but a tap, one end of a veth pair and a bridge without addresses between them; the other end of the veth is an
// isolated port of the host's bridge, so a VMM that is broken out of sees no network of the host. One nftables table
// translates addresses and says what guests may reach, and a DNS forwarder answers on the gateway addresses. All of it
// lives in the kernel under one name, is taken over from a process that died, and is gone after Close.
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

	forwardAll bool // for tests: forward IPv6 as on kernels that cannot do it per interface
}

// Network is an open network. Its methods are safe for concurrent use. Everything it does happens in the network
// namespace of the thread that called Open.
type Network struct {
	cfg     Config
	home    namespace
	lock    *os.File        // holds the name
	link    *netlink.Handle // route netlink in home
	watch   *routeWatch     // of home's routes
	bridge  int             // interface index
	mtu     int             // bytes, of bridge, veths and taps
	dns     *forwarder
	servers listeners
	warn    []string
	closing chan struct{} // closed by Close

	mu    sync.Mutex
	undo  undo.Stack
	pool  *pool
	ports map[*Port]struct{}
	shut  bool
	up    uplinks // as table and sysctls have them; changed by Open and Serve only
}

// Gateway returns the first host address of a subnet: the address the host has in it, also the guests' DNS server.
func Gateway(p netip.Prefix) netip.Addr { return p.Masked().Addr().Next() }

// Open makes the network: bridge, table, sysctls, DNS listeners. What an earlier process left under the same name is
// removed first; a live process that uses the name is a Fault. On error nothing is left behind. The DNS listeners are
// bound, but nothing answers before Serve. It needs CAP_NET_ADMIN and CAP_SYS_ADMIN.
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
	n := &Network{cfg: cfg, ports: map[*Port]struct{}{}, closing: make(chan struct{})}
	var err error
	if n.home, err = currentNamespace(); err != nil {
		return nil, err
	}
	n.undo.Push("close namespace descriptor", func(context.Context) error { return n.home.Close() })
	if err := n.home.do(func() error { return n.open(ctx) }); err != nil {
		return nil, errors.Join(permission("open network "+cfg.Name, err), n.undo.Run(ctx))
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
	if n.link, err = netlink.NewHandle(unix.NETLINK_ROUTE); err != nil {
		return fmt.Errorf("open route netlink: %w", err)
	}
	n.undo.Push("close route netlink", func(context.Context) error { n.link.Close(); return nil })
	if err := removeLeftovers(n.link, n.cfg.Name); err != nil {
		return err
	}
	if n.watch, err = openRouteWatch(); err != nil { // before the routes are looked at, so that no change is missed
		return err
	}
	n.undo.Push("close watch of routes", func(context.Context) error { return ignoreClosed(n.watch.Close()) })
	if err := n.survey(); err != nil {
		return err
	}
	if err := ctx.Err(); err != nil {
		return err
	}
	changes, err := planSysctls(n.up.names(), n.cfg.IPv6.IsValid(), n.cfg.forwardAll)
	if err != nil {
		return err
	}
	if err := createTable(n.cfg, n.up.names(), changes); err != nil {
		return err
	}
	n.undo.Push("remove table and restore sysctls", func(context.Context) error {
		return n.home.do(func() error { return removeTable(n.cfg.Name) })
	})
	if err := n.makeBridge(); err != nil {
		return err
	}
	if err := applySysctls(changes); err != nil {
		return err
	}
	return n.listen(ctx)
}

// survey looks at the host and decides what follows from it: whether IPv6 can be had, the uplinks, the MTU, the
// resolvers, and what the operator should know.
func (n *Network) survey() error {
	if n.cfg.IPv6.IsValid() && !hostHasIPv6() {
		n.warnf("IPv6 is off on this host (the kernel has none, or net.ipv6.conf.all.disable_ipv6 is 1): guests get IPv4 only.")
		n.cfg.IPv6 = netip.Prefix{}
	}
	for _, p := range n.prefixes() {
		if err := checkOverlap(n.link, p); err != nil {
			return err
		}
	}
	var err error
	if n.up, err = findUplinks(n.link); err != nil {
		return err
	}
	if len(n.up.links) == 0 {
		n.warnf("This host has no default route: guests reach nothing but the host's gateway addresses until there is one.")
	}
	if n.mtu, err = guestMTU(n.up.mtu, n.cfg.IPv6.IsValid()); err != nil {
		return err
	}
	if n.pool, err = newPool(n.cfg.IPv4, n.cfg.IPv6); err != nil {
		return err
	}
	if len(n.cfg.Resolvers) == 0 {
		n.cfg.Resolvers = hostResolvers(resolvConf, resolvedConf)
	}
	if len(n.cfg.Resolvers) == 0 {
		n.warnf("No DNS resolver is known (%s names none): every DNS query of a guest will fail. Name resolvers in flint's configuration.", resolvConf)
	}
	foreign, err := foreignDrops(n.cfg.Name, n.cfg.IPv6.IsValid())
	if err != nil {
		return err
	}
	n.warn = append(n.warn, foreign...)
	return nil
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

// makeBridge creates the host's bridge with the gateway addresses, up.
func (n *Network) makeBridge() error {
	off := false
	attrs := netlink.NewLinkAttrs()
	attrs.Name, attrs.MTU, attrs.Group = n.cfg.Name, n.mtu, deviceGroup
	attrs.HardwareAddr = hardwareAddr(Gateway(n.cfg.IPv4)) // fixed, or it would follow the ports' and guests would lose their gateway
	br := &netlink.Bridge{LinkAttrs: attrs, MulticastSnooping: &off}
	if err := n.link.LinkAdd(br); err != nil {
		return missingModule("create bridge", "bridge", err)
	}
	n.undo.Push("remove bridge", func(context.Context) error { return ignoreGone(n.link.LinkDel(br)) })
	n.bridge = br.Index
	if err := bridgeSysctls(n.cfg.Name, n.cfg.IPv6.IsValid()); err != nil {
		return err
	}
	for _, p := range n.prefixes() {
		gw := Gateway(p)
		addr := &netlink.Addr{IPNet: &net.IPNet{IP: gw.AsSlice(), Mask: net.CIDRMask(p.Bits(), gw.BitLen())}}
		if gw.Is6() {
			addr.Flags = unix.IFA_F_NODAD // usable at once: nobody else can be on this bridge yet
		}
		if err := n.link.AddrAdd(br, addr); err != nil {
			return fmt.Errorf("add %s to bridge: %w", gw, err)
		}
	}
	if err := n.link.LinkSetUp(br); err != nil {
		return fmt.Errorf("set bridge up: %w", err)
	}
	return nil
}

// listen binds the DNS listeners to the gateway addresses.
func (n *Network) listen(ctx context.Context) error {
	n.dns = newForwarder(n.cfg.Resolvers, n.home.dialer(), n.cfg.Log)
	for _, p := range n.prefixes() {
		if err := n.servers.bind(ctx, netip.AddrPortFrom(Gateway(p), dnsPort)); err != nil {
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
func (n *Network) Warnings() []string { return slices.Clone(n.warn) }

// Close detaches every port and removes bridge and table. Sysctls that Open changed, and that still are what it made
// them, get their old values back; if another flint network on this host still needs them, they become its to restore.
// It is idempotent. The errors of all steps come back joined.
func (n *Network) Close(ctx context.Context) error {
	n.mu.Lock()
	if n.shut {
		n.mu.Unlock()
		return nil
	}
	n.shut = true
	close(n.closing)
	ports := slices.Collect(maps.Keys(n.ports))
	n.mu.Unlock()
	var errs []error
	for _, p := range ports {
		errs = append(errs, p.Close(ctx))
	}
	return errors.Join(append(errs, n.undo.Run(ctx))...)
}

// Leftovers lists the links and tables in the caller's network namespace that carry the name: after Close, none.
func Leftovers(name string) ([]string, error) {
	h, err := netlink.NewHandle(unix.NETLINK_ROUTE)
	if err != nil {
		return nil, fmt.Errorf("open route netlink: %w", err)
	}
	defer h.Close()
	links, err := ownLinks(h, name)
	if err != nil {
		return nil, err
	}
	var left []string
	for _, l := range links {
		left = append(left, "link "+l.Attrs().Name)
	}
	found, err := tableExists(name)
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
		if s.Port() == 0 || !(c.IPv4.IsValid() && s.Addr() == Gateway(c.IPv4) || c.IPv6.IsValid() && s.Addr() == Gateway(c.IPv6)) {
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
