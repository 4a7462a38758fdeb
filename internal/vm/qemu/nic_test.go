package qemu

import (
	"net"
	"os"
	"slices"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"flint/internal/vm"
)

// testNIC makes a network namespace that holds a tap and nothing else. Both are gone when their descriptors are.
func testNIC(t *testing.T) *vm.NIC {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("needs root: a network namespace and a tap")
	}
	var m struct{ ns, tap *os.File }
	err := vm.Apart(func() (err error) {
		if err = unix.Unshare(unix.CLONE_NEWNET); err != nil {
			return err
		}
		if m.ns, err = os.Open("/proc/thread-self/ns/net"); err != nil {
			return err
		}
		if m.tap, err = os.OpenFile("/dev/net/tun", os.O_RDWR, 0); err != nil {
			return err
		}
		req, err := unix.NewIfreq("tap0")
		if err != nil {
			return err
		}
		req.SetUint16(unix.IFF_TAP | unix.IFF_NO_PI | unix.IFF_VNET_HDR)
		return unix.IoctlIfreq(int(m.tap.Fd()), unix.TUNSETIFF, req)
	})
	t.Cleanup(func() {
		m.ns.Close()
		m.tap.Close()
	})
	if err != nil {
		t.Skipf("needs network namespaces and taps: %v", err)
	}
	return &vm.NIC{Tap: m.tap, Name: "tap0", Namespace: m.ns, MAC: net.HardwareAddr{2, 0xf1, 0, 0, 0, 7}, MTU: 1400}
}

func TestNIC(t *testing.T) {
	d, s := fakeDriver(t, "reports")
	s.NIC = testNIC(t)
	m, err := d.Boot(patiently(t), s)
	if err != nil {
		t.Fatal(err)
	}
	defer m.Close(t.Context())
	r := readReport(t, m)
	slices.Sort(r.Interfaces)
	if !slices.Equal(r.Interfaces, []string{"lo", "tap0"}) || r.Tap != "tap0" {
		t.Errorf("sees interfaces %q and was given tap %q", r.Interfaces, r.Tap)
	}
	if !strings.Contains(r.Device, "mac=02:f1:00:00:00:07") || !strings.Contains(r.Device, "host_mtu=1400") {
		t.Errorf("network device %q", r.Device)
	}
	if _, err := s.NIC.Tap.Stat(); err != nil {
		t.Errorf("the caller's tap after Boot: %v", err)
	}
	s.NIC.Tap = nil
	s.Dir = t.TempDir()
	if _, err := d.Boot(t.Context(), s); err == nil || !strings.Contains(err.Error(), "tap") {
		t.Errorf("no tap: %v", err)
	}
	empty(t, s.Dir)
}

// TestRealNIC boots a real guest with a network interface and asks it what it sees.
func TestRealNIC(t *testing.T) {
	dir := assets(t)
	s := realSpec(t, dir, "nic")
	s.CPUs = 2
	s.NIC = testNIC(t)
	d := driver(t)
	m, err := d.Boot(patiently(t), s)
	if err != nil {
		t.Fatal(err)
	}
	defer m.Close(t.Context())
	if out, want := output(t, m, "uname", "-m"), map[string]string{"amd64": "x86_64\n", "arm64": "aarch64\n"}[d.target.arch]; out != want {
		t.Errorf("the guest's architecture is %q, want %q", out, want)
	}
	if out := output(t, m, "cat", "/sys/class/net/eth0/address", "/sys/class/net/eth0/mtu"); out != "02:f1:00:00:00:07\n1400\n" {
		t.Errorf("the guest's interface is %q", out)
	}
	if out := output(t, m, "nproc"); out != "2\n" {
		t.Errorf("the guest's processors are %q", out)
	}
	if out := output(t, m, "sh", "-c", "cat /sys/block/vd*/serial"); out != "basescratch" {
		t.Errorf("the guest's drives are %q", out)
	}
}
