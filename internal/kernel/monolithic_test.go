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
	w.write(t, vmlinux+".config", "CONFIG_VETH=y\nCONFIG_BRIDGE=m\n")
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

func readFile(t *testing.T, name string) []byte {
	t.Helper()
	b, err := os.ReadFile(name)
	if err != nil {
		t.Fatal(err)
	}
	return b
}
