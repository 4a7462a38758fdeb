//go:build !amd64

package qemu

// hostTSC returns 0: there is no time stamp counter to tell a guest of.
func hostTSC() uint64 { return 0 }
