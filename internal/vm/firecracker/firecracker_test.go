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

// Forget lets go of the VMM as the end of this process would: see vmtest.
func (m *machine) Forget() {
	m.api.close()
	for _, p := range m.pipes {
		p.close()
	}
	if m.user != nil {
		_ = m.user.forget()
	}
}

func TestConformanceJailed(t *testing.T) {
	r := newRig(t, fctest.Options{})
	vmtest.Run(t, func(*testing.T) (vm.Driver, vm.Spec) { return r.driver(), r.spec() })
	r.clean()
}

func TestConformanceBare(t *testing.T) {
	r := newBareRig(t, fctest.Options{})
	vmtest.Run(t, func(*testing.T) (vm.Driver, vm.Spec) { return r.driver(), r.spec() })
	r.clean()
}
