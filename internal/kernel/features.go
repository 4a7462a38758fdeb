package kernel

import (
	"bytes"
	"errors"
	"slices"
	"strings"

	"flint"
)

// Options that a caller's Source.Needs may name.
const (
	// NeedsPVH is the entry point by which QEMU boots an ELF.
	NeedsPVH = "PVH"
	// NeedsACPI is how QEMU's machines tell an x86-64 guest of its devices. A device tree is as good.
	NeedsACPI = "ACPI"
	// NeedsSerial and NeedsVsock are the ways to the agent.
	NeedsSerial = "VIRTIO_CONSOLE"
	NeedsVsock  = "VIRTIO_VSOCKETS"
)

// essential lists the options, as the workload boot names them, without which no guest of flint's gets as far as its agent. Of a kernel with
// modules, the boot set answers for them.
const essential = `
BLK_DEV_INITRD VIRTIO_MMIO VIRTIO_MMIO_CMDLINE_DEVICES VIRTIO_BLK VIRTIO_NET EXT4_FS OVERLAY_FS TMPFS DEVTMPFS
`

// lacks refuses a kernel that cannot boot a guest, where what it has is known.
func (e *entry) lacks(needs []string) error {
	if e.Monolithic {
		needs = slices.Concat(strings.Fields(essential), needs)
	}
	needs = slices.DeleteFunc(slices.Compact(slices.Sorted(slices.Values(needs))), func(n string) bool { return !slices.Contains(e.Missing, n) })
	if len(needs) == 0 {
		return nil
	}
	return &flint.Fault{
		Code: "kernel.lacks", What: "boot kernel " + e.Version + " from " + e.From, Kind: flint.ErrConfig,
		Err: errors.New("it was built without what a guest needs: CONFIG_" + strings.Join(needs, ", CONFIG_")),
		Fix: "give its modules, too, if it has any (kernel.modules), or another kernel: `make kernel` builds one that has all",
	}
}

// embeddedConfig returns the configuration that a kernel built with CONFIG_IKCONFIG carries after a mark (the kernel's
// kernel/configs.c), or nil.
func embeddedConfig(kernel []byte) []byte {
	for {
		_, rest, ok := bytes.Cut(kernel, []byte("IKCFG_ST"))
		if !ok {
			return nil
		}
		kernel = rest
		if compression(rest) != "gzip" {
			continue
		}
		if config, err := decompress(rest, maxConfig); err == nil {
			return config
		}
	}
}

// missingDrivers names the virtio drivers that a monolithic kernel of unknown configuration cannot have, because the name
// under which it would register them is nowhere in it.
func missingDrivers(kernel []byte) []string {
	var missing []string
	for _, d := range []struct{ option, name string }{
		{"VIRTIO_MMIO", "virtio-mmio"},
		{"VIRTIO_BLK", "virtio_blk"},
		{"VIRTIO_NET", "virtio_net"},
		{"VIRTIO_CONSOLE", "virtio_console"},
		{"VIRTIO_VSOCKETS", "vmw_vsock_virtio_transport"},
	} {
		if !bytes.Contains(kernel, []byte(d.name+"\x00")) {
			missing = append(missing, d.option)
		}
	}
	return missing
}
