package qemu

import (
	"os"
	"path/filepath"
	"strconv"
	"testing"
)

// TestMainThreadStays boots a few QEMUs and looks whether one of them took the program's main thread along into its
// namespaces. That thread cannot be thrown away: /proc/self would speak of the QEMU's namespaces for ever.
func TestMainThreadStays(t *testing.T) {
	look := func(name string) string {
		link, err := os.Readlink("/proc/self/ns/" + name)
		if err != nil {
			t.Fatal(err)
		}
		return link
	}
	mnt, net := look("mnt"), look("net")
	d, s := fakeDriver(t, "reports")
	if !d.isolate {
		t.Skip("needs root: QEMU has no namespaces of its own")
	}
	nic := testNIC(t)
	for i := range 20 {
		s.NIC = nic
		s.Dir = filepath.Join(t.TempDir(), strconv.Itoa(i))
		if err := os.Mkdir(s.Dir, 0o700); err != nil {
			t.Fatal(err)
		}
		m, err := d.Boot(patiently(t), s)
		if err != nil {
			t.Fatal(err)
		}
		if err := m.Close(t.Context()); err != nil {
			t.Fatal(err)
		}
		if look("mnt") != mnt || look("net") != net {
			t.Fatalf("after boot %d the main thread is in %s and %s, was in %s and %s", i+1, look("mnt"), look("net"), mnt, net)
		}
	}
}
