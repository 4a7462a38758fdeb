package qemu

import (
	"context"
	"fmt"
	"net"
	"os"
	"path/filepath"

	"golang.org/x/sys/unix"
)

// Names of the sockets in Spec.Dir. QEMU listens on them through descriptors we made, so it needs no access to the
// directory; a later process of ours finds them there.
const (
	agentSocket   = "agent.sock"
	monitorSocket = "qmp.sock"
	consoleSocket = "console.sock"
)

func socketNames() []string { return []string{agentSocket, monitorSocket, consoleSocket} }

// listen makes a listening unix socket at dir/name (mode 0600) that is not accepted from here.
func listen(dir, name string) (_ *os.File, err error) {
	fd, err := unix.Socket(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return nil, fmt.Errorf("make socket %s: %w", name, err)
	}
	f := os.NewFile(uintptr(fd), name)
	path := filepath.Join(dir, name)
	bound := false
	defer func() {
		if err == nil {
			return
		}
		f.Close()
		if bound {
			os.Remove(path)
		}
	}()
	err = shortPath(dir, name, func(short string) error { return unix.Bind(fd, &unix.SockaddrUnix{Name: short}) })
	if err != nil {
		return nil, fmt.Errorf("bind socket %s: %w", path, err)
	}
	bound = true
	if err = os.Chmod(path, 0o600); err != nil {
		return nil, fmt.Errorf("restrict socket: %w", err)
	}
	if err = unix.Listen(fd, 4); err != nil {
		return nil, fmt.Errorf("listen on socket %s: %w", path, err)
	}
	return f, nil
}

// dial connects to dir/name.
func dial(ctx context.Context, dir, name string) (conn net.Conn, err error) {
	err = shortPath(dir, name, func(short string) error {
		var d net.Dialer
		conn, err = d.DialContext(ctx, "unix", short)
		return err
	})
	if err != nil {
		return nil, fmt.Errorf("connect to %s: %w", filepath.Join(dir, name), err)
	}
	return conn, nil
}

// shortPath calls f with a path of dir/name that fits a socket address, which holds 107 bytes.
func shortPath(dir, name string, f func(string) error) error {
	if path := filepath.Join(dir, name); len(path) < 108 {
		return f(path)
	}
	d, err := os.Open(dir)
	if err != nil {
		return err
	}
	defer d.Close()
	return f(fmt.Sprintf("/proc/self/fd/%d/%s", d.Fd(), name))
}
