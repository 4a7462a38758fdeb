//go:build !linux || !amd64

package vm

import (
	"context"
	"errors"
	"io/fs"
	"os"
)

// ProbeKVM tells whether /dev/kvm can be opened. On this architecture it does not run a guest to see whether it works.
func ProbeKVM(context.Context) KVMStatus {
	f, err := os.OpenFile(kvmDevice, os.O_RDWR, 0)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return KVMStatus{State: KVMAbsent}
	case errors.Is(err, fs.ErrPermission):
		return KVMStatus{KVMNoPermission, err.Error()}
	case err != nil:
		return KVMStatus{KVMBroken, err.Error()}
	}
	f.Close()
	return KVMStatus{State: KVMWorks}
}
