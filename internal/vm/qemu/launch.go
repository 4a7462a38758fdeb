package qemu

import (
	"context"
	"errors"
	"fmt"
	"math"
	"os"
	"os/exec"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"flint/internal/vm"
)

const (
	consoleKept = 64 << 10 // bytes of the guest's console
	stderrKept  = 8 << 10  // bytes of QEMU's own messages

	openFiles = 1024 // descriptors a QEMU may have; it needs some thirty
)

// inheritance collects what QEMU inherits. Descriptor n of the child is files[n-3].
type inheritance struct {
	files []*os.File
	ours  []*os.File // those to close here once QEMU has them
}

// own adds a file that belongs to us, and returns its number in the child.
func (i *inheritance) own(f *os.File) int {
	i.ours = append(i.ours, f)
	return i.lend(f)
}

// lend adds a file that belongs to the caller.
func (i *inheritance) lend(f *os.File) int {
	i.files = append(i.files, f)
	return len(i.files) + 2
}

func (i *inheritance) close() {
	for _, f := range i.ours {
		f.Close()
	}
	i.ours = nil
}

// start makes the sockets, opens the files, and starts QEMU. The machine it returns runs until it is closed.
func (d *Driver) start(ctx context.Context, s vm.Spec) (_ *machine, err error) {
	in := &inheritance{}
	defer in.close()
	m := newMachine(s)
	defer func() {
		if err != nil {
			err = errors.Join(err, m.release(context.WithoutCancel(ctx)))
		}
	}()
	h, err := d.gather(s, in, m)
	if err != nil {
		return nil, err
	}
	if err = m.connect(ctx); err != nil { // before it runs, so nothing of its output is missed
		return nil, err
	}
	var root *privateRoot
	if d.isolate {
		if root, err = d.privateRoot(s.Kernel, s.Initrd); err != nil {
			return nil, err
		}
	}
	args, err := d.arguments(s, h)
	if err != nil {
		return nil, err
	}
	null, err := os.OpenFile(os.DevNull, os.O_RDWR, 0)
	if err != nil {
		return nil, err
	}
	defer null.Close()
	cmd := d.command(args, in.files)
	if d.cgroups != nil {
		group, err := d.cgroups.create(s)
		if err != nil {
			return nil, cgroupFault(err)
		}
		m.cgroups = d.cgroups
		defer group.Close()
		// Born there: to move a process takes the kernel many milliseconds.
		cmd.SysProcAttr.UseCgroupFD, cmd.SysProcAttr.CgroupFD = true, int(group.Fd())
	}
	cmd.Stdin, cmd.Stdout, cmd.Stderr = null, null, m.stderr
	m.spawned = time.Now()
	if err = startApart(cmd, s.NIC, root); err != nil {
		return nil, err
	}
	limit(cmd.Process.Pid)
	in.close() // before anybody waits for the sockets to close
	m.proc = child(cmd)
	m.watch()
	return m, nil
}

// gather opens everything QEMU is given as a descriptor, and makes m's sockets.
func (d *Driver) gather(s vm.Spec, in *inheritance, m *machine) (h handles, err error) {
	for _, f := range []struct {
		path string
		at   *int
	}{{s.Kernel, &h.kernel}, {s.Initrd, &h.initrd}} {
		file, err := d.openFor(f.path)
		if err != nil {
			return h, err
		}
		if d.isolate {
			file.Close() // it could be opened; the private root has it by name
			continue
		}
		*f.at = in.own(file)
	}
	for _, drive := range s.Drives {
		f, err := openDrive(drive)
		if err != nil {
			return h, fmt.Errorf("open drive %s: %w", drive.ID, err)
		}
		h.drives = append(h.drives, in.own(f))
	}
	if s.NIC != nil {
		if s.NIC.Tap == nil {
			return h, errors.New("network interface has no tap descriptor")
		}
		h.tap = in.lend(s.NIC.Tap)
	}
	for _, sock := range []struct {
		name string
		at   *int
	}{{agentSocket, &h.agent}, {monitorSocket, &h.monitor}, {consoleSocket, &h.console}} {
		f, err := listen(s.Dir, sock.name)
		if err != nil {
			return h, err
		}
		m.sockets = append(m.sockets, sock.name)
		*sock.at = in.own(f)
	}
	return h, nil
}

func openDrive(d vm.Drive) (*os.File, error) {
	mode := os.O_RDWR
	if d.ReadOnly {
		mode = os.O_RDONLY
	}
	f, err := os.OpenFile(d.Path, mode|unix.O_NONBLOCK, 0) // so that a FIFO does not block; files do not care
	if err != nil {
		return nil, err
	}
	st, err := f.Stat()
	if err == nil && !st.Mode().IsRegular() {
		err = fmt.Errorf("%s is not a regular file", d.Path)
	}
	if err != nil {
		f.Close()
		return nil, err
	}
	return f, nil
}

func (d *Driver) command(args []string, files []*os.File) *exec.Cmd {
	cmd := exec.Command(d.binary, args...)
	cmd.Env = []string{}
	cmd.Dir = "/"
	cmd.ExtraFiles = files
	cmd.WaitDelay = time.Second
	// A session of its own, and no signal when we die: the VM outlives us.
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	if d.drop {
		cmd.SysProcAttr.Credential = &syscall.Credential{Uid: d.uid, Gid: d.gid, Groups: d.groups()}
	}
	if d.isolate {
		cmd.SysProcAttr.Cloneflags = unix.CLONE_NEWPID | unix.CLONE_NEWIPC | unix.CLONE_NEWUTS
	}
	return cmd
}

// groups are QEMU's supplementary groups: none, unless it must open the host's own /dev/kvm.
func (d *Driver) groups() []uint32 {
	var st unix.Stat_t
	if d.accel != KVM || d.isolate || unix.Stat(kvmDevice, &st) != nil {
		return nil
	}
	return []uint32{st.Gid}
}

// startApart starts cmd in the NIC's network namespace and the private root, and stays outside itself.
func startApart(cmd *exec.Cmd, nic *vm.NIC, root *privateRoot) error {
	return vm.Apart(func() error {
		// What this process got from its parent without close-on-exec is not for QEMU. Kernels before 5.11 refuse.
		_ = unix.CloseRange(3, math.MaxInt32, unix.CLOSE_RANGE_CLOEXEC)
		if nic != nil && nic.Namespace != nil {
			if err := unix.Setns(int(nic.Namespace.Fd()), unix.CLONE_NEWNET); err != nil {
				return fmt.Errorf("enter network namespace: %w", err)
			}
		}
		if root != nil {
			if err := root.enter(); err != nil {
				return fmt.Errorf("make a root for QEMU: %w", err)
			}
		}
		return cmd.Start()
	})
}

// limit sets the resource limits of a process that has just begun. Where this process may not (privileges), or the
// other has ended already, nothing happens.
func limit(pid int) {
	for resource, limit := range map[int]uint64{unix.RLIMIT_CORE: 0, unix.RLIMIT_NOFILE: openFiles} {
		_ = unix.Prlimit(pid, resource, &unix.Rlimit{Cur: limit, Max: limit}, nil)
	}
}
