package firecracker

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"os/exec"
	"path/filepath"
	"testing"

	"flint"
	"flint/internal/vm"
	"flint/internal/vm/vmtest"
)

// realConfig finds real Firecracker, its real jailer, and what guests boot from, or skips.
func realConfig(t *testing.T) (c Config, assets string) {
	t.Helper()
	programs, assets := os.Getenv("FLINT_TEST_FIRECRACKER"), os.Getenv("FLINT_TEST_ASSETS")
	if programs == "" || assets == "" {
		t.Skip("needs Firecracker and what guests boot from: FLINT_TEST_FIRECRACKER names a directory with firecracker and jailer, FLINT_TEST_ASSETS one with vmlinux, initrd, base.ext4 and scratch.ext4")
	}
	if os.Geteuid() != 0 {
		t.Skip("needs root: the jailer makes mounts, devices and users")
	}
	if s := vm.ProbeKVM(t.Context()); s.State != vm.KVMWorks {
		t.Skipf("needs KVM: %s", s)
	}
	// The jails are on the file system of the assets: TMPDIR must be, as hard links do not leave theirs.
	parent := fmt.Sprintf("flint-real-%d", os.Getpid())
	t.Cleanup(func() { removeParent(t, parent) })
	return Config{
		Firecracker: filepath.Join(programs, "firecracker"), Jailer: filepath.Join(programs, "jailer"), Serial: true,
		ChrootBase: filepath.Join(t.TempDir(), "jail"), UIDs: testUIDs, ParentCgroup: parent,
		Log: slog.New(slog.NewTextHandler(testLog{t}, nil)),
	}, assets
}

// removeParent removes a test's own cgroup, which must be empty: its VMs' groups are gone with them.
func removeParent(t *testing.T, parent string) {
	t.Helper()
	root, err := vm.CgroupRoot("/proc/self/mounts")
	if err != nil {
		return // then it could not be made either
	}
	if err := os.Remove(filepath.Join(root, parent)); err != nil && !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("the parent of the VMs' cgroups is left: %v", err)
	}
}

// realSpec returns a bootable spec of a VM of its own.
func realSpec(t *testing.T, assets, id string) vm.Spec {
	t.Helper()
	dir := t.TempDir()
	scratch := filepath.Join(dir, "scratch.ext4")
	if out, err := exec.Command("cp", "--sparse=always", filepath.Join(assets, "scratch.ext4"), scratch).CombinedOutput(); err != nil {
		t.Fatalf("make scratch disk: %v: %s", err, out)
	}
	return vm.Spec{
		ID: id, Kernel: resolved(t, assets, "vmlinux"), Initrd: resolved(t, assets, "initrd"), CPUs: 1, Memory: 512 * flint.MiB, Dir: dir,
		Drives: []vm.Drive{{ID: "base", Path: resolved(t, assets, "base.ext4"), ReadOnly: true}, {ID: "scratch", Path: scratch}},
	}
}

// TestRealVM holds real Firecracker under its real jailer to the suite, with real guests.
func TestRealVM(t *testing.T) {
	c, assets := realConfig(t)
	n := 0
	vmtest.Run(t, func(t *testing.T) (vm.Driver, vm.Spec) {
		n++
		d, err := New(t.Context(), c)
		if err != nil {
			t.Fatal(err)
		}
		if n == 1 {
			c.Log.Info("found Firecracker", "version", d.Version())
		}
		return d, realSpec(t, assets, fmt.Sprintf("real-%d", n))
	})
}

// TestRealNIC boots a real guest with a network interface and limits, asks it what it sees, and looks at what is counted.
func TestRealNIC(t *testing.T) {
	c, assets := realConfig(t)
	d, err := New(t.Context(), c)
	if err != nil {
		t.Fatal(err)
	}
	s := realSpec(t, assets, "real-nic")
	s.CPUs, s.NIC = 2, testNIC(t)
	s.Limits = vm.Limits{DiskBytes: flint.GiB, DiskOps: 100_000, NetRx: flint.GiB, NetTx: flint.GiB}
	m, err := d.Boot(patiently(t), s)
	if err != nil {
		t.Fatal(err)
	}
	defer m.Close(context.Background())
	g := attach(t, m)
	if out := output(t, g, "cat", "/sys/class/net/eth0/address"); out != "02:f1:00:00:00:07\n" {
		t.Errorf("the guest's interface is %q", out)
	}
	if out := output(t, g, "cat", "/sys/class/net/eth0/mtu"); atLeast(d.Version(), mtuMinor) && out != "1400\n" {
		t.Errorf("the interface's MTU is %q", out)
	}
	if out := output(t, g, "nproc"); out != "2\n" {
		t.Errorf("the guest's processors are %q", out)
	}
	if err := m.Close(t.Context()); err != nil {
		t.Error(err)
	}
	if counted := m.(vm.Metrics).Metrics(); counted.Boot <= 0 || counted.BlockRead < flint.MiB {
		t.Errorf("counters %+v: a guest that booted has read more", counted)
	}
	if entries, err := os.ReadDir(d.base); err != nil || len(entries) != 0 {
		t.Errorf("jails are left: %v, %v", entries, err)
	}
}

// resolved is what a link in the assets' directory names.
func resolved(t *testing.T, dir, name string) string {
	t.Helper()
	path, err := filepath.EvalSymlinks(filepath.Join(dir, name))
	if err != nil {
		t.Fatal(err)
	}
	return path
}
