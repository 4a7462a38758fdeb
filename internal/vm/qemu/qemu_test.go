package qemu

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"flint"
	"flint/internal/vm"
)

func TestNew(t *testing.T) {
	var f *flint.Fault
	_, err := New(t.Context(), Config{Binary: filepath.Join(t.TempDir(), "qemu-system-x86_64"), Accel: TCG})
	if !errors.As(err, &f) || f.Code != "qemu.missing" || !errors.Is(err, flint.ErrNotFound) || !strings.Contains(f.Fix, "qemu-system-x86") {
		t.Errorf("no QEMU: %#v", err)
	}
	if _, err = New(t.Context(), Config{Binary: "/bin/true", Accel: "hvf"}); !errors.As(err, &f) || f.Code != "qemu.accel" {
		t.Errorf("unknown accelerator: %#v", err)
	}
	works := vm.ProbeKVM(t.Context()).State == vm.KVMWorks
	d, err := New(t.Context(), Config{Binary: "/bin/true", Accel: KVM})
	if works != (err == nil) || err != nil && (!errors.As(err, &f) || f.Code != "qemu.kvm") {
		t.Errorf("KVM works: %v; but asked for: %v", works, err)
	}
	if works {
		if a, _ := d.Accel(); a != KVM {
			t.Errorf("accelerator %s", a)
		}
	}
	d, err = New(t.Context(), Config{Binary: "/bin/true"})
	if err != nil {
		t.Fatal(err)
	}
	if a, s := d.Accel(); (a == KVM) != (s.State == vm.KVMWorks) {
		t.Errorf("accelerator %s where KVM %s", a, s)
	}
}

func TestSurroundings(t *testing.T) {
	d, s := fakeDriver(t, "reports")
	os.Setenv("FLINT_SECRET", "hunter2")
	defer os.Unsetenv("FLINT_SECRET")
	leak, err := os.Open("/dev/null")
	if err != nil {
		t.Fatal(err)
	}
	defer leak.Close()
	inherited, err := unix.Dup(int(leak.Fd())) // without close-on-exec
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(inherited)
	m, err := d.Boot(patiently(t), s)
	if err != nil {
		t.Fatal(err)
	}
	defer m.Close(t.Context())
	r := readReport(t, m)
	if len(r.Env) > 0 || r.Dir != "/" || !r.Session {
		t.Errorf("environment %q, directory %s, own session %v", r.Env, r.Dir, r.Session)
	}
	if r.Kernel != "the kernel" || r.Initrd != "the initrd" {
		t.Errorf("kernel: %s; initrd: %s", r.Kernel, r.Initrd)
	}
	if want := map[string]string{"0": "the base", "1": "the scratch rw"}; !maps.Equal(r.Drives, want) {
		t.Errorf("drives %q, want %q", r.Drives, want)
	}
	if !strings.HasSuffix(r.KernelArgs, " last=yes") || !strings.Contains(r.KernelArgs, " flint.drives=base,scratch ") {
		t.Errorf("kernel arguments %q", r.KernelArgs)
	}
	if d.drop && (r.UID != nobody || r.GID != nobody || len(r.Groups) > 0) {
		t.Errorf("runs as %d:%d with groups %d", r.UID, r.GID, r.Groups)
	}
	if d.isolate {
		// /tmp is there because the fake QEMU is; the real one is below /usr.
		known := []string{"etc", "initrd", "kernel", "lib", "lib32", "lib64", "libx32", "tmp", "usr"}
		for _, name := range r.Root {
			if !slices.Contains(known, name) {
				t.Errorf("/%s can be seen", name)
			}
		}
		if r.PID != 1 {
			t.Errorf("is process %d of its namespace", r.PID)
		}
	}
	if !d.drop || !d.isolate {
		t.Log("not root: own user and namespaces are not tested")
	}
	// Nothing but stdio, three sockets and two drives; not root: the kernel and the initrd too.
	want := 8
	if !d.isolate {
		want += 2
	}
	if len(r.Fds) != want {
		t.Errorf("has descriptors %v, want %d", r.Fds, want)
	}
}

// TestKVMDevice sees that QEMU's own user can open the /dev/kvm it is given, whatever the host's node allows. Whether KVM
// works does not matter here.
func TestKVMDevice(t *testing.T) {
	if f, err := os.OpenFile(kvmDevice, os.O_RDWR, 0); err != nil {
		t.Skipf("needs /dev/kvm: %v", err)
	} else {
		f.Close()
	}
	d, s := fakeDriver(t, "reports")
	d.accel = KVM
	m, err := d.Boot(patiently(t), s)
	if err != nil {
		t.Fatal(err)
	}
	defer m.Close(t.Context())
	r := readReport(t, m)
	if r.KVM != "yes" {
		t.Errorf("opening it: %s", r.KVM)
	}
	if i := slices.Index(r.Args, "-accel"); i < 0 || r.Args[i+1] != "kvm" || strings.Contains(r.KernelArgs, "tsc") {
		t.Errorf("arguments %q", r.Args)
	}
}

func readReport(t *testing.T, m vm.Machine) report {
	t.Helper()
	ctx := patiently(t)
	tick := time.NewTicker(time.Millisecond)
	defer tick.Stop()
	for {
		var r report
		if c := m.(vm.Console).Console(); bytes.HasSuffix(c, []byte("\n")) {
			if err := json.Unmarshal(c, &r); err != nil {
				t.Fatalf("%v in %s", err, c)
			}
			return r
		}
		select {
		case <-tick.C:
		case <-ctx.Done():
			t.Fatal("no report")
		}
	}
}

func TestEnds(t *testing.T) {
	for id, want := range map[string]string{ // "" is no error
		"guest-reset":      "",
		"guest-shutdown":   "",
		"guest-panic":      "kernel panicked",
		"panics":           "kernel panicked",
		"panic-device":     "kernel panicked",
		"host-signal":      `"host-signal"`,
		"silent":           "without giving a reason",
		"reset-then-fails": "QEMU died: exit status 3: ",
		"nonsense":         "read monitor message",
	} {
		t.Run(id, func(t *testing.T) {
			d, s := fakeDriver(t, id)
			m, err := d.Boot(patiently(t), s)
			if err == nil {
				defer m.Close(t.Context())
				err = m.Wait(patiently(t))
			} else if !strings.Contains(err.Error(), "start QEMU") { // it may end before Boot sees it run
				t.Errorf("boot: %v", err)
			}
			if want == "" && err != nil || want != "" && (err == nil || !strings.Contains(err.Error(), want)) {
				t.Errorf("got %v, want %q", err, want)
			}
			if want == "kernel panicked" != errors.Is(err, flint.ErrGuest) {
				t.Errorf("%v blames the wrong one", err)
			}
		})
	}
}

func TestBootRefused(t *testing.T) {
	d, s := fakeDriver(t, "refuses")
	_, err := d.Boot(patiently(t), s)
	var f *flint.Fault
	if !errors.As(err, &f) || f.Code != "qemu.start" || !strings.Contains(err.Error(), "fake qemu: -m 64T: cannot allocate memory[31m") {
		t.Errorf("boot: %v", err)
	}
	empty(t, s.Dir)
}

func TestBootHangs(t *testing.T) {
	d, s := fakeDriver(t, "hangs")
	ctx, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
	defer cancel()
	if _, err := d.Boot(ctx, s); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("boot: %v", err)
	}
	empty(t, s.Dir)
}

func TestStubborn(t *testing.T) {
	d, s := fakeDriver(t, "stubborn")
	m, err := d.Boot(patiently(t), s)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel() // a close that must not take its time
	if err := m.Close(ctx); err != nil {
		t.Errorf("close: %v", err)
	}
	if err := m.Wait(t.Context()); err != nil {
		t.Errorf("wait: %v", err)
	}
	empty(t, s.Dir)
}

func TestFloods(t *testing.T) {
	d, s := fakeDriver(t, "floods")
	m, err := d.Boot(patiently(t), s)
	if err != nil {
		t.Fatal(err)
	}
	defer m.Close(t.Context())
	if err := m.Wait(patiently(t)); err != nil {
		t.Errorf("wait: %v", err)
	}
	c := m.(vm.Console).Console()
	if len(c) != consoleKept || !bytes.HasSuffix(c, []byte("\x00the end")) {
		t.Errorf("console keeps %d bytes that end in %q", len(c), c[max(0, len(c)-8):])
	}
}

func TestSocketsOfAnotherStay(t *testing.T) {
	d, s := fakeDriver(t, "quits")
	m, err := d.Boot(patiently(t), s)
	if err != nil {
		t.Fatal(err)
	}
	defer m.Close(t.Context())
	if _, err := d.Boot(patiently(t), s); err == nil {
		t.Fatal("two machines in one directory")
	}
	for _, name := range []string{agentSocket, monitorSocket, consoleSocket} {
		if st, err := os.Stat(filepath.Join(s.Dir, name)); err != nil || st.Mode().Perm() != 0o600 {
			t.Errorf("socket %s: %v, %v", name, st, err)
		}
	}
}

// TestOutlivesUs lets a process that booted a VM die, and talks to the VM afterwards.
func TestOutlivesUs(t *testing.T) {
	if dir := os.Getenv("FLINT_TEST_DIES"); dir != "" {
		d, s := fakeDriver(t, os.Getenv("FLINT_TEST_ORPHAN"))
		s.Dir = dir
		m, err := d.Boot(patiently(t), s)
		if err != nil {
			t.Fatal(err)
		}
		fmt.Println(m.(vm.Process).Process())
		syscall.Exit(7) // no clean-up of any kind
	}
	dir, _, _ := orphan(t, "outlives")
	conn, err := dial(patiently(t), dir, agentSocket)
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close() // which ends it
	deadline, _ := patiently(t).Deadline()
	_ = conn.SetReadDeadline(deadline)
	if line, err := bufio.NewReader(conn).ReadString('\n'); !strings.HasPrefix(line, "alive ") {
		t.Errorf("the VM says %q, %v", line, err)
	}
}

// orphan boots a fake QEMU by a process that dies at once.
func orphan(t *testing.T, id string) (dir string, pid int, start uint64) {
	t.Helper()
	tmp, err := os.MkdirTemp("", "flint-outlives")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(tmp) })
	if err := os.Chmod(tmp, 0o755); err != nil {
		t.Fatal(err)
	}
	dir = t.TempDir()
	dies := exec.CommandContext(patiently(t), os.Args[0], "-test.run=^TestOutlivesUs$")
	dies.Env = append(os.Environ(), "FLINT_TEST_DIES="+dir, "FLINT_TEST_ORPHAN="+id, "TMPDIR="+tmp)
	out, err := dies.Output()
	if dies.ProcessState.ExitCode() != 7 {
		t.Fatalf("%v: %s", err, out)
	}
	if _, err := fmt.Sscan(string(out), &pid, &start); err != nil {
		t.Fatalf("%v in %s", err, out)
	}
	return dir, pid, start
}

func TestLongDirectory(t *testing.T) {
	d, s := fakeDriver(t, "quits")
	s.Dir = filepath.Join(s.Dir, strings.Repeat("long-", 30))
	if err := os.Mkdir(s.Dir, 0o700); err != nil {
		t.Fatal(err)
	}
	m, err := d.Boot(patiently(t), s)
	if err != nil {
		t.Fatal(err)
	}
	if c, err := m.Dial(t.Context(), vm.AgentPort); err != nil {
		t.Errorf("dial: %v", err)
	} else {
		c.Close()
	}
	if err := m.Close(t.Context()); err != nil {
		t.Errorf("close: %v", err)
	}
	empty(t, s.Dir)
}

func TestUnusableFiles(t *testing.T) {
	d, s := fakeDriver(t, "quits")
	directory := s
	directory.Drives = []vm.Drive{{ID: "base", Path: t.TempDir(), ReadOnly: true}}
	if _, err := d.Boot(t.Context(), directory); err == nil || !strings.Contains(err.Error(), "not a regular file") {
		t.Errorf("a directory as drive: %v", err)
	}
	long := s
	long.Args = []string{strings.Repeat("x", maxCommandLine)}
	if _, err := d.Boot(t.Context(), long); err == nil || !strings.Contains(err.Error(), "kernel arguments") {
		t.Errorf("long kernel arguments: %v", err)
	}
	empty(t, s.Dir)
	if !d.drop {
		t.Skip("needs root: files QEMU's own user may not read")
	}
	if err := os.Chmod(s.Kernel, 0o600); err != nil {
		t.Fatal(err)
	}
	var f *flint.Fault
	if _, err := d.Boot(t.Context(), s); !errors.As(err, &f) || f.Code != "qemu.unreadable" {
		t.Errorf("kernel of root only: %v", err)
	}
	empty(t, s.Dir)
}

func empty(t *testing.T, dir string) {
	t.Helper()
	entries, err := os.ReadDir(dir)
	if err != nil || len(entries) > 0 {
		t.Errorf("left: %v, %v", entries, err)
	}
}

func FuzzMonitor(f *testing.F) {
	f.Add([]byte("{\"QMP\":{}}\r\n{\"return\":{}}\r\n{\"event\":\"SHUTDOWN\",\"data\":{\"guest\":true,\"reason\":\"guest-reset\"}}\r\n"))
	f.Add([]byte("{\"error\":{\"class\":\"x\",\"desc\":\"no\"}}\n"))
	f.Add([]byte("{\"event\":\"GUEST_PANICKED\"}\n{\"return\":1}\n{\"return\":2}\n"))
	f.Fuzz(func(t *testing.T, said []byte) {
		ours, theirs := net.Pipe()
		q := newQMP(ours)
		done := make(chan error, 1)
		go func() {
			err := q.listen()
			ours.Close()
			done <- err
		}()
		go func() { // what we say must be commands, one a line
			lines := bufio.NewScanner(theirs)
			for lines.Scan() {
				if lines.Text() != `{"execute":"qmp_capabilities"}` {
					t.Errorf("we said %q", lines.Text())
				}
			}
		}()
		_, _ = theirs.Write(said)
		theirs.Close()
		<-done
		q.ended()
	})
}
