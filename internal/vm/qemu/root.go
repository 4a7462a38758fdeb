package qemu

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"golang.org/x/sys/unix"
)

// Where the private root has the guest's kernel and initramfs.
const (
	rootKernel = "/kernel"
	rootInitrd = "/initrd"

	// rootAt is where it is built, unseen by everybody else: a directory every host has, and no file we need is in.
	rootAt = "/proc"

	kvmDevice = "/dev/kvm"
)

// privateRoot is the file system a QEMU sees: read-only, with the system's programs and libraries, QEMU's own where it
// is installed elsewhere, the guest's kernel and initramfs, /dev/kvm where it is used, and nothing else: no /proc, /sys,
// /home, /etc, /var, /run.
type privateRoot struct {
	trees   []string          // directories of the host, at the same place
	links   map[string]string // symbolic links of the host
	files   map[string]string // inside → outside
	program string            // a program of the host, at the same place; empty: it is in a tree
	kvm     uint64            // device number of /dev/kvm, which gets a node that belongs to uid; 0: none
	uid     uint32
}

// privateRoot plans the root for a QEMU.
func (d *Driver) privateRoot(kernel, initrd string) (*privateRoot, error) {
	r := &privateRoot{links: map[string]string{}, files: map[string]string{rootKernel: kernel, rootInitrd: initrd}, uid: d.uid}
	if d.accel == KVM {
		var st unix.Stat_t
		if err := unix.Stat(kvmDevice, &st); err != nil {
			return nil, fmt.Errorf("look at %s: %w", kvmDevice, err)
		}
		r.kvm = st.Rdev
	}
	if _, err := os.Stat("/etc/ld.so.cache"); err == nil {
		r.files["/etc/ld.so.cache"] = "/etc/ld.so.cache"
	}
	for _, dir := range append([]string{"/usr", "/lib", "/lib32", "/lib64", "/libx32"}, installation(d.binary)...) {
		if err := r.add(dir); err != nil {
			return nil, err
		}
	}
	if !r.holds(d.binary) {
		r.program = d.binary
	}
	return r, nil
}

// installation returns the directories that belong to a program, where they are not the system's: the one it is in, and
// if that is a bin, those for libraries and data beside it. Stores of packages are taken whole, as /usr is, because what
// is in them refers to each other.
func installation(binary string) []string {
	for _, store := range []string{"/nix/store", "/gnu/store"} {
		if strings.HasPrefix(binary, store+"/") {
			return []string{store}
		}
	}
	dir := filepath.Dir(binary)
	if dir == "/" {
		return nil
	}
	if filepath.Base(dir) != "bin" {
		return []string{dir}
	}
	prefix := filepath.Dir(dir)
	return []string{dir, filepath.Join(prefix, "lib"), filepath.Join(prefix, "lib64"), filepath.Join(prefix, "share")}
}

// add plans a directory or a link of the host, if there is one and the root does not hold it yet.
func (r *privateRoot) add(dir string) error {
	st, err := os.Lstat(dir)
	switch {
	case errors.Is(err, fs.ErrNotExist) || r.holds(dir):
		return nil
	case err != nil:
		return err
	case st.Mode()&fs.ModeSymlink != 0:
		r.links[dir], err = os.Readlink(dir)
		return err
	case st.IsDir():
		r.trees = append(r.trees, dir)
	}
	return nil
}

// holds reports whether a path is in one of the trees.
func (r *privateRoot) holds(path string) bool {
	return slices.ContainsFunc(r.trees, func(tree string) bool { return path == tree || strings.HasPrefix(path, tree+"/") })
}

// enter moves the calling thread into the root, in a mount namespace of its own. The thread must be thrown away.
func (r *privateRoot) enter() error {
	if err := unix.Unshare(unix.CLONE_NEWNS); err != nil {
		return fmt.Errorf("make mount namespace: %w", err)
	}
	if err := unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, ""); err != nil {
		return fmt.Errorf("keep mounts private: %w", err)
	}
	unix.Umask(0o022) // of this thread, and then of QEMU: directories made below are there for its user
	const flags = unix.MS_NOSUID | unix.MS_NODEV
	if err := unix.Mount("flint", rootAt, "tmpfs", flags|unix.MS_NOEXEC, "mode=0755,size=64k,nr_inodes=64"); err != nil {
		return fmt.Errorf("mount root: %w", err)
	}
	for link, target := range r.links {
		if err := os.MkdirAll(rootAt+filepath.Dir(link), 0o755); err != nil {
			return err
		}
		if err := os.Symlink(target, rootAt+link); err != nil {
			return err
		}
	}
	for _, tree := range r.trees {
		if err := os.MkdirAll(rootAt+tree, 0o755); err != nil {
			return err
		}
		if err := bind(tree, rootAt+tree, flags); err != nil {
			return err
		}
	}
	for inside, outside := range r.files {
		if err := r.file(inside, outside, flags|unix.MS_NOEXEC); err != nil {
			return err
		}
	}
	if r.program != "" {
		if err := r.file(r.program, r.program, flags); err != nil {
			return err
		}
	}
	if r.kvm != 0 {
		if err := r.device(); err != nil {
			return err
		}
	}
	if err := unix.Mount("", rootAt, "", unix.MS_REMOUNT|unix.MS_BIND|unix.MS_RDONLY|unix.MS_NOEXEC|flags, ""); err != nil {
		return fmt.Errorf("make root read-only: %w", err)
	}
	if err := unix.Chdir(rootAt); err != nil {
		return fmt.Errorf("enter root: %w", err)
	}
	// The old root ends up on top of the new one, where it can be taken off without a directory to hold it.
	if err := unix.PivotRoot(".", "."); err != nil {
		return fmt.Errorf("change root: %w", err)
	}
	if err := unix.Unmount(".", unix.MNT_DETACH); err != nil {
		return fmt.Errorf("leave old root: %w", err)
	}
	return unix.Chdir("/")
}

func (r *privateRoot) file(inside, outside string, flags uintptr) error {
	at := rootAt + inside
	if err := os.MkdirAll(filepath.Dir(at), 0o755); err != nil {
		return err
	}
	f, err := os.OpenFile(at, os.O_CREATE|os.O_EXCL|os.O_WRONLY, 0o444)
	if err != nil {
		return err
	}
	if err := f.Close(); err != nil {
		return err
	}
	return bind(outside, at, flags)
}

// device makes /dev with the one node QEMU opens, whatever the host's own node allows.
func (r *privateRoot) device() error {
	dev := filepath.Join(rootAt, filepath.Dir(kvmDevice))
	if err := os.Mkdir(dev, 0o755); err != nil {
		return err
	}
	const flags = unix.MS_NOSUID | unix.MS_NOEXEC
	if err := unix.Mount("flint", dev, "tmpfs", flags, "mode=0755,size=4k,nr_inodes=4"); err != nil {
		return fmt.Errorf("mount /dev: %w", err)
	}
	node := rootAt + kvmDevice
	if err := unix.Mknod(node, unix.S_IFCHR|0o600, int(r.kvm)); err != nil {
		return fmt.Errorf("make %s: %w", kvmDevice, err)
	}
	if err := os.Chown(node, int(r.uid), 0); err != nil {
		return err
	}
	if err := unix.Mount("", dev, "", unix.MS_REMOUNT|unix.MS_BIND|unix.MS_RDONLY|flags, ""); err != nil {
		return fmt.Errorf("make /dev read-only: %w", err)
	}
	return nil
}

// bind mounts a file or directory of the host read-only at another place.
func bind(from, to string, flags uintptr) error {
	if err := unix.Mount(from, to, "", unix.MS_BIND, ""); err != nil {
		return fmt.Errorf("bind %s: %w", from, err)
	}
	if err := unix.Mount("", to, "", unix.MS_REMOUNT|unix.MS_BIND|unix.MS_RDONLY|flags, ""); err != nil {
		return fmt.Errorf("make %s read-only: %w", from, err)
	}
	return nil
}
