package main

import (
	"encoding/binary"
	"errors"
	"os"
	"path/filepath"
	"reflect"
	"slices"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

func TestParseCmdline(t *testing.T) {
	for in, want := range map[string]kernelArgs{
		"": {},
		"console=ttyS0 quiet flint.channel=serial flint.drives=base,scratch\n": {"serial", []string{"base", "scratch"}, false},
		"flint.drives=a flint.drives=b,c flint.channel=vsock":                  {"vsock", []string{"b", "c"}, false},
		"flint.root=memory":           {Memory: true},
		"flint.root=disk":             {},
		"flint.drives= flint.channel": {},
	} {
		if got := parseCmdline(in); !reflect.DeepEqual(got, want) {
			t.Errorf("%q: %+v", in, got)
		}
	}
}

func TestModuleOrder(t *testing.T) {
	ms, err := parseOrder([]byte("virtio.ko\n\n# why\nvirtio_console.ko serial\nvsock.ko vsock\nrng.ko late\nodd.ko unknown"))
	if err != nil {
		t.Fatal(err)
	}
	load := func(channel string) string {
		var out []string
		for _, m := range ms {
			if m.wanted(channel) {
				out = append(out, m.File)
			}
		}
		return strings.Join(out, " ")
	}
	for channel, want := range map[string]string{
		"serial": "virtio.ko virtio_console.ko", "vsock": "virtio.ko vsock.ko", "": "virtio.ko virtio_console.ko vsock.ko",
	} {
		if got := load(channel); got != want {
			t.Errorf("channel %q loads %s", channel, got)
		}
	}
	for _, bad := range []string{"../etc/x.ko", "a.ko b c", "notamodule", "/abs.ko"} {
		if _, err := parseOrder([]byte(bad)); err == nil {
			t.Errorf("%q was accepted", bad)
		}
	}
}

// TestKernelWithoutModules has an initramfs without anything to load, and a kernel that would load nothing.
func TestKernelWithoutModules(t *testing.T) {
	dir := t.TempDir()
	if ms, err := loadBootModules(dir, "serial"); len(ms) != 0 || err != nil {
		t.Errorf("without a list: %v, %v", ms, err)
	}
	write(t, dir, "order", "")
	if ms, err := loadBootModules(dir, "serial"); len(ms) != 0 || err != nil {
		t.Errorf("empty list: %v, %v", ms, err)
	}
	setting := filepath.Join(dir, "modprobe")
	if err := nameHelper(setting, "/run/helper"); err != nil {
		t.Error(err)
	}
	if _, err := os.Stat(setting); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("a setting that was not there is: %v", err)
	}
	write(t, dir, "modprobe", "")
	if err := nameHelper(setting, "/run/helper"); err != nil {
		t.Error(err)
	}
	if b, err := os.ReadFile(setting); string(b) != "/run/helper" {
		t.Errorf("setting %q, %v", b, err)
	}
}

func TestProbeModule(t *testing.T) {
	dir := t.TempDir()
	write(t, dir, "modules.dep", "kernel/a.ko: kernel/b.ko kernel/c.ko\nkernel/b.ko: kernel/c.ko\nkernel/c.ko:\nkernel/x-y.ko:\nkernel/z.ko.xz:\n")
	write(t, dir, "modules.alias", "# comment\nalias fs-* b\nalias char-major-10-200 x_y\nalias broken[ c\nalias cipher a\nalias cipher c\nalias gone nothing\n")
	for name, want := range map[string]string{
		"a": "kernel/c.ko kernel/b.ko kernel/a.ko", "x-y": "kernel/x-y.ko", "x_y": "kernel/x-y.ko", "fs-any": "kernel/c.ko kernel/b.ko",
		"char-major-10-200": "kernel/x-y.ko", "z": "kernel/z.ko.xz",
	} {
		var got []string
		err := probeModule(dir, name, func(f string) error {
			rel, err := filepath.Rel(dir, f)
			got = append(got, rel)
			return err
		})
		if err != nil || strings.Join(got, " ") != want {
			t.Errorf("%s: %v, loaded %v", name, err, got)
		}
	}
	for _, name := range []string{"nothing", "gone"} {
		err := probeModule(dir, name, func(string) error { t.Errorf("%s was loaded", name); return nil })
		if err == nil || !strings.Contains(err.Error(), "none has that name") {
			t.Errorf("%s: %v", name, err)
		}
	}
}

// TestProbeAliasOfMany: a module that does not fit the processor does not keep another from being loaded.
func TestProbeAliasOfMany(t *testing.T) {
	dir := t.TempDir()
	write(t, dir, "modules.dep", "kernel/fast.ko:\nkernel/slow.ko: kernel/need.ko\nkernel/need.ko:\n")
	write(t, dir, "modules.alias", "alias crypto-x fast\nalias crypto-x slow\n")
	for misfits, want := range map[string]struct {
		loaded string
		fails  bool
	}{
		"":                {"fast.ko need.ko slow.ko", false},
		"fast.ko":         {"need.ko slow.ko", false},
		"slow.ko":         {"fast.ko need.ko", false},
		"fast.ko need.ko": {"", true},
	} {
		var got []string
		err := probeModule(dir, "crypto-x", func(f string) error {
			if name := filepath.Base(f); !strings.Contains(misfits, name) {
				got = append(got, name)
				return nil
			}
			return unix.ENODEV
		})
		if strings.Join(got, " ") != want.loaded || (err != nil) != want.fails || want.fails && !errors.Is(err, unix.ENODEV) {
			t.Errorf("without %q: loaded %v, %v", misfits, got, err)
		}
	}
}

func write(t *testing.T, dir, name, content string) {
	t.Helper()
	name = filepath.Join(dir, name)
	if err := os.MkdirAll(filepath.Dir(name), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(name, []byte(content), 0o644); err != nil {
		t.Fatal(err)
	}
}

func TestListDisks(t *testing.T) {
	sys := t.TempDir()
	for name, serial := range map[string]string{"vda": "base\n", "vdb": "", "vdaa": "late\n", "sda": "other\n"} {
		write(t, sys, "block/"+name+"/size", "1")
		if serial != "" {
			write(t, sys, "block/"+name+"/serial", serial)
		}
	}
	want := []disk{{"vda", "base"}, {"vdb", ""}, {"vdaa", "late"}}
	if got := listDisks(sys); !slices.Equal(got, want) {
		t.Errorf("disks %v", got)
	}
}

func TestMatchDrives(t *testing.T) {
	for _, c := range []struct {
		name    string
		names   string
		disks   []disk
		want    map[string]string
		missing string
	}{
		{"by serial, in any order", "base scratch", []disk{{"vda", "scratch"}, {"vdb", "base"}}, map[string]string{"base": "/dev/vdb", "scratch": "/dev/vda"}, ""},
		{"by position", "base scratch", []disk{{"vda", ""}, {"vdb", ""}}, map[string]string{"base": "/dev/vda", "scratch": "/dev/vdb"}, ""},
		{"never one with another's serial", "base scratch", []disk{{"vda", "base"}, {"vdb", "runner"}}, map[string]string{"base": "/dev/vda"}, "scratch"},
		{"not there yet", "base scratch", []disk{{"vda", ""}}, map[string]string{"base": "/dev/vda"}, "scratch"},
	} {
		found, missing := matchDrives(strings.Fields(c.names), c.disks)
		if !reflect.DeepEqual(found, c.want) || strings.Join(missing, " ") != c.missing {
			t.Errorf("%s: %v, missing %v", c.name, found, missing)
		}
	}
}

func TestSuperblock(t *testing.T) {
	ext, erofs, squash := make([]byte, 2048), make([]byte, 2048), make([]byte, 2048)
	binary.LittleEndian.PutUint16(ext[1080:], 0xEF53)
	binary.LittleEndian.PutUint32(erofs[1024:], 0xE0F5E1E2)
	binary.LittleEndian.PutUint16(erofs[1080:], 0xEF53) // part of its UUID
	copy(squash, "hsqs")
	for want, head := range map[string][]byte{"ext4": ext, "erofs": erofs, "squashfs": squash} {
		if got, err := superblock(head); got != want || err != nil {
			t.Errorf("%s: %s, %v", want, got, err)
		}
	}
	for _, bad := range [][]byte{nil, make([]byte, 100), make([]byte, 2048)} {
		if got, err := superblock(bad); err == nil {
			t.Errorf("%d bytes are %s", len(bad), got)
		}
	}
}

func TestFindSystemd(t *testing.T) {
	for _, c := range []struct {
		name, link, to, file, want string
	}{
		{"absolute link", "sbin/init", "/lib/systemd/systemd", "lib/systemd/systemd", "/sbin/init"},
		{"relative link", "sbin/init", "../lib/systemd/systemd", "lib/systemd/systemd", "/sbin/init"},
		{"without link", "", "", "usr/lib/systemd/systemd", ""},
		{"another init", "sbin/init", "/bin/busybox", "bin/busybox", ""},
		{"another init beside systemd", "sbin/init", "/bin/tini", "lib/systemd/systemd", ""},
		{"link out of the image", "sbin/init", "../../../../../../../../bin/sh", "etc/passwd", ""},
		{"link to nothing", "sbin/init", "/lib/systemd/systemd", "etc/passwd", ""},
	} {
		root := t.TempDir()
		write(t, root, c.file, "")
		if c.link != "" {
			if err := os.MkdirAll(filepath.Dir(filepath.Join(root, c.link)), 0o755); err != nil {
				t.Fatal(err)
			}
			if err := os.Symlink(c.to, filepath.Join(root, c.link)); err != nil {
				t.Fatal(err)
			}
		}
		if got := findSystemd(root); got != c.want {
			t.Errorf("%s: %q", c.name, got)
		}
	}
}

func TestWithHost(t *testing.T) {
	for in, want := range map[string]string{
		"":                              "127.0.0.1 localhost\n::1 localhost ip6-localhost ip6-loopback\n127.0.1.1 vm-1\n",
		"127.0.0.1 localhost":           "127.0.0.1 localhost\n127.0.1.1 vm-1\n",
		"127.0.0.1 localhost vm-1 #x\n": "127.0.0.1 localhost vm-1 #x\n",
		"127.0.0.1 localhost # vm-1\n":  "127.0.0.1 localhost # vm-1\n127.0.1.1 vm-1\n",
	} {
		if got := withHost(in, "vm-1"); got != want {
			t.Errorf("%q: %q", in, got)
		}
	}
}

func TestKernelFigures(t *testing.T) {
	total, available := parseMeminfo([]byte("MemTotal:  1024 kB\nMemFree: 1 kB\nMemAvailable: 512 kB\nodd\n"))
	if total != 1<<20 || available != 1<<19 {
		t.Errorf("memory %d, %d", total, available)
	}
	if n := counter([]byte("nr_free 1\noom_kill 7\noom_kill_x 9\n"), "oom_kill"); n != 7 {
		t.Errorf("%d OOM kills", n)
	}
}

func TestSerialPort(t *testing.T) {
	sys := t.TempDir()
	write(t, sys, "class/virtio-ports/vport3p1/name", "org.other\n")
	write(t, sys, "class/virtio-ports/vport3p2/name", "flint.agent\n")
	if got := serialPort(sys, "flint.agent"); got != "/dev/vport3p2" {
		t.Errorf("port %q", got)
	}
	if got := serialPort(sys, "none"); got != "" {
		t.Errorf("port %q", got)
	}
}

func TestDNSAnswers(t *testing.T) {
	q := dnsQuery(7, "a.example.")
	if string(q[12:]) != "\x01a\x07example\x00\x00\x01\x00\x01" {
		t.Errorf("question %q", q[12:])
	}
	answer := func(rcode byte) []byte { return []byte{0, 7, 0x81, 0x80 | rcode, 0, 1, 0, 0, 0, 0, 0, 0} }
	for rcode, ok := range map[byte]bool{0: true, 3: true, 2: false, 5: false} {
		if err := checkAnswer(7, answer(rcode)); (err == nil) != ok {
			t.Errorf("code %d: %v", rcode, err)
		}
	}
	for _, bad := range [][]byte{nil, q, answer(0)[:11], {0, 8, 0x81, 0, 0, 0, 0, 0, 0, 0, 0, 0}} {
		if checkAnswer(7, bad) == nil {
			t.Errorf("%q was taken for an answer", bad)
		}
	}
}

func TestModulesToProbe(t *testing.T) {
	for args, want := range map[string]string{
		"-q -- fs-erofs":              "fs-erofs",
		"-va bridge br_netfilter":     "bridge br_netfilter",
		"--all nf_tables ip6_tables":  "nf_tables ip6_tables",
		"-b loop max_loop=8 dry":      "loop",
		"--use-blacklist overlay arg": "overlay",
		"-q":                          "",
	} {
		if got := strings.Join(modulesToProbe(strings.Fields(args)), " "); got != want {
			t.Errorf("modprobe %s: %q, want %q", args, got, want)
		}
	}
}
