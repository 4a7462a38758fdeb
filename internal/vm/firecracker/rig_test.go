package firecracker

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"flint"
	"flint/internal/guest"
	"flint/internal/vm"
	"flint/internal/vm/firecracker/fctest"
	"flint/internal/vm/vmtest"
)

// doubles is where TestMain has built the doubles.
var doubles string

func TestMain(m *testing.M) {
	if os.Getenv(helperEnv) != "" {
		if err := bootAndDie(); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
		os.Exit(0)
	}
	os.Exit(fctest.Main(func(dir string) int {
		doubles = dir
		return m.Run()
	}))
}

// rig is a host with doubles on it.
type rig struct {
	t      testing.TB
	dir    string // jails and images are in it
	config Config
	fs     cgroupFS
	groups string // root of the cgroup hierarchy
	count  int
}

// testUIDs are beyond the default ones, few, and this process's: other tests on this machine have theirs.
var testUIDs = Range{First: 1_910_000_000 + 16*uint32(os.Getpid()), Count: 16}

// newRig makes a host for a jailed driver.
func newRig(t testing.TB, o fctest.Options) *rig {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("needs root: the jailer makes mounts, devices and users")
	}
	parent := fmt.Sprintf("flint-test-%d", os.Getpid())
	cfs := cgroupFS{mounts: "/proc/self/mounts", remove: os.Remove}
	if g, err := openCgroups(cfs, parent); err == nil {
		t.Cleanup(func() { os.Remove(filepath.Join(g.root, g.parent)) }) // fails while other groups of this run are there
		r := newBareRig(t, o)
		r.groups = g.root
		return r.jailed(parent, cfs)
	}
	o.Root, cfs.mounts = fctest.Cgroups(t)
	cfs.remove = removeTree
	r := newBareRig(t, o)
	r.groups = o.Root
	return r.jailed(parent, cfs)
}

func (r *rig) jailed(parent string, cfs cgroupFS) *rig {
	r.fs = cfs
	r.config.NoJail, r.config.ParentCgroup, r.config.UIDs = false, parent, testUIDs
	r.config.ChrootBase = filepath.Join(r.dir, "jail")
	return r
}

// removeTree removes a directory of plain files as rmdir does a cgroup.
func removeTree(dir string) error {
	if _, err := os.Stat(dir); err != nil {
		return err
	}
	return os.RemoveAll(dir)
}

// newBareRig makes a host for a driver without a jail.
func newBareRig(t testing.TB, o fctest.Options) *rig {
	t.Helper()
	p := fctest.Install(t, doubles, o)
	dir := t.TempDir()
	for path, content := range map[string]string{"kernel": "\x7fELF" + strings.Repeat("k", 100), "initrd": "initrd", "base": strings.Repeat("b", sector), "modules": strings.Repeat("m", 2*sector)} {
		if err := os.WriteFile(filepath.Join(dir, path), []byte(content), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	return &rig{t: t, dir: dir, config: Config{
		Firecracker: p.Firecracker, Jailer: p.Jailer, NoJail: true, Serial: true, Log: slog.New(slog.NewTextHandler(testLog{t}, &slog.HandlerOptions{Level: slog.LevelDebug})),
	}}
}

// testLog is a writer to a test's log.
type testLog struct{ t testing.TB }

func (l testLog) Write(p []byte) (int, error) {
	l.t.Logf("%s", bytes.TrimSpace(p))
	return len(p), nil
}

func (r *rig) driver() *Driver {
	r.t.Helper()
	d, err := newDriver(r.t.Context(), r.config, r.fs)
	if err != nil {
		r.t.Fatalf("new driver: %v", err)
	}
	return d
}

// spec returns a bootable spec of a VM of its own.
func (r *rig) spec() vm.Spec {
	r.t.Helper()
	r.count++
	dir := filepath.Join(r.dir, fmt.Sprintf("vm%d", r.count))
	if err := os.Mkdir(dir, 0o700); err != nil {
		r.t.Fatal(err)
	}
	scratch := filepath.Join(dir, "scratch.ext4")
	f, err := os.OpenFile(scratch, os.O_CREATE|os.O_WRONLY, 0o600)
	if err == nil {
		err = errors.Join(f.Truncate(64<<20), f.Close())
	}
	if err != nil {
		r.t.Fatal(err)
	}
	in := func(name string) string { return filepath.Join(r.dir, name) }
	return vm.Spec{
		ID: fmt.Sprintf("vm-%d-%d", os.Getpid(), r.count), Kernel: in("kernel"), Initrd: in("initrd"), CPUs: 2, Memory: 256 * flint.MiB, Dir: dir,
		Drives: []vm.Drive{{ID: "base", Path: in("base"), ReadOnly: true}, {ID: "scratch", Path: scratch}, {ID: "more-modules", Path: in("modules"), ReadOnly: true}},
		Args:   []string{"last=yes"},
	}
}

// boot boots a machine that is closed when the test ends.
func (r *rig) boot(d *Driver, s vm.Spec) *machine {
	r.t.Helper()
	m, err := d.Boot(patiently(r.t), s)
	if err != nil {
		r.t.Fatalf("boot: %v", err)
	}
	r.t.Cleanup(func() {
		if err := m.Close(context.Background()); err != nil {
			r.t.Errorf("close: %v", err)
		}
	})
	return m.(*machine)
}

// clean checks that nothing of any VM is left on the host.
func (r *rig) clean() {
	r.t.Helper()
	left := func(dir string, but ...string) {
		entries, err := os.ReadDir(dir)
		if err != nil && !errors.Is(err, fs.ErrNotExist) {
			r.t.Error(err)
		}
		for _, e := range entries {
			if !slices.Contains(but, e.Name()) {
				r.t.Errorf("%s is left in %s", e.Name(), dir)
			}
		}
	}
	for i := range r.count {
		left(filepath.Join(r.dir, fmt.Sprintf("vm%d", i+1)), "scratch.ext4")
	}
	if r.config.NoJail {
		return
	}
	left(filepath.Join(r.config.ChrootBase, "firecracker"))
	left(filepath.Join(r.config.ChrootBase, uidDir))
	groups, _ := filepath.Glob(filepath.Join(r.groups, r.config.ParentCgroup, "vm-*"))
	for _, g := range groups {
		r.t.Errorf("cgroup %s is left", g)
	}
	running, err := owners()
	if err != nil {
		r.t.Error(err)
	}
	for i := range testUIDs.Count {
		uid := testUIDs.First + i
		if !running[uid] {
			continue
		}
		if busy, err := runs(uid); busy || err != nil { // an orphan may wait to be collected by init
			r.t.Errorf("a process of user %d is left (%v)", uid, err)
		}
	}
	for _, name := range []string{"kernel", "initrd", "base", "modules"} {
		if st, err := os.Stat(filepath.Join(r.dir, name)); err != nil || st.Mode().Perm() != 0o644 || owner(r.t, filepath.Join(r.dir, name)) != 0 {
			r.t.Errorf("the shared file %s was changed: %v, %v", name, st, err)
		}
	}
}

// patiently returns a context for what must happen, some time.
func patiently(t testing.TB) context.Context {
	ctx, cancel := context.WithTimeout(context.Background(), vmtest.Patience(t)/2)
	t.Cleanup(cancel)
	return ctx
}

// attach opens a session that is closed when the test ends.
func attach(t testing.TB, m vm.Machine) *guest.Session {
	t.Helper()
	conn, err := m.Dial(patiently(t), vm.AgentPort)
	if err != nil {
		t.Fatalf("dial: %v", err)
	}
	g, err := guest.Attach(patiently(t), conn, guest.Options{Heartbeat: vmtest.Patience(t)})
	if err != nil {
		t.Fatalf("attach: %v", err)
	}
	t.Cleanup(func() { _ = g.Close() })
	return g
}

// output runs a command in the guest.
func output(t testing.TB, g *guest.Session, args ...string) string {
	t.Helper()
	var out bytes.Buffer
	exit, err := g.Exec(patiently(t), guest.Command{Args: args, Dir: "/"}, guest.IO{Stdout: &out, Stderr: &out})
	if err != nil || exit.Code != 0 {
		t.Errorf("execute %q: exit %+v, %v: %s", args, exit, err, out.String())
	}
	return out.String()
}

// faultCode checks that an error is the fault with this code, with something to do about it.
func faultCode(t testing.TB, err error, code string) {
	t.Helper()
	var fault *flint.Fault
	if !errors.As(err, &fault) {
		t.Errorf("error %v is no fault; want %s", err, code)
		return
	}
	if fault.Code != code || fault.Fix == "" || fault.What == "" {
		t.Errorf("fault %s, %q, fix %q; want %s", fault.Code, fault.Error(), fault.Fix, code)
	}
}
