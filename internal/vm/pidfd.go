package vm

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"strconv"
	"strings"
	"sync/atomic"

	"golang.org/x/sys/unix"

	"flint"
)

// Pidfd holds a process of this host that need not be a child of ours, such as a VMM an earlier process of ours began.
// Its methods are safe for concurrent use.
type Pidfd struct {
	f      *os.File
	closed atomic.Bool // set before f is closed
}

// OpenProcess takes hold of the process that began at start (see Process). The error is flint.ErrNotFound when it has
// ended, or when another has its pid. The caller closes what it gets.
func OpenProcess(pid int, start uint64) (*Pidfd, error) {
	if pid <= 1 || start == 0 {
		return nil, fmt.Errorf("find process %d: %w", pid, flint.ErrNotFound)
	}
	fd, err := unix.PidfdOpen(pid, unix.PIDFD_NONBLOCK)
	switch {
	case errors.Is(err, unix.ESRCH):
		return nil, fmt.Errorf("find process %d: %w", pid, flint.ErrNotFound)
	case err != nil: // a thread's id is no process either (EINVAL)
		return nil, fmt.Errorf("open process %d: %w", pid, err)
	}
	p := &Pidfd{f: os.NewFile(uintptr(fd), "pidfd")}
	// Asked after opening: so it is of the process the descriptor holds, or that one has ended.
	is, err := ProcessStart(pid)
	switch {
	case err != nil && !errors.Is(err, fs.ErrNotExist) && !errors.Is(err, unix.ESRCH):
		return nil, errors.Join(err, p.Close())
	case err != nil || is != start || p.Ended():
		return nil, errors.Join(fmt.Errorf("find process %d that began at %d: %w", pid, start, flint.ErrNotFound), p.Close())
	}
	return p, nil
}

// Wait blocks until the process has ended, and returns nil: how it ended is for its parent to know. Close ends the wait
// with os.ErrClosed.
func (p *Pidfd) Wait() error {
	raw, err := p.f.SyscallConn()
	if err == nil {
		err = raw.Read(readable)
	}
	if err != nil && p.closed.Load() {
		return os.ErrClosed // the error itself does not say so
	}
	return err
}

// Ended reports whether the process has ended, or p is closed.
func (p *Pidfd) Ended() bool {
	ended := true
	if raw, err := p.f.SyscallConn(); err == nil {
		_ = raw.Control(func(fd uintptr) { ended = readable(fd) }) // closed by now: true
	}
	return ended
}

// readable reports whether a pidfd's process has ended.
func readable(fd uintptr) bool {
	for {
		n, err := unix.Poll([]unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}, 0)
		if !errors.Is(err, unix.EINTR) {
			return n > 0 || err != nil
		}
	}
}

// Kill ends the process by force, even one that is stopped. It is no error when it has ended, or p is closed.
func (p *Pidfd) Kill() error {
	raw, err := p.f.SyscallConn()
	if err == nil {
		cerr := raw.Control(func(fd uintptr) { err = unix.PidfdSendSignal(int(fd), unix.SIGKILL, nil, 0) })
		err = errors.Join(cerr, err)
	}
	if errors.Is(err, unix.ESRCH) || p.closed.Load() {
		return nil
	}
	return err
}

// Close lets go of the process, which goes on.
func (p *Pidfd) Close() error {
	p.closed.Store(true)
	return p.f.Close()
}

// ResidentPeak returns the most memory a running process had at once (VmHWM of proc_pid_status(5)); 0 for one that is
// gone or about to go.
func ResidentPeak(pid int) flint.Bytes {
	status, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", pid))
	if err != nil {
		return 0
	}
	for line := range strings.Lines(string(status)) {
		if f := strings.Fields(line); len(f) == 3 && f[0] == "VmHWM:" {
			kib, _ := strconv.ParseInt(f[1], 10, 64)
			return flint.Bytes(kib) * flint.KiB
		}
	}
	return 0
}
