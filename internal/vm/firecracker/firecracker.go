// Package firecracker runs virtual machines with Firecracker under its jailer: the production driver.
//
// Each VMM has a user and group, a root directory, a cgroup, a process namespace and a session of its own, and lives in
// the network namespace of its guest's interface. Images are hard-linked into its root and never changed. It lives on
// when this process ends, and can be adopted by the next: its sockets and pipes have names. The package must not know
// what a guest is for, and must not make drives, networks or Spec.Dir; everything else a VMM needs it makes and removes.
package firecracker

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"time"

	"flint"
	"flint/internal/vm"
)

const (
	// defaultChrootBase is on the file system flint keeps its images on, as a rule: hard links end there.
	defaultChrootBase = "/var/lib/flint/jail"
	// defaultParentCgroup is below the root of the cgroup hierarchy, because VMs outlive the daemon's own cgroup.
	defaultParentCgroup = "flint"
	// The default users are between those of containers (to 1879048191) and those systemd maps foreign ones to (from 2147352576).
	defaultFirstUID = 1_900_000_000
	defaultUIDs     = 1000

	maxCPUs = 32 // of a Firecracker guest

	// startWithin bounds a start, from the jailer's to the guest's, which takes some tens of milliseconds: a VMM that hangs
	// is given up even if the caller's context has no end.
	startWithin = time.Minute
	sector      = 512 // bytes: what disks are made of
)

// Range is a range of user ids; each is a group id too.
type Range struct{ First, Count uint32 }

// Config says how to run Firecracker. The zero value works on a host set up for it.
type Config struct {
	Firecracker  string // path of the program; empty: firecracker, looked up in PATH
	Jailer       string // path of the program, of the same version; empty: jailer, looked up in PATH
	NoJail       bool   // run Firecracker as the user this process runs as, in no jail: for tests, and never for strangers' jobs
	ChrootBase   string // directory of the jails, on the file system of the images; empty: /var/lib/flint/jail
	UIDs         Range  // reserved for VMs, one each; zero: 1000 of them from 1900000000
	ParentCgroup string // relative to the root of cgroup v2; made where it is missing; empty: flint
	Limits       vm.Limits
	// Serial gives the guest a serial console. Without one a guest's panic looks like its reboot (see Machine's Wait),
	// and Console is empty.
	Serial bool
	Log    *slog.Logger // nil: no log
}

// Driver implements vm.Driver, vm.Adopter and vm.Sweeper. Its machines implement vm.Console, vm.Log, vm.Usage, vm.Process
// and vm.Metrics.
type Driver struct {
	c       Config
	version flint.Version
	base    string // the jails of this program: ChrootBase/<name of the program>
	uids    *uidPool
	groups  *cgroups
	log     *slog.Logger
	within  time.Duration // startWithin, but in tests

	mu   sync.Mutex
	live map[string]bool // IDs of the machines this driver has
}

var (
	_ vm.Driver  = (*Driver)(nil)
	_ vm.Adopter = (*Driver)(nil)
	_ vm.Sweeper = (*Driver)(nil)
)

// New finds and checks what it takes to run Firecracker: the programs and their versions, and for the jail the directory,
// the users and the cgroup, which it makes. It does not look at KVM: vm.ProbeKVM does. Its errors are faults whose codes
// begin with firecracker.
func New(ctx context.Context, c Config) (*Driver, error) {
	return newDriver(ctx, c, cgroupFS{mounts: "/proc/self/mounts", remove: os.Remove})
}

func newDriver(ctx context.Context, c Config, fs cgroupFS) (*Driver, error) {
	d := &Driver{c: c, log: c.Log, within: startWithin, live: map[string]bool{}}
	if d.log == nil {
		d.log = slog.New(slog.DiscardHandler)
	}
	var err error
	if d.c.Firecracker, err = findProgram("firecracker", c.Firecracker); err != nil {
		return nil, err
	}
	if d.version, err = programVersion(ctx, d.c.Firecracker); err != nil {
		return nil, err
	}
	if err := supported(d.version, d.c.Firecracker); err != nil {
		return nil, err
	}
	if c.NoJail {
		d.log.Warn("Firecracker runs WITHOUT its jailer: a guest that breaks out of it has all this user may do",
			"uid", os.Geteuid(), "fix", "remove firecracker.jail: false from the configuration")
		return d, nil
	}
	if err := d.prepareJail(ctx, fs); err != nil {
		return nil, err
	}
	d.log.Debug("found Firecracker", "program", d.c.Firecracker, "version", d.version, "jails", d.base)
	return d, nil
}

// Version returns the version of the Firecracker program, as it said when New asked.
func (d *Driver) Version() flint.Version { return d.version }

// prepareJail checks and makes what the jailer stands on.
func (d *Driver) prepareJail(ctx context.Context, fs cgroupFS) error {
	if os.Geteuid() != 0 {
		return &flint.Fault{
			Code: "firecracker.root", What: "run Firecracker under its jailer", Kind: flint.ErrPermission,
			Err: errors.New("the jailer needs root"), Fix: "run flint as root; Firecracker itself runs as an unprivileged user of its own",
		}
	}
	var err error
	if d.c.Jailer, err = findProgram("jailer", d.c.Jailer); err != nil {
		return err
	}
	v, err := programVersion(ctx, d.c.Jailer)
	if err != nil {
		return err
	}
	if v != d.version {
		return &flint.Fault{
			Code: "firecracker.mismatch", What: fmt.Sprintf("use jailer %s with Firecracker %s", v, d.version), Kind: flint.ErrConfig,
			Err: errors.New("they must be of the same release"), Fix: "install both from one release archive of Firecracker",
		}
	}
	name := filepath.Base(d.c.Firecracker)
	if !strings.Contains(name, "firecracker") {
		return &flint.Fault{
			Code: "firecracker.missing", What: "run " + d.c.Firecracker + " under the jailer", Kind: flint.ErrConfig,
			Err: errors.New("its file name does not contain \"firecracker\", which the jailer insists on"), Fix: "rename it to firecracker",
		}
	}
	if err := selfContained(d.c.Firecracker); err != nil {
		return err
	}
	if d.c.ChrootBase == "" {
		d.c.ChrootBase = defaultChrootBase
	}
	if d.c.ChrootBase, err = chrootBase(d.c.ChrootBase); err != nil {
		return err
	}
	if d.uids, err = newUIDPool(d.c.UIDs, filepath.Join(d.c.ChrootBase, uidDir)); err != nil {
		return err
	}
	d.base = filepath.Join(d.c.ChrootBase, name)
	if err := os.MkdirAll(d.base, 0o755); err != nil {
		return chrootFault(d.c.ChrootBase, fmt.Errorf("make directory of jails: %w", err), "check the file system")
	}
	if d.c.ParentCgroup == "" {
		d.c.ParentCgroup = defaultParentCgroup
	}
	d.groups, err = openCgroups(fs, d.c.ParentCgroup)
	return err
}

// Boot implements vm.Driver. It returns when the guest's first instruction has run.
func (d *Driver) Boot(ctx context.Context, s vm.Spec) (vm.Machine, error) {
	if err := s.Validate(); err != nil {
		return nil, fmt.Errorf("check the spec of VM %s: %w", s.ID, err)
	}
	if s.CPUs > maxCPUs {
		return nil, &flint.Fault{
			Code: "firecracker.cpus", What: fmt.Sprintf("give VM %s %d CPUs", s.ID, s.CPUs), Kind: flint.ErrConfig,
			Err: fmt.Errorf("a Firecracker guest has at most %d", maxCPUs), Fix: "lower the pool's cpus",
		}
	}
	if err := checkDrives(s); err != nil {
		return nil, err
	}
	if err := ctx.Err(); err != nil {
		return nil, fmt.Errorf("boot VM %s: %w", s.ID, err)
	}
	if err := d.claim(s.ID); err != nil {
		return nil, err
	}
	m := newMachine(s.ID, d.log.With("vm", s.ID), d.c.Serial)
	m.undo.Push("forget VM", func(context.Context) error { d.disclaim(s.ID); return nil })
	if err := d.boot(ctx, s, m); err != nil {
		err = m.explain(ctx, err)
		return nil, errors.Join(fmt.Errorf("start Firecracker for VM %s: %w", s.ID, err), m.Close(context.WithoutCancel(ctx)))
	}
	d.log.Debug("Firecracker runs", "vm", s.ID, "pid", m.proc.pid, "version", m.version, "boot", m.Metrics().Boot)
	return m, nil
}

func (d *Driver) boot(ctx context.Context, s vm.Spec, m *machine) error {
	if s.Limits == (vm.Limits{}) {
		s.Limits = d.c.Limits
	}
	args, err := kernelArgs(s, d.c.Serial)
	if err != nil {
		return err
	}
	if s.NIC != nil && s.NIC.Tap != nil {
		_ = s.NIC.Tap.Close() // whoever closed it before did what we want
	}
	v, err := d.furnish(ctx, s, m)
	if err != nil {
		return err
	}
	if err := d.launch(s, m, v); err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(ctx, d.within)
	defer cancel()
	return m.configure(ctx, s, args, v)
}

// checkDrives finds images that were cut off: Firecracker takes them, and the guest finds a damaged file system.
func checkDrives(s vm.Spec) error {
	for _, drive := range s.Drives {
		st, err := os.Stat(drive.Path)
		if err != nil {
			return fmt.Errorf("look at drive %s: %w", drive.ID, err)
		}
		if size := st.Size(); st.Mode().IsRegular() && (size == 0 || size%sector != 0) {
			return &flint.Fault{
				Code: "firecracker.image", What: fmt.Sprintf("give VM %s the drive %s (%s)", s.ID, drive.ID, drive.Path), Kind: flint.ErrConfig,
				Err: fmt.Errorf("its size, %d bytes, is not that of a disk, a multiple of %d", size, sector),
				Fix: "the image was cut off, or is none: remove the file and have it made again",
			}
		}
	}
	return nil
}

// claim makes sure that an ID names one machine.
func (d *Driver) claim(id string) error {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.live[id] {
		return &flint.Fault{
			Code: "firecracker.busy", What: "boot VM " + id, Kind: flint.ErrConflict,
			Err: errors.New("a VM of that name runs"), Fix: "wait until it has ended",
		}
	}
	d.live[id] = true
	return nil
}

func (d *Driver) disclaim(id string) {
	d.mu.Lock()
	defer d.mu.Unlock()
	delete(d.live, id)
}
