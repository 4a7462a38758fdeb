package network

import (
	"fmt"
	"os"

	"golang.org/x/sys/unix"
)

const tunDevice = "/dev/net/tun"

// createTap makes a persistent tap in the calling thread's network namespace and returns its queue. The flags are those
// QEMU and Firecracker ask for; the header lets checksums and segmentation be left to whoever is last.
func createTap(name string) (*os.File, error) {
	fd, err := unix.Open(tunDevice, unix.O_RDWR|unix.O_CLOEXEC|unix.O_NONBLOCK, 0)
	if err != nil {
		return nil, missingModule("open "+tunDevice, "tun", err)
	}
	if err := setupTap(fd, name); err != nil {
		unix.Close(fd)
		return nil, err
	}
	// Only now, because a queue that is attached to no tap polls as broken.
	return os.NewFile(uintptr(fd), tunDevice), nil
}

func setupTap(fd int, name string) error {
	req, err := unix.NewIfreq(name)
	if err != nil {
		return fmt.Errorf("name tap: %w", err)
	}
	req.SetUint16(unix.IFF_TAP | unix.IFF_NO_PI | unix.IFF_VNET_HDR)
	if err := unix.IoctlIfreq(fd, unix.TUNSETIFF, req); err != nil {
		return fmt.Errorf("create tap: %w", err)
	}
	if err := unix.IoctlSetInt(fd, unix.TUNSETPERSIST, 1); err != nil {
		return fmt.Errorf("make tap persistent: %w", err)
	}
	return nil
}
