package host

import "flint"

// SetLimits changes what all VMs together may have, from the next admission on. Those that live stay, even beyond it.
func (h *Host) SetLimits(s flint.Shape) {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.c.Limits = s
}
