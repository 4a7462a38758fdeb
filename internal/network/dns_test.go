package network

import (
	"context"
	"io"
	"log/slog"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/miekg/dns"
	"golang.org/x/sync/errgroup"
)

// forward serves a forwarder on a loopback port, asking the given resolvers, and returns its address.
func forward(t *testing.T, f *forwarder) netip.AddrPort {
	t.Helper()
	udp, tcp := onePort(t)
	l := listeners{udp: []net.PacketConn{udp}, tcp: []net.Listener{tcp}}
	ctx, cancel := context.WithCancel(t.Context())
	var g errgroup.Group
	g.Go(func() error { return l.serve(ctx, nil, f) })
	t.Cleanup(func() { cancel(); ok(t, g.Wait()) })
	return udp.LocalAddr().(*net.UDPAddr).AddrPort()
}

// onePort listens by UDP and TCP on one loopback port; what one of them gets may be taken in the other.
func onePort(t *testing.T) (net.PacketConn, net.Listener) {
	t.Helper()
	for range 100 {
		tcp, err := net.Listen("tcp", "127.0.0.1:0")
		ok(t, err)
		udp, err := net.ListenPacket("udp", tcp.Addr().String())
		if err == nil {
			return udp, tcp
		}
		ok(t, tcp.Close())
	}
	t.Fatal("no port is free by UDP and TCP")
	return nil, nil
}

// asking makes a forwarder with all patience, for resolvers that answer.
func asking(t *testing.T, resolvers ...netip.AddrPort) *forwarder {
	var d net.Dialer
	f := newForwarder(resolvers, d.DialContext, slog.New(slog.NewTextHandler(t.Output(), &slog.HandlerOptions{Level: slog.LevelDebug})))
	f.tryFor, f.within = long, long
	return f
}

// askingSilent makes a forwarder with little patience, as one of the resolvers does not answer; the others must within it.
func askingSilent(t *testing.T, resolvers ...netip.AddrPort) *forwarder {
	f := asking(t, resolvers...)
	f.tryFor = time.Second
	return f
}

// upstream serves a handler by UDP and TCP on one loopback port.
func upstream(t *testing.T, h dns.HandlerFunc) netip.AddrPort {
	t.Helper()
	udp, tcp := onePort(t)
	serveDNS(t, udp, tcp, h)
	return udp.LocalAddr().(*net.UDPAddr).AddrPort()
}

// rawUpstream answers every UDP query with what reply makes of it; nil is silence.
func rawUpstream(t *testing.T, reply func(query []byte) []byte) (netip.AddrPort, *atomic.Int64) {
	t.Helper()
	l, err := net.ListenPacket("udp", "127.0.0.1:0")
	ok(t, err)
	var asked atomic.Int64
	var g errgroup.Group
	g.Go(func() error {
		buf := make([]byte, 65536)
		for {
			n, from, err := l.ReadFrom(buf)
			if err != nil {
				return nil
			}
			asked.Add(1)
			if r := reply(buf[:n]); r != nil {
				_, _ = l.WriteTo(r, from)
			}
		}
	})
	t.Cleanup(func() { l.Close(); ok(t, g.Wait()) })
	return l.LocalAddr().(*net.UDPAddr).AddrPort(), &asked
}

func question() *dns.Msg { return new(dns.Msg).SetQuestion("flint.example.", dns.TypeTXT) }

func ask(t *testing.T, network string, at netip.AddrPort, q *dns.Msg) *dns.Msg {
	t.Helper()
	r, err := lookup(t, here(t), network, at, q)
	ok(t, err)
	if r.Id != q.Id {
		t.Errorf("answer has id %d, the query %d", r.Id, q.Id)
	}
	return r
}

// txt is the text of the only answer, or the response code's name.
func txt(r *dns.Msg) string {
	if len(r.Answer) != 1 {
		return dns.RcodeToString[r.Rcode]
	}
	return strings.Join(r.Answer[0].(*dns.TXT).Txt, "")
}

func TestForwardsBySameTransport(t *testing.T) {
	at := forward(t, asking(t, upstream(t, echoResolver)))
	for _, network := range []string{"udp", "tcp"} {
		if got := txt(ask(t, network, at, question())); got != network {
			t.Errorf("query by %s arrived by %s", network, got)
		}
	}
}

func TestNextResolver(t *testing.T) {
	good := upstream(t, echoResolver)
	pack := func(change func(*dns.Msg)) func([]byte) []byte {
		return func(b []byte) []byte {
			q := new(dns.Msg)
			if q.Unpack(b) != nil {
				return nil
			}
			r := new(dns.Msg).SetReply(q)
			change(r)
			out, _ := r.Pack()
			return out
		}
	}
	for name, bad := range map[string]func([]byte) []byte{
		"silent":         func([]byte) []byte { return nil },
		"garbage":        func([]byte) []byte { return []byte("no DNS message at all, is it") },
		"short":          func(b []byte) []byte { return b[:5] },
		"cut off":        func(b []byte) []byte { b[2] |= 0x80; b[7] = 1; return append(b, 0xc0, 0x0c, 0, 16, 0) },
		"query":          func(b []byte) []byte { return b },
		"wrong id":       pack(func(r *dns.Msg) { r.Id++ }),
		"wrong question": pack(func(r *dns.Msg) { r.Question[0].Name = "evil.example." }),
		"no question":    pack(func(r *dns.Msg) { r.Question = nil }),
		"server failure": pack(func(r *dns.Msg) { r.Rcode = dns.RcodeServerFailure }),
		"refused":        pack(func(r *dns.Msg) { r.Rcode = dns.RcodeRefused }),
	} {
		t.Run(name, func(t *testing.T) {
			first, asked := rawUpstream(t, bad)
			at := forward(t, askingSilent(t, first, good))
			if got := txt(ask(t, "udp", at, question())); got != "udp" {
				t.Errorf("answer is %q", got)
			}
			before := asked.Load()
			if before == 0 {
				t.Error("the first resolver was not asked")
			}
			ask(t, "udp", at, question())
			if asked.Load() != before {
				t.Error("the failing resolver was asked first again, though another had answered")
			}
		})
	}
	t.Run("not there", func(t *testing.T) {
		nobodys := netip.MustParseAddrPort("127.0.0.1:1") // of a kind that is given to none who asks for any
		at := forward(t, asking(t, nobodys, good))
		for _, network := range []string{"udp", "tcp"} {
			if got := txt(ask(t, network, at, question())); got != network {
				t.Errorf("answer by %s is %q", network, got)
			}
		}
	})
}

func TestNoResolverAnswers(t *testing.T) {
	refused := func(w dns.ResponseWriter, q *dns.Msg) { _ = w.WriteMsg(new(dns.Msg).SetRcode(q, dns.RcodeRefused)) }
	nx := func(w dns.ResponseWriter, q *dns.Msg) { _ = w.WriteMsg(new(dns.Msg).SetRcode(q, dns.RcodeNameError)) }
	silent, asked := rawUpstream(t, func([]byte) []byte { return nil })
	for _, c := range []struct {
		what      string
		resolvers []netip.AddrPort
		rcode     int
	}{
		{"none known", nil, dns.RcodeServerFailure},
		{"one that is silent", []netip.AddrPort{silent}, dns.RcodeServerFailure},
		{"its refusal, when no other does better", []netip.AddrPort{upstream(t, refused), silent}, dns.RcodeRefused},
		{"a name that does not exist", []netip.AddrPort{upstream(t, nx)}, dns.RcodeNameError},
	} {
		r := ask(t, "udp", forward(t, askingSilent(t, c.resolvers...)), question())
		if r.Rcode != c.rcode {
			t.Errorf("%s: %s, want %s", c.what, dns.RcodeToString[r.Rcode], dns.RcodeToString[c.rcode])
		}
	}
	if asked.Load() < 2 {
		t.Error("a lost datagram was not sent again")
	}
}

func TestProbeNeedsNoResolver(t *testing.T) {
	at := forward(t, asking(t))
	for _, network := range []string{"udp", "tcp"} {
		q := new(dns.Msg).SetQuestion(ProbeName+".", dns.TypeA)
		if r := ask(t, network, at, q); r.Rcode != dns.RcodeSuccess || len(r.Answer) != 0 {
			t.Errorf("probe by %s: %v", network, r)
		}
	}
}

// bigResolver answers with more than fits a datagram of the size offered, and keeps to no size.
func bigResolver(w dns.ResponseWriter, q *dns.Msg) {
	r := new(dns.Msg).SetReply(q)
	hdr := dns.RR_Header{Name: q.Question[0].Name, Rrtype: dns.TypeTXT, Class: dns.ClassINET}
	for range 8 {
		r.Answer = append(r.Answer, &dns.TXT{Hdr: hdr, Txt: []string{strings.Repeat("x", 200)}})
	}
	if opt := q.IsEdns0(); opt != nil {
		r.SetEdns0(opt.UDPSize(), opt.Do())
		r.Answer = append(r.Answer, &dns.TXT{Hdr: hdr, Txt: []string{"do"}})
	}
	if w.LocalAddr().Network() == "udp" {
		size := dns.MinMsgSize
		if opt := q.IsEdns0(); opt != nil {
			size = int(opt.UDPSize())
		}
		r.Truncate(size)
	}
	_ = w.WriteMsg(r)
}

func TestTruncationLeadsToTCP(t *testing.T) {
	at := forward(t, asking(t, upstream(t, bigResolver)))
	if r := ask(t, "udp", at, question()); !r.Truncated || r.Len() > dns.MinMsgSize {
		t.Errorf("by UDP: truncated %t, %d bytes", r.Truncated, r.Len())
	}
	if r := ask(t, "tcp", at, question()); r.Truncated || len(r.Answer) != 8 {
		t.Errorf("by TCP: truncated %t, %d records", r.Truncated, len(r.Answer))
	}
	q := question()
	q.SetEdns0(4096, true)
	if r := ask(t, "udp", at, q); r.Truncated || len(r.Answer) != 9 || r.IsEdns0() == nil || !r.IsEdns0().Do() {
		t.Errorf("by UDP with EDNS: truncated %t, %d records", r.Truncated, len(r.Answer))
	}
}

func TestEDNSIsPassedOnInBounds(t *testing.T) {
	seen := make(chan *dns.OPT, 2) // a resolver that is slow is asked twice
	at := forward(t, asking(t, upstream(t, func(w dns.ResponseWriter, q *dns.Msg) {
		seen <- q.IsEdns0()
		echoResolver(w, q)
	})))
	q := question()
	q.SetEdns0(65535, true)
	q.IsEdns0().Option = append(q.IsEdns0().Option, &dns.EDNS0_LOCAL{Code: 65001, Data: []byte("hi")})
	ask(t, "udp", at, q)
	if opt := <-seen; opt == nil || !opt.Do() || len(opt.Option) != 1 || opt.UDPSize() != maxUDPAnswer {
		t.Errorf("resolver saw EDNS %v", opt)
	}
}

func TestOddQueries(t *testing.T) {
	at := forward(t, asking(t, upstream(t, echoResolver)))
	axfr := new(dns.Msg).SetAxfr("example.")
	if r := ask(t, "tcp", at, axfr); r.Rcode != dns.RcodeRefused {
		t.Errorf("zone transfer: %s", dns.RcodeToString[r.Rcode])
	}
	two := question()
	two.Question = append(two.Question, two.Question[0])
	if r := ask(t, "udp", at, two); r.Rcode != dns.RcodeFormatError {
		t.Errorf("two questions: %s", dns.RcodeToString[r.Rcode])
	}
	notify := new(dns.Msg).SetNotify("example.")
	if r := ask(t, "udp", at, notify); r.Rcode != dns.RcodeNotImplemented {
		t.Errorf("notify: %s", dns.RcodeToString[r.Rcode])
	}
}

func TestOneGuestsShare(t *testing.T) {
	arrived, release := make(chan struct{}), make(chan struct{})
	f := asking(t, upstream(t, func(w dns.ResponseWriter, q *dns.Msg) {
		select {
		case arrived <- struct{}{}:
		case <-release:
		}
		<-release
		echoResolver(w, q)
	}))
	f.gate = newGate(4, 2)
	at := forward(t, f)
	host := here(t)
	var g errgroup.Group
	for range 2 {
		g.Go(func() error {
			r, err := lookup(t, host, "udp", at, question())
			if err == nil && txt(r) != "udp" {
				t.Errorf("a query within the share got %q", txt(r))
			}
			return err
		})
		<-arrived
	}
	if got := txt(ask(t, "udp", at, question())); got != "SERVFAIL" {
		t.Errorf("a query beyond the share got %q", got)
	}
	close(release)
	ok(t, g.Wait())
	if got := txt(ask(t, "udp", at, question())); got != "udp" {
		t.Errorf("once there is room again: %q", got)
	}
}

func TestGate(t *testing.T) {
	a, b, c := netip.MustParseAddr("10.0.0.1"), netip.MustParseAddr("10.0.0.2"), netip.MustParseAddr("10.0.0.3")
	g := newGate(3, 2)
	got := []bool{g.enter(a), g.enter(a), g.enter(a), g.enter(b), g.enter(c)}
	if want := []bool{true, true, false, true, false}; !slices.Equal(got, want) {
		t.Errorf("entered %v, want %v", got, want)
	}
	g.leave(a)
	if !g.enter(c) {
		t.Error("no room after one left")
	}
	for _, x := range []netip.Addr{a, b, c} {
		g.leave(x)
	}
	if g.total != 0 || len(g.by) != 0 {
		t.Errorf("empty gate remembers %d, %v", g.total, g.by)
	}
}

func TestTCPConnectionsAreBounded(t *testing.T) {
	f := asking(t, upstream(t, echoResolver))
	f.idle = long // none of them is closed before the last is there
	at := forward(t, f)
	var conns []net.Conn
	for range shareConns {
		c, err := net.Dial("tcp", at.String())
		ok(t, err)
		defer c.Close()
		conns = append(conns, c)
	}
	// Connections are accepted in order, so an answer on the last says that all were.
	client := &dns.Client{Timeout: long}
	_, _, err := client.ExchangeWithConn(question(), &dns.Conn{Conn: conns[shareConns-1]})
	ok(t, err)
	over, err := net.Dial("tcp", at.String())
	ok(t, err)
	defer over.Close()
	ok(t, over.SetDeadline(time.Now().Add(long)))
	if _, err := over.Read(make([]byte, 1)); err != io.EOF && !strings.Contains(err.Error(), "reset") {
		t.Errorf("connection beyond the share: %v", err)
	}
}

// TestServeEndsWhileResolverHangs would take the resolver's whole patience if the query were not cut short.
func TestServeEndsWhileResolverHangs(t *testing.T) {
	arrived := make(chan struct{}, 8)
	silent, _ := rawUpstream(t, func([]byte) []byte { arrived <- struct{}{}; return nil })
	f := asking(t, silent)
	f.tryFor, f.within = time.Hour, time.Hour
	at := forward(t, f)
	c, err := net.Dial("udp", at.String())
	ok(t, err)
	defer c.Close()
	b, err := question().Pack()
	ok(t, err)
	_, err = c.Write(b)
	ok(t, err)
	<-arrived
}

func TestHostResolvers(t *testing.T) {
	dir := t.TempDir()
	file := func(name, text string) string {
		path := filepath.Join(dir, name)
		ok(t, os.WriteFile(path, []byte(text), 0o600))
		return path
	}
	none := filepath.Join(dir, "missing")
	stub := file("stub", "nameserver 127.0.0.53\noptions edns0 trust-ad\n")
	behind := file("behind", "nameserver 192.0.2.53\nnameserver 2001:db8::53\n")
	plain := file("plain", "# comment\nsearch example\nnameserver 192.0.2.1\nnameserver fe80::1%eth0\nnameserver nonsense\n")
	local := file("local", "nameserver 127.0.0.1\n")
	for _, c := range []struct {
		what, etc, resolved, want string
	}{
		{"plain", plain, behind, "192.0.2.1:53 [fe80::1%eth0]:53"},
		{"stub with servers behind", stub, behind, "192.0.2.53:53 [2001:db8::53]:53"},
		{"stub alone", stub, none, "127.0.0.53:53"},
		{"a local server of the owner's", local, behind, "127.0.0.1:53"},
		{"nothing", none, none, ""},
	} {
		var got []string
		for _, s := range hostResolvers(c.etc, c.resolved) {
			got = append(got, s.String())
		}
		if strings.Join(got, " ") != c.want {
			t.Errorf("%s: %q, want %q", c.what, got, c.want)
		}
	}
}
