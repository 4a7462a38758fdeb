package e2e

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
)

// systemd is a command in a VM of the image in ./systemd. It gets more time than people do: in software, beside other
// tests, systemd takes half a minute.
func (r *rig) systemd(args ...string) (string, int) {
	r.t.Helper()
	image := filepath.Join(r.assets, "base-systemd.ext4")
	if _, err := os.Stat(image); err != nil {
		r.t.Skipf("needs the image with systemd, which make test prepares: %v", err)
	}
	out, err := r.flint(r.t.Context(), []string{"FLINT_VM_BOOT_TIMEOUT=3m"}, append([]string{"run", "--image", image, "--"}, args...)...).CombinedOutput()
	return string(out), exitCode(r.t, err)
}

func TestSystemdIsInitAndCommandsWaitForItsServices(t *testing.T) {
	r := newRig(t)
	out, code := r.systemd("sh", "-c", `
		echo "init is $(cat /proc/1/comm)"
		systemctl is-active multi-user.target slow.service flint-agent.service
		echo "$(systemctl list-jobs --no-legend | grep -c start) jobs wait"
		test -e /run/slow-is-up || echo "slow is not up"
		for name in flint-agent slow; do systemctl cat $name | grep Description=; done
		getent hosts $(hostname) >/dev/null && grep -q . /etc/resolv.conf && echo configured
		exit 9`)
	want := "init is systemd\nactive\nactive\nactive\n0 jobs wait\nDescription=flint agent\nDescription=Something slow that jobs need\nconfigured\n"
	if code != 9 || !strings.HasSuffix(out, want) {
		t.Errorf("exit %d\n%s", code, out)
	}
	r.nothingLeft("run0")
}

// An orderly reboot in the guest ends the VM, as it ends any machine.
func TestSystemdRebootEndsTheVM(t *testing.T) {
	r := newRig(t)
	out, code := r.systemd("sh", "-c", "systemctl reboot; sleep 1000")
	if strings.Contains(out, "Kernel panic") || code == 0 {
		t.Errorf("exit %d\n%s", code, out)
	}
	t.Logf("exit %d\n%s", code, out)
	r.nothingLeft("run0")
}
