package firecracker

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"flint/internal/vm"
)

const (
	firstRetry = 500 * time.Microsecond
	lastRetry  = 10 * time.Millisecond
	// answerWithin bounds one attempt to reach the agent: a guest whose kernel is not up yet does not answer at all.
	answerWithin = 2 * time.Second
)

// connect opens the unix socket of that name in m's directory. The VMM owns the directory and may have put anything there:
// links are not followed, and whoever listens must be the VM's user. Long paths do not matter.
func (m *machine) connect(ctx context.Context, name string) (net.Conn, error) {
	fd, err := m.dir.openat(name, unix.O_PATH)
	if err != nil {
		return nil, err
	}
	defer unix.Close(fd)
	var st unix.Stat_t
	if err := unix.Fstat(fd, &st); err != nil {
		return nil, fmt.Errorf("look at socket %s: %w", name, err)
	}
	if st.Mode&unix.S_IFMT != unix.S_IFSOCK {
		return nil, fmt.Errorf("connect to %s: it is no socket", name)
	}
	var d net.Dialer
	conn, err := d.DialContext(ctx, "unix", "/proc/self/fd/"+strconv.Itoa(fd))
	if err != nil {
		return nil, fmt.Errorf("connect to %s: %w", name, err)
	}
	if err := m.checkPeer(conn); err != nil {
		conn.Close()
		return nil, fmt.Errorf("connect to %s: %w", name, err)
	}
	return conn, nil
}

// checkPeer makes sure that the VM's user is at the other end.
func (m *machine) checkPeer(conn net.Conn) error {
	uc, ok := conn.(*net.UnixConn)
	if !ok || m.uid < 0 {
		return nil
	}
	raw, err := uc.SyscallConn()
	if err != nil {
		return err
	}
	var peer *unix.Ucred
	if cerr := raw.Control(func(fd uintptr) { peer, err = unix.GetsockoptUcred(int(fd), unix.SOL_SOCKET, unix.SO_PEERCRED) }); cerr != nil {
		return cerr
	}
	if err != nil {
		return fmt.Errorf("ask who is there: %w", err)
	}
	// Between the jailer and the first instruction of Firecracker nobody listens, so root is not an answer either.
	if peer.Uid != uint32(m.uid) {
		return fmt.Errorf("user %d listens there, and not the VM's, %d", peer.Uid, m.uid)
	}
	return nil
}

// retry calls f until it succeeds, ctx ends, or the VMM does.
func (m *machine) retry(ctx context.Context, f func() error) error {
	for wait := firstRetry; ; wait = min(2*wait, lastRetry) {
		select {
		case <-m.done:
			return net.ErrClosed
		default:
		}
		if err := ctx.Err(); err != nil {
			return err
		}
		err := f()
		if err == nil {
			return nil
		}
		pause := time.NewTimer(wait)
		select {
		case <-pause.C:
		case <-m.done:
			pause.Stop()
			return net.ErrClosed
		case <-ctx.Done():
			pause.Stop()
			return fmt.Errorf("%w (%w)", ctx.Err(), err)
		}
	}
}

// Dial implements vm.Machine. It waits until the agent listens; every connection is a new one, and the agent ends the
// one before.
func (m *machine) Dial(ctx context.Context, port uint32) (net.Conn, error) {
	if port != vm.AgentPort {
		return nil, fmt.Errorf("dial port %d of VM %s: it has port %d only", port, m.id, vm.AgentPort)
	}
	var conn net.Conn
	err := m.retry(ctx, func() (err error) {
		if m.isClosing() {
			return net.ErrClosed
		}
		conn, err = m.shake(ctx, port)
		return err
	})
	if err != nil {
		return nil, fmt.Errorf("dial VM %s: %w", m.id, err)
	}
	return conn, nil
}

// shake connects to a port of the guest: `CONNECT port` and, when somebody listens, `OK number`. Until then Firecracker
// hangs up, or says nothing.
func (m *machine) shake(ctx context.Context, port uint32) (_ net.Conn, err error) {
	ctx, cancel := context.WithTimeout(ctx, answerWithin)
	defer cancel()
	conn, err := m.connect(ctx, vsockSocket)
	if err != nil {
		return nil, err
	}
	stop := context.AfterFunc(ctx, func() { _ = conn.SetDeadline(time.Unix(1, 0)) })
	defer func() {
		if !stop() && err == nil {
			err = ctx.Err() // the deadline may be set yet
		}
		if err != nil {
			conn.Close()
		}
	}()
	if _, err := fmt.Fprintf(conn, "CONNECT %d\n", port); err != nil {
		return nil, fmt.Errorf("ask for port %d: %w", port, err)
	}
	line, err := readLine(conn)
	if err != nil {
		return nil, fmt.Errorf("wait for port %d: %w", port, err)
	}
	number, ok := strings.CutPrefix(line, "OK ")
	if _, nerr := strconv.ParseUint(number, 10, 32); !ok || nerr != nil {
		return nil, fmt.Errorf("wait for port %d: the answer is %q", port, line)
	}
	return conn, nil
}

// readLine reads a short line and not a byte more, since what follows is the guest's.
func readLine(r io.Reader) (string, error) {
	var line [32]byte
	for n := range line {
		if _, err := io.ReadFull(r, line[n:n+1]); err != nil {
			return "", err
		}
		if line[n] == '\n' {
			return string(line[:n]), nil
		}
	}
	return "", errors.New("the answer is too long")
}
