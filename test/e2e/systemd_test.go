package e2e

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
)

// One VM for all of it, because in software systemd takes half a minute.
func TestSystemdIsInitAndCommandsWaitForItsServices(t *testing.T) {
	r := newRig(t)
	image := filepath.Join(r.assets, "base-systemd.ext4")
	if _, err := os.Stat(image); err != nil {
		t.Skipf("needs the image with systemd, which make test prepares: %v", err)
	}
	cmd := r.flint(t.Context(), []string{"FLINT_VM_BOOT_TIMEOUT=3m"}, "run", "-v", "--image", image, "--", "sh", "-c", `
		echo "init is $(cat /proc/1/comm)"
		systemctl is-active multi-user.target slow.service flint-agent.service
		echo "$(systemctl list-jobs --no-legend | grep -c start) jobs wait"
		test -e /run/slow-is-up || echo "slow is not up"
		getent hosts $(hostname) >/dev/null && grep -q . /etc/resolv.conf && echo configured
		exit 9`)
	var log strings.Builder
	cmd.Stderr = &log
	out, err := cmd.Output()
	if code := exitCode(t, err); code != 9 || string(out) != "init is systemd\nactive\nactive\nactive\n0 jobs wait\nconfigured\n" {
		t.Errorf("exit %d\n%s\n%s", code, out, &log)
	}
	for _, wrong := range []string{"with a fault", "did not end by itself"} { // the agent's reboot ends the VM
		if strings.Contains(log.String(), wrong) {
			t.Errorf("%q is in the log:\n%s", wrong, &log)
		}
	}
	r.nothingLeft("run0")
}
