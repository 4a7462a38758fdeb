package network

import (
	"bytes"
	"context"
	"errors"
	"log/slog"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/nftables"
	"github.com/miekg/dns"
	"golang.org/x/sys/unix"
)

// vandalize does what a careless script does: nft flush ruleset, ip link del, sysctl -w net.ipv4.ip_forward=0.
func vandalize(t *testing.T) {
	t.Helper()
	flushRules(t)
	stopForwarding(t)
	deleteLink(t, "flint0")
}

func flushRules(t *testing.T) {
	t.Helper()
	c, err := nftables.New()
	ok(t, err)
	c.FlushRuleset()
	ok(t, c.Flush())
}

func deleteLink(t *testing.T, name string) {
	t.Helper()
	l, err := handle(t).LinkByName(name)
	ok(t, err)
	ok(t, handle(t).LinkDel(l))
}

func stopForwarding(t *testing.T) {
	t.Helper()
	ok(t, os.WriteFile(sysctlRoot+"ipv4/ip_forward", []byte("0"), 0)) // as sysctl does: written although it is 0
	ok(t, setSysctl(forwarding4("up0"), "0"))
	ok(t, ignoreMissing(setSysctl(forced6("up0"), "0")))
	ok(t, setSysctl(forwarding4("flint0"), "0"))
}

// TestCheckMends removes each part of the network under a guest that is talking.
func TestCheckMends(t *testing.T) {
	for name, c := range map[string]struct {
		spoil func(*testing.T)
		says  string
	}{
		"everything":    {vandalize, "the nftables table"},
		"flush ruleset": {flushRules, "the nftables table"},
		"flush table": {func(t *testing.T) {
			c, err := nftables.New()
			ok(t, err)
			c.FlushTable(&nftables.Table{Name: "flint0", Family: nftables.TableFamilyINet})
			ok(t, c.Flush())
		}, "the nftables table"},
		"one rule": {func(t *testing.T) {
			c, err := nftables.New()
			ok(t, err)
			tb := &nftables.Table{Name: "flint0", Family: nftables.TableFamilyINet}
			rules, err := c.GetRules(tb, &nftables.Chain{Name: "postrouting", Table: tb})
			ok(t, err)
			ok(t, c.DelRule(rules[0]))
			ok(t, c.Flush())
		}, "the nftables table"},
		"uplinks": {func(t *testing.T) {
			c, err := nftables.New()
			ok(t, err)
			c.FlushSet(uplinkSet(&nftables.Table{Name: "flint0", Family: nftables.TableFamilyINet}))
			ok(t, c.Flush())
		}, "the nftables table"},
		"bridge": {func(t *testing.T) { deleteLink(t, "flint0") }, "the bridge, "},
		"bridge down": {func(t *testing.T) {
			l, err := handle(t).LinkByName("flint0")
			ok(t, err)
			ok(t, handle(t).LinkSetDown(l))
		}, "the bridge's being up"},
		"address": {func(t *testing.T) {
			l, err := handle(t).LinkByName("flint0")
			ok(t, err)
			ok(t, handle(t).AddrDel(l, gatewayAddr(guests4)))
		}, "the address 10.77.0.1/24"},
		"veth": {func(t *testing.T) { deleteLink(t, "flint0-2") }, "the link of guest one"},
		"no master": {func(t *testing.T) {
			l, err := handle(t).LinkByName("flint0-2")
			ok(t, err)
			ok(t, handle(t).LinkSetNoMaster(l))
		}, "the connection of guest one"},
		"forwarding": {stopForwarding, "sysctl net/ipv4/conf/up0/forwarding"},
	} {
		t.Run(name, func(t *testing.T) { checkMends(t, c.spoil, c.says) })
	}
}

func checkMends(t *testing.T, spoil func(*testing.T), says string) {
	w := newWorld(t)
	before := state(t)
	resolver(t, w.internet, netip.AddrPortFrom(internet4, 53), echoResolver)
	var said bytes.Buffer
	cfg := config()
	cfg.Log = slog.New(slog.NewTextHandler(&said, nil))
	n, stop := serve(t, cfg)
	p, err := n.Attach(t.Context(), "one")
	ok(t, err)
	g := newGuest(t, p)
	talk := converse(t, g.namespace, w.internet, netip.AddrPortFrom(internet4, 99))
	ok(t, n.Check(t.Context()))
	if said.Len() > 0 {
		t.Errorf("with nothing amiss it says %s", &said)
	}
	if isolated := isolatedPorts(t); isolated != 1 {
		t.Errorf("%d ports are isolated, want 1", isolated)
	}
	rules := ruleCount(t)

	spoil(t)
	ok(t, n.Check(t.Context()))
	if strings.Count(said.String(), "made it again") == 0 || !strings.Contains(said.String(), says) {
		t.Errorf("it says %q, want %q", &said, says)
	}
	talk.goesOn(t)
	for _, a := range []netip.Addr{internet4, internet6} {
		greet(t, w.internet, netip.AddrPortFrom(a, 80))
		mustReach(t, g.namespace, netip.AddrPortFrom(a, 80))
	}
	for _, gw := range p.Address().Gateways {
		q := new(dns.Msg).SetQuestion("flint.example.", dns.TypeTXT)
		if r, err := lookup(t, g.namespace, "tcp", netip.AddrPortFrom(gw, 53), q); err != nil || len(r.Answer) != 1 {
			t.Errorf("look up at %s: %v, %v", gw, r, err)
		}
	}
	if isolated := isolatedPorts(t); isolated != 1 {
		t.Errorf("%d ports are isolated after it, want 1", isolated)
	}
	if now := ruleCount(t); now != rules {
		t.Errorf("the table has %d rules, had %d", now, rules)
	}
	attach(t, n, "two")
	said.Reset()
	ok(t, n.Check(t.Context()))
	if said.Len() > 0 {
		t.Errorf("it says again %s", &said)
	}
	stop()
	sameState(t, before, state(t))
}

func ruleCount(t *testing.T) int {
	t.Helper()
	c, err := openNft(nil)
	ok(t, err)
	rules, _, err := rulesOf(c, "flint0")
	ok(t, err)
	return len(rules)
}

func isolatedPorts(t *testing.T) (isolated int) {
	t.Helper()
	links, err := ownLinks(links{h: handle(t)}, "flint0")
	ok(t, err)
	for _, l := range links {
		if l.Attrs().MasterIndex == 0 {
			continue
		}
		info, err := handle(t).LinkGetProtinfo(l)
		ok(t, err)
		if info.Isolated {
			isolated++
		}
	}
	return isolated
}

// TestCheckSparesStrangers has somebody take the bridge's name.
func TestCheckSparesStrangers(t *testing.T) {
	newWorld(t)
	n, err := Open(t.Context(), config())
	ok(t, err)
	vandalize(t)
	c, err := nftables.New()
	ok(t, err)
	c.AddTable(&nftables.Table{Name: "flint0", Family: nftables.TableFamilyINet})
	ok(t, c.Flush())
	if err := n.Check(t.Context()); fault(err).Code != "network.name" {
		t.Errorf("check: %v", err)
	}
	if _, err := c.ListTableOfFamily("flint0", nftables.TableFamilyINet); err != nil {
		t.Errorf("their table: %v", err)
	}
	c.DelTable(&nftables.Table{Name: "flint0", Family: nftables.TableFamilyINet})
	ok(t, c.Flush())
	ok(t, n.Check(t.Context()))
	ok(t, n.Close(t.Context()))
}

// TestCheckWarnsOnce adds a firewall that is in the way.
func TestCheckWarnsOnce(t *testing.T) {
	newWorld(t)
	var said bytes.Buffer
	cfg := config()
	cfg.Log = slog.New(slog.NewTextHandler(&said, nil))
	n, _ := serve(t, cfg)
	c, err := nftables.New()
	ok(t, err)
	policy := nftables.ChainPolicyDrop
	wall := c.AddTable(&nftables.Table{Name: "wall", Family: nftables.TableFamilyINet})
	c.AddChain(&nftables.Chain{
		Name: "fwd", Table: wall, Type: nftables.ChainTypeFilter,
		Hooknum: nftables.ChainHookForward, Priority: nftables.ChainPriorityFilter, Policy: &policy,
	})
	ok(t, c.Flush())
	for range 2 {
		ok(t, n.Check(t.Context()))
	}
	if got := strings.Count(said.String(), "nft insert rule inet wall fwd iifname flint0 accept"); got != 1 || len(n.Warnings()) != 1 {
		t.Errorf("said %d times, warnings %q", got, n.Warnings())
	}
}

// TestResolversAreFollowed writes the host's resolv.conf anew.
func TestResolversAreFollowed(t *testing.T) {
	w := newWorld(t)
	resolver(t, w.internet, netip.AddrPortFrom(internet6, 53), echoResolver)
	cfg := config()
	cfg.Resolvers = nil
	cfg.resolv = resolvFiles{filepath.Join(t.TempDir(), "resolv.conf"), "/nonexistent"}
	write := func(s string) {
		t.Helper()
		ok(t, os.WriteFile(cfg.resolv.etc, []byte(s), 0o600))
	}
	write("nameserver " + metadata.String() + "\n")
	n, _ := serve(t, cfg)
	g := newGuest(t, attach(t, n, "one"))
	write("nameserver 10.77.0.1\nnameserver " + internet6.String() + "\n")
	ok(t, n.Check(t.Context()))
	q := new(dns.Msg).SetQuestion("flint.example.", dns.TypeTXT)
	answers := func() {
		t.Helper()
		if r, err := lookup(t, g.namespace, "udp", netip.AddrPortFrom(gatewayOf(guests4), 53), q); err != nil || len(r.Answer) != 1 {
			t.Errorf("look up: %v, %v", r, err)
		}
	}
	answers()
	write("# being written")
	ok(t, n.Check(t.Context()))
	answers()
	if got := n.dns.servers(); len(got) != 1 || got[0].Addr() != internet6 {
		t.Errorf("resolvers: %v; the gateway's own address must not be one", got)
	}
}

// TestCheckRemovesWhatACloseCouldNot has the removal of a guest's link fail while something holds its namespace.
func TestCheckRemovesWhatACloseCouldNot(t *testing.T) {
	newWorld(t)
	fail := false
	cfg := config()
	cfg.faults = func(call string) error {
		if fail && strings.HasPrefix(call, "delete link ") {
			return errInjected
		}
		return nil
	}
	n := open(t, cfg)
	stays, err := n.Attach(t.Context(), "stays")
	ok(t, err)
	goes, err := n.Attach(t.Context(), "goes")
	ok(t, err)
	fd, err := unix.Dup(int(goes.Namespace().Fd()))
	ok(t, err)
	defer unix.Close(fd)
	stray := portName(cfg.Name, goes.index)

	fail = true
	if err := goes.Close(context.Background()); !errors.Is(err, errInjected) {
		t.Fatalf("close: %v", err)
	}
	if err := n.Check(t.Context()); !errors.Is(err, errInjected) {
		t.Errorf("check: %v", err)
	}
	if _, err := handle(t).LinkByName(stray); err != nil {
		t.Fatalf("there is nothing to remove: %v", err)
	}
	fail = false
	ok(t, n.Check(t.Context()))
	if _, err := handle(t).LinkByName(stray); err == nil {
		t.Errorf("%s is left", stray)
	}
	if _, err := handle(t).LinkByName(portName(cfg.Name, stays.index)); err != nil {
		t.Errorf("the other guest's link: %v", err)
	}
}
