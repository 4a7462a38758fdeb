package firecracker

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"strconv"
	"strings"
	"syscall"

	"golang.org/x/sys/unix"

	"flint"
	"flint/internal/vm"
)

// process is a VMM: a child of this process, or of an earlier one that we adopted.
type process struct {
	pid   int
	start uint64    // see vm.Process
	cmd   *exec.Cmd // nil: adopted
	fd    *os.File  // with cmd nil: a pidfd in non-blocking mode
}

// adopt opens the process with this pid and start time. The error is flint.ErrNotFound when there is none.
func adopt(pid int, start uint64) (*process, error) {
	if pid <= 1 || start == 0 {
		return nil, fmt.Errorf("find process %d: %w", pid, flint.ErrNotFound)
	}
	fd, err := unix.PidfdOpen(pid, unix.PIDFD_NONBLOCK)
	if errors.Is(err, unix.ESRCH) {
		return nil, fmt.Errorf("find process %d: %w", pid, flint.ErrNotFound)
	}
	if err != nil {
		return nil, fmt.Errorf("open process %d: %w", pid, err)
	}
	p := &process{pid: pid, start: start, fd: os.NewFile(uintptr(fd), "pidfd")}
	// Asked after opening, so the descriptor is that process's.
	if began, err := vm.ProcessStart(pid); err != nil || began != start {
		p.close()
		return nil, fmt.Errorf("find process %d that began at %d: %w", pid, start, flint.ErrNotFound)
	}
	return p, nil
}

// wait blocks until the process has ended. It is called once. Of an adopted process it cannot be told how: nil.
func (p *process) wait() error {
	if p.cmd != nil {
		return p.cmd.Wait()
	}
	raw, err := p.fd.SyscallConn()
	if err != nil {
		return err
	}
	return raw.Read(func(fd uintptr) bool {
		n, err := unix.Poll([]unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}, 0)
		return n > 0 || err != nil && !errors.Is(err, unix.EINTR)
	})
}

// kill ends the process by force, even one that is stopped.
func (p *process) kill() error {
	var err error
	if p.cmd != nil {
		err = p.cmd.Process.Kill()
	} else {
		raw, cerr := p.fd.SyscallConn()
		if cerr == nil {
			cerr = raw.Control(func(fd uintptr) { err = unix.PidfdSendSignal(int(fd), unix.SIGKILL, nil, 0) })
		}
		err = errors.Join(cerr, err)
	}
	if errors.Is(err, os.ErrProcessDone) || errors.Is(err, unix.ESRCH) || errors.Is(err, os.ErrClosed) {
		return nil
	}
	return err
}

func (p *process) close() {
	if p.fd != nil {
		p.fd.Close()
	}
}

// peak returns the most memory the process had at once while it runs, or after it ended if it was a child; else 0.
func (p *process) peak() flint.Bytes {
	if p.cmd != nil && p.cmd.ProcessState != nil {
		if usage, ok := p.cmd.ProcessState.SysUsage().(*syscall.Rusage); ok {
			return flint.Bytes(usage.Maxrss) * flint.KiB
		}
	}
	return 0
}

// residentPeak returns the most memory a running process had at once, or 0.
func residentPeak(pid int) flint.Bytes {
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
