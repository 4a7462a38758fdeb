package e2e

import (
	"os/exec"
	"strings"
	"syscall"
	"testing"
	"time"
)

// What a command takes too much of ends in a verdict, and within a bound; what it said before arrives. The VMs run side by side.
func TestWhatTakesTooMuchEndsInAVerdict(t *testing.T) {
	const bound = 5 * time.Minute // of a machine that does much else
	r := newRig(t)
	type run struct {
		*exec.Cmd
		out, err *watched
		code     int
		says     []string // on standard error
	}
	begin := time.Now()
	start := func(code int, says []string, args ...string) *run {
		cmd := r.flint(t.Context(), nil, r.run(append([]string{"--memory", "256MiB"}, args...)...)...)
		u := &run{cmd, newWatched(), newWatched(), code, says}
		cmd.Stdout, cmd.Stderr = u.out, u.err
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		return u
	}
	stuck := start(125, []string{"[vm.lost]", "no sign of life for 15s", "fix:"}, "--", "sh", "-c", "echo begun; sleep 1000")
	stuck.out.until(t, "begun")
	_, pid := r.running("run0") // the only one yet
	if err := syscall.Kill(pid, syscall.SIGSTOP); err != nil {
		t.Fatal(err)
	}
	for name, u := range map[string]*run{
		"stuck": stuck,
		"memory": start(7, []string{"its VM ran out of memory (256MiB) [runner.oom]", "fix:"},
			"--timeout", "4m", "--", "sh", "-c", `echo begun; tail /dev/zero; echo tail ended with $?
			# What a container and the job have together is more than there is for both.
			(echo 0 >/sys/fs/cgroup/flint/docker/cgroup.procs; { head -c 110M /dev/zero; sleep 1000; } | tail -c 110M) &
			{ head -c 110M /dev/zero; sleep 1000; } | tail -c 110M &
			until grep -q '^oom [1-9]' /sys/fs/cgroup/flint/memory.events.local; do sleep 1; done
			echo they met their common limit; exit 7`),
		"processes": start(3, []string{"Resource temporarily unavailable", "its VM had as many processes as one of 256MiB may have [runner.pids]", "fix:"},
			"--user", "runner", "--", "bash", "-c", `mkfifo f; exec 9<>f; echo begun; b() { b | b & }; b
			until read -r _ refused </sys/fs/cgroup/flint/job/pids.events && [ $refused -gt 50 ]; do read -rt 0.2 -u 9; done; exit 3`),
		// A full disk and deaf ears in one VM: the limit of time is the verdict, and the disk is said.
		"disk and time": start(124, []string{"[runner.time_limit]", "asked to end, it went on, and was killed; its disk was full (100MiB)", "fix:"},
			"--disk", "100MiB", "--timeout", "30s", "--user", "runner", "--", "sh", "-c",
			"trap 'echo asked to end' TERM; echo begun; fallocate -l 200M x; cat /dev/zero > x; sleep 3; rm x; while :; do sleep 1; done"), // the agent looks four times a second
	} {
		code := exitCode(t, u.Wait())
		if took := time.Since(begin); code != u.code || took > bound {
			t.Errorf("%s: exit %d after %s, want %d", name, code, took, u.code)
		}
		for _, want := range append([]string{"begun\n"}, u.says...) {
			if !strings.Contains(u.out.String()+u.err.String(), want) {
				t.Errorf("%s: %q is not shown in\n%s%.4000s", name, want, u.out, tail(u.err.String()))
			}
		}
		t.Logf("%s:\n%s%s", name, u.out, tail(u.err.String()))
		if name == "disk and time" && !strings.Contains(u.out.String(), "asked to end\n") {
			t.Errorf("%s: what it said when it was asked to end did not arrive", name)
		}
		if name == "memory" && !strings.Contains(u.out.String(), "tail ended with 137\nthey met their common limit\n") {
			t.Errorf("%s: more was killed than what took the memory:\n%s", name, u.out)
		}
	}
	for _, instance := range []string{"run0", "run1", "run2", "run3"} {
		r.nothingLeft(instance)
	}
}

// tail is the end of a text, for a fork bomb says much.
func tail(s string) string { return s[max(0, len(s)-600):] }
