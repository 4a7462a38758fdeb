package network

import (
	"net"
	"net/netip"

	"github.com/google/nftables"
	"github.com/google/nftables/binaryutil"
	"github.com/google/nftables/expr"
	"golang.org/x/sys/unix"
)

// ICMP and ICMPv6 message types (RFC 792, RFC 4443, RFC 4861).
const (
	icmpEcho              = 8
	icmp6Echo             = 128
	icmp6NeighbourSolicit = 135
	icmp6NeighbourAdvert  = 136
)

// connDNAT is IPS_DST_NAT of linux/netfilter/nf_conntrack_common.h.
const connDNAT = 1 << 5

// The functions below are the vocabulary of rules: each returns a piece of one. A rule is pieces in a row that all
// must match, then a verdict.

func accept() []expr.Any     { return []expr.Any{&expr.Verdict{Kind: expr.VerdictAccept}} }
func drop() []expr.Any       { return []expr.Any{&expr.Verdict{Kind: expr.VerdictDrop}} }
func proceed() []expr.Any    { return []expr.Any{&expr.Verdict{Kind: expr.VerdictContinue}} }
func masquerade() []expr.Any { return []expr.Any{&expr.Masq{}} }

func iif(name string) []expr.Any    { return meta(expr.MetaKeyIIFNAME, expr.CmpOpEq, ifname(name)) }
func iifNot(name string) []expr.Any { return meta(expr.MetaKeyIIFNAME, expr.CmpOpNeq, ifname(name)) }
func oif(name string) []expr.Any    { return meta(expr.MetaKeyOIFNAME, expr.CmpOpEq, ifname(name)) }
func oifNot(name string) []expr.Any { return meta(expr.MetaKeyOIFNAME, expr.CmpOpNeq, ifname(name)) }

func nfproto(family byte) []expr.Any {
	return meta(expr.MetaKeyNFPROTO, expr.CmpOpEq, []byte{family})
}

// notFromGuests matches what no flint bridge brought in, ours or another network's.
func notFromGuests() []expr.Any {
	return meta(expr.MetaKeyIIFGROUP, expr.CmpOpNeq, number(deviceGroup))
}

func meta(key expr.MetaKey, op expr.CmpOp, value []byte) []expr.Any {
	return []expr.Any{&expr.Meta{Key: key, Register: 1}, &expr.Cmp{Op: op, Register: 1, Data: value}}
}

func oifIn(set *nftables.Set) []expr.Any {
	return []expr.Any{
		&expr.Meta{Key: expr.MetaKeyOIFNAME, Register: 1},
		&expr.Lookup{SourceRegister: 1, SetName: set.Name, SetID: set.ID},
	}
}

// established matches packets of a connection that was let through before, and errors about one.
func established() []expr.Any {
	return conntrack(expr.CtKeySTATE, expr.CtStateBitESTABLISHED|expr.CtStateBitRELATED, expr.CmpOpNeq)
}

// notRedirected matches connections whose destination nobody on this host rewrote.
func notRedirected() []expr.Any { return conntrack(expr.CtKeySTATUS, connDNAT, expr.CmpOpEq) }

// conntrack compares the masked bits with zero.
func conntrack(key expr.CtKey, mask uint32, op expr.CmpOp) []expr.Any {
	return []expr.Any{
		&expr.Ct{Key: key, Register: 1},
		&expr.Bitwise{SourceRegister: 1, DestRegister: 1, Len: 4, Mask: number(mask), Xor: number(0)},
		&expr.Cmp{Op: op, Register: 1, Data: number(0)},
	}
}

// Offsets of the addresses in the IPv4 (RFC 791) and IPv6 (RFC 8200) headers.
func saddr(p netip.Prefix) []expr.Any { return address(p, 12, 8) }
func daddr(p netip.Prefix) []expr.Any { return address(p, 16, 24) }

func address(p netip.Prefix, offset4, offset6 uint32) []expr.Any {
	p = p.Masked()
	family, offset := byte(unix.NFPROTO_IPV4), offset4
	if p.Addr().Is6() {
		family, offset = unix.NFPROTO_IPV6, offset6
	}
	n := uint32(p.Addr().BitLen() / 8)
	return append(nfproto(family),
		&expr.Payload{DestRegister: 1, Base: expr.PayloadBaseNetworkHeader, Offset: offset, Len: n},
		&expr.Bitwise{SourceRegister: 1, DestRegister: 1, Len: n, Mask: net.CIDRMask(p.Bits(), p.Addr().BitLen()), Xor: make([]byte, n)},
		&expr.Cmp{Op: expr.CmpOpEq, Register: 1, Data: p.Addr().AsSlice()},
	)
}

// host is the prefix of one address.
func host(a netip.Addr) netip.Prefix { return netip.PrefixFrom(a, a.BitLen()) }

// dport matches a transport protocol and its destination port, which both TCP and UDP have at offset 2.
func dport(proto byte, port uint16) []expr.Any {
	return append(meta(expr.MetaKeyL4PROTO, expr.CmpOpEq, []byte{proto}),
		&expr.Payload{DestRegister: 1, Base: expr.PayloadBaseTransportHeader, Offset: 2, Len: 2},
		&expr.Cmp{Op: expr.CmpOpEq, Register: 1, Data: binaryutil.BigEndian.PutUint16(port)},
	)
}

// icmp matches a message type of ICMP or ICMPv6; both have it at offset 0.
func icmp(proto, typ byte) []expr.Any {
	return append(meta(expr.MetaKeyL4PROTO, expr.CmpOpEq, []byte{proto}),
		&expr.Payload{DestRegister: 1, Base: expr.PayloadBaseTransportHeader, Offset: 0, Len: 1},
		&expr.Cmp{Op: expr.CmpOpEq, Register: 1, Data: []byte{typ}},
	)
}
