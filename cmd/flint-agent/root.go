package main

import (
	"errors"
	"fmt"
	"os"
	"path"
	"path/filepath"
	"strings"

	"golang.org/x/sys/unix"
)

// Where things are while the initramfs is the root.
const (
	atBase    = "/flint/base"
	atScratch = "/flint/scratch"
	atMemory  = "/flint/memory"
	atTools   = "/flint/tools"
	atRoot    = "/flint/root"
)

// mount is one mount(2).
type mount struct {
	Source, Target, Type string
	Flags                uintptr
	Options              string
}

func (m mount) do() error {
	if err := os.MkdirAll(m.Target, 0o755); err != nil {
		return fmt.Errorf("make mount point: %w", err)
	}
	if err := unix.Mount(m.Source, m.Target, m.Type, m.Flags, m.Options); err != nil {
		return fmt.Errorf("mount %s on %s: %w", m.Source, m.Target, err)
	}
	return nil
}

// mountEarly mounts what the agent itself needs.
func mountEarly() error {
	var errs []error
	for _, m := range []mount{
		{"proc", "/proc", "proc", unix.MS_NOSUID | unix.MS_NODEV | unix.MS_NOEXEC, ""},
		{"sysfs", "/sys", "sysfs", unix.MS_NOSUID | unix.MS_NODEV | unix.MS_NOEXEC, ""},
		{"devtmpfs", "/dev", "devtmpfs", unix.MS_NOSUID, "mode=0755"},
	} {
		if err := m.do(); err != nil && !errors.Is(err, unix.EBUSY) { // EBUSY: the kernel mounted it
			errs = append(errs, err)
		}
	}
	return errors.Join(errs...)
}

// boundDirs are the directories that live on the scratch disk itself rather than on the overlay, because their users
// cannot work on one (docker, containerd), or write much.
var boundDirs = [...]struct {
	Path string
	Mode os.FileMode
}{
	{"/var/lib/docker", 0o710},
	{"/var/lib/containerd", 0o711},
	{"/var/lib/buildkit", 0o711},
	{"/var/lib/kubelet", 0o750},
	{"/tmp", 0o777 | os.ModeSticky},
	{"/var/tmp", 0o777 | os.ModeSticky},
	{"/work", 0o777 | os.ModeSticky},
}

// mountDrive mounts a drive with whatever file system it holds.
func mountDrive(device, target string, flags uintptr, options string) error {
	fs, err := fileSystem(device)
	if err != nil {
		return fmt.Errorf("look at %s: %w", device, err)
	}
	return mount{device, target, fs, flags, options}.do()
}

// mountRoot makes the guest's root at atRoot: the base drive under an overlay on the scratch drive (or on memory, if that is
// wished, or without one), with the other drives and the directories of the scratch disk in it. What is merely missing in the end
// comes back as faults.
func mountRoot(drives map[string]string, release string, memory bool) (faults []string, err error) {
	if err := mountDrive(drives[driveBase], atBase, unix.MS_RDONLY|unix.MS_NOATIME, ""); err != nil {
		return nil, fmt.Errorf("mount base drive: %w", err)
	}
	if dev, ok := drives[driveScratch]; ok {
		err = mountDrive(dev, atScratch, unix.MS_NOATIME, "")
	} else {
		err = mountMemory(atScratch)
	}
	if err != nil {
		return nil, fmt.Errorf("mount scratch drive: %w", err)
	}
	upper := atScratch
	if memory {
		upper = atMemory
		if err := mountMemory(upper); err != nil {
			return nil, fmt.Errorf("mount memory for the root: %w", err)
		}
	}
	if err := mountOverlay(atBase, upper, atRoot); err != nil {
		return nil, fmt.Errorf("mount root: %w", err)
	}
	root, err := os.OpenRoot(atRoot)
	if err != nil {
		return nil, fmt.Errorf("open new root: %w", err)
	}
	defer root.Close()
	note := func(err error) {
		if err != nil {
			faults = append(faults, err.Error())
		}
	}
	for _, b := range boundDirs {
		note(bindFromScratch(root, b.Path, b.Mode))
	}
	for name, at := range map[string]string{driveModules: "/lib/modules/" + release, driveRunner: "/opt/flint/runner"} {
		if dev, ok := drives[name]; ok {
			note(mountInside(root, at, func(target string) error {
				return mountDrive(dev, target, unix.MS_RDONLY|unix.MS_NOATIME, "")
			}))
		}
	}
	if dev, ok := drives[driveTools]; ok {
		note(mountTools(root, dev))
	}
	return faults, nil
}

// mountMemory mounts an empty file system that may fill half of the memory.
func mountMemory(target string) error {
	return mount{"flint", target, "tmpfs", unix.MS_NOATIME, "mode=0755"}.do()
}

// mountTools puts the drive with tools where actions look for them, under an overlay on the scratch disk: they add what is missing.
func mountTools(root *os.Root, device string) error {
	if err := mountDrive(device, atTools, unix.MS_RDONLY|unix.MS_NOATIME, ""); err != nil {
		return fmt.Errorf("mount tools drive: %w", err)
	}
	return mountInside(root, "/opt/hostedtoolcache", func(target string) error {
		return mountOverlay(atTools, filepath.Join(atScratch, "tools"), target)
	})
}

// mountOverlay mounts at target what is below lower, and puts what is written there below over. Its top has the mode of
// lower's. It is volatile where the kernel can do that: nothing outlives the VM, so nothing need be forced to the disk.
func mountOverlay(lower, over, target string) error {
	info, err := os.Stat(lower)
	if err != nil {
		return fmt.Errorf("look at lower directory: %w", err)
	}
	upper, work := filepath.Join(over, "upper"), filepath.Join(over, "work")
	if err := errors.Join(os.MkdirAll(upper, 0o755), os.MkdirAll(work, 0o755), os.Chmod(upper, info.Mode())); err != nil {
		return fmt.Errorf("make overlay directories: %w", err)
	}
	options := fmt.Sprintf("lowerdir=%s,upperdir=%s,workdir=%s", lower, upper, work)
	err = mount{"overlay", target, "overlay", unix.MS_NOATIME, options + ",volatile"}.do()
	if errors.Is(err, unix.EINVAL) {
		err = mount{"overlay", target, "overlay", unix.MS_NOATIME, options}.do()
	}
	return err
}

// bindFromScratch puts a directory of the scratch disk in the place of one of the image's.
func bindFromScratch(root *os.Root, at string, mode os.FileMode) error {
	source := filepath.Join(atScratch, "bind", strings.ReplaceAll(strings.Trim(at, "/"), "/", "-"))
	if err := os.MkdirAll(source, 0o755); err != nil {
		return fmt.Errorf("make scratch directory for %s: %w", at, err)
	}
	if err := os.Chmod(source, mode); err != nil {
		return fmt.Errorf("set mode of scratch directory for %s: %w", at, err)
	}
	return mountInside(root, at, func(target string) error {
		return mount{source, target, "", unix.MS_BIND, ""}.do()
	})
}

// mountInside calls do with a name for the directory at, made if need be and resolved as the guest will see it: an
// image's links may be absolute.
func mountInside(root *os.Root, at string, do func(target string) error) error {
	fd, err := openInside(root.Name(), at)
	if errors.Is(err, unix.ENOENT) {
		if err := root.MkdirAll(strings.Trim(at, "/"), 0o755); err != nil {
			return fmt.Errorf("make %s in the image: %w", at, err)
		}
		fd, err = openInside(root.Name(), at)
	}
	if err != nil {
		return fmt.Errorf("open %s in the image: %w", at, err)
	}
	defer unix.Close(fd)
	if err := do(fmt.Sprintf("/proc/self/fd/%d", fd)); err != nil {
		return fmt.Errorf("mount %s: %w", at, err)
	}
	return nil
}

// openInside opens a path below root as if root were /. The descriptor only names the file.
func openInside(root, name string) (int, error) {
	dir, err := unix.Open(root, unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return -1, err
	}
	defer unix.Close(dir)
	return unix.Openat2(dir, strings.TrimPrefix(name, "/"), &unix.OpenHow{
		Flags: unix.O_PATH | unix.O_CLOEXEC, Resolve: unix.RESOLVE_IN_ROOT | unix.RESOLVE_NO_MAGICLINKS,
	})
}

// findSystemd returns the path of the image's init if that is systemd, else "". /sbin/init alone decides: an image may
// have systemd's files because some package needs them, and another init or none.
func findSystemd(root string) string {
	const init = "/sbin/init"
	fd, err := openInside(root, init)
	if err != nil {
		return ""
	}
	real, err := os.Readlink(fmt.Sprintf("/proc/self/fd/%d", fd))
	unix.Close(fd)
	if err != nil || path.Base(real) != "systemd" {
		return ""
	}
	return init
}

// mountPseudo moves the kernel's file systems into the new root and adds those that programs expect.
func mountPseudo() error {
	for _, d := range []string{"/proc", "/sys", "/dev"} {
		if err := (mount{d, atRoot + d, "", unix.MS_MOVE, ""}).do(); err != nil {
			return err
		}
	}
	dev, run := atRoot+"/dev", atRoot+"/run"
	var errs []error
	for _, m := range []mount{
		{"tmpfs", run, "tmpfs", unix.MS_NOSUID | unix.MS_NODEV, "mode=0755"},
		{"devpts", dev + "/pts", "devpts", unix.MS_NOSUID | unix.MS_NOEXEC, "gid=5,mode=0620,ptmxmode=0666"},
		{"tmpfs", dev + "/shm", "tmpfs", unix.MS_NOSUID | unix.MS_NODEV, "mode=1777"},
		{"cgroup2", atRoot + "/sys/fs/cgroup", "cgroup2", unix.MS_NOSUID | unix.MS_NODEV | unix.MS_NOEXEC, ""},
	} {
		errs = append(errs, m.do())
	}
	for link, to := range map[string]string{"fd": "/proc/self/fd", "stdin": "fd/0", "stdout": "fd/1", "stderr": "fd/2"} {
		errs = append(errs, except(os.Symlink(to, filepath.Join(dev, link)), os.ErrExist))
	}
	// Opening one of these loads its module. The numbers are from the kernel's devices.txt.
	for name, minor := range map[string]uint32{"net/tun": 200, "fuse": 229, "loop-control": 237} {
		node := filepath.Join(dev, name)
		errs = append(errs, os.MkdirAll(filepath.Dir(node), 0o755),
			except(unix.Mknod(node, unix.S_IFCHR|0o600, int(unix.Mkdev(10, minor))), unix.EEXIST))
	}
	for _, name := range []string{"net/tun", "fuse"} { // as udev sets them
		errs = append(errs, os.Chmod(filepath.Join(dev, name), 0o666))
	}
	return errors.Join(errs...)
}

// except returns err unless it is what was expected.
func except(err, expected error) error {
	if errors.Is(err, expected) {
		return nil
	}
	return err
}

// switchRoot makes atRoot the root and frees the initramfs.
func switchRoot() error {
	if err := os.RemoveAll("/modules"); err != nil {
		return fmt.Errorf("free initramfs: %w", err)
	}
	if err := except(os.Remove("/init"), os.ErrNotExist); err != nil {
		return fmt.Errorf("free initramfs: %w", err)
	}
	if err := os.Chdir(atRoot); err != nil {
		return fmt.Errorf("enter new root: %w", err)
	}
	if err := unix.Mount(".", "/", "", unix.MS_MOVE, ""); err != nil {
		return fmt.Errorf("move new root: %w", err)
	}
	if err := unix.Chroot("."); err != nil {
		return fmt.Errorf("enter new root: %w", err)
	}
	return os.Chdir("/")
}
