package app

import (
	"context"
	"errors"
	"path/filepath"

	"flint"
	"flint/internal/vm"
	"flint/internal/vm/firecracker"
	"flint/internal/vm/qemu"
)

const (
	// qemuExtra is counted for each VM beyond its guest's memory: the 128 MiB that QEMU may fill with translated code where
	// there is no KVM, and 80 MiB for itself.
	qemuExtra = 208 * flint.MiB
	// firecrackerExtra is what the driver lets a VMM's cgroup have beyond its guest's memory, but for the part that grows
	// with the guest.
	firecrackerExtra = 128 * flint.MiB
)

// openDriver chooses what runs the VMs: as configured, or Firecracker where KVM works and its programs are there, else
// QEMU.
func (a *App) openDriver(ctx context.Context) error {
	done := a.opt.Progress.Step("virtual machines")
	detail, err := a.chooseDriver(ctx)
	done(detail, err)
	return err
}

func (a *App) chooseDriver(ctx context.Context) (string, error) {
	switch a.cfg.VM.Driver {
	case "firecracker":
		return a.openFirecracker(ctx)
	case "qemu":
		return a.openQEMU(ctx)
	}
	if a.cfg.VM.Accel == "tcg" {
		return a.openQEMU(ctx)
	}
	if kvm := vm.ProbeKVM(ctx); kvm.State != vm.KVMWorks {
		return a.openQEMU(ctx)
	}
	detail, err := a.openFirecracker(ctx)
	if err == nil {
		return detail, nil
	}
	var fault *flint.Fault
	if errors.As(err, &fault) && fault.Code != "firecracker.missing" {
		// It is installed, so it is meant to be used: QEMU in its place would hide what is wrong.
		return "", err
	}
	a.log.Info("Firecracker is not installed: VMs run under QEMU")
	return a.openQEMU(ctx)
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
	a.driver, a.extra = d, firecrackerExtra
	if !c.Jail {
		return "Firecracker " + d.Version().String() + " WITHOUT ITS JAIL: for trusted jobs only", nil
	}
	return "Firecracker " + d.Version().String() + ", jailed", nil
}

func (a *App) openQEMU(ctx context.Context) (string, error) {
	d, err := qemu.New(ctx, qemu.Config{Binary: a.cfg.VM.QEMU, Accel: qemu.Accel(a.cfg.VM.Accel), Log: a.log})
	if err != nil {
		return "", err
	}
	a.driver, a.extra = d, qemuExtra
	accel, kvm := d.Accel()
	a.log.Info("virtual machines", "accelerator", accel, "kvm", kvm)
	return describeAccel(accel, kvm), nil
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
