package network

import (
	"bytes"
	"net/netip"
	"testing"

	"github.com/google/nftables/userdata"
)

func TestPoolGivesLowestButNotAtOnceAgain(t *testing.T) {
	p, err := newPool(netip.MustParsePrefix("10.77.0.0/29"), netip.Prefix{})
	ok(t, err)
	take := func(want int) {
		t.Helper()
		if i, err := p.take(); err != nil || i != want {
			t.Errorf("took %d, %v; want %d", i, err, want)
		}
	}
	take(2)
	take(3)
	p.release(2)
	take(4)
	take(5)
	take(6)
	take(2) // nothing else is left
	p.release(5)
	p.release(3)
	p.release(3) // twice does no harm
	take(5)      // longest ago
	take(3)
	if _, err := p.take(); fault(err).Code != "network.full" {
		t.Errorf("took from an empty pool: %v", err)
	}
}

func TestPoolAddresses(t *testing.T) {
	for _, c := range []struct {
		v4, v6  string
		index   int
		addr4   string
		addr6   string
		guests  int
		gateway string
	}{
		{"10.77.0.0/24", "fd77::/64", 2, "10.77.0.2/24", "fd77::2/64", 253, "10.77.0.1"},
		{"10.77.5.9/16", "fd77::/64", 300, "10.77.1.44/16", "fd77::12c/64", maxPorts, "10.77.0.1"},
		{"10.0.0.252/30", "fd77::/120", 2, "10.0.0.254/30", "fd77::2/120", 1, "10.0.0.253"},
		{"10.77.0.0/16", "fd77::ff00/120", 254, "10.77.0.254/16", "fd77::fffe/120", 253, "10.77.0.1"},
	} {
		v4 := netip.MustParsePrefix(c.v4)
		p, err := newPool(v4, netip.MustParsePrefix(c.v6))
		ok(t, err)
		got := p.prefixes(c.index)
		if got[0].String() != c.addr4 || got[1].String() != c.addr6 {
			t.Errorf("%s %s: guest %d has %v", c.v4, c.v6, c.index, got)
		}
		if p.last-1 != c.guests {
			t.Errorf("%s %s: room for %d guests, want %d", c.v4, c.v6, p.last-1, c.guests)
		}
		if gw := gatewayOf(v4).String(); gw != c.gateway {
			t.Errorf("gateway of %s is %s", v4, gw)
		}
		for _, a := range got {
			if last := p.prefixes(p.last); !a.Masked().Contains(last[0].Addr()) && !a.Masked().Contains(last[1].Addr()) {
				t.Errorf("last guest %v is outside %s", last, a)
			}
		}
		if mac := hardwareAddr(got[0].Addr()); mac[0]&3 != 2 {
			t.Errorf("MAC %s is not local and unicast", mac)
		}
	}
}

func TestPortNamesFit(t *testing.T) {
	if name := portName("flintflint1", 1+maxPorts); len(name) > 15 {
		t.Errorf("%s has more than the 15 bytes of an interface name", name)
	}
}

func TestParseNote(t *testing.T) {
	note := func(s string) []byte { return userdata.AppendString(nil, userdata.TypeComment, s) }
	for _, c := range []change{
		{"ipv4/conf/eth0/forwarding", "0", "1"},
		{"ipv6/conf/eth0.7/accept_ra", "1", "2"},
		{"ipv6/conf/all/forwarding", "0", "1"},
	} {
		if got, valid := parseNote(note(c.path + " " + c.old + " " + c.new)); !valid || got != c {
			t.Errorf("%v came back as %v, %t", c, got, valid)
		}
	}
	for _, bad := range [][]byte{
		nil,
		{0},
		{0, 200, 1},
		note(""), note("ipv4/conf/eth0/forwarding 0"), note("ipv4/conf/../forwarding 0 1"),
		note("ipv4/conf/eth0/forwarding 0 11"), note("ipv4/conf/eth0/shared_media 0 1"), note("core/conf/eth0/forwarding 0 1"),
		note("ipv4/conf/a/b/forwarding 0 1"), bytes.Repeat([]byte{0}, 40),
	} {
		if got, valid := parseNote(bad); valid {
			t.Errorf("%q was read as %v", bad, got)
		}
	}
}
