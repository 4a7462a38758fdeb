package qemu

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"flint"
	"flint/internal/vm"
)

// realParent returns a parent of cgroups that only this test uses, and its directory.
func realParent(tb testing.TB) (parent, dir string) {
	tb.Helper()
	parent = fmt.Sprintf("flint-test-%d", os.Getpid())
	g, err := openCgroups("/proc/self/mounts", parent)
	if err != nil {
		tb.Skipf("needs a cgroup v2 that can be written: %v", err)
	}
	if err := os.Remove(g.parent); err != nil {
		tb.Fatal(err)
	}
	return parent, g.parent
}

func members(t *testing.T, dir string) []string {
	t.Helper()
	b, err := os.ReadFile(filepath.Join(dir, "cgroup.procs"))
	if err != nil {
		t.Error(err)
	}
	return strings.Fields(string(b))
}

func gone(t *testing.T, dir string) {
	t.Helper()
	if _, err := os.Stat(dir); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("%s: %v", dir, err)
	}
}

func TestCgroupLivesWithItsVM(t *testing.T) {
	parent, dir := realParent(t)
	d, s := fakeDriver(t, "later-quits")
	d.openCgroups(parent)
	gone(t, dir) // there is no VM yet
	booted, err := d.Boot(patiently(t), s)
	if err != nil {
		t.Fatal(err)
	}
	defer booted.Close(t.Context())
	pid, start := booted.(vm.Process).Process()
	group := filepath.Join(dir, s.ID)
	if got := members(t, group); !slices.Equal(got, []string{fmt.Sprint(pid)}) {
		t.Errorf("processes %s are in the group, want %d", got, pid)
	}
	if err := os.Mkdir(filepath.Join(dir, "left"), 0o755); err != nil {
		t.Fatal(err)
	}
	if left, err := Leftovers(parent); err != nil || !slices.Contains(left, "cgroup "+group) || len(left) != 2 {
		t.Errorf("leftovers %q, %v", left, err)
	}
	booted.(*machine).Forget()

	// The next process finds a VM that lives, and what a dead one left.
	next, _ := fakeDriver(t, s.ID)
	next.openCgroups(parent)
	gone(t, filepath.Join(dir, "left"))
	if got := members(t, group); len(got) != 1 {
		t.Errorf("processes %s are in the group after a sweep", got)
	}
	m, err := next.Adopt(patiently(t), vm.Spec{ID: s.ID, Dir: s.Dir}, pid, start)
	if err != nil {
		t.Fatal(err)
	}
	if err := m.Close(t.Context()); err != nil {
		t.Error(err)
	}
	gone(t, dir)
}

// TestCgroupOfAFailedBoot must not stay.
func TestCgroupOfAFailedBoot(t *testing.T) {
	parent, dir := realParent(t)
	d, s := fakeDriver(t, "refuses")
	d.openCgroups(parent)
	if _, err := d.Boot(patiently(t), s); err == nil {
		t.Error("it booted")
	}
	gone(t, dir)
	d.binary = "/nowhere"
	if _, err := d.Boot(patiently(t), s); err == nil {
		t.Error("it booted from nothing")
	}
	gone(t, dir)
}

// TestCgroupSweptWhileOneBoots: a group is empty between its making and its first process.
func TestCgroupSweptWhileOneBoots(t *testing.T) {
	parent, dir := realParent(t)
	g, err := openCgroups("/proc/self/mounts", parent)
	if err != nil {
		t.Fatal(err)
	}
	f, err := g.create(vm.Spec{ID: "x", CPUs: 1, Memory: flint.GiB})
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if _, err := g.create(vm.Spec{ID: "x"}); !errors.Is(err, flint.ErrConflict) {
		t.Errorf("made twice: %v", err)
	}
	if removed, err := g.sweep(); len(removed) > 0 || err != nil {
		t.Errorf("removed %s, %v", removed, err)
	}
	if err := g.remove(t.Context(), "x"); err != nil {
		t.Error(err)
	}
	gone(t, dir)
}

// plainGroups is a hierarchy of plain files.
func plainGroups(t *testing.T) *cgroups {
	t.Helper()
	root := t.TempDir()
	mounts := filepath.Join(root, "mounts")
	if err := os.WriteFile(mounts, []byte("tmpfs /run tmpfs rw 0 0\ncgroup2 "+root+" cgroup2 rw 0 0\n"), 0o644); err != nil {
		t.Fatal(err)
	}
	g, err := openCgroups(mounts, "flint/qemu.x")
	if err != nil {
		t.Fatal(err)
	}
	return g
}

func TestCgroupLimits(t *testing.T) {
	g := plainGroups(t)
	dir := g.dir("x")
	if err := os.Mkdir(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{"memory.max", "memory.oom.group", "cpu.max", "cpu.weight", "pids.max"} {
		if err := os.WriteFile(filepath.Join(dir, name), nil, 0o644); err != nil {
			t.Fatal(err)
		}
	}
	if err := limitGroup(dir, vm.Spec{ID: "x", CPUs: 3, Memory: flint.GiB}); err != nil {
		t.Fatal(err)
	}
	for name, want := range map[string]string{
		"memory.max": fmt.Sprint(int64(flint.GiB + 208*flint.MiB + 128*flint.MiB)), "memory.oom.group": "1",
		"cpu.max": "400000 100000", "cpu.weight": "300", "pids.max": "131",
	} {
		if b, err := os.ReadFile(filepath.Join(dir, name)); string(b) != want || err != nil {
			t.Errorf("%s is %q, %v; want %q", name, b, err, want)
		}
	}
	gone(t, filepath.Join(dir, "memory.swap.max")) // a kernel that does not count swap
	if g.killedForMemory("x") {
		t.Error("killed for memory, says a group that says nothing")
	}
	if err := os.WriteFile(filepath.Join(dir, "memory.events"), []byte("oom 1\noom_kill 1\n"), 0o644); err != nil {
		t.Fatal(err)
	}
	if !g.killedForMemory("x") {
		t.Error("not killed for memory")
	}
}

func TestCgroupsThatCannotBe(t *testing.T) {
	for _, parent := range []string{"", ".", "/flint", "../flint", "a//b"} {
		if _, err := openCgroups("/proc/self/mounts", parent); err == nil {
			t.Errorf("parent %q is taken", parent)
		}
	}
	if _, err := openCgroups("/dev/null", "flint"); err == nil || !strings.Contains(err.Error(), "not mounted") {
		t.Errorf("no cgroup v2: %v", err)
	}
	g := plainGroups(t)
	if err := vm.SetCgroup(g.parent, "cgroup.subtree_control", "cpu memory"); err != nil {
		t.Fatal(err)
	}
	if got := g.missing(); !slices.Equal(got, []string{"pids"}) {
		t.Errorf("missing %s", got)
	}
}
