// Package qemu runs virtual machines with QEMU's microvm machine, or virt for arm64, under KVM where it works and under
// software emulation (TCG) where it does not.
//
// QEMU gets what it needs as file descriptors and bind mounts, so it runs as an unprivileged user, in namespaces and a
// root directory of its own that hold next to nothing, under its seccomp filter. It lives on when this process ends: its sockets have
// names in Spec.Dir, and it never blocks on a reader that is gone (console output nobody reads is dropped). The package
// must not know what a guest is for, and must not make drives, networks or directories: those come in the Spec.
package qemu

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"flint"
	"flint/internal/vm"
)

// Accel is how QEMU runs the guest's instructions.
type Accel string

// The accelerators. The zero value is Auto.
const (
	Auto Accel = "auto" // KVM where a probe shows that it works, else TCG
	KVM  Accel = "kvm"
	TCG  Accel = "tcg" // software emulation: some 4 to 10 times slower, works everywhere
)

// Config says how to run QEMU. The zero value works.
type Config struct {
	Arch   string // the guests' architecture, as GOARCH: amd64 or arm64; empty: this program's. Another one's is emulated
	Binary string // path of qemu-system-x86_64 or qemu-system-aarch64; empty: looked up in PATH
	Accel  Accel
	UID    uint32 // user and group QEMU runs as when this process is root; 0: 65534, nobody
	GID    uint32
	Cgroup string       // parent of the VMs' cgroups, relative to the root of cgroup v2, used by nobody else; empty: they have none
	Log    *slog.Logger // nil: no log
}

const nobody = 65534

// Driver implements vm.Driver, vm.Adopter and vm.Sweeper. Its machines implement vm.Console, vm.Usage and vm.Process.
type Driver struct {
	target   target
	binary   string
	firmware string // one of the target's; empty where none is installed
	accel    Accel  // KVM or TCG
	kvm      vm.KVMStatus
	tscKHz   uint64 // of the host, under TCG
	uid, gid uint32
	drop     bool     // run QEMU as uid and gid
	isolate  bool     // run QEMU in namespaces and a root of its own
	cgroups  *cgroups // nil: VMs have no cgroups of their own
	log      *slog.Logger
}

var (
	_ vm.Driver  = (*Driver)(nil)
	_ vm.Adopter = (*Driver)(nil)
	_ vm.Sweeper = (*Driver)(nil)
)

// New finds QEMU and decides how to run it. It takes up to a second where KVM must be probed and does not work, less if
// ctx ends. Its errors are faults: qemu.arch, qemu.missing, qemu.kvm, qemu.accel.
func New(ctx context.Context, c Config) (*Driver, error) {
	d := &Driver{uid: c.UID, gid: c.GID, log: c.Log}
	if d.log == nil {
		d.log = slog.New(slog.DiscardHandler)
	}
	if d.uid == 0 {
		d.uid = nobody
	}
	if d.gid == 0 {
		d.gid = nobody
	}
	var err error
	if d.target, err = targetFor(c.Arch); err != nil {
		return nil, err
	}
	if d.binary, err = d.target.findBinary(c.Binary); err != nil {
		return nil, err
	}
	d.firmware = d.target.findFirmware()
	if err = d.choose(ctx, c.Accel); err != nil {
		return nil, err
	}
	if d.accel == TCG && d.target.arch == "amd64" {
		d.tscKHz = hostTSC()
	}
	var limits bool
	d.drop, d.isolate, limits = privileges()
	if lacks := lacking(d.drop, d.isolate, limits); len(lacks) > 0 {
		d.log.Warn("QEMU runs with less isolation than it could have", "missing", strings.Join(lacks, ", "),
			"fix", "run flint as root with all capabilities")
	}
	d.openCgroups(c.Cgroup)
	d.log.Debug("found QEMU", "binary", d.binary, "firmware", d.firmware, "accel", d.accel, "kvm", d.kvm, "tsc_khz", d.tscKHz)
	return d, nil
}

// openCgroups gives the VMs cgroups where this machine has them to give. Where it has not, VMs run all the same.
func (d *Driver) openCgroups(parent string) {
	if parent == "" {
		return
	}
	var err error
	if d.cgroups, err = openCgroups("/proc/self/mounts", parent); err != nil {
		d.log.Debug("VMs get no cgroups of their own", "why", err)
		return
	}
	if missing := d.cgroups.missing(); len(missing) > 0 {
		d.log.Debug("VMs' cgroups cannot limit everything", "missing", missing)
	}
	if err := d.Sweep(context.Background()); err != nil {
		d.log.Warn("what earlier VMs left is left", "err", err)
	}
}

// Sweep implements vm.Sweeper.
func (d *Driver) Sweep(context.Context) error {
	if d.cgroups == nil {
		return nil // everything is in Spec.Dir
	}
	removed, err := d.cgroups.sweep()
	for _, id := range removed {
		d.log.Info("removed the cgroup an earlier VM left", "vm", id)
	}
	return err
}

// Accel returns the accelerator in use, KVM or TCG, and what the probe of KVM said; its zero value when nothing was probed.
func (d *Driver) Accel() (Accel, vm.KVMStatus) { return d.accel, d.kvm }

func (d *Driver) choose(ctx context.Context, a Accel) error {
	switch a {
	case TCG:
		d.accel = TCG
		return nil
	case Auto, KVM, "":
	default:
		return &flint.Fault{
			Code: "qemu.accel", What: fmt.Sprintf("use accelerator %q", a), Kind: flint.ErrConfig,
			Fix: "set it to auto, kvm or tcg", Err: errors.New("there is no such accelerator"),
		}
	}
	d.kvm = d.target.probeKVM(ctx)
	if d.kvm.State == vm.KVMWorks {
		d.accel = KVM
		return nil
	}
	if a != KVM {
		d.accel = TCG
		return nil
	}
	f := &flint.Fault{Code: "qemu.kvm", What: "use KVM", Err: errors.New(d.kvm.String()), Fix: "set the accelerator to auto or tcg"}
	if d.kvm.State == vm.KVMNoPermission {
		f.Kind, f.Fix = flint.ErrPermission, "run flint as root, or add its user to the group that owns /dev/kvm"
	}
	return f
}

func (t target) findBinary(path string) (string, error) {
	missing := func(err error) error {
		return &flint.Fault{
			Code: "qemu.missing", What: "find QEMU", Kind: flint.ErrNotFound, Err: err,
			Fix: "apt-get install " + t.packaged,
		}
	}
	if path == "" {
		path = t.program
	}
	path, err := exec.LookPath(path)
	if err != nil {
		return "", missing(err)
	}
	if path, err = filepath.Abs(path); err != nil {
		return "", missing(err)
	}
	// The real path, because a link may point out of what QEMU's own root holds.
	if path, err = filepath.EvalSymlinks(path); err != nil {
		return "", missing(err)
	}
	return path, nil
}

func (t target) findFirmware() string {
	for _, p := range t.firmware {
		if _, err := os.Stat(p); err == nil {
			return p
		}
	}
	return ""
}

// privileges tells whether this process may change its children's user, make namespaces and mounts for them, and then
// limit their resources.
func privileges() (user, namespaces, limits bool) {
	if os.Geteuid() != 0 {
		return false, false, true
	}
	head := unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}
	var data [2]unix.CapUserData
	if err := unix.Capget(&head, &data[0]); err != nil {
		return false, false, false
	}
	has := func(c int) bool { return data[c/32].Effective&(1<<(c%32)) != 0 }
	return has(unix.CAP_SETUID) && has(unix.CAP_SETGID), has(unix.CAP_SYS_ADMIN) && has(unix.CAP_SYS_CHROOT), has(unix.CAP_SYS_RESOURCE)
}

// lacking names, with the capability each needs, what privileges did not find.
func lacking(user, namespaces, limits bool) (lacks []string) {
	if !user {
		lacks = append(lacks, "a user of its own (CAP_SETUID, CAP_SETGID)")
	}
	if !namespaces {
		lacks = append(lacks, "namespaces (CAP_SYS_ADMIN, CAP_SYS_CHROOT)")
	}
	if !limits {
		lacks = append(lacks, "resource limits (CAP_SYS_RESOURCE)")
	}
	return lacks
}

// Boot implements vm.Driver. It returns when QEMU's main loop runs; the guest's kernel has begun by then.
func (d *Driver) Boot(ctx context.Context, s vm.Spec) (vm.Machine, error) {
	asked := time.Now()
	if err := s.Validate(); err != nil {
		return nil, fmt.Errorf("check the spec of VM %s: %w", s.ID, err)
	}
	if err := ctx.Err(); err != nil {
		return nil, fmt.Errorf("boot VM %s: %w", s.ID, err)
	}
	m, err := d.start(ctx, s)
	if err != nil {
		return nil, fmt.Errorf("start QEMU for VM %s: %w", s.ID, err)
	}
	select {
	case <-m.qmp.ready:
		d.log.Debug("QEMU runs", "vm", s.ID, "pid", m.proc.pid, "prepared", m.spawned.Sub(asked), "answered", time.Since(m.spawned))
		return m, nil
	case <-m.done:
		err = d.diagnose(m)
	case <-ctx.Done():
		err = ctx.Err()
	}
	if cerr := m.Close(context.WithoutCancel(ctx)); cerr != nil {
		err = errors.Join(err, cerr)
	}
	return nil, fmt.Errorf("start QEMU for VM %s: %w", s.ID, err)
}

// diagnose says why a QEMU ended before it began.
func (d *Driver) diagnose(m *machine) error {
	return &flint.Fault{
		Code: "qemu.start", What: "start " + d.binary, Err: m.err,
		Fix: "see what QEMU says above; flint needs QEMU 5.2 or newer with the microvm machine, and free memory for the guest",
	}
}

// openFor opens what QEMU, as its own user, must be able to read by itself.
func (d *Driver) openFor(path string) (*os.File, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	if !d.drop {
		return f, nil
	}
	var st unix.Stat_t
	if err := unix.Fstat(int(f.Fd()), &st); err != nil {
		f.Close()
		return nil, fmt.Errorf("look at %s: %w", path, err)
	}
	if readable := st.Mode&0o004 != 0 || st.Uid == d.uid && st.Mode&0o400 != 0 || st.Gid == d.gid && st.Mode&0o040 != 0; !readable {
		f.Close()
		return nil, &flint.Fault{
			Code: "qemu.unreadable", What: "read " + path, Kind: flint.ErrPermission,
			Err: fmt.Errorf("QEMU's user %d may not: %w", d.uid, fs.ErrPermission), Fix: "chmod a+r " + path,
		}
	}
	return f, nil
}
