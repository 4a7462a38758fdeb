package firecracker

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"

	"golang.org/x/sys/unix"

	"flint"
	"flint/internal/vm"
	"flint/internal/vm/firecracker/fctest"
)

func read(t testing.TB, path ...string) string {
	t.Helper()
	b, err := os.ReadFile(filepath.Join(path...))
	if err != nil {
		t.Error(err)
	}
	return strings.TrimSpace(string(b))
}

// statusLine returns the fields of a line of /proc/pid/status.
func statusLine(t testing.TB, pid int, name string) []string {
	t.Helper()
	for line := range strings.Lines(read(t, "/proc", strconv.Itoa(pid), "status")) {
		if rest, ok := strings.CutPrefix(line, name+":"); ok {
			return strings.Fields(rest)
		}
	}
	return nil
}

// TestJail looks at a VMM from outside.
func TestJail(t *testing.T) {
	t.Setenv("FLINT_TEST_SECRET", "not for a VMM")
	r := newRig(t, fctest.Options{})
	s := r.spec()
	s.Limits = vm.Limits{DiskBytes: 50 * flint.MiB, DiskOps: 1000}
	m := r.boot(r.driver(), s)
	pid, _ := m.Process()
	proc := fmt.Sprintf("/proc/%d", pid)

	uid := strconv.Itoa(m.uid)
	if m.uid < int(testUIDs.First) || m.uid >= int(testUIDs.First+testUIDs.Count) {
		t.Errorf("user %s is not of the range", uid)
	}
	want := []string{uid, uid, uid, uid}
	if u, g := statusLine(t, pid, "Uid"), statusLine(t, pid, "Gid"); !slices.Equal(u, want) || !slices.Equal(g, want) {
		t.Errorf("users %v, groups %v; want %s", u, g, uid)
	}
	if g := statusLine(t, pid, "Groups"); len(g) != 0 {
		t.Errorf("supplementary groups %v", g)
	}
	if c := statusLine(t, pid, "CapEff"); !slices.Equal(c, []string{"0000000000000000"}) {
		t.Errorf("capabilities %v", c)
	}
	if n := statusLine(t, pid, "NSpid"); len(n) < 2 || n[len(n)-1] != "1" {
		t.Errorf("numbers %v: it is not the first process of a namespace", n)
	}
	if sid, err := unix.Getsid(pid); err != nil || sid != pid {
		t.Errorf("session %d, %v; want its own", sid, err)
	}
	if own, err := os.Readlink("/proc/self/ns/net"); err != nil {
		t.Error(err)
	} else if its, err := os.Readlink(proc + "/ns/net"); err != nil || its == own {
		t.Errorf("it has no network of its own, and is in %s (%v)", its, err)
	}
	if env := read(t, proc, "environ"); env != "" {
		t.Errorf("environment %q", env)
	}
	var root []string
	entries, err := os.ReadDir(proc + "/root/")
	if err != nil {
		t.Error(err)
	}
	for _, e := range entries {
		root = append(root, e.Name())
	}
	slices.Sort(root)
	if want := []string{"api.sock", "dev", "firecracker", "firecracker.pid", "log", "metrics", "out", "run", "v.sock"}; !slices.Equal(root, want) {
		t.Errorf("its root has %v; want %v", root, want)
	}
	for _, dir := range []string{"", "dev", "dev/net", "run"} {
		st, err := os.Stat(filepath.Join(proc, "root", dir))
		if err != nil || st.Mode().Perm() != 0o755 || owner(t, filepath.Join(proc, "root", dir)) != 0 {
			t.Errorf("it may write to /%s: %v, %v", dir, st, err)
		}
	}
	limits := read(t, proc, "limits")
	for _, line := range []string{"Max open files            2048                 2048", "Max file size             268435456            268435456", "Max core file size        0                    0"} {
		if !strings.Contains(limits, line) {
			t.Errorf("limits lack %q:\n%s", line, limits)
		}
	}
	for _, d := range s.Drives {
		var st unix.Stat_t
		if err := unix.Stat(d.Path, &st); err != nil || st.Nlink != 1 {
			t.Errorf("%s has %d links, %v: the one in the jail was not taken away", d.Path, st.Nlink, err)
		}
	}
	if got := owner(t, s.Drives[1].Path); got != m.uid {
		t.Errorf("the scratch disk belongs to %d while the VM runs; want %s", got, uid)
	}
	if err := m.Close(t.Context()); err != nil {
		t.Error(err)
	}
	if got := owner(t, s.Drives[1].Path); got != 0 {
		t.Errorf("the scratch disk belongs to %d afterwards", got)
	}
	r.clean()
}

func TestCgroup(t *testing.T) {
	r := newRig(t, fctest.Options{})
	s := r.spec()
	s.Limits = vm.Limits{DiskBytes: 50 * flint.MiB, DiskOps: 1000}
	d := r.driver()
	m := r.boot(d, s)
	pid, _ := m.Process()
	group := filepath.Join(r.groups, r.config.ParentCgroup, s.ID)
	for file, want := range map[string]string{
		"memory.max":       strconv.FormatInt(int64((256+128+4)*flint.MiB), 10),
		"memory.swap.max":  "0",
		"memory.oom.group": "1",
		"cpu.max":          "300000 100000",
		"cpu.weight":       "200",
		"pids.max":         "34",
	} {
		if got := read(t, group, file); got != want {
			t.Errorf("%s is %q; want %q", file, got, want)
		}
	}
	if d.groups.fs.mounts != "/proc/self/mounts" { // numbers in a group of plain files are the jailer's own
		if got := read(t, group, "cgroup.procs"); got != "1" {
			t.Errorf("process %q entered", got)
		}
		if got := read(t, group, "io.max"); !strings.HasSuffix(got, " rbps=52428800 wbps=52428800 riops=1000 wiops=1000") {
			t.Errorf("io.max is %q", got)
		}
	} else if got := read(t, group, "cgroup.procs"); got != strconv.Itoa(pid) {
		t.Errorf("processes %q are in the group; want %d", got, pid)
	}
	if err := m.Close(t.Context()); err != nil {
		t.Error(err)
	}
	r.clean()
}

// testNIC makes a network namespace that holds a persistent tap and nothing else.
func testNIC(t testing.TB) *vm.NIC {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("needs root: a network namespace and a tap")
	}
	var ns, tap *os.File
	err := vm.Apart(func() (err error) {
		if err = unix.Unshare(unix.CLONE_NEWNET); err != nil {
			return err
		}
		if ns, err = os.Open("/proc/thread-self/ns/net"); err != nil {
			return err
		}
		if tap, err = os.OpenFile("/dev/net/tun", os.O_RDWR, 0); err != nil {
			return err
		}
		req, err := unix.NewIfreq("tap0")
		if err != nil {
			return err
		}
		req.SetUint16(unix.IFF_TAP | unix.IFF_NO_PI | unix.IFF_VNET_HDR)
		if err := unix.IoctlIfreq(int(tap.Fd()), unix.TUNSETIFF, req); err != nil {
			return err
		}
		return unix.IoctlSetInt(int(tap.Fd()), unix.TUNSETPERSIST, 1)
	})
	t.Cleanup(func() {
		ns.Close()
		tap.Close()
	})
	if err != nil {
		t.Skipf("needs network namespaces and taps: %v", err)
	}
	return &vm.NIC{Tap: tap, Name: "tap0", Namespace: ns, MAC: net.HardwareAddr{2, 0xf1, 0, 0, 0, 7}, MTU: 1400}
}

func TestNIC(t *testing.T) {
	for _, version := range []string{"1.15.0", "1.16.0", "1.16.1"} { // the first has no mtu, the second takes no links for namespaces
		t.Run(version, func(t *testing.T) {
			r := newRig(t, fctest.Options{Version: version})
			s := r.spec()
			s.NIC = testNIC(t)
			s.Limits = vm.Limits{NetRx: flint.MiB, NetTx: flint.MiB}
			m := r.boot(r.driver(), s)
			pid, _ := m.Process()
			var want, have unix.Stat_t
			if err := unix.Fstat(int(s.NIC.Namespace.Fd()), &want); err != nil {
				t.Fatal(err)
			}
			if err := unix.Stat(fmt.Sprintf("/proc/%d/ns/net", pid), &have); err != nil || have.Ino != want.Ino {
				t.Errorf("it is in network namespace %d, %v; want %d", have.Ino, err, want.Ino)
			}
			output(t, attach(t, m), "true")
			if err := m.Close(t.Context()); err != nil {
				t.Error(err)
			}
			r.clean()
		})
	}
}

func TestTapInUse(t *testing.T) {
	r := newRig(t, fctest.Options{})
	s := r.spec()
	s.NIC = testNIC(t)
	r.boot(r.driver(), s)
	again := r.spec()
	again.NIC = s.NIC
	_, err := r.driver().Boot(patiently(t), again)
	faultCode(t, err, "firecracker.tap")
	if err != nil && !strings.Contains(err.Error(), "Open tap device failed") {
		t.Errorf("the error does not have Firecracker's words: %v", err)
	}
}

func TestUsers(t *testing.T) {
	r := newRig(t, fctest.Options{})
	r.config.UIDs.Count = 2
	d := r.driver()
	first := r.boot(d, r.spec())
	second := r.boot(r.driver(), r.spec()) // of another driver, as of another process
	if first.uid == second.uid {
		t.Errorf("both VMs run as user %d", first.uid)
	}
	_, err := d.Boot(patiently(t), r.spec())
	faultCode(t, err, "firecracker.uids")
	if err := first.Close(t.Context()); err != nil {
		t.Error(err)
	}
	third := r.boot(d, r.spec())
	if third.uid != first.uid {
		t.Errorf("user %d was given; want %d, which is free again", third.uid, first.uid)
	}
}

func TestManyAtOnce(t *testing.T) {
	r := newRig(t, fctest.Options{})
	d := r.driver()
	var all sync.WaitGroup
	var mu sync.Mutex
	users := map[int]bool{}
	for range 8 {
		s := r.spec()
		all.Go(func() {
			m, err := d.Boot(patiently(t), s)
			if err != nil {
				t.Errorf("boot: %v", err)
				return
			}
			mu.Lock()
			users[m.(*machine).uid] = true
			mu.Unlock()
			if err := m.Close(context.Background()); err != nil {
				t.Errorf("close: %v", err)
			}
		})
	}
	all.Wait()
	if len(users) < 2 {
		t.Errorf("VMs ran as users %v", users)
	}
	r.clean()
}

func TestUnused(t *testing.T) {
	dir := t.TempDir()
	for name, content := range map[string]string{
		"passwd": "root:x:0:0::/root:/bin/sh\nodd\nme:x:5000:5100::/:/bin/sh\n", "subuid": "me:100000:65536\nyou:x:y\n",
		"group": "root:x:0:\ncrowd:x:5200:" + strings.Repeat("member,", 20_000) + "me\n", "subgid": "me:300000:10\n",
	} {
		if err := os.WriteFile(filepath.Join(dir, name), []byte(content), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	for _, c := range []struct {
		r    Range
		free bool
	}{
		{Range{4000, 1000}, true},
		{Range{4001, 1000}, false},
		{Range{5000, 1}, false},
		{Range{5001, 99}, true},
		{Range{5100, 1}, false}, // the account's group
		{Range{5200, 1}, false}, // a group
		{Range{5201, 94799}, true},
		{Range{5201, 94800}, false},
		{Range{165535, 1}, false},
		{Range{165536, 10}, true},
		{Range{300009, 1}, false}, // a subordinate group
		{Range{300010, 1}, true},
	} {
		if err := unused(c.r, dir); (err == nil) != c.free {
			t.Errorf("%+v: %v", c.r, err)
		}
	}
	for _, r := range []Range{{0, 10}, {10, 0}, {1<<32 - 10, 20}} {
		_, err := newUIDPool(r, dir)
		faultCode(t, err, "firecracker.uids")
	}
	if p, err := newUIDPool(Range{7000, 3}, filepath.Join(dir, "missing", uidDir)); err != nil || p.first != 7000 {
		t.Errorf("%+v, %v", p, err)
	}
	if err := errors.Join(os.Remove(filepath.Join(dir, "group")), os.Mkdir(filepath.Join(dir, "group"), 0o755)); err != nil {
		t.Fatal(err)
	}
	if err := unused(Range{1, 1}, dir); err == nil {
		t.Error("a file that cannot be read is taken for one without accounts")
	}
}

// TestChrootBase tries directories that jails cannot be in.
func TestChrootBase(t *testing.T) {
	r := newRig(t, fctest.Options{})
	try := func(base, say string) {
		t.Helper()
		r.config.ChrootBase = base
		_, err := newDriver(t.Context(), r.config, r.fs)
		faultCode(t, err, "firecracker.chroot")
		if err != nil && !strings.Contains(err.Error(), say) {
			t.Errorf("%s: %v; want %q", base, err, say)
		}
	}
	try("relative/path", "not absolute")
	open := t.TempDir()
	if err := os.Chmod(open, 0o777); err != nil {
		t.Fatal(err)
	}
	try(open, "others than root")
	for flag, say := range map[uintptr]string{unix.MS_NOEXEC: "noexec", unix.MS_NODEV: "nodev"} {
		dir := t.TempDir()
		if err := unix.Mount("flint-test", dir, "tmpfs", flag, "mode=755,size=64k"); err != nil {
			t.Skipf("needs to mount a tmpfs: %v", err)
		}
		t.Cleanup(func() { _ = unix.Unmount(dir, unix.MNT_DETACH) })
		try(dir, say)
	}
}

func TestOtherFileSystem(t *testing.T) {
	r := newRig(t, fctest.Options{})
	dir := t.TempDir()
	if err := unix.Mount("flint-test", dir, "tmpfs", 0, "mode=755,size=16m"); err != nil {
		t.Skipf("needs to mount a tmpfs: %v", err)
	}
	t.Cleanup(func() { _ = unix.Unmount(dir, unix.MNT_DETACH) })
	r.config.ChrootBase = dir
	_, err := r.driver().Boot(patiently(t), r.spec())
	faultCode(t, err, "firecracker.chroot")
	if err != nil && (!strings.Contains(err.Error(), dir) || !strings.Contains(err.Error(), r.dir)) {
		t.Errorf("%v does not name both directories", err)
	}
	r.clean()
}

func TestFilesOfASpec(t *testing.T) {
	r := newRig(t, fctest.Options{})
	d := r.driver()
	secret := r.spec()
	if err := os.WriteFile(filepath.Join(r.dir, "secret"), make([]byte, sector), 0o600); err != nil {
		t.Fatal(err)
	}
	secret.Drives[0].Path = filepath.Join(r.dir, "secret")
	_, err := d.Boot(patiently(t), secret)
	faultCode(t, err, "firecracker.unreadable")

	for _, spoil := range []func(string) error{
		func(path string) error { return os.Chmod(path, 0o646) },
		func(path string) error { // of every user a VM may get
			return errors.Join(os.Chmod(path, 0o644), os.Chown(path, int(testUIDs.First), 0))
		},
	} {
		open := r.spec()
		open.Drives[0].Path = filepath.Join(r.dir, "open")
		if err := errors.Join(os.WriteFile(open.Drives[0].Path, make([]byte, sector), 0o644), spoil(open.Drives[0].Path)); err != nil {
			t.Fatal(err)
		}
		r.config.UIDs = Range{First: testUIDs.First, Count: 1}
		_, err := r.driver().Boot(patiently(t), open)
		faultCode(t, err, "firecracker.writable")
	}
	r.config.UIDs = testUIDs

	for _, size := range []int64{0, 100, sector + 1} {
		cut := r.spec()
		if err := os.Truncate(cut.Drives[1].Path, size); err != nil {
			t.Fatal(err)
		}
		_, err := d.Boot(patiently(t), cut)
		faultCode(t, err, "firecracker.image")
	}

	shared := r.spec()
	if err := os.Link(shared.Drives[1].Path, filepath.Join(r.dir, "another-name")); err != nil {
		t.Fatal(err)
	}
	_, err = d.Boot(patiently(t), shared)
	faultCode(t, err, "firecracker.shared")
	if got := owner(t, shared.Drives[1].Path); got != 0 {
		t.Errorf("the shared disk was given to %d", got)
	}

	device := r.spec()
	device.Drives[0].Path = "/dev/null"
	if _, err = d.Boot(patiently(t), device); err == nil {
		t.Error("a device was taken for an image")
	}

	kernel := r.spec()
	kernel.Kernel = filepath.Join(r.dir, "base")
	_, err = d.Boot(patiently(t), kernel)
	faultCode(t, err, "firecracker.kernel")

	cpus := r.spec()
	cpus.CPUs = 33
	_, err = d.Boot(patiently(t), cpus)
	faultCode(t, err, "firecracker.cpus")

	long := r.spec()
	long.Args = []string{strings.Repeat("a", 2000)}
	if _, err = d.Boot(patiently(t), long); err == nil || !strings.Contains(err.Error(), "kernel arguments") {
		t.Errorf("long arguments: %v", err)
	}
	r.clean()
}

func TestCgroupRequirements(t *testing.T) {
	root, mounts := fctest.Cgroups(t)
	fs := cgroupFS{mounts: mounts, remove: os.RemoveAll}
	if _, err := openCgroups(fs, "a/b"); err != nil {
		t.Errorf("a nested parent: %v", err)
	}
	for _, dir := range []string{"", "a", "a/b"} {
		if got := read(t, root, dir, "cgroup.subtree_control"); got != "+cpu +memory +pids +io" {
			t.Errorf("controllers of %q: %q", dir, got)
		}
	}
	for _, parent := range []string{"", ".", "/flint", "../flint", "a//b", "a/"} {
		_, err := openCgroups(fs, parent)
		faultCode(t, err, "firecracker.cgroup")
	}
	if err := os.WriteFile(filepath.Join(root, "cgroup.controllers"), []byte("cpuset cpu io pids\n"), 0o644); err != nil {
		t.Fatal(err)
	}
	_, err := openCgroups(fs, "flint")
	faultCode(t, err, "firecracker.cgroup")
	if err != nil && !strings.Contains(err.Error(), "memory") {
		t.Errorf("%v does not name the controller", err)
	}
	if err := os.WriteFile(mounts, []byte("cgroup /sys/fs/cgroup/cpu cgroup rw 0 0\n"), 0o644); err != nil {
		t.Fatal(err)
	}
	_, err = openCgroups(fs, "flint")
	faultCode(t, err, "firecracker.cgroup")
}

// TestCgroupNotDelegated cannot hand the controllers down.
func TestCgroupNotDelegated(t *testing.T) {
	root, mounts := fctest.Cgroups(t)
	control := filepath.Join(root, "cgroup.subtree_control")
	if err := errors.Join(os.Remove(control), os.Mkdir(control, 0o755)); err != nil {
		t.Fatal(err)
	}
	_, err := openCgroups(cgroupFS{mounts: mounts, remove: os.RemoveAll}, "flint")
	faultCode(t, err, "firecracker.cgroup")
	if err != nil && !strings.Contains(err.Error(), "cgroup.subtree_control") {
		t.Errorf("%v does not name the file", err)
	}
}

// TestCgroupBusy removes a group the kernel does not yet believe to be empty.
func TestCgroupBusy(t *testing.T) {
	_, mounts := fctest.Cgroups(t)
	tries := 0
	g, err := openCgroups(cgroupFS{mounts: mounts, remove: func(dir string) error {
		if tries++; tries < 4 {
			return &os.PathError{Op: "rmdir", Path: dir, Err: unix.EBUSY}
		}
		return os.RemoveAll(dir)
	}}, "flint")
	if err != nil {
		t.Fatal(err)
	}
	if err := g.create(vm.Spec{ID: "x", CPUs: 1, Memory: flint.GiB}); err != nil {
		t.Fatal(err)
	}
	if err := g.remove(t.Context(), "x"); err != nil || tries != 4 {
		t.Errorf("%v after %d tries", err, tries)
	}
	if _, err := os.Stat(g.dir("x")); !os.IsNotExist(err) {
		t.Errorf("the group is left: %v", err)
	}
}

func TestKernelArgs(t *testing.T) {
	s := vm.Spec{Drives: []vm.Drive{{ID: "base"}, {ID: "scratch"}}, Args: []string{"mine=1"}}
	for serial, want := range map[bool]string{true: "console=ttyS0 8250.nr_uarts=1", false: "8250.nr_uarts=0"} {
		line, err := kernelArgs(s, serial)
		if err != nil || !strings.Contains(line, want) || !strings.HasSuffix(line, " flint.channel=vsock flint.drives=base,scratch mine=1") {
			t.Errorf("serial %v: %q, %v", serial, line, err)
		}
		if strings.Contains(line, "nomodule") || bytes.Contains([]byte(line), []byte("console")) != serial {
			t.Errorf("serial %v: %q", serial, line)
		}
	}
}
