package qemu

import (
	"bufio"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"os"
	"os/signal"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"

	"flint"
	"flint/internal/vm"
	"flint/internal/vm/vmtest"
)

// TestMain makes the test binary its own QEMU: as one it is started with -name first, and acts as the VM's ID says.
func TestMain(m *testing.M) {
	if len(os.Args) > 2 && os.Args[1] == "-name" {
		syscall.Exit(fakeQEMU(os.Args[2], os.Args[1:])) // not os.Exit, in which the race detector lingers a second
	}
	os.Exit(m.Run())
}

// report is what a fake QEMU says of its surroundings, on the console.
type report struct {
	UID, GID   int
	Groups     []int
	Dir        string
	Env, Args  []string
	PID        int
	Session    bool
	Root       []string
	Near       []string          // what is beside the program, up to three directories above it
	Fds        map[string]string // number → link; only with /proc
	Kernel     string            // what is in the file
	Initrd     string
	Drives     map[string]string // set → first line, with "rw" where it could be written
	KernelArgs string
	KVM        string   // "yes" if /dev/kvm could be opened, else why not
	Interfaces []string // of its network namespace
	Tap        string   // name of the tap it was given
	Device     string   // options of the network device
}

func fakeQEMU(id string, args []string) int {
	options := map[string][]string{}
	for i := 0; i+1 < len(args); i++ {
		options[args[i]] = append(options[args[i]], args[i+1])
	}
	chardev := map[string]net.Listener{}
	for _, c := range options["-chardev"] {
		o := suboptions(c)
		fd, _ := strconv.Atoi(o["fd"])
		l, err := net.FileListener(os.NewFile(uintptr(fd), o["id"]))
		if err != nil {
			fmt.Fprintln(os.Stderr, "fake qemu:", c, err)
			return 1
		}
		chardev[o["id"]] = l
	}
	switch id {
	case "refuses":
		fmt.Fprintln(os.Stderr, "fake qemu: -m 64T: cannot allocate memory\x1b[31m")
		return 1
	case "hangs":
		hang()
	}
	console, err := chardev["console"].Accept()
	if err != nil {
		return 1
	}
	monitor, err := chardev["monitor"].Accept()
	if err != nil {
		return 1
	}
	if id == "nonsense" {
		io.WriteString(monitor, "{\"QMP\":{}}\n")
		bufio.NewReader(monitor).ReadString('\n')
		io.WriteString(monitor, "{\"return\":{}}\n]]]]\n"+strings.Repeat("x", 1<<20)+"\n{\"event\":\"SHUTDOWN\",\"data\":{\"reason\":\"guest-reset\"}}\n")
		return 0
	}
	io.WriteString(monitor, `{"QMP": {"version": {}, "capabilities": ["oob"]}}`+"\r\n")
	monitored := bufio.NewScanner(monitor)
	monitored.Scan()
	io.WriteString(monitor, `{"return": {}}`+"\r\n")
	if id == "outlives" {
		return outlive(chardev["agent"], console)
	}
	if then, ok := strings.CutPrefix(id, "later-"); ok {
		return later(then, options, chardev)
	}
	return fakeGuest(id, options, console, monitor, monitored)
}

// later acts out what follows when somebody else has come for the console and the monitor.
func later(id string, options map[string][]string, chardev map[string]net.Listener) int {
	signal.Ignore(syscall.SIGPIPE) // as QEMU does
	console, err := chardev["console"].Accept()
	if err != nil {
		return 1
	}
	monitor, err := chardev["monitor"].Accept()
	if err != nil {
		return 1
	}
	io.WriteString(monitor, `{"QMP": {"version": {}, "capabilities": ["oob"]}}`+"\r\n")
	monitored := bufio.NewScanner(monitor)
	monitored.Scan()
	io.WriteString(monitor, `{"return": {}}`+"\r\n")
	return fakeGuest(id, options, console, monitor, monitored)
}

// outlive talks to nobody for a while, as a guest whose host's daemon died, and then to the next that comes.
func outlive(agent net.Listener, console net.Conn) int {
	signal.Ignore(syscall.SIGPIPE) // as QEMU does
	for range 64 {
		_, _ = console.Write(make([]byte, 32<<10))
		_, _ = os.Stderr.Write(make([]byte, 32<<10))
	}
	conn, err := agent.Accept()
	if err != nil {
		return 1
	}
	fmt.Fprintln(conn, "alive", os.Getppid())
	_, _ = io.Copy(io.Discard, conn)
	return 0
}

// fakeGuest acts out how the VM ends.
func fakeGuest(id string, options map[string][]string, console, monitor net.Conn, commands *bufio.Scanner) int {
	end := func(reason string) {
		fmt.Fprintf(monitor, `{"timestamp":{"seconds":1},"event":"SHUTDOWN","data":{"guest":true,"reason":%q}}`+"\r\n", reason)
	}
	switch id {
	case "guest-reset", "guest-shutdown", "guest-panic", "host-signal":
		end(id)
	case "reset-then-fails":
		end("guest-reset")
		fmt.Fprintln(os.Stderr, "fake qemu: corrupted double-linked list")
		return 3
	case "panics":
		fmt.Fprint(console, "[    1.0] Kernel panic - not syncing: Attempted to kill init!\r\n")
		end("guest-reset")
	case "panic-device":
		fmt.Fprint(monitor, `{"event":"GUEST_PANICKED","data":{"action":"shutdown"}}`+"\n")
		end("guest-reset")
	case "silent":
	case "floods":
		for range 64 {
			console.Write(make([]byte, 32<<10))
			os.Stderr.Write(make([]byte, 32<<10))
		}
		fmt.Fprint(console, "the end")
		end("guest-reset")
	case "stubborn":
		hang()
	case "quits", "reports":
		if id == "reports" {
			json.NewEncoder(console).Encode(look(options))
		}
		for commands.Scan() {
			if strings.Contains(commands.Text(), `"quit"`) {
				end("host-qmp-quit")
				return 0
			}
		}
	}
	return 0
}

func hang() {
	signal.Ignore(syscall.SIGTERM, syscall.SIGINT)
	select {}
}

func suboptions(s string) map[string]string {
	o := map[string]string{}
	for part := range strings.SplitSeq(s, ",") {
		k, v, _ := strings.Cut(part, "=")
		o[k] = v
	}
	return o
}

func look(options map[string][]string) report {
	read := func(path string) string {
		b, err := os.ReadFile(path)
		if err != nil {
			return err.Error()
		}
		return string(b)
	}
	sid, _ := unix.Getsid(0)
	r := report{
		UID: os.Getuid(), GID: os.Getgid(), Env: os.Environ(), Args: os.Args, PID: os.Getpid(), Session: sid == os.Getpid(),
		Kernel: read(options["-kernel"][0]), Initrd: read(options["-initrd"][0]), Fds: map[string]string{}, Drives: map[string]string{},
		KernelArgs: options["-append"][0],
	}
	r.KVM = "yes"
	if f, err := os.OpenFile(kvmDevice, os.O_RDWR, 0); err != nil {
		r.KVM = err.Error()
	} else {
		f.Close()
	}
	r.Groups, _ = os.Getgroups()
	r.Dir, _ = os.Getwd()
	entries, _ := os.ReadDir("/")
	for _, e := range entries {
		r.Root = append(r.Root, e.Name())
	}
	for dir, above := filepath.Dir(os.Args[0]), 0; dir != "/" && above < 4; dir, above = filepath.Dir(dir), above+1 {
		found, _ := filepath.Glob(dir + "/*")
		r.Near = append(r.Near, found...)
	}
	for fd := range 64 {
		var st unix.Stat_t
		flags, err := unix.FcntlInt(uintptr(fd), unix.F_GETFD, 0)
		if err == nil && flags&unix.FD_CLOEXEC == 0 && unix.Fstat(fd, &st) == nil {
			r.Fds[strconv.Itoa(fd)] = fmt.Sprintf("%o", st.Mode&unix.S_IFMT)
		}
	}
	interfaces, _ := net.Interfaces()
	for _, i := range interfaces {
		r.Interfaces = append(r.Interfaces, i.Name)
	}
	for _, n := range options["-netdev"] {
		fd, _ := strconv.Atoi(suboptions(n)["fd"])
		req, _ := unix.NewIfreq("none")
		if err := unix.IoctlIfreq(fd, unix.TUNGETIFF, req); err != nil {
			r.Tap = err.Error()
		} else {
			r.Tap = req.Name()
		}
		r.Device = options["-device"][len(options["-device"])-1]
	}
	for _, a := range options["-add-fd"] {
		o := suboptions(a)
		fd, _ := strconv.Atoi(o["fd"])
		buf := make([]byte, 64)
		n, err := unix.Pread(fd, buf, 0)
		content := string(buf[:max(n, 0)])
		if err != nil {
			content = err.Error()
		}
		if _, err := unix.Pwrite(fd, buf[:max(n, 0)], 0); err == nil {
			content += " rw"
		}
		r.Drives[o["set"]] = content
	}
	return r
}

// fakeDriver returns a driver whose QEMU is this test binary, and a spec that is complete.
func fakeDriver(t *testing.T, id string) (*Driver, vm.Spec) {
	t.Helper()
	d, err := New(t.Context(), Config{Binary: reachable(t), Accel: TCG})
	if err != nil {
		t.Fatal(err)
	}
	files, dir := t.TempDir(), t.TempDir()
	if err := os.Chmod(files, 0o700); err != nil { // QEMU's user may not walk through it
		t.Fatal(err)
	}
	for _, name := range []string{"kernel", "initrd", "base", "scratch"} {
		if err := os.WriteFile(filepath.Join(files, name), []byte("the "+name), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	return d, vm.Spec{
		ID: id, Kernel: filepath.Join(files, "kernel"), Initrd: filepath.Join(files, "initrd"), CPUs: 2, Memory: 256 * flint.MiB, Dir: dir,
		Drives: []vm.Drive{{ID: "base", Path: filepath.Join(files, "base"), ReadOnly: true}, {ID: "scratch", Path: filepath.Join(files, "scratch")}},
		Args:   []string{"last=yes"},
	}
}

// reachable returns a copy of the test binary that QEMU's user can reach, which the original is not.
func reachable(t *testing.T) string {
	t.Helper()
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	dir, err := os.MkdirTemp("", "flint-qemu")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	if err := os.Chmod(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	b, err := os.ReadFile(self)
	if err != nil {
		t.Fatal(err)
	}
	path := filepath.Join(dir, "fake-qemu")
	if err := os.WriteFile(path, b, 0o755); err != nil {
		t.Fatal(err)
	}
	return path
}

// patiently returns a context for what must happen, some time.
func patiently(t *testing.T) context.Context {
	ctx, cancel := context.WithTimeout(t.Context(), vmtest.Patience(t)/2)
	t.Cleanup(cancel)
	return ctx
}
