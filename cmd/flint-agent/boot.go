package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"syscall"
	"time"

	"flint/internal/guest"

	"golang.org/x/sys/unix"
)

const (
	runDir = "/run/flint" // private to root; what the agent keeps until the VM ends
	// tellWithin is how long a guest that could not boot waits for a host to tell.
	tellWithin = 30 * time.Second
)

// state is what PID 1 leaves in runDir for the agent that goes on after it.
type state struct {
	Hello   guest.Hello
	Channel string
}

// journey records the steps of the boot.
type journey struct{ state }

func (j *journey) step(name string, do func() error) error {
	start := time.Now()
	err := do()
	j.Hello.Steps = append(j.Hello.Steps, guest.Step{Name: name, Took: time.Since(start)})
	if err != nil {
		return fmt.Errorf("%s: %w", name, err)
	}
	return nil
}

// fault records what went wrong without stopping the boot.
func (j *journey) fault(err error) {
	if err != nil {
		complain(err)
		j.Hello.Faults = append(j.Hello.Faults, err.Error())
	}
}

// boot is PID 1. It does not return: it becomes systemd, or serves until the guest reboots.
func boot(ctx context.Context) {
	signals := catchSignals()
	j := &journey{}
	j.Hello = guest.Hello{Agent: version, Arch: runtime.GOARCH, Init: "agent"}
	systemd, err := j.prepare(ctx)
	if err == nil && systemd != "" {
		err = j.handOver(systemd) // returns only on failure
	}
	if err != nil {
		complain(err)
		j.Hello.Init = "none"
		j.fault(err)
		ctx, cancel := context.WithTimeout(ctx, tellWithin)
		serve(ctx, j.state, &broken{err})
		cancel()
		restart()
	}
	if err := serveAsInit(ctx, j.state, signals); err != nil {
		complain(err)
	}
	restart()
}

// prepare brings the guest to its own root. It returns the image's systemd, if that is to be its init.
func (j *journey) prepare(ctx context.Context) (systemd string, err error) {
	if err := j.step("mount kernel file systems", mountEarly); err != nil {
		return "", err
	}
	useConsole()
	cmdline, err := os.ReadFile("/proc/cmdline")
	if err != nil {
		return "", fmt.Errorf("read kernel arguments: %w", err)
	}
	args := parseCmdline(string(cmdline))
	j.Channel = args.Channel
	j.identify()

	var modules []module
	if err := j.step("load boot modules", func() (err error) {
		modules, err = loadBootModules("/modules", args.Channel)
		return err
	}); err != nil {
		j.fault(err) // what misses it will say so better
	}
	var drives map[string]string
	if err := j.step("find drives", func() (err error) {
		drives, err = findDrives(ctx, "/sys", args.Drives)
		return err
	}); err != nil {
		return "", err
	}
	j.fault(loadFormats("/modules", modules, drives)) // the mount that misses one fails
	if err := j.step("mount root", func() error {
		faults, err := mountRoot(drives, j.Hello.Kernel, args.Memory)
		j.Hello.Faults = append(j.Hello.Faults, faults...)
		return err
	}); err != nil {
		return "", err
	}
	systemd = findSystemd(atRoot)
	j.fault(j.step("mount pseudo file systems", mountPseudo))
	j.fault(j.step("keep what the agent needs", func() error { return keep(systemd != "", modules) }))
	if err := j.step("switch root", switchRoot); err != nil {
		return "", err
	}
	return systemd, nil
}

// useConsole gives a PID 1 that was started without one its output.
func useConsole() {
	if unix.FcntlFlock(1, unix.F_GETFD, nil) == nil {
		return
	}
	f, err := os.OpenFile("/dev/console", os.O_RDWR, 0)
	if err != nil {
		return // nobody could be told
	}
	for fd := range 3 {
		_ = unix.Dup3(int(f.Fd()), fd, 0) // likewise
	}
}

// identify learns what makes this boot itself.
func (j *journey) identify() {
	var u unix.Utsname
	if err := unix.Uname(&u); err == nil {
		j.Hello.Kernel = unix.ByteSliceToString(u.Release[:])
	}
	id, err := os.ReadFile("/proc/sys/kernel/random/boot_id")
	j.fault(err)
	j.Hello.Boot = strings.TrimSpace(string(id))
}

// keep saves from the initramfs what is needed after it: the agent for those who start it again, and the late modules.
func keep(service bool, modules []module) error {
	dir := atRoot + runDir
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return fmt.Errorf("make agent's directory: %w", err)
	}
	errs := []error{os.MkdirAll(dir+"/late", 0o700)}
	for i, m := range modules {
		if m.Group == "late" {
			errs = append(errs, copyFile("/modules/"+m.File, fmt.Sprintf("%s/late/%03d-%s", dir, i, m.File), 0o600))
		}
	}
	fd, err := openInside(atRoot, "/sbin/modprobe")
	if err == nil {
		unix.Close(fd)
	}
	if helper := err != nil; service || helper {
		errs = append(errs, copyFile(atRoot+"/proc/self/exe", dir+"/flint-agent", 0o700))
		if helper {
			errs = append(errs, os.Symlink("flint-agent", dir+"/modprobe"),
				nameHelper(atRoot+"/proc/sys/kernel/modprobe", runDir+"/modprobe"))
		}
	}
	return errors.Join(errs...)
}

// nameHelper tells the kernel whom to ask for modules, by its setting. A kernel that loads none has no such setting.
func nameHelper(setting, helper string) error {
	f, err := os.OpenFile(setting, os.O_WRONLY, 0)
	if errors.Is(err, os.ErrNotExist) {
		return nil
	}
	if err == nil {
		_, err = f.WriteString(helper)
		err = errors.Join(err, f.Close())
	}
	if err != nil {
		return fmt.Errorf("name modprobe: %w", err)
	}
	return nil
}

func copyFile(from, to string, mode os.FileMode) error {
	in, err := os.Open(from)
	if err != nil {
		return err
	}
	defer in.Close()
	out, err := os.OpenFile(to, os.O_CREATE|os.O_EXCL|os.O_WRONLY, mode)
	if err != nil {
		return err
	}
	_, err = io.Copy(out, in)
	return errors.Join(err, out.Close())
}

// upFile is there once systemd has started all it starts at boot.
const upFile = runDir + "/up"

// getties are the units that offer a login on a terminal. Nobody sits there, and in an image without udev the one on the
// console would keep multi-user.target waiting for its device, 90 s.
var getties = [...]string{"getty@.service", "getty-static.service", "serial-getty@.service", "console-getty.service"}

// unitUp is the last unit of the boot: ordered after the targets that may stand for all of it, whichever is the default.
const unitUp = `[Unit]
Description=flint knows that the system is up
DefaultDependencies=no
After=default.target graphical.target multi-user.target

[Service]
Type=oneshot
RemainAfterExit=yes
ExecStart=` + runDir + `/flint-agent up
`

const unit = `[Unit]
Description=flint agent
DefaultDependencies=no
IgnoreOnIsolate=yes

[Service]
ExecStart=` + runDir + `/flint-agent serve
Restart=always
RestartSec=100ms
KillMode=process
LimitNOFILE=65536:1048576
TasksMax=infinity
CPUWeight=10000
StandardOutput=kmsg
StandardError=kmsg
`

// handOver makes the agent a service of the image's systemd and becomes that.
func (j *journey) handOver(systemd string) error {
	j.Hello.Init = systemd
	b, err := json.Marshal(j.state)
	if err != nil {
		return fmt.Errorf("write agent's state: %w", err)
	}
	if err := errors.Join(
		os.WriteFile(filepath.Join(runDir, "state.json"), b, 0o600),
		addUnit("flint-agent.service", unit, "sysinit.target"),
		addUnit("flint-up.service", unitUp, "default.target"),
	); err != nil {
		return fmt.Errorf("make the agent a service: %w", err)
	}
	for _, name := range getties {
		if err := os.Symlink("/dev/null", filepath.Join(unitDir, name)); err != nil {
			return fmt.Errorf("mask %s: %w", name, err)
		}
	}
	return fmt.Errorf("start %s: %w", systemd, syscall.Exec(systemd, []string{systemd}, []string{"PATH=" + defaultPath, "TERM=linux"}))
}

// unitDir is where units live that are gone with the boot (systemd.unit(5)).
const unitDir = "/run/systemd/system"

// addUnit adds a unit that is started with the target.
func addUnit(name, content, target string) error {
	wants := filepath.Join(unitDir, target+".wants")
	return errors.Join(
		os.MkdirAll(wants, 0o755),
		os.WriteFile(filepath.Join(unitDir, name), []byte(content), 0o644),
		os.Symlink("../"+name, filepath.Join(wants, name)),
	)
}

// restart ends the VM: the VMM takes a reboot for the end.
func restart() {
	unix.Sync()
	if err := unix.Reboot(unix.LINUX_REBOOT_CMD_RESTART); err != nil {
		complain(fmt.Errorf("reboot: %w", err)) // PID 1 returns, so the kernel panics, and reboots by panic=
	}
}

// broken is the System of a guest that could not boot: it only says why.
type broken struct{ why error }

func (b *broken) refuse() error { return fmt.Errorf("the guest could not boot: %w", b.why) }

func (b *broken) Configure(context.Context, guest.Config) (guest.Configured, error) {
	return guest.Configured{}, b.refuse()
}
func (b *broken) Start(guest.Command) (guest.Process, error) { return nil, b.refuse() }
func (b *broken) Stats() (guest.Stats, error)                { return guest.Stats{}, b.refuse() }

func (b *broken) Reboot() error {
	restart()
	return nil
}
