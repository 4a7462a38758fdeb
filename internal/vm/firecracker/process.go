package firecracker

import (
	"errors"
	"os"
	"os/exec"
	"syscall"

	"flint"
	"flint/internal/vm"
)

// process is a VMM: a child of this process, or of an earlier one that we adopted.
type process struct {
	pid   int
	start uint64    // see vm.Process
	cmd   *exec.Cmd // nil: adopted
	held  *vm.Pidfd // with cmd nil
}

// adopt takes hold of the process with this pid and start time. The error is flint.ErrNotFound when there is none.
func adopt(pid int, start uint64) (*process, error) {
	held, err := vm.OpenProcess(pid, start)
	if err != nil {
		return nil, err
	}
	return &process{pid: pid, start: start, held: held}, nil
}

// wait blocks until the process has ended. It is called once. Of an adopted process it cannot be told how: nil.
func (p *process) wait() error {
	if p.cmd != nil {
		return p.cmd.Wait()
	}
	return p.held.Wait()
}

// kill ends the process by force, even one that is stopped.
func (p *process) kill() error {
	if p.cmd == nil {
		return p.held.Kill()
	}
	if err := p.cmd.Process.Kill(); !errors.Is(err, os.ErrProcessDone) {
		return err
	}
	return nil
}

func (p *process) close() {
	if p.held != nil {
		p.held.Close()
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
