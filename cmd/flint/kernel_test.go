package main

import (
	"debug/elf"
	"encoding/json"
	"errors"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"testing"

	"flint/internal/app"
)

// writeKernel writes a kernel reduced to a head and a banner, with its configuration beside it, and returns its path.
func writeKernel(t *testing.T, version, config string) string {
	t.Helper()
	b := make([]byte, 64)
	copy(b, elf.ELFMAG)
	b[elf.EI_CLASS], b[elf.EI_DATA], b[elf.EI_VERSION] = byte(elf.ELFCLASS64), byte(elf.ELFDATA2LSB), 1
	b[16], b[18], b[20], b[52] = byte(elf.ET_EXEC), byte(elf.EM_X86_64), 1, 64
	path := filepath.Join(t.TempDir(), "vmlinux")
	for name, content := range map[string]string{path: string(b) + "Linux version " + version + " (a@b) #1\x00", path + ".config": config} {
		if err := os.WriteFile(name, []byte(content), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	return path
}

func TestKernel(t *testing.T) {
	if runtime.GOARCH != "amd64" {
		t.Skip("needs an amd64 machine: its kernels are ELF files")
	}
	state := t.TempDir()
	t.Setenv("FLINT_VM_AGENT", writeKernel(t, "of the agent", "")) // any static program
	do := func(want int, args ...string) string {
		return flintSays(t, want, append([]string{"kernel", "--state-dir", state}, args...)...)
	}
	if out := do(0, "ls"); !strings.HasPrefix(out, "None is kept") {
		t.Errorf("%q", out)
	}
	if out := do(0, "ls", "--json"); out != "[]\n" {
		t.Errorf("%q", out)
	}
	// A kernel that is known not to boot a VM is refused.
	do(3, "import", "--vmlinuz", writeKernel(t, "6.99.0-no-vm", "CONFIG_WIREGUARD=y\n"))
	do(0, "rm", "6.99.0-no-vm")

	given := writeKernel(t, "6.99.1-mine", bootable+"CONFIG_WIREGUARD=y\nCONFIG_IP_MULTIPLE_TABLES=y\nCONFIG_IPV6_MULTIPLE_TABLES=y\n")
	out := do(0, "import", "--vmlinuz", given)
	if !strings.HasPrefix(out, "kernel 6.99.1-mine is kept as ") || !strings.Contains(out, "kernel.pack: ") || !strings.Contains(out, "some of wireguard") {
		t.Errorf("%q", out)
	}
	var list []app.KeptKernel
	if err := json.Unmarshal([]byte(do(0, "ls", "--json")), &list); err != nil || len(list) != 1 || list[0].Version != "6.99.1-mine" || list[0].Chosen || !list[0].Monolithic {
		t.Fatalf("%+v, %v", list, err)
	}
	id := list[0].ID
	lines := strings.Split(strings.TrimSuffix(do(0, "ls"), "\n"), "\n")
	if len(lines) != 2 || !strings.HasPrefix(lines[0], "  id ") || !strings.HasPrefix(lines[1], "  "+id+"  6.99.1-mine  "+given) ||
		strings.Index(lines[0], "pools") != strings.Index(lines[1], "-      docker") {
		t.Errorf("%q", lines)
	}
	for _, args := range [][]string{{"inspect", "6.99.1-mine"}, {"inspect", id[:6]}, {"ls", "-v"}} {
		out := do(0, args...)
		for _, want := range []string{"6.99.1-mine  amd64, all built in\n", "  wireguard  partly   without ", "  docker     no       lacks NAMESPACES, "} {
			if !strings.Contains(out, want) {
				t.Errorf("%v: %q is not in\n%s", args, want, out)
			}
		}
	}
	do(5, "inspect") // the configured one has not been made
	do(5, "inspect", "6.99.2")
	do(2, "inspect", "a", "b")
	do(2, "pull", "a", "b")
	do(2, "import")
	do(2, "import", "host", "--vmlinuz", given)
	do(2, "import", "host", "x.deb")
	do(2, "import", "x.deb", "host")
	do(2, "import", "--vmlinuz", given, "x.deb")
	do(5, "import", "none.deb")
	do(5, "import", "./host") // a file
	do(2, "build", "--jobs", "-1")
	do(2, "build", "--jobs", "0")
	for _, series := range []string{"abc", "6", "6.1.", "6.1.2.3", "6.1 ", ""} {
		do(2, "build", "--series", series)
	}
	damaged := filepath.Join(t.TempDir(), "damaged.deb")
	if err := os.WriteFile(damaged, []byte("!<arch>\ndamaged"), 0o600); err != nil {
		t.Fatal(err)
	}
	do(3, "import", damaged)
	do(3, "import", "--vmlinuz", damaged)
	do(3, "import", filepath.Dir(damaged))
	do(2, "rm")
	do(5, "rm", "6.99.2")

	t.Setenv("FLINT_KERNEL_PACK", "6.99.1-mine")
	if out := do(0, "inspect"); !strings.Contains(out, "  pools      (configured)\n") {
		t.Errorf("it is not the configured one:\n%s", out)
	}
	do(8, "rm", id)
	t.Setenv("FLINT_KERNEL_PACK", "")
	if out := do(0, "rm", "6.99.1-mine"); out != "removed 6.99.1-mine "+id+"\n" {
		t.Errorf("%q", out)
	}
	if out := do(0, "ls"); !strings.HasPrefix(out, "None is kept") {
		t.Errorf("%q", out)
	}
}

// TestKernelsOfAnotherUser asks as nobody for what root keeps: where he may look, and where he may not.
func TestKernelsOfAnotherUser(t *testing.T) {
	if os.Geteuid() != 0 || runtime.GOARCH != "amd64" {
		t.Skip("needs root on an amd64 machine: it asks as nobody, and its kernels are ELF files")
	}
	open, locked := t.TempDir(), t.TempDir()
	agent := writeKernel(t, "of the agent", "") // any static program
	kept, other := writeKernel(t, "6.99.1-mine", bootable), writeKernel(t, "6.99.2-other", bootable)
	t.Setenv("FLINT_VM_AGENT", agent)
	flintSays(t, 0, "kernel", "import", "--vmlinuz", kept, "--state-dir", open)
	err := errors.Join(os.Mkdir(filepath.Join(open, "kernel-source"), 0o755), os.Chmod(locked, 0o700), os.Chmod(filepath.Dir(open), 0o755))
	for _, dir := range []string{open, filepath.Dir(agent), filepath.Dir(other)} {
		err = errors.Join(err, os.Chmod(dir, 0o755))
	}
	if err != nil {
		t.Fatal(err)
	}
	t.Setenv("PATH", t.TempDir()) // nothing is fetched or built, should it not be refused
	refused := func(state string, args ...string) {
		t.Helper()
		refusedToNobody(t, append([]string{"kernel", "--state-dir", state}, args...)...)
	}
	for _, state := range []string{open, locked} {
		refused(state, "import", "--vmlinuz", other)
		refused(state, "build")
		refused(state, "rm", "6.99.1-mine")
	}
	refused(locked, "pull")
	refused(locked, "ls")
	refused(locked, "ls", "--json")
	refused(locked, "inspect", "6.99.1-mine")
	flintSays(t, 0, "kernel", "inspect", "6.99.1-mine", "--state-dir", open)
}

// bootable is the configuration of a kernel without modules that boots a VM, and does little else.
const bootable = `CONFIG_BLK_DEV_INITRD=y
CONFIG_VIRTIO_MMIO=y
CONFIG_ACPI=y
CONFIG_VIRTIO_BLK=y
CONFIG_VIRTIO_NET=y
CONFIG_VIRTIO_CONSOLE=y
CONFIG_VIRTIO_VSOCKETS=y
CONFIG_HW_RANDOM_VIRTIO=y
CONFIG_EXT4_FS=y
CONFIG_OVERLAY_FS=y
CONFIG_TMPFS=y
CONFIG_DEVTMPFS=y
CONFIG_UNIX98_PTYS=y
CONFIG_SERIAL_8250_CONSOLE=y
`
