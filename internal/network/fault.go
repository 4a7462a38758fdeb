package network

import (
	"errors"
	"fmt"
	"os"
	"strings"

	"golang.org/x/sys/unix"

	"flint"
)

// missingModule turns the kernel's "I know no such thing" into a fault that names the module, and wraps everything else.
func missingModule(what, module string, err error) error {
	if errors.Is(err, unix.EOPNOTSUPP) || errors.Is(err, unix.EPROTONOSUPPORT) || errors.Is(err, unix.EAFNOSUPPORT) || errors.Is(err, unix.ENODEV) {
		return &flint.Fault{
			Code: "network.module", What: what, Err: fmt.Errorf("the kernel has no %s: %w", module, err),
			Fix: "load the kernel module: modprobe " + module,
		}
	}
	return fmt.Errorf("%s: %w", what, err)
}

// permission makes a fault of the kernel's refusal; other errors pass as they are.
func permission(what string, err error) error {
	var f *flint.Fault
	if !errors.Is(err, os.ErrPermission) || errors.As(err, &f) {
		return err
	}
	return &flint.Fault{
		Code: "network.permission", What: what, Kind: flint.ErrPermission, Err: err,
		Fix: "run flint as root (sudo flint …), or give its service " + strings.Join(capNames(neededCaps()), ", "),
	}
}

// capability is a Linux capability (linux/capability.h) with its name.
type capability struct {
	bit  uint
	name string
}

// neededCaps: links and nftables; namespaces; DNS on port 53.
func neededCaps() []capability {
	return []capability{
		{unix.CAP_NET_ADMIN, "CAP_NET_ADMIN"},
		{unix.CAP_SYS_ADMIN, "CAP_SYS_ADMIN"},
		{unix.CAP_NET_BIND_SERVICE, "CAP_NET_BIND_SERVICE"},
	}
}

func capNames(cs []capability) []string {
	var names []string
	for _, c := range cs {
		names = append(names, c.name)
	}
	return names
}

// checkCapabilities reports the needed capabilities this process does not have.
func checkCapabilities() error {
	var missing []capability
	for _, c := range neededCaps() {
		if !hasCapability(c.bit) {
			missing = append(missing, c)
		}
	}
	if len(missing) == 0 {
		return nil
	}
	return permission("make networks for guests", fmt.Errorf("this process lacks %s: %w", strings.Join(capNames(missing), ", "), unix.EPERM))
}

// hasCapability reports whether the calling thread has a capability. One that cannot be looked up is taken for had: what
// needs it will tell.
func hasCapability(bit uint) bool {
	hdr := unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}
	var data [2]unix.CapUserData
	if err := unix.Capget(&hdr, &data[0]); err != nil {
		return true
	}
	return data[bit/32].Effective&(1<<(bit%32)) != 0
}
