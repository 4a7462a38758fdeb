package network

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/netip"
	"strings"
	"sync/atomic"
	"time"

	"github.com/miekg/dns"
)

const (
	// dnsPort is where the forwarder listens (RFC 1035, section 4.2).
	dnsPort = 53
	// maxQueries and shareQueries bound the queries under way, of all guests and of one.
	maxQueries, shareQueries = 256, 64
	// maxUDPAnswer bounds what a UDP answer may have, whatever the guest offers to take, in bytes.
	maxUDPAnswer = 4096
	// tryFor is how long one resolver may take, answerWithin how long all tries together may. Guests' resolver
	// libraries give up after 5 seconds.
	tryFor, answerWithin = 2 * time.Second, 4500 * time.Millisecond
)

// forwarder passes guests' DNS queries to resolvers, over the transport they came by, and the answers back. It
// remembers nothing of them.
type forwarder struct {
	resolvers atomic.Pointer[[]netip.AddrPort]
	dial      dialFunc
	log       *slog.Logger
	gate      *gate
	tryFor    time.Duration // one resolver
	within    time.Duration // all tries together
	idle      time.Duration // a connection of a guest's
	good      atomic.Int64  // index of the resolver that answered last
}

func newForwarder(resolvers []netip.AddrPort, dial dialFunc, log *slog.Logger) *forwarder {
	f := &forwarder{dial: dial, log: log, gate: newGate(maxQueries, shareQueries), tryFor: tryFor, within: answerWithin, idle: idleFor}
	f.resolvers.Store(&resolvers)
	return f
}

// servers are the resolvers queries go to now.
func (f *forwarder) servers() []netip.AddrPort { return *f.resolvers.Load() }

// answer handles one query: always one reply, unless the guest's own message was too broken for any.
func (f *forwarder) answer(ctx context.Context, w dns.ResponseWriter, q *dns.Msg) {
	from := addrOf(w.RemoteAddr())
	var reply *dns.Msg
	switch {
	case len(q.Question) != 1:
		reply = refusal(q, dns.RcodeFormatError)
	case q.Opcode != dns.OpcodeQuery:
		reply = refusal(q, dns.RcodeNotImplemented)
	case q.Question[0].Qtype == dns.TypeAXFR || q.Question[0].Qtype == dns.TypeIXFR:
		reply = refusal(q, dns.RcodeRefused)
	case strings.EqualFold(q.Question[0].Name, dns.Fqdn(ProbeName)):
		reply = probed(q)
	case !f.gate.enter(from):
		reply = refusal(q, dns.RcodeServerFailure)
	default:
		reply = f.forward(ctx, w.LocalAddr().Network(), q)
		f.gate.leave(from)
	}
	if w.LocalAddr().Network() == "udp" {
		reply.Truncate(udpSize(q))
	}
	if err := w.WriteMsg(reply); err != nil {
		f.log.Debug("DNS answer not sent", "guest", from, "err", err)
	}
}

// forward asks the resolvers in turn, the one that answered last first, twice around if time allows. A resolver's own
// failure (SERVFAIL, REFUSED) is passed on only when no other does better.
func (f *forwarder) forward(ctx context.Context, network string, q *dns.Msg) *dns.Msg {
	ctx, cancel := context.WithTimeout(ctx, f.within)
	defer cancel()
	var poor *dns.Msg
	start, resolvers := int(f.good.Load()), f.servers()
	for try := range 2 * len(resolvers) {
		if poor != nil && try >= len(resolvers) || ctx.Err() != nil {
			break
		}
		i := (start + try) % len(resolvers)
		r, err := f.exchange(ctx, network, resolvers[i], q)
		if err != nil {
			f.log.Debug("DNS resolver failed", "resolver", resolvers[i], "transport", network, "err", err)
			continue
		}
		if r.Rcode == dns.RcodeServerFailure || r.Rcode == dns.RcodeRefused {
			poor = r
			continue
		}
		f.good.Store(int64(i))
		return r
	}
	if poor != nil {
		return poor
	}
	return refusal(q, dns.RcodeServerFailure)
}

// exchange asks one resolver under an id of our own, on a socket of its own: a stranger who would forge the answer has
// to guess both.
func (f *forwarder) exchange(ctx context.Context, network string, to netip.AddrPort, q *dns.Msg) (*dns.Msg, error) {
	ctx, cancel := context.WithTimeout(ctx, f.tryFor)
	defer cancel()
	conn, err := f.dial(ctx, network, to.String())
	if err != nil {
		return nil, fmt.Errorf("reach resolver: %w", err)
	}
	defer conn.Close()
	defer context.AfterFunc(ctx, func() { conn.Close() })()
	ask := q.Copy()
	ask.Id = dns.Id()
	if opt := ask.IsEdns0(); opt != nil {
		opt.SetUDPSize(uint16(udpSize(q)))
	}
	var client dns.Client
	r, _, err := client.ExchangeWithConnContext(ctx, ask, &dns.Conn{Conn: conn})
	if err != nil {
		return nil, fmt.Errorf("ask resolver: %w", err)
	}
	if err := answers(r, q); err != nil {
		return nil, err
	}
	r.Id = q.Id
	r.Compress = true
	return r, nil
}

// answers checks that r is a reply to q's question.
func answers(r, q *dns.Msg) error {
	if !r.Response {
		return errors.New("resolver sent a query, not an answer")
	}
	if len(r.Question) == 0 && r.Rcode != dns.RcodeSuccess {
		return nil // servers that cannot read a query need not repeat it
	}
	if len(r.Question) != 1 {
		return fmt.Errorf("resolver repeated %d questions", len(r.Question))
	}
	got, want := r.Question[0], q.Question[0]
	if got.Qtype != want.Qtype || got.Qclass != want.Qclass || !strings.EqualFold(got.Name, want.Name) {
		return errors.New("resolver answered another question")
	}
	return nil
}

// refusal is an answer without data.
func refusal(q *dns.Msg, rcode int) *dns.Msg {
	r := new(dns.Msg).SetRcode(q, rcode)
	r.RecursionAvailable = true
	if opt := q.IsEdns0(); opt != nil {
		r.SetEdns0(uint16(udpSize(q)), opt.Do())
	}
	return r
}

// udpSize is the largest UDP answer the guest takes, in bytes, within our bound.
func udpSize(q *dns.Msg) int {
	size := dns.MinMsgSize
	if opt := q.IsEdns0(); opt != nil {
		size = max(size, int(opt.UDPSize()))
	}
	return min(size, maxUDPAnswer)
}

// addrOf is the address part of a peer's address; the zero Addr for what has none.
func addrOf(a net.Addr) netip.Addr {
	ap, err := netip.ParseAddrPort(a.String())
	if err != nil {
		return netip.Addr{}
	}
	return ap.Addr().Unmap()
}
