package host

import (
	"runtime"

	"golang.org/x/sys/unix"

	"flint"
)

// LimitsOf returns what all VMs together may have. What is not asked for (0) is twice this machine's processors, and nine tenths of
// its memory.
func LimitsOf(asked flint.Shape) flint.Shape {
	if asked.CPUs == 0 {
		asked.CPUs = 2 * runtime.NumCPU()
	}
	if asked.Memory == 0 {
		var info unix.Sysinfo_t
		if err := unix.Sysinfo(&info); err == nil {
			asked.Memory = flint.Bytes(uint64(info.Totalram)*uint64(info.Unit)) / 10 * 9
		}
	}
	return asked
}

// SetLimits changes what all VMs together may have, from the next admission on. Those that live stay, even beyond it.
func (h *Host) SetLimits(s flint.Shape) {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.c.Limits = s
}
