package host

import (
	"errors"
	"fmt"

	"flint"
)

// why tells a person how the runner ended. The caller holds l.mu.
func (l *life) why(err error) flint.Reason {
	var fault *flint.Fault
	switch r := l.result; {
	case err != nil && r.Lost:
		return flint.Because("runner.lost", "the VM was lost under %s; GitHub will declare it failed in about ten minutes (%s)", jobOf(l.rec.Runner), err)
	case errors.Is(err, errIdle):
		return flint.Because("runner.idle", "GitHub gave it no job within %s", l.h.c.Deadlines.Pickup)
	case errors.Is(err, flint.ErrUnneeded):
		return flint.Because("runner.unneeded", "nobody needed it any more")
	case errors.Is(err, flint.ErrStopped):
		return flint.Because("runner.stopped", "flint was told to stop")
	case errors.As(err, &fault) && fault.Code == "runner.offline":
		return flint.Because(fault.Code, "%s; %s", fault, fault.Fix)
	case errors.Is(err, flint.ErrGuest):
		return flint.Because("runner.guest", "its VM failed: %s", err)
	case errors.Is(err, flint.ErrTimeout):
		return flint.Because("runner.time_limit", "its time was up: %s", err)
	case err != nil:
		return flint.Because("runner.failed", "it failed: %s", err)
	case !l.shortage().IsZero() && !l.succeeded(): // what it ran out of did no harm otherwise
		return l.shortage()
	case r.Lost:
		return flint.Because("runner.lost", "its program was ended by %s under %s; GitHub will declare it failed in about ten minutes",
			r.Signal, jobOf(l.rec.Runner))
	case r.ExitCode == exitDeprecated && l.rec.Register && l.rec.Runner.Job == nil:
		return flint.Because("runner.deprecated", "GitHub refuses this version of the runner software: give the pool a newer release")
	case r.Unstarted != "":
		return flint.Because("runner.start", "its program could not be started: %s", r.Unstarted)
	case r.ExitCode != 0:
		return flint.Because("runner.exit", "its program ended with code %d", r.ExitCode)
	}
	return flint.Because("runner.done", "its work was done")
}

// exitDeprecated is how the runner program ends when GitHub refuses its version (actions/runner, Constants.ReturnCode). One
// that had a job was not refused: its exit code is then what the job made of it.
const exitDeprecated = 7

// jobOf names a runner's job for a person.
func jobOf(r flint.Runner) string {
	if r.Job.Repository == "" {
		return "job " + r.Job.Name
	}
	return fmt.Sprintf("job %s of %s", r.Job.Name, r.Job.Repository)
}

// shortage says what the VM ran out of under its program; zero if it had enough.
func (l *life) shortage() flint.Reason {
	switch r := l.result; {
	// Before memory: too many processes are short of that, too.
	case r.PIDs:
		return flint.Because("runner.pids", "its VM had as many processes as one of %s may have", l.shape.Memory)
	case r.OOM:
		return flint.Because("runner.oom", "its VM ran out of memory (%s)", l.shape.Memory)
	case r.DiskFull:
		return flint.Because("runner.disk_full", "its disk was full (%s)", l.shape.Disk)
	case r.RootFull:
		return flint.Because("runner.root_full", "its root was full, which is half of its memory (%s)", l.shape.Memory)
	}
	return flint.Reason{}
}

// succeeded reports whether its work went well: of a job GitHub says so, for the runner program ends with 0 after a failed one, too.
// The caller holds l.mu.
func (l *life) succeeded() bool {
	if l.rec.Runner.Job != nil {
		return l.conclusion == "succeeded"
	}
	return l.result.ExitCode == 0 && l.result.Signal == "" && l.result.Unstarted == ""
}

// cutShort is the error of a program that was asked to end, and then killed if it had to be, for this cause.
func (l *life) cutShort(name string, cause error) error {
	cause = ended(cause)
	if !errors.Is(cause, flint.ErrTimeout) {
		return fmt.Errorf("run %s: %w", name, cause)
	}
	if l.result.Signal == "SIGKILL" {
		cause = fmt.Errorf("%w; asked to end, it went on, and was killed", cause)
	}
	if short := l.shortage(); !short.IsZero() {
		cause = fmt.Errorf("%w; %s", cause, short.Text)
	}
	return &flint.Fault{
		Code: "runner.time_limit", What: "run " + name + " to its end", Kind: flint.ErrTimeout, Err: cause,
		Fix: "see in its output what it waited for, or give it more time: vm.job_timeout (flint run: --timeout)",
	}
}
