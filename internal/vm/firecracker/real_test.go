package firecracker

import (
	"fmt"
	"log/slog"
	"os"
	"os/exec"
	"path/filepath"
	"testing"

	"flint"
	"flint/internal/vm"
	"flint/internal/vm/vmtest"
)

// TestRealVM holds real Firecracker under its real jailer to the suite, with real guests.
func TestRealVM(t *testing.T) {
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
	c := Config{
		Firecracker: filepath.Join(programs, "firecracker"), Jailer: filepath.Join(programs, "jailer"), Serial: true,
		ChrootBase: filepath.Join(t.TempDir(), "jail"), UIDs: testUIDs, ParentCgroup: fmt.Sprintf("flint-real-%d", os.Getpid()),
		Log: slog.New(slog.NewTextHandler(testLog{t}, nil)),
	}
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
		dir := t.TempDir()
		scratch := filepath.Join(dir, "scratch.ext4")
		if out, err := exec.Command("cp", "--sparse=always", filepath.Join(assets, "scratch.ext4"), scratch).CombinedOutput(); err != nil {
			t.Fatalf("make scratch disk: %v: %s", err, out)
		}
		return d, vm.Spec{
			ID: fmt.Sprintf("real-%d", n), Kernel: resolved(t, assets, "vmlinux"), Initrd: resolved(t, assets, "initrd"), CPUs: 1, Memory: 512 * flint.MiB, Dir: dir,
			Drives: []vm.Drive{{ID: "base", Path: resolved(t, assets, "base.ext4"), ReadOnly: true}, {ID: "scratch", Path: scratch}},
		}
	})
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
