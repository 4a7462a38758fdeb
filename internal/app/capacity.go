package app

import (
	"flint"
	"flint/internal/config"
	"flint/internal/vm/firecracker"
	"flint/internal/vm/qemu"
)

// Capacity is the memory that VMs are admitted by.
type Capacity struct {
	Memory            flint.Bytes    // over all VMs
	QEMU, Firecracker flint.Overhead // what each VM takes beyond its guest's memory
}

// CapacityOf returns what a host of this configuration would admit VMs by, on this machine. It opens nothing.
func CapacityOf(cfg config.Config) Capacity {
	return Capacity{Memory: limits(cfg.Host).Memory, QEMU: qemu.Overhead(), Firecracker: firecracker.Overhead()}
}
