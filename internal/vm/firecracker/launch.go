package firecracker

import (
	"errors"
	"fmt"
	"io/fs"
	"math"
	"os"
	"os/exec"
	"strconv"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"flint"
	"flint/internal/vm"
)

// openFiles is how many descriptors a VMM may have: some twenty, and one for each connection of its guest.
const openFiles = 2048

// command returns how to start the VMM.
func (d *Driver) command(s vm.Spec, m *machine, v view) *exec.Cmd {
	var cmd *exec.Cmd
	if d.c.NoJail {
		cmd = exec.Command(d.c.Firecracker, "--id", s.ID, "--api-sock", v.see(apiSocket))
		cmd.Dir = s.Dir
	} else {
		id := strconv.Itoa(m.uid)
		// A guest's memory may be a file too.
		fileSize := max(v.largest, int64(s.Memory))
		cmd = exec.Command(
			d.c.Jailer, "--id", s.ID, "--exec-file", d.c.Firecracker, "--uid", id, "--gid", id, "--chroot-base-dir", d.c.ChrootBase,
			// Naming a setting is what makes the jailer enter the VM's own group; without one it would look for others.
			"--cgroup-version", "2", "--parent-cgroup", d.groups.parent, "--cgroup", "pids.max="+d.groups.pids(s),
			"--resource-limit", "no-file="+strconv.Itoa(openFiles), "--resource-limit", "fsize="+strconv.FormatInt(fileSize, 10),
			"--", "--api-sock", v.see(apiSocket),
		)
		cmd.Dir = "/"
	}
	cmd.Env = []string{}
	// A session of its own, and no signal when we die: the VM outlives us. The jailer execs Firecracker in place, so the
	// process started here is Firecracker, and init of its process namespace.
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	if os.Geteuid() == 0 {
		cmd.SysProcAttr.Cloneflags = unix.CLONE_NEWPID | unix.CLONE_NEWIPC | unix.CLONE_NEWUTS
		if s.NIC == nil { // what has no network does not need the host's either
			cmd.SysProcAttr.Cloneflags |= unix.CLONE_NEWNET
		}
	}
	return cmd
}

// launch starts the VMM and begins to watch it.
func (d *Driver) launch(s vm.Spec, m *machine, v view) error {
	null, err := os.OpenFile(os.DevNull, os.O_RDWR, 0)
	if err != nil {
		return err
	}
	defer null.Close()
	// Both ends, so that it never ends nor breaks when nobody reads; and a VMM must not wait for whoever should.
	fd, err := m.dir.openat(outPipe, unix.O_RDWR|unix.O_NONBLOCK)
	if err != nil {
		return err
	}
	out := os.NewFile(uintptr(fd), outPipe)
	defer out.Close()
	cmd := d.command(s, m, v)
	cmd.Stdin, cmd.Stdout, cmd.Stderr = null, out, out
	// Of this process, and so of what it starts: a core would have the guest's memory in it, and so its secrets. Once the jailer has
	// become another user, only who has all capabilities could set its limits.
	if err := unix.Setrlimit(unix.RLIMIT_CORE, &unix.Rlimit{}); err != nil {
		return fmt.Errorf("forbid core dumps: %w", err)
	}
	m.started = time.Now()
	if err := startApart(cmd, s.NIC); err != nil {
		return startFault(cmd.Path, err)
	}
	pid := cmd.Process.Pid // cannot be another's yet: nobody has waited for it
	start, err := vm.ProcessStart(pid)
	err = errors.Join(err, unix.SetNonblock(fd, true)) // os/exec made it block
	m.watch(&process{pid: pid, start: start, cmd: cmd})
	return err
}

// startFault says what a program is missing that was there when the driver began.
func startFault(path string, err error) error {
	if !errors.Is(err, fs.ErrNotExist) && !errors.Is(err, fs.ErrPermission) {
		return fmt.Errorf("start %s: %w", path, err)
	}
	return &flint.Fault{
		Code: "firecracker.missing", What: "start " + path, Kind: flint.ErrNotFound, Err: err,
		Fix: "if it was replaced by another release, start flint anew; else install firecracker and jailer of one release again",
	}
}

// startApart starts cmd in the NIC's network namespace, and stays outside itself. The jailer's own --netns is of no use:
// the namespace has no name but /proc/PID/fd/N, a link, and Firecracker 1.16.0 refuses links there.
func startApart(cmd *exec.Cmd, nic *vm.NIC) error {
	return vm.Apart(func() error {
		// What this process got from its parent without close-on-exec is not for the VMM. Kernels before 5.11 refuse.
		_ = unix.CloseRange(3, math.MaxInt32, unix.CLOSE_RANGE_CLOEXEC)
		if nic != nil && nic.Namespace != nil {
			if err := unix.Setns(int(nic.Namespace.Fd()), unix.CLONE_NEWNET); err != nil {
				return fmt.Errorf("enter network namespace: %w", err)
			}
		}
		return cmd.Start()
	})
}
