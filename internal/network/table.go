package network

import (
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"strings"

	"github.com/google/nftables"
	"github.com/google/nftables/binaryutil"
	"github.com/google/nftables/expr"
	"github.com/google/nftables/userdata"
	"golang.org/x/sys/unix"

	"flint"
)

// undoChain is the name of the chain that marks a table as a flint network's. It hooks nowhere; its rules match
// nothing and their comments are the sysctls to restore, so that the note lives exactly as long as the network.
const undoChain = "flint_undo"

// forwardChain is the name of the chain that decides what is forwarded.
const forwardChain = "forward"

// writeTable programs everything guests may and may not do, and notes the changes, in one transaction. A table of ours
// that is there is replaced by the same transaction, and what it has noted stays noted; connections that are established
// are the kernel's connection tracking's and go on. Besides the noted changes, those in guarded are guarded. It returns
// all that is noted and all that is guarded now.
func writeTable(c nft, cfg Config, uplinks []string, changes, guarded []change) (notes, guards []change, err error) {
	old, err := findUndo(c, cfg.Name)
	if err != nil {
		return nil, nil, err
	}
	if old != nil {
		noted, err := notedChanges(c, old)
		if err != nil {
			return nil, nil, err
		}
		notes = noted
	}
	// One that is noted comes again when a link was removed and another has its name.
	notes = union(notes, changes)
	guards = union(guarded, notes)
	others, err := otherNetworks(c, cfg.Name)
	if err != nil {
		return nil, nil, err
	}
	for _, o := range others {
		theirs, err := notedChanges(c, o)
		if err != nil {
			return nil, nil, err
		}
		guards = union(guards, theirs)
	}
	if old != nil {
		c.DelTable(old.Table)
	}
	t := c.AddTable(&nftables.Table{Name: cfg.Name, Family: nftables.TableFamilyINet})
	set := uplinkSet(t)
	if err := c.AddSet(set, elements(uplinks)); err != nil {
		return nil, nil, fmt.Errorf("add set of uplinks: %w", err)
	}
	b := ruleset{c, t, cfg, set}
	b.forward(guards)
	b.input()
	b.postrouting()
	noteChanges(c, c.AddChain(&nftables.Chain{Name: undoChain, Table: t}), notes)
	if err := c.Flush(); err != nil {
		return nil, nil, nftMissing("create table inet "+cfg.Name, err)
	}
	return notes, guards, nil
}

// union is a and what of b is not in it.
func union(a, b []change) []change {
	u := slices.Clone(a)
	for _, ch := range b {
		if !slices.Contains(u, ch) {
			u = append(u, ch)
		}
	}
	return u
}

// rulesOf lists the rules of a table of ours, each by its chain and the number the kernel gave it, and what is noted. A
// rule that somebody removed and added again has another number. Nothing of it is there if the table is not.
func rulesOf(c nft, name string) (rules []string, notes []change, err error) {
	undo, err := findUndo(c, name)
	if err != nil || undo == nil {
		return nil, nil, err
	}
	chains, err := c.ListChainsOfTableFamily(nftables.TableFamilyINet)
	if err != nil {
		return nil, nil, nftMissing("list nftables chains", err)
	}
	for _, ch := range chains {
		if ch.Table.Name != name {
			continue
		}
		rs, err := c.GetRules(undo.Table, ch)
		if err != nil {
			return nil, nil, fmt.Errorf("list rules of chain %s: %w", ch.Name, err)
		}
		for _, r := range rs {
			rules = append(rules, fmt.Sprintf("%s %d", ch.Name, r.Handle))
			if note, ok := parseNote(r.UserData); ok && ch.Name == undoChain {
				notes = append(notes, note)
			}
		}
	}
	return rules, notes, nil
}

// uplinksOf lists the names in the set of uplinks, in order.
func uplinksOf(c nft, name string) ([]string, error) {
	set := uplinkSet(&nftables.Table{Name: name, Family: nftables.TableFamilyINet})
	elems, err := c.GetSetElements(set)
	if err != nil {
		return nil, fmt.Errorf("list uplinks in table inet %s: %w", name, err)
	}
	var names []string
	for _, e := range elems {
		names = append(names, strings.TrimRight(string(e.Key), "\x00"))
	}
	slices.Sort(names)
	return names, nil
}

// takeOver adds changes to those of a table that exists: the notes and the rules that guard them. Nothing is sent
// before Flush.
func takeOver(c nft, undo *nftables.Chain, changes []change) {
	noteChanges(c, undo, changes)
	forward := &nftables.Chain{Name: forwardChain, Table: undo.Table}
	for _, g := range guards(changes) {
		c.AddRule(&nftables.Rule{Table: undo.Table, Chain: forward, Exprs: g})
	}
}

// uplinkSet is the set of the names of the uplinks.
func uplinkSet(t *nftables.Table) *nftables.Set {
	return &nftables.Set{Table: t, Name: "uplinks", KeyType: nftables.TypeIFName}
}

func elements(links []string) []nftables.SetElement {
	var elems []nftables.SetElement
	for _, l := range links {
		elems = append(elems, nftables.SetElement{Key: ifname(l)})
	}
	return elems
}

// ruleset adds the chains of one network to a table.
type ruleset struct {
	c       nft
	t       *nftables.Table
	cfg     Config
	uplinks *nftables.Set
}

func (b ruleset) chain(name string, typ nftables.ChainType, hook *nftables.ChainHook, prio *nftables.ChainPriority) func(...[]expr.Any) {
	ch := b.c.AddChain(&nftables.Chain{Name: name, Table: b.t, Type: typ, Hooknum: hook, Priority: prio})
	return func(parts ...[]expr.Any) {
		b.c.AddRule(&nftables.Rule{Table: b.t, Chain: ch, Exprs: slices.Concat(parts...)})
	}
}

// forward lets guests out by the uplinks and nothing in that they did not ask for. Traffic that is not the guests' is
// left to others, except that a host which forwarded nothing before us still forwards nothing but for guests.
func (b ruleset) forward(guarded []change) {
	rule := b.chain(forwardChain, nftables.ChainTypeFilter, nftables.ChainHookForward, nftables.ChainPriorityFilter)
	br := b.cfg.Name
	rule(established(), accept())
	rule(iif(br), oif(br), drop())
	rule(iif(br), daddr(netip.MustParsePrefix("169.254.0.0/16")), drop())
	rule(iif(br), oifIn(b.uplinks), accept())
	rule(iif(br), drop())
	rule(oif(br), drop())
	for _, g := range guards(guarded) {
		rule(g)
	}
}

// guards are the rules that keep what the changes would let through: nothing is forwarded but for guests where nothing
// was before.
func guards(changes []change) [][]expr.Any {
	var rules [][]expr.Any
	for _, g := range changes {
		parts := strings.Split(g.path, "/") // ipv4/conf/eth0/forwarding
		if len(parts) != 4 || g.new != "1" || parts[3] == "accept_ra" {
			continue
		}
		family := byte(unix.NFPROTO_IPV4)
		if parts[0] == "ipv6" {
			family = unix.NFPROTO_IPV6
		}
		in := iif(parts[2])
		if parts[2] == "all" {
			in = nil
		}
		rules = append(rules, slices.Concat(in, nfproto(family), notFromGuests(), notRedirected(), drop()))
	}
	return rules
}

// input says what guests may ask of the host itself, and keeps the gateway addresses from everyone else's neighbours.
func (b ruleset) input() {
	rule := b.chain("input", nftables.ChainTypeFilter, nftables.ChainHookInput, nftables.ChainPriorityFilter)
	br := b.cfg.Name
	gateways := []netip.Addr{gatewayOf(b.cfg.IPv4)}
	if b.cfg.IPv6.IsValid() {
		gateways = append(gateways, gatewayOf(b.cfg.IPv6))
	}
	for _, gw := range gateways {
		rule(iifNot(br), iifNot("lo"), daddr(host(gw)), drop())
	}
	rule(iifNot(br), accept())
	rule(established(), accept())
	for _, gw := range gateways {
		for _, proto := range []byte{unix.IPPROTO_UDP, unix.IPPROTO_TCP} {
			rule(daddr(host(gw)), dport(proto, dnsPort), accept())
		}
		if gw.Is4() {
			rule(daddr(host(gw)), icmp(unix.IPPROTO_ICMP, icmpEcho), accept())
		} else {
			rule(daddr(host(gw)), icmp(unix.IPPROTO_ICMPV6, icmp6Echo), accept())
			rule(icmp(unix.IPPROTO_ICMPV6, icmp6NeighbourSolicit), accept())
			rule(icmp(unix.IPPROTO_ICMPV6, icmp6NeighbourAdvert), accept())
		}
	}
	for _, s := range b.cfg.Services {
		if s.Addr().Is4() || b.cfg.IPv6.IsValid() {
			rule(daddr(host(s.Addr())), dport(unix.IPPROTO_TCP, s.Port()), accept())
		}
	}
	rule(drop())
}

// postrouting hides guests behind the host's addresses.
func (b ruleset) postrouting() {
	rule := b.chain("postrouting", nftables.ChainTypeNAT, nftables.ChainHookPostrouting, nftables.ChainPriorityNATSource)
	rule(oifNot(b.cfg.Name), saddr(b.cfg.IPv4), masquerade())
	if b.cfg.IPv6.IsValid() {
		rule(oifNot(b.cfg.Name), saddr(b.cfg.IPv6), masquerade())
	}
}

// removeTable removes the network's table and settles the sysctls it noted: another live flint network inherits them,
// else they are restored. A table that is not there is fine. It works in the calling thread's namespace.
func removeTable(fail faults, name string) error {
	c, err := openNft(fail)
	if err != nil {
		return err
	}
	undo, err := findUndo(c, name)
	if err != nil || undo == nil {
		return err
	}
	changes, err := notedChanges(c, undo)
	if err != nil {
		return err
	}
	others, err := otherNetworks(c, name)
	if err != nil {
		return err
	}
	var restore error
	if len(others) > 0 {
		takeOver(c, others[0], changes)
	} else {
		restore = restoreSysctls(changes)
	}
	c.DelTable(undo.Table)
	if err := c.Flush(); err != nil {
		return errors.Join(restore, fmt.Errorf("delete table inet %s: %w", name, err))
	}
	return restore
}

// tableExists reports whether there is a table inet of that name, ours or not.
func tableExists(c nft, name string) (bool, error) {
	tables, err := c.ListTablesOfFamily(nftables.TableFamilyINet)
	if err != nil {
		return false, nftMissing("list nftables tables", err)
	}
	return slices.ContainsFunc(tables, func(t *nftables.Table) bool { return t.Name == name }), nil
}

// findUndo returns the mark of the network's table, or nil if there is no such table. A table without the mark is
// somebody else's and a Fault.
func findUndo(c nft, name string) (*nftables.Chain, error) {
	found, err := tableExists(c, name)
	if err != nil || !found {
		return nil, err
	}
	all, err := undoChains(c)
	if err != nil {
		return nil, err
	}
	for _, u := range all {
		if u.Table.Name == name {
			u.Table.Family = nftables.TableFamilyINet
			return u, nil
		}
	}
	return nil, taken(name, "nftables table inet "+name)
}

// otherNetworks returns the marks of all flint networks but the named one.
func otherNetworks(c nft, name string) ([]*nftables.Chain, error) {
	all, err := undoChains(c)
	return slices.DeleteFunc(all, func(u *nftables.Chain) bool { return u.Table.Name == name }), err
}

func undoChains(c nft) ([]*nftables.Chain, error) {
	chains, err := c.ListChainsOfTableFamily(nftables.TableFamilyINet)
	if err != nil {
		return nil, nftMissing("list nftables chains", err)
	}
	return slices.DeleteFunc(chains, func(ch *nftables.Chain) bool { return ch.Name != undoChain || ch.Hooknum != nil }), nil
}

// noteChanges adds the changes to an undo chain. Nothing is sent before Flush.
func noteChanges(c nft, undo *nftables.Chain, changes []change) {
	for _, ch := range changes {
		note := userdata.AppendString(nil, userdata.TypeComment, ch.path+" "+ch.old+" "+ch.new)
		c.AddRule(&nftables.Rule{Table: undo.Table, Chain: undo, UserData: note, Exprs: proceed()})
	}
}

// notedChanges reads the changes noted in an undo chain.
func notedChanges(c nft, undo *nftables.Chain) ([]change, error) {
	undo.Table.Family = nftables.TableFamilyINet
	rules, err := c.GetRules(undo.Table, undo)
	if err != nil {
		return nil, fmt.Errorf("read noted sysctls: %w", err)
	}
	var changes []change
	for _, r := range rules {
		if ch, ok := parseNote(r.UserData); ok {
			changes = append(changes, ch)
		}
	}
	return changes, nil
}

// parseNote is strict, because what it returns is written below /proc/sys.
func parseNote(data []byte) (change, bool) {
	if len(data) < 2 || data[0] != byte(userdata.TypeComment) || int(data[1]) != len(data)-2 {
		return change{}, false
	}
	note, _ := userdata.GetString(data, userdata.TypeComment)
	f := strings.Split(note, " ")
	if len(f) != 3 || len(f[1]) != 1 || len(f[2]) != 1 {
		return change{}, false
	}
	p := strings.Split(f[0], "/")
	if len(p) != 4 || p[0] != "ipv4" && p[0] != "ipv6" || p[1] != "conf" || p[2] == "" || p[2] == "." || p[2] == ".." ||
		!slices.Contains([]string{"forwarding", "force_forwarding", "accept_ra"}, p[3]) {
		return change{}, false
	}
	return change{f[0], f[1], f[2]}, true
}

// taken is the fault of a name that something which is not flint's has.
func taken(name, what string) error {
	return &flint.Fault{
		Code: "network.name", What: "open network " + name, Kind: flint.ErrConflict,
		Err: fmt.Errorf("%s exists and is not flint's", what),
		Fix: "choose another network name, or remove it if nothing needs it",
	}
}

// nftMissing tells a kernel without nf_tables, or without a part of it we use, from other errors.
func nftMissing(what string, err error) error {
	for _, e := range []error{unix.EPROTONOSUPPORT, unix.EOPNOTSUPP, unix.EINVAL, unix.ENOENT} {
		if errors.Is(err, e) {
			return &flint.Fault{
				Code: "network.nftables", What: what, Err: fmt.Errorf("the kernel lacks nf_tables or a part of it: %w", err),
				Fix: "load the kernel modules: modprobe -a nf_tables nft_ct nft_chain_nat nft_masq",
			}
		}
	}
	return fmt.Errorf("%s: %w", what, err)
}

// ifname is an interface name as nftables compares it.
func ifname(name string) []byte {
	b := make([]byte, unix.IFNAMSIZ)
	copy(b, name)
	return b
}

// number is a number as the kernel holds it in a register.
func number(n uint32) []byte { return binaryutil.NativeEndian.PutUint32(n) }
