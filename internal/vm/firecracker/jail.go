package firecracker

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"

	"golang.org/x/sys/unix"

	"flint"
	"flint/internal/vm"
)

// Names in a VMM's root directory, or without a jail in Spec.Dir.
const (
	apiSocket   = "api.sock"
	vsockSocket = "v.sock"
	logPipe     = "log"
	metricsPipe = "metrics"
	outPipe     = "out" // standard output and error: the serial console, and what is said before there is a log

	kernelLink = "kernel"
	initrdLink = "initrd"
)

// view is what a VMM sees.
type view struct {
	prefix         string // of the names above, as Firecracker is to use them
	kernel, initrd string
	drives         []string
	links          []string // names of the hard links in its root
	largest        int64    // bytes of the largest disk it writes
}

func (v view) see(name string) string { return v.prefix + name }

func chrootFault(base string, err error, fix string) error {
	return &flint.Fault{Code: "firecracker.chroot", What: "use " + base + " for jails", Kind: flint.ErrConfig, Err: err, Fix: fix}
}

// chrootBase makes the directory of the jails and checks it. It returns its real path.
func chrootBase(path string) (string, error) {
	if !filepath.IsAbs(path) {
		return "", chrootFault(path, errors.New("the path is not absolute"), "set firecracker.chroot_base to an absolute path")
	}
	if err := os.MkdirAll(path, 0o755); err != nil {
		return "", chrootFault(path, err, "set firecracker.chroot_base to a directory that can be made")
	}
	path, err := filepath.EvalSymlinks(path)
	if err != nil {
		return "", chrootFault(path, err, "check the directory")
	}
	var st unix.Stat_t
	if err := unix.Stat(path, &st); err != nil {
		return "", chrootFault(path, err, "check the directory")
	}
	if st.Uid != 0 || st.Mode&0o022 != 0 {
		return "", chrootFault(path, errors.New("others than root can write there"), "chown root: "+path+" && chmod 755 "+path)
	}
	var sfs unix.Statfs_t
	if err := unix.Statfs(path, &sfs); err != nil {
		return "", chrootFault(path, err, "check the file system")
	}
	for flag, name := range map[int64]string{unix.ST_NOEXEC: "noexec", unix.ST_NODEV: "nodev"} {
		if int64(sfs.Flags)&flag != 0 {
			return "", chrootFault(path, fmt.Errorf("its file system is mounted %s: Firecracker could not run there", name),
				"mount it without "+name+", or set firecracker.chroot_base to a directory elsewhere")
		}
	}
	return path, nil
}

// furnish makes everything a VMM needs before it runs. What it makes, m releases.
func (d *Driver) furnish(ctx context.Context, s vm.Spec, m *machine) (view, error) {
	if d.c.NoJail {
		return d.furnishBare(s, m)
	}
	user, err := d.uids.take(d.holder(s.ID))
	if err != nil {
		return view{}, err
	}
	m.user, m.uid = user, int(user.uid)
	m.undo.Push("give user back", m.giveUser)
	home := filepath.Join(d.base, s.ID)
	if err := d.makeHome(ctx, s.ID, home, user.uid); err != nil {
		return view{}, err
	}
	m.pushRemoval("remove jail", func(context.Context) error { return os.RemoveAll(home) })
	if err := d.groups.create(s); err != nil {
		return view{}, err
	}
	m.groups = d.groups
	m.pushRemoval("remove cgroup", func(ctx context.Context) error { return d.groups.remove(ctx, s.ID) })
	root := filepath.Join(home, "root")
	if err := os.Mkdir(root, 0o700); err != nil {
		return view{}, fmt.Errorf("make root directory: %w", err)
	}
	if err := m.open(root); err != nil {
		return view{}, err
	}
	v := view{prefix: "/"}
	if err := d.linkAll(s, m, &v); err != nil {
		return view{}, err
	}
	return v, m.makePipes()
}

// holder is what reserves a user: the VM's jail, relative to the chroot base. It survives a program of another name.
func (d *Driver) holder(id string) string { return filepath.Join(filepath.Base(d.base), id) }

// pushRemoval registers the removal of something that Sweep would find by the VM's user.
func (m *machine) pushRemoval(name string, remove func(context.Context) error) {
	m.undo.Push(name, func(ctx context.Context) error {
		err := remove(ctx)
		m.left = m.left || err != nil
		return err
	})
}

// giveUser frees the VM's user. If something of the VM is left, the user stays reserved: then Sweep tries again.
func (m *machine) giveUser(context.Context) error {
	if m.left {
		return m.user.forget()
	}
	return m.user.give()
}

// makeHome makes a VM's directory. What a crash left of an earlier VM of the same name goes first.
func (d *Driver) makeHome(ctx context.Context, id, home string, own uint32) (err error) {
	if err = os.Mkdir(home, 0o700); !errors.Is(err, fs.ErrExist) {
		return err
	}
	busy := func(err error, fix string) error {
		return &flint.Fault{Code: "firecracker.busy", What: "boot VM " + id, Kind: flint.ErrConflict, Err: err, Fix: fix}
	}
	reserved, err := d.uids.reservations()
	if err != nil {
		return err
	}
	delete(reserved, own)
	var stale []*reservation
	defer func() {
		for _, user := range stale {
			err = errors.Join(err, user.forget())
		}
	}()
	for uid, holder := range reserved {
		if holder != d.holder(id) {
			continue
		}
		user, err := d.uids.hold(uid, holder)
		if err != nil {
			return busy(fmt.Errorf("its jail %s is in use: %w", home, err), "wait until that VM has ended, or choose another name")
		}
		stale = append(stale, user)
		if runs, err := runs(uid); runs || err != nil {
			return busy(errors.Join(fmt.Errorf("a process runs in its jail %s, as user %d", home, uid), err), "end that process, or choose another name")
		}
	}
	if len(stale) == 0 {
		return busy(fmt.Errorf("its jail %s exists, and flint did not make it", home), "remove that directory, or choose another chroot base")
	}
	if err := errors.Join(d.groups.remove(ctx, id), os.RemoveAll(home)); err != nil {
		return fmt.Errorf("remove what an earlier VM %s left: %w", id, err)
	}
	for _, user := range stale {
		if err := user.give(); err != nil {
			return fmt.Errorf("free the user of an earlier VM %s: %w", id, err)
		}
	}
	return os.Mkdir(home, 0o700)
}

// linkAll puts kernel, initramfs and drives into the root directory.
func (d *Driver) linkAll(s vm.Spec, m *machine, v *view) error {
	link := func(name, path string, readOnly bool) error {
		if err := d.link(m, name, path, readOnly, v); err != nil {
			return fmt.Errorf("put %s into the jail: %w", path, err)
		}
		return nil
	}
	if err := link(kernelLink, s.Kernel, true); err != nil {
		return err
	}
	if err := link(initrdLink, s.Initrd, true); err != nil {
		return err
	}
	v.kernel, v.initrd = v.see(kernelLink), v.see(initrdLink)
	for i, drive := range s.Drives {
		name := "drive" + strconv.Itoa(i)
		if err := link(name, drive.Path, drive.ReadOnly); err != nil {
			return err
		}
		v.drives = append(v.drives, v.see(name))
	}
	return nil
}

// link makes a hard link. Read-only files are shared by all VMs and stay as they are; a writable one becomes the VM's.
func (d *Driver) link(m *machine, name, path string, readOnly bool, v *view) error {
	var st unix.Stat_t
	err := m.dir.do(func(dir int) error {
		if err := unix.Linkat(unix.AT_FDCWD, path, dir, name, unix.AT_SYMLINK_FOLLOW); err != nil {
			return err
		}
		v.links = append(v.links, name)
		return unix.Fstatat(dir, name, &st, unix.AT_SYMLINK_NOFOLLOW)
	})
	if errors.Is(err, unix.EXDEV) {
		return chrootFault(d.c.ChrootBase, fmt.Errorf("%s is on another file system, and files are shared by hard links", filepath.Dir(path)),
			fmt.Sprintf("have %s and %s on one file system: set firecracker.chroot_base to a directory beside the files", d.c.ChrootBase, filepath.Dir(path)))
	}
	if err != nil {
		return fmt.Errorf("link: %w", err)
	}
	switch {
	case st.Mode&unix.S_IFMT != unix.S_IFREG:
		return errors.New("it is not a regular file")
	case readOnly && st.Mode&0o004 == 0:
		return &flint.Fault{
			Code: "firecracker.unreadable", What: "read " + path, Kind: flint.ErrPermission,
			Err: fmt.Errorf("the VM's own user may not: %w", fs.ErrPermission), Fix: "chmod a+r " + path,
		}
	case readOnly && (st.Mode&0o002 != 0 || st.Uid == uint32(m.uid)):
		return &flint.Fault{
			Code: "firecracker.writable", What: "share " + path + " with the VM", Kind: flint.ErrPermission,
			Err: errors.New("the VM's own user may write it, and so change what other VMs read"), Fix: "chown root: " + path + " && chmod o-w " + path,
		}
	case readOnly:
		return nil
	case st.Nlink > 2:
		return &flint.Fault{
			Code: "firecracker.shared", What: "give " + path + " to the VM", Kind: flint.ErrConflict,
			Err: errors.New("it has other hard links, and what a VM writes must be its own"), Fix: "give each VM a copy",
		}
	}
	v.largest = max(v.largest, st.Size)
	err = m.dir.do(func(dir int) error { return unix.Fchownat(dir, name, m.uid, m.uid, unix.AT_SYMLINK_NOFOLLOW) })
	if err != nil {
		return err
	}
	m.undo.Push("take drive back", func(context.Context) error {
		if err := os.Lchown(path, int(st.Uid), int(st.Gid)); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return err
		}
		return nil
	})
	return nil
}

// furnishBare makes what a VMM without a jail needs: its pipes, in Spec.Dir.
func (d *Driver) furnishBare(s vm.Spec, m *machine) (view, error) {
	if err := m.open(s.Dir); err != nil {
		return view{}, err
	}
	m.undo.Push("remove sockets and pipes", func(context.Context) error {
		return m.dir.remove(apiSocket, vsockSocket, logPipe, metricsPipe, outPipe)
	})
	v := view{kernel: s.Kernel, initrd: s.Initrd}
	for _, drive := range s.Drives {
		v.drives = append(v.drives, drive.Path)
	}
	return v, m.makePipes()
}

// open opens the directory of m's sockets and pipes.
func (m *machine) open(dir string) error {
	m.undo.Push("close directory", func(context.Context) error { return m.dir.close() })
	return m.dir.open(dir)
}

// makePipes makes the named pipes, which belong to the VM's user, and opens them for reading.
func (m *machine) makePipes() error {
	for _, name := range []string{logPipe, metricsPipe, outPipe} {
		err := m.dir.do(func(dir int) error {
			if err := unix.Mkfifoat(dir, name, 0o600); err != nil {
				return err
			}
			return unix.Fchownat(dir, name, m.uid, m.uid, unix.AT_SYMLINK_NOFOLLOW)
		})
		if err != nil {
			return fmt.Errorf("make pipe %s: %w", name, err)
		}
	}
	return m.openPipes()
}

func (m *machine) openPipes() error {
	for _, name := range []string{logPipe, metricsPipe, outPipe} {
		p, err := openPipe(&m.dir, name)
		if err != nil {
			return err
		}
		m.pipes = append(m.pipes, p)
		m.undo.Push("close pipe", func(context.Context) error { p.close(); return nil })
	}
	return nil
}
