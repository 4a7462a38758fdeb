package main

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"
)

// The names of the drives the agent knows. Only base is needed.
const (
	driveBase    = "base"
	driveScratch = "scratch"
	driveModules = "modules"
	driveRunner  = "runner"
	driveTools   = "tools"
)

// disk is a virtio disk of the guest.
type disk struct {
	Name   string // vda
	Serial string // empty where the VMM passes none on
}

// drivesWithin bounds the wait for disks, which may be probed after their driver was loaded.
const drivesWithin = 10 * time.Second

// listDisks returns the virtio disks in the order the kernel numbered them.
func listDisks(sys string) []disk {
	dirs, _ := filepath.Glob(filepath.Join(sys, "block/vd*")) // the pattern is well formed
	var ds []disk
	for _, d := range dirs {
		serial, _ := os.ReadFile(filepath.Join(d, "serial")) // a disk without one is matched by position
		ds = append(ds, disk{filepath.Base(d), strings.TrimSpace(string(serial))})
	}
	slices.SortFunc(ds, func(a, b disk) int {
		if n := len(a.Name) - len(b.Name); n != 0 { // vdz comes before vdaa
			return n
		}
		return strings.Compare(a.Name, b.Name)
	})
	return ds
}

// matchDrives finds each named drive: by serial, or by position if the disk there has none. It returns the drives'
// devices and the names that were not found.
func matchDrives(names []string, ds []disk) (map[string]string, []string) {
	found := map[string]string{}
	var missing []string
	for i, n := range names {
		at := slices.IndexFunc(ds, func(d disk) bool { return d.Serial == n })
		if at < 0 && i < len(ds) && ds[i].Serial == "" {
			at = i
		}
		if at < 0 {
			missing = append(missing, n)
			continue
		}
		found[n] = "/dev/" + ds[at].Name
	}
	return found, missing
}

// findDrives waits until every drive the host names is there.
func findDrives(ctx context.Context, sys string, names []string) (map[string]string, error) {
	if len(names) == 0 {
		names = []string{driveBase}
	}
	ctx, cancel := context.WithTimeout(ctx, drivesWithin)
	defer cancel()
	var found map[string]string
	err := retry(ctx, func() error {
		var missing []string
		if found, missing = matchDrives(names, listDisks(sys)); len(missing) > 0 {
			return fmt.Errorf("no disk is called %s, nor stands in its place", strings.Join(missing, ", "))
		}
		return nil
	})
	if err != nil {
		return nil, fmt.Errorf("find drives: %w", err)
	}
	return found, nil
}

// retry does try until it succeeds, from every millisecond to every 50 ms, and returns its last error when ctx ends.
func retry(ctx context.Context, try func() error) error {
	wait := time.Millisecond
	for {
		err := try()
		if err == nil {
			return nil
		}
		select {
		case <-time.After(wait):
			wait = min(2*wait, 50*time.Millisecond)
		case <-ctx.Done():
			return err
		}
	}
}

// fileSystem names the file system on a device by its superblock.
func fileSystem(device string) (string, error) {
	f, err := os.Open(device)
	if err != nil {
		return "", err
	}
	defer f.Close()
	head := make([]byte, 2048)
	if _, err := f.ReadAt(head, 0); err != nil {
		return "", fmt.Errorf("read superblock: %w", err)
	}
	return superblock(head)
}

// superblock tells the file systems apart by the first 2048 bytes of a device. The magics are the kernel's, of
// include/uapi/linux/magic.h and erofs_fs.h. Where ext4 has its magic erofs has a random number.
func superblock(head []byte) (string, error) {
	switch {
	case len(head) < 2048:
		return "", errors.New("device is too small for a file system")
	case binary.LittleEndian.Uint32(head[1024:]) == 0xE0F5E1E2:
		return "erofs", nil
	case binary.LittleEndian.Uint16(head[1024+56:]) == 0xEF53:
		return "ext4", nil
	case string(head[:4]) == "hsqs":
		return "squashfs", nil
	}
	return "", errors.New("device holds neither ext4, erofs nor squashfs")
}
