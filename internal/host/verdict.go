package host

import (
	"errors"
	"fmt"

	"flint"
)

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
