package app

import (
	"context"
	"errors"
	"net"
	"net/netip"
	"syscall"

	"golang.org/x/sys/unix"
)

// ListenAhead listens on an address that the bridge is going to have: a gateway's, for one of Options.Services. The port
// is chosen when it is 0. The listener is the caller's.
func ListenAhead(ctx context.Context, at netip.AddrPort) (net.Listener, error) {
	lc := net.ListenConfig{Control: func(_, _ string, raw syscall.RawConn) error {
		var serr error
		err := raw.Control(func(fd uintptr) { serr = unix.SetsockoptInt(int(fd), unix.IPPROTO_IP, unix.IP_FREEBIND, 1) })
		return errors.Join(err, serr)
	}}
	return lc.Listen(ctx, "tcp4", at.String())
}
