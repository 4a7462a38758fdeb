package network

import (
	"context"
	"errors"
	"fmt"
	"os"
	"strconv"
	"sync"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"flint"
	"flint/internal/undo"
)

// Names of the three links in a guest's namespace. They are the same in all: nothing else is there.
const (
	tapName        = "tap0"
	guestVethName  = "veth0"
	guestBridgeDev = "br0"
)

// Port is one guest's place in the network. Its methods are safe for concurrent use.
type Port struct {
	n     *Network
	index int // host index
	addr  flint.Address
	ns    namespace
	tap   *os.File // nil when adopted
	alias string

	mu       sync.Mutex
	veth     int        // interface index of the host's end
	attached bool       // complete
	undo     undo.Stack // what can outlive this process: addresses and veth
	own      undo.Stack // its descriptors
}

// Attach makes the namespace, tap and addresses of one guest. The id names the guest in `ip link` (the port's alias), in
// messages, and to Adopt, which takes only what has an id to itself. When all addresses are taken it returns the Fault network.full. On error nothing
// is left behind.
func (n *Network) Attach(ctx context.Context, id string) (*Port, error) {
	if err := ctx.Err(); err != nil {
		return nil, err
	}
	p := &Port{n: n, alias: portAlias(id)}
	if err := n.admit(p); err != nil {
		return nil, err
	}
	if err := p.attach(); err != nil {
		return nil, errors.Join(permission("attach guest to network "+n.cfg.Name, err), p.Close(ctx))
	}
	return p, nil
}

// admit gives p its addresses and makes it one of the ports Close closes.
func (n *Network) admit(p *Port) error {
	n.mu.Lock()
	defer n.mu.Unlock()
	if n.shut {
		return fmt.Errorf("attach to network %s: %w", n.cfg.Name, os.ErrClosed)
	}
	i, err := n.pool.take()
	if err != nil {
		return err
	}
	// Held until the port is complete, so that a Close of the network cannot overtake its making.
	p.mu.Lock()
	n.enter(p, i)
	return nil
}

// enter makes p one of the ports, with addresses that are taken already. The caller holds n.mu.
func (n *Network) enter(p *Port, i int) {
	n.ports[p] = struct{}{}
	p.undo.Push("release addresses", func(context.Context) error {
		n.mu.Lock()
		defer n.mu.Unlock()
		n.pool.release(i)
		delete(n.ports, p)
		return nil
	})
	p.index = i
	p.addr = flint.Address{Prefixes: n.pool.prefixes(i), MTU: n.mtu}
	p.addr.MAC = hardwareAddr(p.addr.Prefixes[0].Addr()).String()
	for _, s := range n.prefixes() {
		p.addr.Gateways = append(p.addr.Gateways, gatewayOf(s))
	}
	p.undo.Push("remove veth", func(context.Context) error { return p.removeVeth() })
}

// attach makes what the port consists of. It ends the exclusion that admit began.
func (p *Port) attach() error {
	defer p.mu.Unlock()
	if err := p.n.cfg.faults.at("make guest namespace"); err != nil {
		return err
	}
	var inside links
	defer func() { inside.close() }()
	err := newNamespace(func(ns namespace) (err error) {
		p.ns = ns
		p.own.Push("close guest namespace", func(context.Context) error { return ignoreClosed(ns.Close()) })
		if err := namespaceSysctls(); err != nil {
			return err
		}
		if err := p.n.cfg.faults.at("create tap"); err != nil {
			return err
		}
		if p.tap, err = createTap(tapName); err != nil {
			return err
		}
		p.own.Push("close tap", func(context.Context) error { return ignoreClosed(p.tap.Close()) })
		if inside, err = openLinks(p.n.cfg.faults); err != nil {
			return fmt.Errorf("open route netlink: %w", err)
		}
		return nil
	})
	if err != nil {
		return err
	}
	if err := p.makeOutside(); err != nil {
		return err
	}
	if err := p.makeInside(inside); err != nil {
		return err
	}
	p.attached = true
	return nil
}

// makeOutside makes the veth pair: one end an isolated port of the host's bridge, the other in the guest's namespace.
func (p *Port) makeOutside() error {
	attrs := netlink.NewLinkAttrs()
	attrs.Name, attrs.MTU, attrs.Group = portName(p.n.cfg.Name, p.index), p.n.mtu, deviceGroup
	veth := netlink.NewVeth(attrs)
	veth.PeerName, veth.PeerNamespace = guestVethName, netlink.NsFd(int(p.ns.Fd()))
	if err := p.n.link.add(veth); err != nil {
		return missingModule("create veth", "veth", err)
	}
	p.veth = veth.Index
	if err := p.n.link.setAlias(veth, p.alias); err != nil {
		return fmt.Errorf("label veth: %w", err)
	}
	return p.connect(veth)
}

// connect makes the host's end of the veth pair an isolated port of the bridge, and sets it up.
func (p *Port) connect(veth netlink.Link) error {
	link := p.n.link
	if err := link.setMaster(veth, int(p.n.bridge.Load())); err != nil {
		return fmt.Errorf("attach veth to bridge: %w", err)
	}
	// Before the link is up: guests never see each other, not even for a moment.
	if err := link.isolate(veth); err != nil {
		return fmt.Errorf("isolate bridge port: %w", err)
	}
	if err := link.setUp(veth); err != nil {
		return fmt.Errorf("set veth up: %w", err)
	}
	return nil
}

// removeVeth takes the host's end away, and with it the guest's.
func (p *Port) removeVeth() error {
	if p.veth == 0 {
		return nil // it was never made
	}
	attrs := netlink.NewLinkAttrs()
	attrs.Name, attrs.Index = portName(p.n.cfg.Name, p.index), p.veth
	return ignoreGone(p.n.link.del(&netlink.GenericLink{LinkAttrs: attrs, LinkType: "veth"}))
}

// makeInside joins tap and veth in the guest's namespace by a bridge that has no address.
func (p *Port) makeInside(h links) error {
	off := false
	attrs := netlink.NewLinkAttrs()
	attrs.Name, attrs.MTU = guestBridgeDev, p.n.mtu
	br := &netlink.Bridge{LinkAttrs: attrs, MulticastSnooping: &off}
	if err := h.add(br); err != nil {
		return missingModule("create bridge in guest namespace", "bridge", err)
	}
	for _, name := range []string{tapName, guestVethName} {
		if err := p.joinInside(h, name, br.Index); err != nil {
			return err
		}
	}
	if err := h.setUp(br); err != nil {
		return fmt.Errorf("set bridge up in guest namespace: %w", err)
	}
	return nil
}

// joinInside makes a link a port of the bridge in the guest's namespace, up.
func (p *Port) joinInside(h links, name string, bridge int) error {
	l, err := h.byName(name)
	if err != nil {
		return fmt.Errorf("find %s in guest namespace: %w", name, err)
	}
	if err := h.setMTU(l, p.n.mtu); err != nil {
		return fmt.Errorf("set MTU of %s: %w", name, err)
	}
	if err := h.setMaster(l, bridge); err != nil {
		return fmt.Errorf("attach %s to bridge: %w", name, err)
	}
	if err := h.setUp(l); err != nil {
		return fmt.Errorf("set %s up: %w", name, err)
	}
	return nil
}

// portName names the host's end of a guest's veth pair after the guest's host index: at most maxName bytes, a dash and
// three digits.
func portName(network string, index int) string {
	return network + "-" + strconv.FormatInt(int64(index), 36)
}

// portAlias is how `ip link` and later processes know whose port it is. The kernel takes 255 bytes (IFALIASZ).
func portAlias(id string) string { return "flint " + id[:min(len(id), 64)] }

// Address is what the guest is to be told.
func (p *Port) Address() flint.Address { return p.addr }

// Tap is the open queue of the tap (IFF_TAP|IFF_NO_PI|IFF_VNET_HDR), for a VMM that takes a descriptor. It belongs to
// the port; the caller may close it early, and must before a VMM can open the tap by its name, since a tap has one queue. It is nil when the port was adopted: the VMM has
// the tap open.
func (p *Port) Tap() *os.File { return p.tap }

// TapName is the tap's name in Namespace.
func (p *Port) TapName() string { return tapName }

// Namespace is the network namespace the tap is in. It belongs to the port.
func (p *Port) Namespace() *os.File { return p.ns.File }

// Close takes the guest off the network and releases its addresses. The namespace itself ends with the last process in
// it. Close is idempotent, and does nothing after the network's Leave.
func (p *Port) Close(ctx context.Context) error {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.attached = false
	return errors.Join(p.undo.Run(ctx), p.own.Run(ctx))
}

// letGo closes the port's descriptors and leaves the rest to the next process.
func (p *Port) letGo(ctx context.Context) error {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.attached = false
	p.undo.Take()
	return p.own.Run(ctx)
}

// ignoreClosed forgives a descriptor that its user closed before us.
func ignoreClosed(err error) error {
	if errors.Is(err, os.ErrClosed) {
		return nil
	}
	return err
}

// ignoreGone forgives a link that ended by itself, as a veth does when its peer's namespace ends.
func ignoreGone(err error) error {
	if errors.Is(err, unix.ENODEV) {
		return nil
	}
	return err
}

// notFound reports whether an error says that there is no such link.
func notFound(err error) bool {
	_, gone := errors.AsType[netlink.LinkNotFoundError](err)
	return gone
}
