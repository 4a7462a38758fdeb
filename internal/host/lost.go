package host

import (
	"context"
	"errors"
	"fmt"
	"time"

	"flint"
	"flint/internal/vm"
)

// verdictTime is how long a VM whose agent is lost gets to end, and so to say why.
const verdictTime = 2 * time.Second

// noGuest says why a VM did not come up: the deadline rather than what it interrupted, with the console beside it.
func (l *life) noGuest(ctx context.Context, what string, err error) error {
	var why error
	var fix string
	switch cause := context.Cause(ctx); {
	case cause == nil:
		fix, why = l.verdict(ctx, err)
	case errors.Is(cause, flint.ErrTimeout):
		why, fix = cause, l.look()+"; a machine without KVM may need a longer vm.boot_timeout"
	default:
		return fmt.Errorf("%s: %w", what, ended(cause))
	}
	return &flint.Fault{Code: "vm.boot", What: what, Kind: flint.ErrGuest, Err: &vm.BootError{Err: why, Console: l.console()}, Fix: fix}
}

// verdict adds to the loss of the agent how its VM ended, or that it did not, and says what to do about it.
func (l *life) verdict(ctx context.Context, lost error) (fix string, why error) {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), verdictTime)
	defer cancel()
	err := l.machine.Wait(ctx)
	switch {
	case err == nil:
		return l.look(), fmt.Errorf("its guest ended by itself, by a reboot or a panic: %w", lost)
	case ctx.Err() != nil && errors.Is(err, ctx.Err()):
		return l.look(), fmt.Errorf("its VMM still runs, and its agent does not answer: %w", lost)
	}
	l.result.OOM = l.result.OOM || errors.Is(err, vm.ErrMemory)
	fix = l.look()
	var fault *flint.Fault
	if errors.As(err, &fault) {
		fix = fault.Fix
	}
	return fix, fmt.Errorf("%w (%w)", err, lost)
}

// look says where to look for why a VM was lost.
func (l *life) look() string {
	if c, ok := l.machine.(vm.Console); ok && len(c.Console()) == 0 {
		return "the guest's console is empty: where VMs run under Firecracker, firecracker.serial: true makes it speak"
	}
	return "the end of the guest's console says more"
}

// console is the end of the guest's console, or of what the VMM itself said where that is all there is.
func (l *life) console() []byte {
	if c, ok := l.machine.(vm.Console); ok {
		if b := c.Console(); len(b) > 0 {
			return b
		}
	}
	if c, ok := l.machine.(vm.Log); ok {
		return c.Log()
	}
	return nil
}

// wentLost is the error of a VM whose agent was lost under its work.
func (l *life) wentLost(ctx context.Context, what string, err error) error {
	fix, why := l.verdict(ctx, err)
	return &flint.Fault{
		Code: "vm.lost", What: what, Kind: flint.ErrGuest, Err: &vm.LostError{Err: why, Console: l.console()},
		Fix: "the VM ended or fell silent before its work did; " + fix,
	}
}
