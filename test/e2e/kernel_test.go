package e2e

import (
	"encoding/json"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

// The kernel that make kernel builds boots, has no modules, and does what containers ask of a kernel. Building one takes
// too long for every run of the tests.
func TestKernelFromSource(t *testing.T) {
	vmlinux := os.Getenv("FLINT_TEST_MONOLITHIC")
	if vmlinux == "" {
		t.Skip("needs a kernel from source: FLINT_TEST_MONOLITHIC names none, and make kernel has not built one")
	}
	r := newRig(t)
	vmlinux, err := filepath.Abs(vmlinux)
	if err != nil {
		t.Fatal(err)
	}
	cmd := r.flint(t.Context(), nil, "run", "--kernel", vmlinux, "--image", "./test/e2e/network", "--", "sh", "-c",
		`uname -r; zcat /proc/config.gz | grep CONFIG_MODULES; ls /lib/modules/$(uname -r) 2>&1; exec try-kernel`)
	var stderr strings.Builder
	cmd.Stderr = &stderr
	out, err := cmd.Output()
	if code := exitCode(t, err); code != 0 {
		t.Errorf("exit %d\n%s%s", code, out, stderr.String())
	}
	for _, want := range []string{"-flint\n", "# CONFIG_MODULES is not set\n", "No such file", "the kernel has all that was asked for\n"} {
		if !strings.Contains(string(out), want) {
			t.Errorf("%q is not in\n%s", want, out)
		}
	}
	// Nothing to load is nothing to complain of.
	if strings.Contains(stderr.String(), "lacks") {
		t.Errorf("flint says\n%s", stderr.String())
	}
	r.nothingLeft("run0")
}

// What `flint kernel inspect` says of the distribution's kernel is what a VM shows: it has all that containers, WireGuard, nftables
// and BPF ask for, though its modules are loaded only when they are asked for, and the image has no kmod.
func TestDistributionKernel(t *testing.T) {
	r := newRig(t)
	var kernel struct {
		Version   string `json:"version"`
		Workloads []struct {
			Name, Verdict string
			Lacks         []string
		} `json:"workloads"`
	}
	out, err := r.flint(t.Context(), nil, "kernel", "inspect", "--json").Output()
	if err != nil {
		t.Fatal(err)
	}
	if err := json.Unmarshal(out, &kernel); err != nil || len(kernel.Workloads) != 7 {
		t.Fatalf("%v: %s", err, out)
	}
	for _, w := range kernel.Workloads {
		if w.Verdict != "yes" {
			t.Errorf("%s has not all for %s, by its report: %s %v", kernel.Version, w.Name, w.Verdict, w.Lacks)
		}
	}
	cmd := r.flint(t.Context(), nil, "run", "--image", "./test/e2e/network", "--", "sh", "-c", `uname -r; command -v kmod; ls /sys/kernel/btf/vmlinux; KINDS=nft exec try-kernel`)
	var stderr strings.Builder
	cmd.Stderr = &stderr
	out, err = cmd.Output()
	if code := exitCode(t, err); code != 0 {
		t.Errorf("exit %d\n%s%s", code, out, stderr.String())
	}
	want := kernel.Version + "\n/sys/kernel/btf/vmlinux\nthe kernel has all that was asked for\n"
	if string(out) != want {
		t.Errorf("got\n%swant\n%s", out, want)
	}
	r.nothingLeft("run0")
}
