package app

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"os/exec"
	"path/filepath"

	"flint"
	"flint/internal/config"
	"flint/internal/vm"
	"flint/internal/vm/firecracker"
	"flint/internal/vm/qemu"
)

// openDriver chooses what runs the VMs, and opens it.
func (a *App) openDriver(ctx context.Context, kvm probe) error {
	done := a.opt.Progress.Step("virtual machines")
	detail, err := a.chooseDriver(ctx, kvm)
	done(detail, err)
	return err
}

// probe is vm.ProbeKVM, or a test's.
type probe func(context.Context) vm.KVMStatus

func (a *App) chooseDriver(ctx context.Context, kvm probe) (string, error) {
	c := choose(ctx, a.cfg, kvm, exec.LookPath)
	if !c.firecracker {
		if c.why != "" {
			a.log.Info("VMs run under QEMU", "why", c.why)
		}
		return a.openQEMU(ctx)
	}
	if a.cfg.VM.Driver == "firecracker" { // with auto, KVM has been found to work
		if err := firecracker.NeedKVM(kvm(ctx)); err != nil {
			return "", err
		}
	}
	detail, err := a.openFirecracker(ctx)
	var fault *flint.Fault
	if a.cfg.VM.Driver == "auto" && errors.As(err, &fault) {
		other := *fault
		other.Fix += "; or set vm.driver: qemu, to do without Firecracker"
		return "", &other
	}
	return detail, err
}

// choice is what is to run the VMs.
type choice struct {
	firecracker bool   // else QEMU
	why         string // it is QEMU although the configuration leaves it open
}

// choose decides what runs the VMs. Firecracker that is installed or named in the configuration is meant to be used: where
// it could work it is chosen whatever may be wrong with it or its jailer, because QEMU in its place would hide that.
// The doctor decides by the same rule; a test holds them together.
func choose(ctx context.Context, c config.Config, kvm probe, look func(string) (string, error)) choice {
	switch {
	case c.VM.Driver == "firecracker":
		return choice{firecracker: true}
	case c.VM.Driver == "qemu" || c.VM.Accel == "tcg":
		return choice{}
	}
	if c.Firecracker.Binary == "" && c.Firecracker.Jailer == "" {
		if _, err := look("firecracker"); errors.Is(err, exec.ErrNotFound) {
			return choice{why: "Firecracker is not installed"}
		}
	}
	if s := kvm(ctx); s.State != vm.KVMWorks {
		return choice{why: "Firecracker needs KVM: " + s.String()}
	}
	return choice{firecracker: true}
}

func (a *App) openFirecracker(ctx context.Context) (string, error) {
	c := a.cfg.Firecracker
	if c.ChrootBase == "" {
		c.ChrootBase = filepath.Join(a.cfg.StateDir, "jail")
	}
	d, err := firecracker.New(ctx, firecracker.Config{
		Firecracker: c.Binary, Jailer: c.Jailer, ChrootBase: c.ChrootBase, ParentCgroup: c.ParentCgroup, Serial: c.Serial, Log: a.log,
		NoJail: !c.Jail,
		UIDs:   firecracker.Range{First: c.UIDFirst, Count: c.UIDCount},
	})
	if err != nil {
		return "", err
	}
	a.driver, a.extra = d, firecracker.Overhead()
	if !c.Jail {
		return "Firecracker " + d.Version().String() + " WITHOUT ITS JAIL: for trusted jobs only", nil
	}
	return "Firecracker " + d.Version().String() + ", jailed", nil
}

func (a *App) openQEMU(ctx context.Context) (string, error) {
	d, err := qemu.New(ctx, qemu.Config{Binary: a.cfg.VM.QEMU, Accel: qemu.Accel(a.cfg.VM.Accel), Cgroup: a.cgroup(), Log: a.log})
	if err != nil {
		return "", err
	}
	a.driver, a.extra = d, qemu.Overhead()
	accel, kvm := d.Accel()
	a.log.Info("virtual machines", "accelerator", accel, "kvm", kvm)
	return describeAccel(accel, kvm), nil
}

// cgroup is the parent of QEMU's VMs in the hierarchy: beside the groups of jails, and this state directory's alone, so that
// what is swept there is its own. No VM's name has a dot.
func (a *App) cgroup() string {
	sum := sha256.Sum256([]byte(a.dir))
	return filepath.Join(a.cfg.Firecracker.ParentCgroup, "qemu."+hex.EncodeToString(sum[:6]))
}

// describeAccel says in a few words what runs the guests' instructions, and why.
func describeAccel(accel qemu.Accel, kvm vm.KVMStatus) string {
	if accel == qemu.KVM {
		return "QEMU with KVM"
	}
	why := map[vm.KVMState]string{
		vm.KVMAbsent: "no /dev/kvm", vm.KVMNoPermission: "no permission for /dev/kvm", vm.KVMBroken: "/dev/kvm does not really work",
	}[kvm.State]
	if why == "" {
		why = "as configured"
	}
	return "QEMU in software: " + why
}
