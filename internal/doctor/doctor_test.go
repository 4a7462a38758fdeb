package doctor

import (
	"bytes"
	"context"
	"debug/elf"
	"encoding/binary"
	"encoding/json"
	"errors"
	"io/fs"
	"os"
	"os/exec"
	"slices"
	"strings"
	"syscall"
	"testing"
	"testing/fstest"

	"flint"
	"flint/internal/vm"
)

// host is a machine made for a test.
type host struct {
	Config
	files       fstest.MapFS
	arch        string
	user        int
	kvm         vm.KVMStatus
	free        flint.Bytes
	programs    map[string]string // name → path
	versions    map[string]string // path → what it says
	links       map[string]string // symbolic link → target
	askedToSay  []string          // whose version was asked
	spaceFailed error
}

func (h *host) system() System {
	return System{
		Files: h.files, Arch: h.arch, User: h.user,
		Real: func(p string) (string, error) {
			if to, ok := h.links[p]; ok {
				return to, nil
			}
			return p, nil
		},
		Space: func(string) (flint.Bytes, flint.Bytes, error) { return h.free, 500 * flint.GiB, h.spaceFailed },
		LookPath: func(name string) (string, error) {
			if p, ok := h.programs[name]; ok {
				return p, nil
			}
			return "", &exec.Error{Name: name, Err: exec.ErrNotFound}
		},
		Version: func(_ context.Context, p string) (string, error) {
			h.askedToSay = append(h.askedToSay, p)
			if v, ok := h.versions[p]; ok {
				return v, nil
			}
			return "", errors.New("exec format error")
		},
		KVM: func(context.Context) vm.KVMStatus { return h.kvm },
	}
}

func (h *host) write(path, text string) { h.files[below(path)] = &fstest.MapFile{Data: []byte(text)} }

func (h *host) remove(path string) {
	prefix := below(path)
	for name := range h.files {
		if name == prefix || strings.HasPrefix(name, prefix+"/") {
			delete(h.files, name)
		}
	}
}

// program puts an executable there.
func (h *host) program(path, version string, static bool) {
	h.files[below(path)] = &fstest.MapFile{Data: executable(static), Mode: 0o755}
	h.versions[path] = version
}

// executable is the least that debug/elf takes for a program.
func executable(static bool) []byte {
	var b bytes.Buffer
	kind := elf.PT_INTERP
	if static {
		kind = elf.PT_LOAD
	}
	ident := [elf.EI_NIDENT]byte{0x7f, 'E', 'L', 'F', byte(elf.ELFCLASS64), byte(elf.ELFDATA2LSB), byte(elf.EV_CURRENT)}
	_ = binary.Write(&b, binary.LittleEndian, elf.Header64{
		Ident: ident, Type: uint16(elf.ET_EXEC), Machine: uint16(elf.EM_X86_64), Version: uint32(elf.EV_CURRENT),
		Phoff: 64, Ehsize: 64, Phentsize: 56, Phnum: 1,
	})
	_ = binary.Write(&b, binary.LittleEndian, elf.Prog64{Type: uint32(kind), Off: 0, Filesz: 64})
	return b.Bytes()
}

// healthy is a machine as the production guide wants it, with Firecracker.
func healthy() *host {
	h := &host{
		Config: Config{
			StateDir: "/var/lib/flint", Driver: "auto", Accel: "auto", ChrootBase: "/var/lib/flint/jail",
			UIDFirst: 1_900_000_000, UIDCount: 1000, ParentCgroup: "flint",
			Memory: 57 * flint.GiB, QEMUOverhead: flint.Overhead{Fixed: 208 * flint.MiB}, FirecrackerOverhead: flint.Overhead{Share: 256}, IPv6: true,
			Kernel:  Kernel{Version: "6.1.0-40-cloud-amd64", Work: []Work{{Name: "boot"}, {Name: "docker"}}},
			Runners: []Software{fresh()},
			Pools:   []flint.Pool{{Name: "big", Max: 4, Shape: flint.Shape{CPUs: 4, Memory: 8 * flint.GiB, Disk: 40 * flint.GiB}}},
		},
		files: fstest.MapFS{}, arch: "amd64", kvm: vm.KVMStatus{State: vm.KVMWorks}, free: 300 * flint.GiB,
		programs: map[string]string{
			"firecracker": "/usr/local/bin/firecracker", "jailer": "/usr/local/bin/jailer", "depmod": "/usr/sbin/depmod",
			"podman": "/usr/bin/podman", "qemu-system-x86_64": "/usr/bin/qemu-system-x86_64",
		},
		versions: map[string]string{},
		links:    map[string]string{},
	}
	h.program("/usr/local/bin/firecracker", "Firecracker v1.16.1\n\nSupported snapshot data format versions: 9.0.0\n", true)
	h.program("/usr/local/bin/jailer", "Jailer v1.16.1\n", true)
	h.program("/usr/bin/qemu-system-x86_64", "QEMU emulator version 7.2.22 (Debian 1:7.2+dfsg-7+deb12u18)\n", false)
	for _, device := range []string{"dev/kvm", "dev/net/tun"} {
		h.files[device] = &fstest.MapFile{Mode: fs.ModeDevice | fs.ModeCharDevice | 0o660}
	}
	h.files["var/lib/flint"] = &fstest.MapFile{Mode: fs.ModeDir | 0o755}
	for path, text := range map[string]string{
		"/proc/cpuinfo":                          "processor\t: 0\nflags\t\t: fpu vme de vmx sse2\n",
		"/proc/cmdline":                          "BOOT_IMAGE=/vmlinuz root=/dev/sda1 ro quiet\n",
		"/proc/swaps":                            "Filename\t\t\t\tType\t\tSize\t\tUsed\t\tPriority\n",
		"/proc/sys/kernel/osrelease":             "6.1.0-40-amd64\n",
		"/proc/sys/kernel/printk":                "4\t4\t1\t7\n",
		"/proc/sys/kernel/seccomp/actions_avail": "kill_process kill_thread trap errno user_notif trace log allow\n",
		"/proc/consoles":                         "ttyS0                -W- (EC   a)    4:64\ntty0                 -WU (E    p  )    4:1\n",
		"/proc/meminfo":                          "MemTotal:       66000000 kB\nMemFree:        60000000 kB\n",
		"/proc/self/limits":                      "Limit                     Soft Limit           Hard Limit           Units     \nMax open files            1024                 1048576              files     \n",
		"/proc/self/mounts":                      "cgroup2 /sys/fs/cgroup cgroup2 rw,nosuid,nodev,noexec,relatime 0 0\n",
		"/proc/self/mountinfo":                   mountinfo,
		"/proc/net/route":                        route4,
		"/proc/net/ipv6_route":                   route6,
		"/proc/sys/net/ipv4/ip_forward":          "0\n",
		"/proc/1/status":                         "Name:\tsystemd\nState:\tS (sleeping)\nUid:\t0\t0\t0\t0\n",

		"/proc/sys/net/ipv6/conf/all/disable_ipv6":           "0\n",
		"/sys/devices/system/cpu/smt/control":                "forceoff\n",
		"/sys/devices/system/cpu/smt/active":                 "0\n",
		"/sys/kernel/mm/ksm/run":                             "0\n",
		"/sys/devices/system/cpu/vulnerabilities/mds":        "Mitigation: Clear CPU buffers; SMT disabled\n",
		"/sys/devices/system/cpu/vulnerabilities/meltdown":   "Not affected\n",
		"/sys/devices/system/cpu/vulnerabilities/spectre_v2": "Mitigation: Enhanced / Automatic IBRS; IBPB: conditional; RSB filling; PBRSB-eIBRS: SW sequence; BHI: BHI_DIS_S\n",
		"/sys/fs/cgroup/cgroup.controllers":                  "cpuset cpu io memory hugetlb pids rdma misc\n",
		"/sys/fs/cgroup/cgroup.procs":                        "2\n3\n4\n",
		"/etc/passwd":                                        "root:x:0:0:root:/root:/bin/bash\nnobody:x:65534:65534::/:/usr/sbin/nologin\nmalformed\n",
		"/etc/group":                                         "root:x:0:\nkvm:x:104:\n",
		"/etc/subuid":                                        "admin:100000:65536\n",
		"/etc/subgid":                                        "admin:100000:65536\n",
		"/etc/resolv.conf":                                   "# made by hand\nnameserver 192.0.2.53\nnameserver 2001:db8::53\n",
	} {
		h.write(path, text)
	}
	return h
}

const mountinfo = `22 28 0:21 / /proc rw,nosuid,nodev,noexec,relatime shared:5 - proc proc rw
23 28 0:22 / /sys rw,nosuid,nodev,noexec,relatime shared:6 - sysfs sysfs rw
28 1 8:1 / / rw,relatime shared:1 - ext4 /dev/sda1 rw,errors=remount-ro
40 28 0:35 / /tmp rw,nosuid,nodev,noexec shared:20 - tmpfs tmpfs rw,size=1024k
41 28 8:17 / /srv/big\040disk rw,relatime shared:21 - xfs /dev/sdb1 rw
42 28 0:50 / /mnt/nas rw,relatime shared:22 - nfs4 nas:/export rw,vers=4.2
43 28 8:33 / /mnt/nodev rw,nodev,relatime - ext4 /dev/sdc1 rw
44 28 8:49 / /mnt/readonly ro,relatime - ext4 /dev/sdd1 ro
`

const (
	route4 = "Iface\tDestination\tGateway \tFlags\tRefCnt\tUse\tMetric\tMask\t\tMTU\tWindow\tIRTT\n" +
		"eth0\t00000000\t010200C0\t0003\t0\t0\t0\t00000000\t0\t0\t0\n" +
		"eth0\t000200C0\t00000000\t0001\t0\t0\t0\t00FFFFFF\t0\t0\t0\n"
	route6 = "20010db8000000000000000000000000 40 00000000000000000000000000000000 00 00000000000000000000000000000000 00000100 00000001 00000000 00000001     eth0\n" +
		"00000000000000000000000000000000 00 00000000000000000000000000000000 00 20010db8000000000000000000000001 00000400 00000001 00000000 00000003     eth0\n" +
		"00000000000000000000000000000000 00 00000000000000000000000000000000 00 00000000000000000000000000000000 ffffffff 00000001 00000000 00200200       lo\n"
)

// examineHost runs all checks and returns them by id.
func examineHost(t *testing.T, h *host) map[string]Finding {
	t.Helper()
	found, err := Run(t.Context(), h.Config, h.system())
	if err != nil {
		t.Fatal(err)
	}
	byID := map[string]Finding{}
	for _, f := range found {
		byID[f.ID] = f
	}
	wellFormed(t, found)
	return byID
}

// wellFormed checks what every list of findings keeps.
func wellFormed(t *testing.T, found []Finding) {
	t.Helper()
	var ids []string
	for _, f := range found {
		ids = append(ids, f.ID)
		switch f.Verdict {
		case Pass, Skip:
			if f.Fix != "" {
				t.Errorf("%s: %s with a fix: %q", f.ID, f.Verdict, f.Fix)
			}
		case Warn, Fail:
			if f.Fix == "" {
				t.Errorf("%s: %s without a fix", f.ID, f.Verdict)
			}
		default:
			t.Errorf("%s: verdict %q", f.ID, f.Verdict)
		}
		if f.Text == "" {
			t.Errorf("%s says nothing", f.ID)
		}
	}
	if !slices.Equal(ids, IDs()) {
		t.Errorf("ids %v, want each of %v once and in order", ids, IDs())
	}
}

func TestAHealthyMachinePasses(t *testing.T) {
	for id, f := range examineHost(t, healthy()) {
		if want := map[string]Verdict{"qemu.binary": Skip}[id]; f.Verdict != Pass && f.Verdict != want {
			t.Errorf("%s: %s %s", id, f.Verdict, f.Text)
		}
	}
}

func TestRunEndsWithItsContext(t *testing.T) {
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := Run(ctx, healthy().Config, healthy().system()); !errors.Is(err, context.Canceled) {
		t.Errorf("err %v, want the context's", err)
	}
}

func TestFailed(t *testing.T) {
	if Failed([]Finding{{Verdict: Pass}, {Verdict: Warn}, {Verdict: Skip}}) {
		t.Error("warnings count as failures")
	}
	if !Failed([]Finding{{Verdict: Pass}, {Verdict: Fail}}) {
		t.Error("a failure is overlooked")
	}
}

func TestJSONIsStable(t *testing.T) {
	b, err := json.Marshal([]Finding{{ID: "smt", Verdict: Warn, Text: "on", Fix: "turn it off"}, {ID: "ksm", Verdict: Pass, Text: "off"}})
	want := `[{"id":"smt","verdict":"WARN","text":"on","fix":"turn it off"},{"id":"ksm","verdict":"PASS","text":"off","fix":""}]`
	if err != nil || string(b) != want {
		t.Errorf("%s, %v; want %s", b, err, want)
	}
}

// TestThisMachineIsNotChanged runs the real checks. What they say depends on the machine.
func TestThisMachineIsNotChanged(t *testing.T) {
	state := t.TempDir()
	c := healthy().Config
	c.StateDir, c.ChrootBase = state+"/flint", state+"/flint/jail"
	before := snapshot(t, state)
	for _, driver := range []string{"auto", "qemu", "firecracker"} {
		c.Driver = driver
		found, err := Run(t.Context(), c, Here())
		if err != nil {
			t.Fatal(err)
		}
		wellFormed(t, found)
	}
	if after := snapshot(t, state); !slices.Equal(after, before) {
		t.Errorf("before:\n%s\nafter:\n%s", strings.Join(before, "\n"), strings.Join(after, "\n"))
	}
}

// snapshot is some of what checks look at and could change.
func snapshot(t *testing.T, dirs ...string) []string {
	t.Helper()
	var all []string
	for _, file := range []string{
		"/proc/sys/net/ipv4/ip_forward", "/proc/sys/net/ipv6/conf/all/forwarding", "/proc/sys/kernel/printk", "/proc/swaps",
		"/sys/kernel/mm/ksm/run", "/sys/devices/system/cpu/smt/control", "/etc/resolv.conf", "/proc/self/mounts",
	} {
		b, err := os.ReadFile(file)
		all = append(all, file+" "+string(b), "missing: "+boolText(err != nil))
	}
	var limit syscall.Rlimit
	if err := syscall.Getrlimit(syscall.RLIMIT_NOFILE, &limit); err != nil {
		t.Fatal(err)
	}
	if cgroups, _, ok := (&exam{System: Here()}).findCgroups(); ok {
		dirs = append(dirs, cgroups)
	}
	for _, dir := range append(dirs, "/var/lib", "/run", "/dev") {
		entries, _ := os.ReadDir(dir)
		for _, e := range entries {
			// Other programs on this machine come and go; what is ours would say so.
			if dir == dirs[0] || strings.Contains(e.Name(), "flint") && dir != "/run" {
				all = append(all, dir+"/"+e.Name())
			}
		}
	}
	return all
}

func boolText(b bool) string {
	if b {
		return "yes"
	}
	return "no"
}

func FuzzFiles(f *testing.F) {
	f.Add(mountinfo)
	f.Add(route4 + route6)
	f.Add("a:b:1900000001:7\nUid:\t1900000001\nName:\n")
	f.Add("Filename\n/dev/dm-0 partition 1 0 -2\nflags : svm\nMax open files 1 2 files\nMemTotal: 99999999999999999999 kB\n")
	f.Add("cgroup2 \\040\\777 cgroup2 rw\n- - - - - - -\n\\0 \\")
	f.Fuzz(func(t *testing.T, text string) {
		h := healthy()
		for name, file := range h.files {
			if file.Mode.IsRegular() && !strings.HasPrefix(name, "usr/") {
				h.write(name, text)
			}
		}
		for path := range h.versions {
			h.versions[path] = text
		}
		examineHost(t, h)
	})
}
