package network

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"maps"
	"os"
	"slices"
	"syscall"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

const (
	// settleFor is how long the routes must be quiet before they are looked at, settleWithin bounds that wait: a change
	// of uplinks is many small ones.
	settleFor, settleWithin = 200 * time.Millisecond, 2 * time.Second
	// retryFirst and retryMost are the pauses after the first and the later failures to follow a change.
	retryFirst, retryMost = time.Second, 30 * time.Second
)

// uplinks are the interfaces the host's default routes leave by.
type uplinks struct {
	links map[int]string // names by index
	mtu   int            // bytes, the smallest; 0 without uplinks
}

// names returns the names in order.
func (u uplinks) names() []string { return slices.Sorted(maps.Values(u.links)) }

// findUplinks reads the default routes, all families, multipath included.
func findUplinks(h links) (uplinks, error) {
	up := uplinks{links: map[int]string{}}
	routes, err := h.mainRoutes()
	if err != nil {
		return up, fmt.Errorf("list routes: %w", err)
	}
	var indices []int
	for _, r := range routes {
		if r.Type != unix.RTN_UNICAST || r.Dst != nil && !isDefault(r) {
			continue
		}
		indices = append(indices, r.LinkIndex)
		for _, hop := range r.MultiPath {
			indices = append(indices, hop.LinkIndex)
		}
	}
	slices.Sort(indices)
	for _, i := range slices.Compact(indices) {
		if i == 0 {
			continue
		}
		l, err := h.byIndex(i)
		if _, gone := errors.AsType[netlink.LinkNotFoundError](err); gone {
			continue // since the routes were listed, and its routes with it
		}
		if err != nil {
			return up, fmt.Errorf("find uplink: %w", err)
		}
		if l.Attrs().Group == deviceGroup {
			continue
		}
		up.links[i] = l.Attrs().Name
		if up.mtu == 0 || l.Attrs().MTU < up.mtu {
			up.mtu = l.Attrs().MTU
		}
	}
	return up, nil
}

func isDefault(r netlink.Route) bool {
	ones, bits := r.Dst.Mask.Size()
	return ones == 0 && bits > 0
}

// followUplinks keeps table and sysctls up to date with the default routes, until ctx or the network ends. It is called once.
func (n *Network) followUplinks(ctx context.Context) error {
	defer context.AfterFunc(ctx, func() { n.watch.Close() })()
	var retry time.Duration // 0: nothing to do until something changes
	for {
		n.mu.Lock()
		up := n.up
		n.mu.Unlock()
		err := n.watch.wait(up, retry)
		select {
		case <-n.closing: // which also closed the watch
			return nil
		default:
		}
		if ctx.Err() != nil {
			return nil
		}
		if err != nil {
			return err
		}
		if err := n.refresh(); err != nil {
			retry = min(max(2*retry, retryFirst), retryMost)
			n.cfg.Log.Warn("the host's default routes changed, and guests may not reach the internet", "network", n.cfg.Name, "err", err, "again_in", retry)
			continue
		}
		retry = 0
	}
}

// refresh looks for the uplinks and does what follows if they are others than before. What an uplink of the past was
// given stays until Close, as default routes come and go.
func (n *Network) refresh() error {
	n.mu.Lock() // so that Close comes before or after all of it
	defer n.mu.Unlock()
	if n.shut {
		return nil
	}
	return n.home.do(func() error {
		up, err := findUplinks(n.link)
		if err != nil || maps.Equal(up.links, n.up.links) {
			return err
		}
		before := n.up
		if _, err := n.program(up); err != nil {
			return err
		}
		n.readResolvers() // which change with the uplink, as a rule
		n.cfg.Log.Info("the host's default routes changed", "network", n.cfg.Name, "left_by", before.names(), "leave_by", up.names())
		return nil
	})
}

// routeWatch is a socket on which the kernel tells of changes to links and routes.
type routeWatch struct {
	*os.File
	buf []byte
}

// openRouteWatch begins to collect changes in the calling thread's network namespace.
func openRouteWatch() (*routeWatch, error) {
	fd, err := unix.Socket(unix.AF_NETLINK, unix.SOCK_RAW|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, unix.NETLINK_ROUTE)
	if err != nil {
		return nil, fmt.Errorf("open route netlink: %w", err)
	}
	groups := uint32(unix.RTMGRP_LINK | unix.RTMGRP_IPV4_ROUTE | unix.RTMGRP_IPV6_ROUTE)
	if err := unix.Bind(fd, &unix.SockaddrNetlink{Family: unix.AF_NETLINK, Groups: groups}); err != nil {
		unix.Close(fd)
		return nil, fmt.Errorf("watch routes: %w", err)
	}
	return &routeWatch{os.NewFile(uintptr(fd), "route netlink"), make([]byte, 64<<10)}, nil
}

// wait blocks until something happened that may change which links are uplinks, and no more of it happens for a moment;
// or, if within is not 0, until that time has passed.
func (w *routeWatch) wait(up uplinks, within time.Duration) error {
	var deadline, last time.Time // last is zero before the first change
	if within > 0 {
		deadline = time.Now().Add(within)
	}
	for {
		if err := w.SetReadDeadline(deadline); err != nil {
			return fmt.Errorf("watch routes: %w", err)
		}
		size, err := w.Read(w.buf)
		switch {
		case errors.Is(err, os.ErrDeadlineExceeded):
			return nil
		case errors.Is(err, unix.ENOBUFS): // there were more changes than the socket holds
		case err != nil:
			return fmt.Errorf("watch routes: %w", err)
		case !up.concerned(w.buf[:size]):
			continue
		}
		now := time.Now()
		if last.IsZero() {
			last = now.Add(settleWithin)
		}
		deadline = now.Add(settleFor)
		if deadline.After(last) {
			deadline = last
		}
	}
}

// concerned reports whether a datagram of the kernel's tells of a default route, or of a link that is an uplink: when
// one goes down, the kernel drops its IPv4 routes without a word.
func (u uplinks) concerned(datagram []byte) bool {
	messages, err := syscall.ParseNetlinkMessage(datagram)
	if err != nil {
		return true
	}
	return slices.ContainsFunc(messages, func(m syscall.NetlinkMessage) bool {
		switch m.Header.Type {
		case unix.RTM_NEWROUTE, unix.RTM_DELROUTE:
			return len(m.Data) < unix.SizeofRtMsg || m.Data[1] == 0 // rtm_dst_len
		case unix.RTM_NEWLINK, unix.RTM_DELLINK:
			if len(m.Data) < unix.SizeofIfInfomsg {
				return true
			}
			_, known := u.links[int(binary.NativeEndian.Uint32(m.Data[4:8]))] // ifi_index
			return known
		}
		return false
	})
}
