package e2e

import "testing"

// What a job does to process 1, or leaves in the background, neither ends the VM before its time nor keeps it.
func TestJobsThatTryTheAgent(t *testing.T) {
	r := newRig(t)
	out, err := r.flint(t.Context(), nil, r.run("--", "sh", "-c", `
		for s in HUP QUIT PIPE ALRM SEGV; do kill -$s 1; done
		(while :; do echo still; sleep 0.4; done) &
		echo alive; exit 3`)...).Output()
	if code := exitCode(t, err); code != 3 || len(out) < len("alive\n") {
		t.Errorf("exit %d, output %q", code, out)
	}
	r.nothingLeft("run0")
}
