package kernel

import (
	"bytes"
	"debug/elf"
	"errors"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"flint"
)

func TestPrepareMonolithic(t *testing.T) {
	const release = "6.1.141"
	w := newWorld(t)
	w.absent = []string{"depmod", "apt-cache", "apt-get"}
	vmlinux := filepath.Join(t.TempDir(), "vmlinux-"+release)
	w.write(t, vmlinux, string(makeKernel(release)))
	s := Source{Vmlinuz: vmlinux}
	first := w.prepare(t, s)
	if first.Version != release || first.Arch != "amd64" || first.Modules != "" || len(first.Missing) != 0 {
		t.Errorf("got %+v", first)
	}
	if kernel, err := os.ReadFile(first.Kernel); err != nil || !bytes.Equal(kernel, makeKernel(release)) {
		t.Errorf("the kernel is not the one given (%v)", err)
	}
	files := initramfsFiles(t, first.Initrd)
	if order, ok := files["modules/"+orderFile]; !ok || order != "" {
		t.Errorf("modules to load: %q, %v", order, ok)
	}
	if !strings.Contains(files["init"], "agent one") {
		t.Error("/init is not the agent")
	}
	for name := range files {
		if strings.HasSuffix(name, ".ko") {
			t.Errorf("the initramfs has %s", name)
		}
	}
	if _, err := os.Stat(filepath.Join(filepath.Dir(first.Kernel), modulesFile)); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("there is an image without modules: %v", err)
	}
	kept, err := os.Stat(first.Kernel)
	if err != nil {
		t.Fatal(err)
	}
	if again := w.prepare(t, s); again.Kernel != first.Kernel || again.Version != release || again.Modules != "" {
		t.Errorf("from the cache it is %+v", again)
	}
	if now, err := os.Stat(first.Kernel); err != nil || !now.ModTime().Equal(kept.ModTime()) {
		t.Errorf("it was made again (%v)", err)
	}
	w.write(t, vmlinux+".config", bootable+"CONFIG_VETH=y\nCONFIG_BRIDGE=m\n")
	pack := w.prepare(t, s)
	if !slices.Contains(pack.Missing, "BRIDGE") || slices.Contains(pack.Missing, "VETH") || slices.Contains(pack.Missing, "MODULES") {
		t.Errorf("missing: %q", pack.Missing)
	}
	if err := os.Truncate(pack.Kernel, 10); err != nil {
		t.Fatal(err)
	}
	if again := w.prepare(t, s); !bytes.Equal(readFile(t, again.Kernel), makeKernel(release)) {
		t.Error("a damaged one is taken from the cache")
	}
}

func TestMonolithicKernelsOfEveryForm(t *testing.T) {
	w := newWorld(t)
	plain := makeKernel(testRelease)
	vmlinuz := filepath.Join(t.TempDir(), "kernel")
	for name, file := range map[string][]byte{
		"ELF": plain, "bzImage": makeBzImage(withSize(packers()["zstd"](t, plain), plain)), "ELF.gz": packers()["gzip"](t, plain),
	} {
		w.write(t, vmlinuz, string(file))
		if pack := w.prepare(t, Source{Vmlinuz: vmlinuz}); !bytes.Equal(readFile(t, pack.Kernel), plain) || pack.Modules != "" {
			t.Errorf("%s: got %+v", name, pack)
		}
	}
	w.write(t, vmlinuz, string(makeELF(elf.EM_X86_64, true, "a program")))
	w.fails(t, Source{Vmlinuz: "/dev/zero"}, "kernel.unpack", "no ordinary file")
	w.fails(t, Source{Vmlinuz: vmlinuz}, "kernel.format", "does not say its version")
	w.write(t, vmlinuz, "#!/bin/sh")
	w.fails(t, Source{Vmlinuz: vmlinuz}, "kernel.format", vmlinuz)
	if f := w.fails(t, Source{Vmlinuz: vmlinuz + ".gone"}, "kernel.unpack", "no such file"); !errors.Is(f, flint.ErrNotFound) {
		t.Errorf("a file that is not there is a fault of kind %v", f.Kind)
	}
	left, err := filepath.Glob(filepath.Join(w.dir, "cache", "*.[nw]*"))
	if err != nil || len(left) != 0 {
		t.Errorf("left behind: %q", left)
	}
}

// bootable is a configuration with what a guest cannot boot without.
const bootable = `CONFIG_BLK_DEV_INITRD=y
CONFIG_ACPI=y
CONFIG_VIRTIO_MMIO=y
CONFIG_VIRTIO_BLK=y
CONFIG_VIRTIO_NET=y
CONFIG_VIRTIO_CONSOLE=y
CONFIG_VIRTIO_VSOCKETS=y
CONFIG_EXT4_FS=y
CONFIG_OVERLAY_FS=y
CONFIG_TMPFS=y
CONFIG_DEVTMPFS=y
`

// embedded is a configuration as a kernel built with CONFIG_IKCONFIG carries it, after a mark that is none.
func embedded(t *testing.T, config string) string {
	t.Helper()
	return "IKCFG_ST\x00IKCFG_ST" + string(packers()["gzip"](t, []byte(config))) + "IKCFG_ED\x00"
}

func TestKernelThatCannotBootAGuestIsRefused(t *testing.T) {
	needs := []string{NeedsPVH, NeedsACPI, NeedsSerial, NeedsVsock}
	without := func(option string) string {
		config := strings.Replace(bootable, "CONFIG_"+option+"=y\n", "", 1)
		if config == bootable {
			t.Fatalf("CONFIG_%s=y is not in it", option)
		}
		return config
	}
	const release = "6.12.1-flint"
	noPVH := makeELF(elf.EM_X86_64, false, "Linux version "+release+" \x00"+driverNames)
	for _, c := range []struct {
		name, lacks string // empty: it is taken
		kernel      []byte
		config      string
	}{
		{name: "all in the configuration it carries", kernel: makeKernelWith(release, embedded(t, bootable))},
		{name: "all in the configuration beside it", kernel: makeKernelWith(release, ""), config: bootable},
		{name: "all drivers by name", kernel: makeKernel(release)},
		{name: "no virtio_blk by configuration", lacks: "VIRTIO_BLK", kernel: makeKernelWith(release, driverNames+embedded(t, without("VIRTIO_BLK")))},
		{name: "the one it carries counts", lacks: "EXT4_FS", kernel: makeKernelWith(release, embedded(t, without("EXT4_FS"))), config: bootable},
		{name: "a module counts for nothing", lacks: "VIRTIO_NET", kernel: makeKernelWith(release, embedded(t, without("VIRTIO_NET")+"CONFIG_VIRTIO_NET=m\n"))},
		{name: "no vsock by configuration", lacks: "VIRTIO_VSOCKETS", kernel: makeKernelWith(release, embedded(t, without("VIRTIO_VSOCKETS")))},
		{name: "no virtio by name", lacks: "VIRTIO_BLK, CONFIG_VIRTIO_CONSOLE, CONFIG_VIRTIO_MMIO", kernel: makeKernelWith(release, "virtio_net\x00vmw_vsock_virtio_transport\x00virtio_blk_of_another\x00")},
		{name: "no vsock by name", lacks: "VIRTIO_VSOCKETS", kernel: makeKernelWith(release, strings.Replace(driverNames, "vmw_", "", 1))},
		{name: "neither ACPI nor a list of devices", lacks: "ACPI, CONFIG_VIRTIO_MMIO_CMDLINE_DEVICES", kernel: makeKernelWith(release, embedded(t, without("ACPI")))},
		{name: "no entry point", lacks: "PVH", kernel: noPVH},
	} {
		t.Run(c.name, func(t *testing.T) {
			w := newWorld(t)
			vmlinux := filepath.Join(t.TempDir(), "vmlinux")
			w.write(t, vmlinux, string(c.kernel))
			if c.config != "" {
				w.write(t, vmlinux+".config", c.config)
			}
			s := Source{Vmlinuz: vmlinux, Needs: needs}
			if c.lacks == "" {
				w.prepare(t, s)
				return
			}
			for range 2 { // made, then cached
				f := w.fails(t, s, "kernel.lacks", release+" from "+vmlinux+": it was built without what a guest needs: CONFIG_"+c.lacks)
				if text := f.Error(); !strings.HasSuffix(text, "CONFIG_"+c.lacks) || !errors.Is(f, flint.ErrConfig) {
					t.Errorf("got %q of kind %v", text, f.Kind)
				}
			}
		})
	}
	// Firecracker needs neither the serial port's driver nor the entry point.
	w := newWorld(t)
	vmlinux := filepath.Join(t.TempDir(), "vmlinux")
	w.write(t, vmlinux, string(makeELF(elf.EM_X86_64, false, "Linux version "+release+" \x00"+embedded(t, without("VIRTIO_CONSOLE")))))
	if pack := w.prepare(t, Source{Vmlinuz: vmlinux, Needs: []string{NeedsVsock}}); !slices.Contains(pack.Missing, "VIRTIO_CONSOLE") {
		t.Errorf("missing: %q", pack.Missing)
	}
}

func readFile(t *testing.T, name string) []byte {
	t.Helper()
	b, err := os.ReadFile(name)
	if err != nil {
		t.Fatal(err)
	}
	return b
}
