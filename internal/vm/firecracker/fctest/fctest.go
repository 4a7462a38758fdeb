// Package fctest has doubles of Firecracker and of its jailer: real programs that behave as the documented ones do, so
// that the driver can be tested where there is neither of them nor KVM.
//
// Firecracker's double has the real one's API, as strict; its guest is the real agent of package guest behind the real
// vsock handshake, on the scripted system of vmtest. The jailer's double really makes the jail. Tests import this
// package; programs must not.
package fctest

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"testing"

	"flint/internal/vm/firecracker/fctest/double"
)

// Options are what a test can tell the doubles.
type Options = double.Options

// prebuilt names a directory with both doubles, for machines without Go.
const prebuilt = "FLINT_FCTEST_BIN"

const room = "flint/internal/vm/firecracker/fctest/"

// build builds both doubles into dir, once for a run of tests: Main does it. Where $FLINT_FCTEST_BIN names a
// directory that has them, they come from there.
func build(dir string) error {
	for _, name := range []string{"firecracker", "jailer"} {
		if from := os.Getenv(prebuilt); from != "" {
			b, err := os.ReadFile(filepath.Join(from, name))
			if err == nil {
				err = os.WriteFile(filepath.Join(dir, name), b, 0o755)
			}
			if err != nil {
				return fmt.Errorf("take %s from %s: %w", name, from, err)
			}
			continue
		}
		cmd := exec.Command("go", "build", "-o", filepath.Join(dir, name), room+name)
		cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
		if out, err := cmd.CombinedOutput(); err != nil {
			return fmt.Errorf("build %s: %w: %s", name, err, out)
		}
	}
	return nil
}

// Main builds both doubles, runs a package's tests with the directory they are in, and returns their exit code: for TestMain.
func Main(run func(dir string) int) int {
	dir, err := os.MkdirTemp("", "flint-fctest")
	if err == nil {
		defer os.RemoveAll(dir)
		err = build(dir)
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	return run(dir)
}

// Programs are the paths of two doubles.
type Programs struct{ Firecracker, Jailer string }

// Install makes a pair of doubles, out of what Build made in dir, that do what o says.
func Install(t testing.TB, dir string, o Options) Programs {
	t.Helper()
	to := t.TempDir()
	p := Programs{filepath.Join(to, "firecracker"), filepath.Join(to, "jailer")}
	for _, path := range []string{p.Firecracker, p.Jailer} {
		if err := o.Install(filepath.Join(dir, filepath.Base(path)), path); err != nil {
			t.Fatalf("install double: %v", err)
		}
	}
	return p
}

// Cgroups makes a directory that looks like a cgroup v2 hierarchy to who only makes directories and writes files, and a
// file as /proc/mounts that names it. Groups in it hold no one.
func Cgroups(t testing.TB) (root, mounts string) {
	t.Helper()
	root = t.TempDir()
	mounts = filepath.Join(t.TempDir(), "mounts")
	for path, content := range map[string]string{
		filepath.Join(root, "cgroup.controllers"):     "cpuset cpu io memory pids\n",
		filepath.Join(root, "cgroup.subtree_control"): "",
		mounts: "proc /proc proc rw 0 0\ncgroup2 " + root + " cgroup2 rw,nosuid,nodev,noexec,relatime 0 0\n",
	} {
		if err := os.WriteFile(path, []byte(content), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	return root, mounts
}
