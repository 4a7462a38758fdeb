package network

import (
	"encoding/binary"
	"fmt"
	"net"
	"net/netip"

	"flint"
)

// maxPorts is how many guests one network holds: the kernel's limit of ports per bridge (BR_MAX_PORTS, 1 << 10), less
// one for good measure.
const maxPorts = 1023

// resting is how many released indices are kept back before one is given out again, so that what still speaks to a
// guest that is gone does not reach the next.
const resting = 64

// pool hands out host indices: the position of a guest's addresses in the subnets. It is not safe for concurrent use.
type pool struct {
	v4, v6 netip.Prefix
	last   int // highest index; the gateway has 1, guests start at 2
	used   map[int]bool
	rest   []int // released, oldest first; not given out while anything else is free
}

// newPool sizes the pool by the smaller of the subnets and what a bridge can hold. v6 may be the zero Prefix.
func newPool(v4, v6 netip.Prefix) (*pool, error) {
	last := hosts(v4)
	if v6.IsValid() {
		last = min(last, hosts(v6))
	}
	last = min(last, 1+maxPorts)
	if last < 2 {
		return nil, fmt.Errorf("subnet %s has no address for a guest", v4)
	}
	return &pool{v4: v4.Masked(), v6: v6.Masked(), last: last, used: map[int]bool{}}, nil
}

// hosts is the highest host index of a subnet, bounded; the last address is left out (IPv4's broadcast).
func hosts(p netip.Prefix) int {
	bits := min(p.Addr().BitLen()-p.Bits(), 20)
	return 1<<bits - 2
}

// take returns the lowest free index that has not been released lately, or the one released longest ago.
func (p *pool) take() (int, error) {
	recent := map[int]bool{}
	for _, i := range p.rest {
		recent[i] = true
	}
	for i := 2; i <= p.last; i++ {
		if !p.used[i] && !recent[i] {
			p.used[i] = true
			return i, nil
		}
	}
	if len(p.rest) == 0 {
		return 0, &flint.Fault{
			Code: "network.full", What: "find an address for the guest", Kind: flint.ErrConflict,
			Err: fmt.Errorf("all %d guest addresses of %s are in use", p.last-1, p.v4),
			Fix: fmt.Sprintf("run fewer guests at once, or give the network a larger subnet (one network holds at most %d guests)", maxPorts),
		}
	}
	i := p.rest[0]
	p.rest = p.rest[1:]
	p.used[i] = true
	return i, nil
}

// claim takes the index of a guest that is there already, and reports whether it can have it.
func (p *pool) claim(i int) bool {
	if i < 2 || i > p.last || p.used[i] {
		return false
	}
	p.used[i] = true
	return true
}

// release gives an index back.
func (p *pool) release(i int) {
	if !p.used[i] {
		return
	}
	delete(p.used, i)
	p.rest = append(p.rest, i)
	if len(p.rest) > resting {
		p.rest = p.rest[1:]
	}
}

// prefixes returns the addresses of index i with their subnets' lengths, IPv4 first.
func (p *pool) prefixes(i int) []netip.Prefix {
	ps := []netip.Prefix{netip.PrefixFrom(nth(p.v4.Addr(), i), p.v4.Bits())}
	if p.v6.IsValid() {
		ps = append(ps, netip.PrefixFrom(nth(p.v6.Addr(), i), p.v6.Bits()))
	}
	return ps
}

// nth returns the address i above base. The caller keeps i inside the subnet, so only the low 32 bits can change.
func nth(base netip.Addr, i int) netip.Addr {
	b := base.AsSlice()
	low := b[len(b)-4:]
	binary.BigEndian.PutUint32(low, binary.BigEndian.Uint32(low)+uint32(i))
	a, _ := netip.AddrFromSlice(b)
	return a
}

// hardwareAddr derives a MAC from an IPv4 address: locally administered, unicast, and unique wherever the address is.
func hardwareAddr(v4 netip.Addr) net.HardwareAddr {
	b := v4.As4()
	return net.HardwareAddr{0x02, 0xf1, b[0], b[1], b[2], b[3]}
}
