package rootfstest

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// Fsck fails the test unless e2fsck, or fsck.erofs where the path ends so, finds nothing at all to say against the file system.
func Fsck(t testing.TB, path string) {
	t.Helper()
	if filepath.Ext(path) == ".erofs" {
		if tool, err := exec.LookPath("fsck.erofs"); err != nil {
			t.Log("not checked: fsck.erofs is missing (sudo apt-get install erofs-utils)")
		} else if out, err := exec.Command(tool, "--extract", path).CombinedOutput(); err != nil {
			t.Fatalf("fsck.erofs: %v\n%s", err, out)
		}
		return
	}
	tool, err := exec.LookPath("e2fsck")
	if err != nil { // also where a test has put a PATH of its own
		tool, err = exec.LookPath("/usr/sbin/e2fsck")
	}
	if err != nil {
		t.Skip("needs e2fsck: sudo apt-get install e2fsprogs")
	}
	if out, err := exec.Command(tool, "-fn", path).CombinedOutput(); err != nil {
		t.Fatalf("e2fsck -fn: %v\n%s", err, out)
	}
}

// Mount mounts a file on a directory for the length of the test and returns the directory and how to unmount early.
func Mount(t testing.TB, path, options string) (dir string, unmount func()) {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("needs root: mounts a file system")
	}
	dir = t.TempDir()
	format := "ext4"
	if filepath.Ext(path) == ".erofs" {
		format = "erofs"
		if b, err := os.ReadFile("/proc/filesystems"); err == nil && !strings.Contains(string(b), "erofs") && exec.Command("modprobe", "erofs").Run() != nil {
			t.Skip("needs a kernel with erofs")
		}
	}
	out, err := exec.Command("mount", "-t", format, "-o", "loop,"+options, path, dir).CombinedOutput()
	// Whoever else takes the same free loop device was quicker, or the device of an earlier mount of the same file is still mounted
	// in a mount namespace that was made meanwhile, by a VMM's jail of another test, say, until that is gone.
	for range 600 {
		if err == nil || !strings.Contains(string(out), "already mounted or mount point busy") {
			break
		}
		<-time.After(100 * time.Millisecond)
		out, err = exec.Command("mount", "-t", format, "-o", "loop,"+options, path, dir).CombinedOutput()
	}
	if err != nil {
		if _, err := os.Stat("/dev/loop-control"); err != nil {
			t.Skip("needs loop devices: /dev/loop-control is missing")
		}
		t.Fatalf("mount: %v\n%s", err, out)
	}
	unmount = sync.OnceFunc(func() {
		if out, err := exec.Command("umount", dir).CombinedOutput(); err != nil {
			t.Errorf("umount: %v\n%s", err, out)
		}
	})
	t.Cleanup(unmount)
	return dir, unmount
}

// Attributes lists a file's extended attributes, but not those by which overlay keeps its books.
func Attributes(t testing.TB, path string) string {
	t.Helper()
	names := make([]byte, 4096)
	n, err := unix.Llistxattr(path, names)
	if err != nil {
		t.Fatalf("%s: %v", path, err)
	}
	var list []string
	for name := range strings.SplitSeq(strings.TrimRight(string(names[:n]), "\x00"), "\x00") {
		if name == "" || strings.HasPrefix(name, "trusted.overlay.") {
			continue
		}
		value := make([]byte, 4096)
		n, err := unix.Lgetxattr(path, name, value)
		if err != nil {
			t.Fatalf("%s: %s: %v", path, name, err)
		}
		list = append(list, fmt.Sprintf(" %s=%x", name, value[:n]))
	}
	slices.Sort(list)
	return strings.Join(list, "")
}
