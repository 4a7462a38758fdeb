package network

import (
	"errors"

	"github.com/google/nftables"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// faults is asked before every call into the kernel that makes, changes or looks at something, and may make it fail. It
// is for tests; nil lets everything pass.
type faults func(call string) error

func (f faults) at(call string) error {
	if f == nil {
		return nil
	}
	return f(call)
}

// try returns what call returns, unless the fault comes first.
func try[T any](f faults, name string, call func() (T, error)) (T, error) {
	if err := f.at(name); err != nil {
		var none T
		return none, err
	}
	return call()
}

// dumps bounds how often a list is asked for: the kernel interrupts it when something of that kind changes meanwhile, which
// other programs may do all the time.
const dumps = 20

// whole asks for a list until the kernel gives all of it.
func whole[T any](f faults, name string, call func() ([]T, error)) ([]T, error) {
	for n := 1; ; n++ {
		list, err := try(f, name, call)
		if n == dumps || !errors.Is(err, netlink.ErrDumpInterrupted) {
			return list, err
		}
	}
}

// links is route netlink in one network namespace.
type links struct {
	h    *netlink.Handle
	fail faults
}

// openLinks opens route netlink in the calling thread's network namespace. The caller closes it.
func openLinks(fail faults) (links, error) {
	h, err := try(fail, "open route netlink", func() (*netlink.Handle, error) { return netlink.NewHandle(unix.NETLINK_ROUTE) })
	return links{h, fail}, err
}

// close is idempotent, and does nothing for what was never opened.
func (l links) close() {
	if l.h != nil {
		l.h.Close()
	}
}

func (l links) list() ([]netlink.Link, error) {
	return whole(l.fail, "list links", l.h.LinkList)
}

func (l links) byName(name string) (netlink.Link, error) {
	return try(l.fail, "find link "+name, func() (netlink.Link, error) { return l.h.LinkByName(name) })
}

func (l links) byIndex(i int) (netlink.Link, error) {
	return try(l.fail, "find link by index", func() (netlink.Link, error) { return l.h.LinkByIndex(i) })
}

func (l links) add(d netlink.Link) error {
	return l.do("add link "+d.Attrs().Name, func() error { return l.h.LinkAdd(d) })
}

func (l links) del(d netlink.Link) error {
	return l.do("delete link "+d.Attrs().Name, func() error { return l.h.LinkDel(d) })
}

func (l links) setMaster(d netlink.Link, master int) error {
	return l.do("set master of "+d.Attrs().Name, func() error { return l.h.LinkSetMasterByIndex(d, master) })
}

func (l links) isolate(d netlink.Link) error {
	return l.do("isolate "+d.Attrs().Name, func() error { return l.h.LinkSetIsolated(d, true) })
}

func (l links) setAlias(d netlink.Link, alias string) error {
	return l.do("label "+d.Attrs().Name, func() error { return l.h.LinkSetAlias(d, alias) })
}

func (l links) setMTU(d netlink.Link, mtu int) error {
	return l.do("set MTU of "+d.Attrs().Name, func() error { return l.h.LinkSetMTU(d, mtu) })
}

func (l links) setUp(d netlink.Link) error {
	return l.do("set up "+d.Attrs().Name, func() error { return l.h.LinkSetUp(d) })
}

func (l links) addrs(d netlink.Link) ([]netlink.Addr, error) {
	return whole(l.fail, "list addresses of "+d.Attrs().Name, func() ([]netlink.Addr, error) { return l.h.AddrList(d, netlink.FAMILY_ALL) })
}

func (l links) addAddr(d netlink.Link, a *netlink.Addr) error {
	return l.do("add address to "+d.Attrs().Name, func() error { return l.h.AddrAdd(d, a) })
}

// routes lists the routes of a family in all tables.
func (l links) routes(family int) ([]netlink.Route, error) {
	all := &netlink.Route{Table: unix.RT_TABLE_UNSPEC}
	return whole(l.fail, "list routes", func() ([]netlink.Route, error) {
		return l.h.RouteListFiltered(family, all, netlink.RT_FILTER_TABLE)
	})
}

// mainRoutes lists the routes of all families in the main table.
func (l links) mainRoutes() ([]netlink.Route, error) {
	return whole(l.fail, "list routes of the main table", func() ([]netlink.Route, error) { return l.h.RouteList(nil, netlink.FAMILY_ALL) })
}

// namespaceID is the number by which this namespace knows another; negative for one it does not know.
func (l links) namespaceID(ns namespace) (int, error) {
	return try(l.fail, "number network namespace", func() (int, error) { return l.h.GetNetNsIdByFd(int(ns.Fd())) })
}

func (l links) do(call string, fn func() error) error {
	if err := l.fail.at(call); err != nil {
		return err
	}
	return fn()
}

// nft is nftables in the network namespace of the thread that calls. Changes are sent by Flush, in one transaction.
type nft struct {
	*nftables.Conn
	fail faults
}

func openNft(fail faults) (nft, error) {
	c, err := try(fail, "open nftables", func() (*nftables.Conn, error) { return nftables.New() })
	if err != nil {
		return nft{}, nftMissing("open nftables", err)
	}
	return nft{c, fail}, nil
}

// Flush sends what was collected.
func (c nft) Flush() error {
	if err := c.fail.at("commit nftables transaction"); err != nil {
		return err
	}
	return c.Conn.Flush()
}

// GetRules lists the rules of a chain.
func (c nft) GetRules(t *nftables.Table, ch *nftables.Chain) ([]*nftables.Rule, error) {
	return try(c.fail, "list rules of "+ch.Name, func() ([]*nftables.Rule, error) { return c.Conn.GetRules(t, ch) })
}

// GetSetElements lists the elements of a set.
func (c nft) GetSetElements(s *nftables.Set) ([]nftables.SetElement, error) {
	return try(c.fail, "list elements of "+s.Name, func() ([]nftables.SetElement, error) { return c.Conn.GetSetElements(s) })
}

// ListChains lists the chains of all families.
func (c nft) ListChains() ([]*nftables.Chain, error) {
	return try(c.fail, "list chains", c.Conn.ListChains)
}

// ListChainsOfTableFamily lists the chains of one family.
func (c nft) ListChainsOfTableFamily(f nftables.TableFamily) ([]*nftables.Chain, error) {
	return try(c.fail, "list chains of a family", func() ([]*nftables.Chain, error) { return c.Conn.ListChainsOfTableFamily(f) })
}

// ListTablesOfFamily lists the tables of one family.
func (c nft) ListTablesOfFamily(f nftables.TableFamily) ([]*nftables.Table, error) {
	return try(c.fail, "list tables", func() ([]*nftables.Table, error) { return c.Conn.ListTablesOfFamily(f) })
}
