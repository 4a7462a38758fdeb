package qemu

import (
	"errors"
	"os"
	"os/exec"
	"syscall"

	"flint"
	"flint/internal/vm"
)

// process is a QEMU: a child of this process, or of an earlier one, from which it was adopted.
type process struct {
	pid   int
	start uint64    // see vm.Process
	cmd   *exec.Cmd // nil: adopted
	held  *vm.Pidfd // with cmd nil
}

// child returns the process of a command that runs.
func child(cmd *exec.Cmd) *process {
	start, _ := vm.ProcessStart(cmd.Process.Pid) // cannot be gone: nobody has waited for it yet
	return &process{pid: cmd.Process.Pid, start: start, cmd: cmd}
}

func (p *process) adopted() bool { return p.cmd == nil }

// wait blocks until the process has ended, and returns how if that was not by itself with 0. It is called once. Of an
// adopted process it cannot be told: nil.
func (p *process) wait() error {
	if p.adopted() {
		return p.held.Wait()
	}
	return p.cmd.Wait()
}

// kill ends the process by force. It is no error when it has ended.
func (p *process) kill() error {
	if p.adopted() {
		return p.held.Kill()
	}
	if err := p.cmd.Process.Kill(); err != nil && !errors.Is(err, os.ErrProcessDone) {
		return err
	}
	return nil
}

// close lets go of an adopted process.
func (p *process) close() {
	if p.adopted() {
		p.held.Close()
	}
}

// peak returns the most memory a child that has ended had at once; 0 if it cannot be told.
func (p *process) peak() flint.Bytes {
	if p.adopted() {
		return 0
	}
	if usage, ok := p.cmd.ProcessState.SysUsage().(*syscall.Rusage); ok {
		return flint.Bytes(usage.Maxrss) * flint.KiB
	}
	return 0
}
