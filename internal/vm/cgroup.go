package vm

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"flint"
)

// CgroupRoot returns where cgroup v2 is mounted: the first such mount of a file like /proc/self/mounts, as Firecracker's
// jailer takes it.
func CgroupRoot(mounts string) (string, error) {
	f, err := os.Open(mounts)
	if err != nil {
		return "", fmt.Errorf("look for cgroups: %w", err)
	}
	defer f.Close()
	lines := bufio.NewScanner(f)
	for lines.Scan() {
		if fields := strings.Fields(lines.Text()); len(fields) > 2 && fields[2] == "cgroup2" {
			return fields[1], nil
		}
	}
	if err := lines.Err(); err != nil {
		return "", fmt.Errorf("look for cgroups: %w", err)
	}
	return "", errors.New("cgroup v2 is not mounted")
}

// SetCgroup writes a setting of a cgroup, whose directory dir is.
func SetCgroup(dir, file, value string) error {
	if err := os.WriteFile(filepath.Join(dir, file), []byte(value), 0o644); err != nil {
		return fmt.Errorf("set %s to %s: %w", file, value, err)
	}
	return nil
}

// CgroupUsage is what a cgroup knows of its VM: the most memory it had at once, the page cache of its disks included (0 if
// it cannot be told), and whether the kernel killed anything in it for memory.
func CgroupUsage(dir string) (peak flint.Bytes, oom bool) {
	if b, err := os.ReadFile(filepath.Join(dir, "memory.peak")); err == nil { // since Linux 5.19
		n, _ := strconv.ParseInt(strings.TrimSpace(string(b)), 10, 64)
		peak = flint.Bytes(n)
	}
	b, _ := os.ReadFile(filepath.Join(dir, "memory.events"))
	for line := range strings.Lines(string(b)) {
		if f := strings.Fields(line); len(f) == 2 && f[0] == "oom_kill" && f[1] != "0" {
			oom = true
		}
	}
	return peak, oom
}

// removeCgroupWithin is how long the kernel may take to notice that a group is empty.
const removeCgroupWithin = 5 * time.Second

// RemoveCgroup ends what is left in a cgroup, and removes it by means of remove, which is os.Remove outside of tests. It is no
// error when there is none.
func RemoveCgroup(ctx context.Context, dir string, remove func(dir string) error) error {
	ctx, cancel := context.WithTimeout(ctx, removeCgroupWithin)
	defer cancel()
	_ = os.WriteFile(filepath.Join(dir, "cgroup.kill"), []byte("1"), 0) // since Linux 5.14; nobody should be there
	for wait := time.Millisecond; ; wait *= 2 {
		err := remove(dir)
		if err == nil || errors.Is(err, fs.ErrNotExist) {
			return nil
		}
		if !errors.Is(err, unix.EBUSY) {
			return fmt.Errorf("remove cgroup: %w", err)
		}
		select {
		case <-time.After(wait):
		case <-ctx.Done():
			return fmt.Errorf("remove cgroup: %w", err)
		}
	}
}
