// The program jailer is a double of Firecracker's jailer: it checks its arguments as the real one does, and really makes
// the jail, in the real one's order.
//
// It is for tests and must not jail anything a person cares for: it has none of the real one's review.
package main

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"syscall"

	"golang.org/x/sys/unix"

	"flint/internal/vm/firecracker/fctest/double"
)

func main() {
	runtime.LockOSThread() // namespaces and root belong to threads
	o, err := double.Read()
	if err == nil {
		err = run(o, os.Args[1:])
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, "Jailer error:", err)
		os.Exit(1)
	}
}

// jail is what the arguments ask for.
type jail struct {
	o        double.Options
	args     map[string]string
	cgroups  [][2]string
	limits   map[string]uint64
	extra    []string
	exec     string // real path
	name     string // its last element
	uid, gid int
	root     string
}

func run(o double.Options, args []string) error {
	if len(args) == 1 && args[0] == "--version" {
		fmt.Printf("Jailer v%s\n\n", o.Version)
		return nil
	}
	if o.JailerIs != "" {
		return errors.New(o.JailerIs)
	}
	if o.JailHang {
		return unix.Pause()
	}
	if err := unix.CloseRange(3, 1<<30, unix.CLOSE_RANGE_CLOEXEC); err != nil {
		return fmt.Errorf("close inherited descriptors: %w", err)
	}
	os.Clearenv()
	j := &jail{o: o, limits: map[string]uint64{"no-file": 2048}}
	for _, step := range []func() error{
		func() error { return j.parse(args) }, j.check, j.copyProgram, j.joinNetwork, j.limit, j.joinCgroups, j.changeRoot, j.devices,
	} {
		if err := step(); err != nil {
			return err
		}
	}
	return j.become()
}

// takesValue lists the arguments; true: several times.
var takesValue = map[string]bool{
	"id": false, "exec-file": false, "uid": false, "gid": false, "chroot-base-dir": false, "netns": false,
	"cgroup": true, "resource-limit": true, "cgroup-version": false, "parent-cgroup": false,
}

func (j *jail) parse(args []string) error {
	j.args = map[string]string{"chroot-base-dir": "/srv/jailer", "cgroup-version": "1"}
	seen := map[string]bool{}
	for i := 0; i < len(args); i++ {
		if args[i] == "--" {
			j.extra = args[i+1:]
			break
		}
		name := strings.TrimPrefix(args[i], "--")
		many, known := takesValue[name]
		if name == args[i] || !known {
			return fmt.Errorf("found argument %q which was not expected", args[i])
		}
		if seen[name] && !many {
			return fmt.Errorf("the argument %q was provided more than once", name)
		}
		seen[name] = true
		if i++; i == len(args) || strings.HasPrefix(args[i], "--") {
			return fmt.Errorf("the argument %q requires a value, but none was supplied", name)
		}
		key, value, ok := strings.Cut(args[i], "=")
		switch name {
		case "cgroup":
			if !ok || value == "" || strings.Contains(value, "=") {
				return fmt.Errorf("invalid format for cgroups: %s", args[i])
			}
			j.cgroups = append(j.cgroups, [2]string{key, value})
		case "resource-limit":
			n, err := strconv.ParseUint(value, 10, 64)
			if !ok || err != nil || key != "no-file" && key != "fsize" {
				return fmt.Errorf("invalid format for resources limits: %s", args[i])
			}
			j.limits[key] = n
		default:
			j.args[name] = args[i]
		}
	}
	for _, name := range []string{"id", "exec-file", "uid", "gid"} {
		if !seen[name] {
			return fmt.Errorf("argument %q required, but not found", name)
		}
	}
	return nil
}

func (j *jail) check() (err error) {
	id := j.args["id"]
	for i, c := range id {
		if c != '-' && (c < '0' || c > '9') && (c < 'a' || c > 'z') && (c < 'A' || c > 'Z') {
			return fmt.Errorf("invalid instance ID: invalid char (%c) at position %d", c, i)
		}
	}
	if len(id) < 1 || len(id) > 64 {
		return fmt.Errorf("invalid instance ID: invalid len (%d)", len(id))
	}
	if j.exec, err = filepath.EvalSymlinks(j.args["exec-file"]); err != nil {
		return fmt.Errorf("canonicalize path %s: %w", j.args["exec-file"], err)
	}
	if st, err := os.Stat(j.exec); err != nil || !st.Mode().IsRegular() {
		return fmt.Errorf("%s is not a file", j.exec)
	}
	if j.name = filepath.Base(j.exec); !strings.Contains(j.name, "firecracker") {
		return fmt.Errorf("invalid filename: the filename of --exec-file must contain firecracker: %s", j.name)
	}
	base, err := filepath.EvalSymlinks(j.args["chroot-base-dir"])
	if err != nil {
		return fmt.Errorf("canonicalize path %s: %w", j.args["chroot-base-dir"], err)
	}
	j.root = filepath.Join(base, j.name, id, "root")
	for name, to := range map[string]*int{"uid": &j.uid, "gid": &j.gid} {
		n, err := strconv.ParseUint(j.args[name], 10, 32)
		if err != nil {
			return fmt.Errorf("invalid %s: %s", name, j.args[name])
		}
		*to = int(n)
	}
	if v := j.args["cgroup-version"]; v != "1" && v != "2" {
		return fmt.Errorf("%s is an invalid cgroup version specifier", v)
	}
	if p, ok := j.args["parent-cgroup"]; ok && (filepath.IsAbs(p) || !filepath.IsLocal(p) || p == ".") {
		return errors.New("parent cgroup path is invalid: it must not be absolute or contain '..' or '.'")
	}
	return nil
}

// copyProgram makes the root directory, if it is not there, and puts the program in it: over no link.
func (j *jail) copyProgram() error {
	if err := os.MkdirAll(j.root, 0o755); err != nil {
		return fmt.Errorf("create directory: %w", err)
	}
	b, err := os.ReadFile(j.exec)
	if err != nil {
		return err
	}
	source, err := os.Stat(j.exec)
	if err != nil {
		return err
	}
	to := filepath.Join(j.root, j.name)
	f, err := os.OpenFile(to, os.O_WRONLY|os.O_CREATE|unix.O_NOFOLLOW, source.Mode().Perm())
	if err != nil {
		return fmt.Errorf("open file %s: %w", to, err)
	}
	defer f.Close()
	var st unix.Stat_t
	if err := unix.Fstat(int(f.Fd()), &st); err != nil {
		return err
	}
	if st.Nlink > 1 {
		return fmt.Errorf("file %s has more than one hard link", to)
	}
	if _, err := f.Write(b); err != nil {
		return fmt.Errorf("copy %s to %s: %w", j.exec, to, err)
	}
	return f.Chown(j.uid, j.gid)
}

func (j *jail) joinNetwork() error {
	path := j.args["netns"]
	if path == "" {
		return nil
	}
	flags := unix.O_RDONLY | unix.O_CLOEXEC
	if j.o.Version == "1.16.0" {
		flags |= unix.O_NOFOLLOW // which that release has, and the next has not
	}
	fd, err := unix.Open(path, flags, 0)
	if err != nil {
		return fmt.Errorf("open file %s: %w", path, err)
	}
	defer unix.Close(fd)
	if err := unix.Setns(fd, unix.CLONE_NEWNET); err != nil {
		return fmt.Errorf("join network namespace: netns: %w", err)
	}
	return nil
}

func (j *jail) limit() error {
	for name, resource := range map[string]int{"no-file": syscall.RLIMIT_NOFILE, "fsize": syscall.RLIMIT_FSIZE} {
		if n, ok := j.limits[name]; ok {
			if err := syscall.Setrlimit(resource, &syscall.Rlimit{Cur: n, Max: n}); err != nil {
				return fmt.Errorf("set limit for resource: %s: %w", name, err)
			}
		}
	}
	return nil
}

// changeRoot enters the root directory, in a mount namespace of its own.
func (j *jail) changeRoot() error {
	if err := unix.Unshare(unix.CLONE_NEWNS); err != nil {
		return fmt.Errorf("unshare into new mount namespace: %w", err)
	}
	if err := unix.Mount("", "/", "", unix.MS_SLAVE|unix.MS_REC, ""); err != nil {
		return fmt.Errorf("change the propagation type to slave: %w", err)
	}
	if err := unix.Mount(j.root, j.root, "", unix.MS_BIND|unix.MS_REC, ""); err != nil {
		return fmt.Errorf("bind mount the jail root directory: %w", err)
	}
	if err := unix.Chdir(j.root); err != nil {
		return err
	}
	if err := unix.Mkdir("old_root", 0o700); err != nil {
		return fmt.Errorf("create the jail root directory before pivoting root: %w", err)
	}
	if err := unix.PivotRoot(".", "old_root"); err != nil {
		return fmt.Errorf("pivot root: %w", err)
	}
	if err := unix.Chdir("/"); err != nil {
		return err
	}
	if err := unix.Unmount("old_root", unix.MNT_DETACH); err != nil {
		return fmt.Errorf("unmount the old jail root: %w", err)
	}
	return unix.Rmdir("old_root")
}

// devices makes the directories and the device nodes; a node that is there already is the mark of a used jail.
func (j *jail) devices() error {
	for _, dir := range []string{"/", "/dev", "/dev/net", "/run"} {
		if err := unix.Mkdir(dir, 0o700); err != nil && !errors.Is(err, fs.ErrExist) {
			return fmt.Errorf("create directory %s: %w", dir, err)
		}
		if err := errors.Join(unix.Chmod(dir, 0o700), unix.Chown(dir, j.uid, j.gid)); err != nil {
			return fmt.Errorf("change owner for %s: %w", dir, err)
		}
	}
	for _, d := range []struct {
		path         string
		major, minor uint32
	}{{"/dev/net/tun", 10, 200}, {"/dev/kvm", 10, 232}, {"/dev/urandom", 1, 9}} {
		if err := unix.Mknod(d.path, unix.S_IFCHR|0o600, int(unix.Mkdev(d.major, d.minor))); err != nil {
			return fmt.Errorf("create %s via mknod inside the jail: %w", d.path, err)
		}
		if err := unix.Chown(d.path, j.uid, j.gid); err != nil {
			return fmt.Errorf("change owner for %s: %w", d.path, err)
		}
	}
	return nil
}

// become drops privileges and is Firecracker from then on.
func (j *jail) become() error {
	pid, err := os.OpenFile("/"+j.name+".pid", os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o644)
	if err != nil {
		return fmt.Errorf("open file: %w", err)
	}
	_, err = fmt.Fprint(pid, os.Getpid())
	if err = errors.Join(err, pid.Close()); err != nil {
		return err
	}
	if err := errors.Join(syscall.Setgroups(nil), syscall.Setgid(j.gid), syscall.Setuid(j.uid)); err != nil {
		return fmt.Errorf("exec into Firecracker: %w", err)
	}
	args := append([]string{"/" + j.name, "--id", j.args["id"], "--start-time-us", "1", "--start-time-cpu-us", "1", "--parent-cpu-time-us", "1"}, j.extra...)
	return fmt.Errorf("exec into Firecracker: %w", syscall.Exec(args[0], args, []string{}))
}
