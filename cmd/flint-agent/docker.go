package main

import (
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

const (
	dockerSocket = "/var/run/docker.sock"
	dockerStarts = 4           // how often dockerd is started at most; one that ends ever again would only cost the job time
	dockerPause  = time.Second // before the second start; doubled before each further one
	dockerConfig = "/etc/docker/daemon.json"
)

// docker is the image's Docker daemon where no init would start it. Its socket is there before the host is answered, so
// that a job that comes at once waits for the daemon rather than find none.
type docker struct {
	shell  string // the program that says LISTEN_PID, which is known to nobody before
	daemon string
	config string // the daemon's own configuration, which may not be there
	groups string // where cgroup v2 is mounted
	socket *os.File
	log    *os.File
	pause  time.Duration
}

// findDocker prepares the image's dockerd; it returns nil if there is none.
func (s *system) findDocker() (*docker, error) {
	env := []string{"PATH=" + defaultPath}
	daemon, err := lookPath("dockerd", "/", env)
	if err != nil {
		return nil, nil
	}
	shell, err := lookPath("sh", "/", env)
	if err != nil {
		return nil, fmt.Errorf("start dockerd: %w", err)
	}
	gid, err := s.users.group("docker")
	if err != nil {
		return nil, fmt.Errorf("start dockerd: %w", err)
	}
	log, err := openKernelLog()
	if err != nil {
		return nil, fmt.Errorf("start dockerd: %w", err)
	}
	socket, err := listenUnix(dockerSocket, gid)
	if err != nil {
		return nil, errors.Join(fmt.Errorf("listen for docker: %w", err), log.Close())
	}
	return &docker{shell: shell, daemon: daemon, config: dockerConfig, groups: atCgroups, socket: socket, log: log, pause: dockerPause}, nil
}

// openKernelLog opens the kernel's log, which is bounded, and makes it keep all that is written to it, as systemd does.
func openKernelLog() (*os.File, error) {
	if err := os.WriteFile("/proc/sys/kernel/printk_devkmsg", []byte("on\n"), 0); err != nil {
		return nil, err
	}
	return os.OpenFile("/dev/kmsg", os.O_WRONLY, 0)
}

// listenUnix makes a socket at path for root and a group.
func listenUnix(path string, gid uint32) (*os.File, error) {
	fd, err := unix.Socket(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return nil, err
	}
	f := os.NewFile(uintptr(fd), path)
	err = except(os.Remove(path), os.ErrNotExist) // the image's is nobody's
	if err == nil {
		err = unix.Bind(fd, &unix.SockaddrUnix{Name: path})
	}
	if err == nil { // nobody can connect before it listens
		err = errors.Join(os.Chown(path, 0, int(gid)), os.Chmod(path, 0o660), unix.Listen(fd, unix.SOMAXCONN))
	}
	if err != nil {
		return nil, errors.Join(err, f.Close())
	}
	return f, nil
}

// keepDocker starts dockerd once the guest is configured, and again if it ends, a few times.
func (s *system) keepDocker(d *docker, stop <-chan struct{}) {
	defer func() { // who comes after this is told at once that there is none
		if err := errors.Join(os.Remove(d.socket.Name()), d.socket.Close(), d.log.Close()); err != nil {
			complain(fmt.Errorf("remove docker's socket: %w", err))
		}
	}()
	select {
	case <-s.configured:
	case <-stop:
		return
	}
	for n := range dockerStarts {
		if n > 0 {
			select {
			case <-time.After(d.pause << (n - 1)):
			case <-s.ending:
				return
			case <-stop:
				return
			}
		}
		ended, err := s.startDocker(d)
		if err != nil {
			complain(fmt.Errorf("start dockerd: %w", err))
			return
		}
		select {
		case ws := <-ended:
			if s.ends() {
				return
			}
			complain(fmt.Errorf("dockerd ended with exit code %d; dmesg says why", exitOf(ws).Code))
		case <-stop:
			return
		}
	}
}

// startDocker starts dockerd as systemd would: by sd_listen_fds(3), and in a control group of its own. The directory with what
// stands in for kmod comes last in its PATH, because it calls modprobe.
func (s *system) startDocker(d *docker) (<-chan syscall.WaitStatus, error) {
	null, err := os.Open(os.DevNull)
	if err != nil {
		return nil, err
	}
	defer null.Close()
	attr := &syscall.ProcAttr{
		Dir:   "/",
		Env:   []string{"PATH=" + defaultPath + ":" + runDir, "HOME=/root", "LISTEN_FDS=1"},
		Files: []uintptr{null.Fd(), d.log.Fd(), d.log.Fd(), d.socket.Fd()}, // the last is SD_LISTEN_FDS_START
		Sys:   &syscall.SysProcAttr{Setsid: true},
	}
	if group, err := makeGroup(d.groups, "dockerd"); err != nil {
		complain(err) // it works without, but for limits of swap
	} else {
		defer group.Close()
		attr.Sys.UseCgroupFD, attr.Sys.CgroupFD = true, int(group.Fd())
	}
	args := []string{"sh", "-c", `LISTEN_PID=$$ exec "$0" "$@"`, d.daemon, "-H", "fd://"}
	if s.cgroups != nil && !d.placesContainers() {
		args = append(args, "--cgroup-parent", "/"+dockerCgroup)
	}
	_, ended, err := s.fork(d.shell, args, attr)
	return ended, err
}

// placesContainers reports whether the image says itself in which control group its containers are: dockerd does not start when it
// is told twice.
func (d *docker) placesContainers() bool {
	b, err := os.ReadFile(d.config)
	var config map[string]json.RawMessage
	return err == nil && json.Unmarshal(b, &config) == nil && config["cgroup-parent"] != nil
}

// makeGroup makes a control group below root, the mount of cgroup v2, with every controller there is. dockerd takes what its own
// group lacks for what the kernel lacks, and the root group has no limits.
func makeGroup(root, name string) (*os.File, error) {
	controllers, err := os.ReadFile(filepath.Join(root, "cgroup.controllers"))
	if err != nil {
		return nil, fmt.Errorf("make control group: %w", err)
	}
	if err := enableControllers(root, strings.Fields(string(controllers))...); err != nil {
		return nil, err
	}
	dir := filepath.Join(root, name)
	if err := except(os.Mkdir(dir, 0o755), os.ErrExist); err != nil {
		return nil, fmt.Errorf("make control group: %w", err)
	}
	f, err := os.Open(dir)
	if err != nil {
		return nil, fmt.Errorf("make control group: %w", err)
	}
	return f, nil
}

// group returns the id of a group, 0 if there is none of that name.
func (us *users) group(name string) (uint32, error) {
	us.mu.Lock()
	defer us.mu.Unlock()
	_, groups, err := us.read()
	if err != nil {
		return 0, err
	}
	if at := slices.IndexFunc(groups, func(g group) bool { return g.Name == name }); at >= 0 {
		return groups[at].GID, nil
	}
	return 0, nil
}
