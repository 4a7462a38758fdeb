package firecracker

import (
	"os"
	"syscall"
	"testing"

	"flint/internal/vm"
	"flint/internal/vm/firecracker/fctest"
	"flint/internal/vm/vmtest"
)

func owner(t testing.TB, path string) int {
	t.Helper()
	st, err := os.Stat(path)
	if err != nil {
		t.Fatal(err)
	}
	return int(st.Sys().(*syscall.Stat_t).Uid)
}

func TestConformanceJailed(t *testing.T) {
	r := newRig(t, fctest.Options{})
	d := r.driver()
	vmtest.Run(t, func(*testing.T) (vm.Driver, vm.Spec) { return d, r.spec() })
	r.clean()
}

func TestConformanceBare(t *testing.T) {
	r := newBareRig(t, fctest.Options{})
	d := r.driver()
	vmtest.Run(t, func(*testing.T) (vm.Driver, vm.Spec) { return d, r.spec() })
	r.clean()
}
