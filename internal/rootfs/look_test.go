package rootfs

import (
	"bytes"
	"context"
	"debug/elf"
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

func TestLook(t *testing.T) {
	for _, format := range []Format{Ext4, Erofs} {
		t.Run(string(format), func(t *testing.T) { testLook(t, format) })
	}
}

// program is the head of an ELF for a machine.
func program(machine elf.Machine) string {
	b := make([]byte, 64)
	copy(b, elf.ELFMAG)
	b[elf.EI_CLASS], b[elf.EI_DATA] = byte(elf.ELFCLASS64), byte(elf.ELFDATA2LSB)
	binary.LittleEndian.PutUint16(b[18:], uint16(machine))
	return string(b)
}

func testLook(t *testing.T, format Format) {
	look := func(items ...item) Contents {
		t.Helper()
		c, err := Look(t.Context(), wrote(t, format, pack(t, items...)))
		if err != nil {
			t.Fatal(err)
		}
		return c
	}
	if c := look(file("f", "1")); c != (Contents{Libc: "none"}) {
		t.Errorf("an empty image has %+v", c)
	}
	debian := look(
		dir("usr/"), dir("usr/bin/"), file("usr/bin/dash", program(elf.EM_X86_64)), sym("usr/bin/sh", "dash"), sym("bin", "usr/bin"),
		sym("lib", "usr/lib"), sym("lib64", "/usr/lib64"), file("usr/lib64/ld-linux-x86-64.so.2", "x"),
		file("usr/lib/systemd/systemd", "x"), sym("sbin", "usr/sbin"), sym("usr/sbin/init", "../lib/systemd/systemd"),
		file("usr/bin/dockerd", "x"), file("etc/passwd", "root:x:0:0::/root:/bin/sh\nrunner:x:1000:1000::/home/runner:/bin/sh\n"),
		file("usr/lib/os-release", "NAME=x\nPRETTY_NAME=\"Debian 12\"\n"), sym("etc/os-release", "../usr/lib/os-release"),
	)
	if want := (Contents{OS: "Debian 12", Shell: true, Arch: "amd64", Libc: "glibc", Systemd: true, Docker: true, Runner: true}); debian != want {
		t.Errorf("got %+v, want %+v", debian, want)
	}
	if c := look(file("bin/busybox", "x"), sym("bin/sh", "busybox"), file("lib/ld-musl-x86_64.so.1", "x"), sym("loop", "loop"), sym("etc", "loop")); c != (Contents{Shell: true, Libc: "musl"}) {
		t.Errorf("got %+v", c)
	}
}

// TestLookIsBounded has an image with a large directory, which every path leads through. It is read again for each.
func TestLookIsBounded(t *testing.T) {
	var items []item
	for i := range 1000 {
		items = append(items, file(fmt.Sprintf("%0240d", i), ""))
	}
	for _, format := range []Format{Ext4, Erofs} {
		f, err := os.Open(wrote(t, format, pack(t, items...)))
		if err != nil {
			t.Fatal(err)
		}
		defer f.Close()
		if _, err := Look(t.Context(), f.Name()); err != nil {
			t.Errorf("%s: %v", format, err)
		}
		// The directory has some 256 KiB, and what is made of it is counted, too.
		if _, err := lookInto(&glance{t.Context(), f, 1 << 20}); !errors.Is(err, errLook) {
			t.Errorf("%s, for the second time: %v", format, err)
		}
		ctx, cancel := context.WithCancel(t.Context())
		cancel()
		if _, err := Look(ctx, f.Name()); !errors.Is(err, context.Canceled) {
			t.Errorf("%s, cancelled: %v", format, err)
		}
	}
}

// TestLookIntoAnothersErofs looks into what mkfs.erofs makes: its inodes are of the small form where they can be, and the last parts of
// large contents stand behind them. Where an ext4 has its magic it has a random number.
func TestLookIntoAnothersErofs(t *testing.T) {
	if _, err := exec.LookPath("mkfs.erofs"); err != nil {
		t.Skip("needs mkfs.erofs: sudo apt-get install erofs-utils")
	}
	dir := t.TempDir()
	passwd := strings.Repeat("user:x:1:1::/:/bin/sh\n", 1000) + "runner:x:1000:1000::/home/runner:/bin/sh\n"
	for name, content := range map[string]string{"bin/sh": "x", "lib64/ld-linux-x86-64.so.2": "x", "etc/passwd": passwd, "usr/lib/os-release": "PRETTY_NAME=Debian\n"} {
		if err := errors.Join(os.MkdirAll(filepath.Join(dir, filepath.Dir(name)), 0o755), os.WriteFile(filepath.Join(dir, name), []byte(content), 0o644)); err != nil {
			t.Fatal(err)
		}
	}
	for i := range 1000 { // a directory of several blocks
		if err := os.Symlink("x", filepath.Join(dir, "etc", fmt.Sprint("link-", i))); err != nil {
			t.Fatal(err)
		}
	}
	if err := errors.Join(os.Symlink("../usr/lib/os-release", filepath.Join(dir, "etc/os-release")), os.Chtimes(filepath.Join(dir, "bin/sh"), time.Time{}, time.Unix(1, 0))); err != nil {
		t.Fatal(err)
	}
	mkfs := func(args ...string) string {
		out := filepath.Join(t.TempDir(), "image")
		if b, err := exec.Command("mkfs.erofs", append(args, out, dir)...).CombinedOutput(); err != nil {
			t.Fatalf("mkfs.erofs %q: %v\n%s", args, err, b)
		}
		return out
	}
	want := Contents{OS: "Debian", Shell: true, Libc: "glibc", Runner: true}
	for _, args := range [][]string{nil, {"-Eforce-inode-extended"}, {"-Enoinline_data"}, {"-U00000000-0000-0000-53ef-000000000000"}} {
		path := mkfs(args...)
		if got, err := Look(t.Context(), path); err != nil || got != want {
			t.Errorf("mkfs.erofs %q: got %+v, %v", args, got, err)
		}
		if err := Whole(path); err != nil {
			t.Errorf("mkfs.erofs %q: %v", args, err)
		}
	}
	if got, err := Look(t.Context(), mkfs("-zlz4")); !errors.Is(err, errErofs) {
		t.Errorf("compressed: got %+v, %v", got, err)
	}
}

// FuzzLook reads file systems that are damaged.
func FuzzLook(f *testing.F) {
	layer := pack(f, file("bin/dash", "x"), sym("bin/sh", "dash"), file("etc/passwd", strings.Repeat("x", 9000)))
	var whole [][]byte
	for _, format := range []Format{Ext4, Erofs} {
		b, err := os.ReadFile(wrote(f, format, layer))
		if err != nil {
			f.Fatal(err)
		}
		whole = append(whole, b)
	}
	f.Add(false, uint32(1024+0x28), []byte{0, 0, 0, 0})
	f.Add(true, uint32(4096), []byte{4})
	f.Fuzz(func(t *testing.T, erofs bool, at uint32, patch []byte) {
		b := whole[0]
		if erofs {
			b = whole[1]
		}
		b = bytes.Clone(b)
		if int(at) < len(b) {
			copy(b[at:], patch)
		}
		_, _ = lookInto(newGlance(t.Context(), bytes.NewReader(b))) // it must end, and not panic
	})
}
