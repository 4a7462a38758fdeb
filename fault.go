package flint

import "errors"

// Kinds of fault. Callers test for them with errors.Is; the command line turns each into an exit code.
var (
	ErrUsage      = errors.New("wrong usage")
	ErrConfig     = errors.New("invalid configuration")
	ErrNotFound   = errors.New("not found")
	ErrPermission = errors.New("not permitted")
	ErrConflict   = errors.New("conflict")
	ErrTimeout    = errors.New("timed out")
	// ErrUnreachable is for commands that ask a running flint where none answers.
	ErrUnreachable = errors.New("not reachable")
	// ErrRelease marks what went well but left something behind that flint tries to release again later.
	ErrRelease = errors.New("not everything was released")
	// ErrGuest marks what is the guest's fault, not ours: trying on another host would not help.
	ErrGuest = errors.New("guest failed")
)

// ErrStopped is what work ended with because flint was told to stop: nobody's fault.
var ErrStopped = errors.New("flint is stopping")

// ErrUnneeded is the cause (context.Cause) with which the scheduler cancels a runner nobody needs any more. Such a
// cancellation yields: a host goes on with a runner that GitHub says is busy. Any other cancellation is final.
//
// It is also what a host's Run ends with when GitHub gave the runner no job for so long that the host let go of it.
var ErrUnneeded = errors.New("no longer needed")

// Fault is an error a person can act on: what went wrong, why, and how to mend it, one line each.
type Fault struct {
	Code string // stable, lower-case, dotted, listed in docs/errors.md: image.build, qemu.missing
	What string // what could not be done: "build image images/demo"
	Fix  string // what the person can do about it
	Kind error  // one of the Err… above, or nil
	Err  error  // why; may be nil
}

// Error returns what and why.
func (f *Fault) Error() string {
	if f.Err == nil {
		return f.What
	}
	return f.What + ": " + f.Err.Error()
}

// Unwrap lets errors.Is and errors.As see both the kind and the cause.
func (f *Fault) Unwrap() []error {
	var errs []error
	for _, e := range []error{f.Kind, f.Err} {
		if e != nil {
			errs = append(errs, e)
		}
	}
	return errs
}
