package firecracker

import (
	"context"
	"debug/elf"
	"errors"
	"io/fs"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"flint/internal/vm"
	"flint/internal/vm/firecracker/fctest"
)

// TestNothingLeft has every step of a boot fail in every way, and looks at what is left.
func TestNothingLeft(t *testing.T) {
	calls := []string{
		"GET /version", "PUT /logger", "PUT /metrics", "PUT /machine-config", "PUT /boot-source", "PUT /drives/base",
		"PUT /drives/more_modules", "PUT /vsock", "PUT /entropy", "PUT /balloon", "PUT /actions",
	}
	for _, call := range calls {
		t.Run("refuses "+call, func(t *testing.T) {
			r := newRig(t, fctest.Options{Answers: map[string]string{call: "No \x1b[31msuch thing."}})
			_, err := r.driver().Boot(patiently(t), r.spec())
			faultCode(t, err, "firecracker.api")
			var refused *apiError
			if !errors.As(err, &refused) || refused.Call != call || refused.Message != "No [31msuch thing." || refused.Status != 400 {
				t.Errorf("refusal %+v of %v", refused, err)
			}
			r.clean()
		})
	}
	for _, call := range []string{calls[0], calls[6], calls[len(calls)-1]} {
		t.Run("dies at "+call, func(t *testing.T) {
			r := newRig(t, fctest.Options{DieAt: call, DieCode: 148})
			_, err := r.driver().Boot(patiently(t), r.spec())
			faultCode(t, err, "firecracker.start")
			if err != nil && !strings.Contains(err.Error(), "system call") {
				t.Errorf("%v does not say what code 148 means", err)
			}
			r.clean()
		})
		t.Run("hangs at "+call, func(t *testing.T) {
			r := newRig(t, fctest.Options{HangAt: call})
			ctx, cancel := context.WithTimeout(t.Context(), 300*time.Millisecond)
			defer cancel()
			if _, err := r.driver().Boot(ctx, r.spec()); !errors.Is(err, context.DeadlineExceeded) {
				t.Errorf("error %v; want that the time was up", err)
			}
			r.clean()
		})
	}
	for name, o := range map[string]fctest.Options{"call": {HangAt: "PUT /vsock"}, "jailer": {JailHang: true}} {
		t.Run("hangs without a deadline at "+name, func(t *testing.T) {
			r := newRig(t, o)
			d := r.driver()
			d.within = 300 * time.Millisecond
			_, err := d.Boot(context.Background(), r.spec())
			faultCode(t, err, "firecracker.hung")
			r.clean()
		})
	}
	t.Run("jailer fails", func(t *testing.T) {
		r := newRig(t, fctest.Options{JailerIs: "create /dev/kvm via mknod inside the jail: Operation not permitted"})
		_, err := r.driver().Boot(patiently(t), r.spec())
		faultCode(t, err, "firecracker.start")
		if err != nil && !strings.Contains(err.Error(), "mknod inside the jail") {
			t.Errorf("%v lacks the jailer's words", err)
		}
		r.clean()
	})
	t.Run("bare", func(t *testing.T) {
		r := newBareRig(t, fctest.Options{Answers: map[string]string{"PUT /balloon": "No."}})
		_, err := r.driver().Boot(patiently(t), r.spec())
		faultCode(t, err, "firecracker.api")
		r.clean()
	})
	t.Run("KVM", func(t *testing.T) {
		r := newBareRig(t, fctest.Options{Answers: map[string]string{"PUT /actions": "Start microvm error: Kvm error: Error creating KVM object: No such file or directory (os error 2)"}})
		_, err := r.driver().Boot(patiently(t), r.spec())
		faultCode(t, err, "firecracker.kvm")
	})
	for name, words := range map[string]string{
		"guest's memory": "Invalid Memory Configuration: Cannot create mmap region: Out of memory (os error 12)",
		"KVM's memory":   "Start microvm error: Kvm error: Cannot create VM: Cannot allocate memory (os error 12)",
	} {
		t.Run(name, func(t *testing.T) {
			r := newBareRig(t, fctest.Options{Answers: map[string]string{"PUT /actions": words}})
			_, err := r.driver().Boot(patiently(t), r.spec())
			faultCode(t, err, "firecracker.memory")
			r.clean()
		})
	}
}

func TestVersions(t *testing.T) {
	for _, c := range []struct {
		version, code string
	}{{"1.12.1", "firecracker.version"}, {"0.25.0", "firecracker.version"}, {"nonsense", "firecracker.version"}, {"1.13.0", ""}, {"1.14.0", ""}, {"1.17.0-dev", ""}, {"2.0.0", ""}} {
		r := newBareRig(t, fctest.Options{Version: c.version})
		d, err := newDriver(t.Context(), r.config, r.fs)
		if c.code != "" {
			faultCode(t, err, c.code)
			continue
		}
		if err != nil {
			t.Errorf("%s: %v", c.version, err)
			continue
		}
		output(t, attach(t, r.boot(d, r.spec())), "true") // the double refuses what its version does not know
	}
	r := newRig(t, fctest.Options{Version: "1.15.0"})
	r.config.Firecracker = fctest.Install(t, doubles, fctest.Options{Version: "1.16.0"}).Firecracker
	_, err := newDriver(t.Context(), r.config, r.fs)
	faultCode(t, err, "firecracker.mismatch")
	r.config.Firecracker = filepath.Join(r.dir, "absent")
	_, err = newDriver(t.Context(), r.config, r.fs)
	faultCode(t, err, "firecracker.missing")
	r.config.Firecracker = "/bin/true"
	_, err = newDriver(t.Context(), r.config, r.fs)
	faultCode(t, err, "firecracker.version")
}

// TestProgramForJail tries programs that a jail, where there is nothing but the program, cannot run.
func TestProgramForJail(t *testing.T) {
	r := newRig(t, fctest.Options{})
	if err := os.Chmod(r.config.Firecracker, 0o750); err != nil {
		t.Fatal(err)
	}
	_, err := newDriver(t.Context(), r.config, r.fs)
	faultCode(t, err, "firecracker.unreadable")
	if err := os.WriteFile(r.config.Firecracker, []byte("#!/bin/sh\necho Firecracker v1.16.1\n"), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.Chmod(r.config.Firecracker, 0o755); err != nil {
		t.Fatal(err)
	}
	_, err = newDriver(t.Context(), r.config, r.fs)
	faultCode(t, err, "firecracker.static")
	self, err := exec.LookPath("sh")
	if err != nil {
		t.Fatal(err)
	}
	err = selfContained(self)
	if program, perr := elf.Open(self); perr != nil || program.Section(".interp") == nil {
		t.Skip("needs a shell that is linked dynamically")
	}
	faultCode(t, err, "firecracker.static")
}

// TestExposedPrograms tries programs that everybody could change or replace: root must not so much as ask their version.
func TestExposedPrograms(t *testing.T) {
	r := newRig(t, fctest.Options{})
	jailer := filepath.Join(t.TempDir(), "jailer") // in a directory of its own
	if b, err := os.ReadFile(r.config.Jailer); err != nil || os.WriteFile(jailer, b, 0o755) != nil {
		t.Fatal(err)
	}
	r.config.Jailer = jailer
	for _, c := range []struct {
		path string
		mode fs.FileMode
		code string
	}{
		{r.config.Firecracker, 0o757, "firecracker.exposed"},
		{filepath.Dir(r.config.Firecracker), 0o777, "firecracker.exposed"},
		{filepath.Dir(r.config.Firecracker), fs.ModeSticky | 0o777, ""},
		{jailer, 0o757, "firecracker.exposed"},
		{filepath.Dir(jailer), 0o777, "firecracker.exposed"},
		{jailer, 0o775, ""}, // its group is its owner's affair
	} {
		before, err := os.Stat(c.path)
		if err != nil {
			t.Fatal(err)
		}
		if err := os.Chmod(c.path, c.mode); err != nil {
			t.Fatal(err)
		}
		_, err = newDriver(t.Context(), r.config, r.fs)
		if c.code != "" {
			faultCode(t, err, c.code)
		} else if err != nil {
			t.Errorf("%s with %v: %v", c.path, c.mode, err)
		}
		if err := os.Chmod(c.path, before.Mode()); err != nil {
			t.Fatal(err)
		}
	}
	ran := filepath.Join(r.dir, "ran")
	if err := os.WriteFile(r.config.Firecracker, []byte("#!/bin/sh\n: >"+ran+"\n"), 0o757); err != nil {
		t.Fatal(err)
	}
	if err := os.Chmod(r.config.Firecracker, 0o757); err != nil {
		t.Fatal(err)
	}
	_, err := newDriver(t.Context(), r.config, r.fs)
	faultCode(t, err, "firecracker.exposed")
	if _, err := os.Stat(ran); err == nil {
		t.Error("it was run")
	}
}

// TestProgramsGone has the programs replaced while the driver has their old paths.
func TestProgramsGone(t *testing.T) {
	r := newRig(t, fctest.Options{})
	d := r.driver()
	if err := os.Rename(r.config.Firecracker, r.config.Firecracker+".new"); err != nil {
		t.Fatal(err)
	}
	_, err := d.Boot(patiently(t), r.spec())
	faultCode(t, err, "firecracker.start") // the jailer says what it lacks
	if err != nil && !strings.Contains(err.Error(), "canonicalize path "+r.config.Firecracker) {
		t.Errorf("%v does not say what is missing", err)
	}
	if err := os.Remove(r.config.Jailer); err != nil {
		t.Fatal(err)
	}
	_, err = d.Boot(patiently(t), r.spec())
	faultCode(t, err, "firecracker.missing")
	r.clean()
}

func TestHungVMM(t *testing.T) {
	r := newRig(t, fctest.Options{})
	m := r.boot(r.driver(), r.spec())
	g := attach(t, m)
	pid, _ := m.Process()
	if err := unix.Kill(pid, unix.SIGSTOP); err != nil {
		t.Fatal(err)
	}
	if err := m.Close(patiently(t)); err != nil {
		t.Errorf("close a VMM that is stopped: %v", err)
	}
	select {
	case <-g.Done():
	case <-patiently(t).Done():
		t.Error("the session goes on")
	}
	r.clean()
}

func TestGuestThatNeverAnswers(t *testing.T) {
	for name, o := range map[string]fctest.Options{"hangs up": {Mute: true}, "says nothing": {Deaf: true}} {
		t.Run(name, func(t *testing.T) {
			r := newBareRig(t, o)
			m := r.boot(r.driver(), r.spec())
			ctx, cancel := context.WithTimeout(t.Context(), 200*time.Millisecond)
			defer cancel()
			if conn, err := m.Dial(ctx, vm.AgentPort); !errors.Is(err, context.DeadlineExceeded) {
				t.Errorf("dialled %v, %v", conn, err)
			}
			dead := make(chan error, 1)
			go func() {
				_, err := m.Dial(patiently(t), vm.AgentPort)
				dead <- err
			}()
			pid, _ := m.Process()
			if err := unix.Kill(pid, unix.SIGKILL); err != nil {
				t.Fatal(err)
			}
			if err := <-dead; !errors.Is(err, net.ErrClosed) {
				t.Errorf("dial a VMM that died: %v", err)
			}
		})
	}
}

func TestMetrics(t *testing.T) {
	want := vm.Counters{NetRx: 2048, NetTx: 1024, BlockRead: 8 << 20, BlockWrite: 1 << 20}
	for name, end := range map[string]func(*machine) error{
		"closed": func(m *machine) error { return nil },
		"rebooted": func(m *machine) error {
			g := attach(t, m)
			if err := g.Reboot(t.Context()); err != nil {
				return err
			}
			return m.Wait(patiently(t))
		},
	} {
		t.Run(name, func(t *testing.T) {
			r := newRig(t, fctest.Options{})
			m := r.boot(r.driver(), r.spec())
			if err := end(m); err != nil {
				t.Error(err)
			}
			if err := m.Close(t.Context()); err != nil {
				t.Error(err)
			}
			got := m.Metrics()
			if got.Boot <= 0 || got.Boot > time.Minute {
				t.Errorf("the boot took %s", got.Boot)
			}
			if got.Boot = 0; got != want {
				t.Errorf("counters %+v; want %+v", got, want)
			}
		})
	}
}

// TestWithoutSerial shows what can be told of a guest without a console.
func TestWithoutSerial(t *testing.T) {
	r := newRig(t, fctest.Options{})
	r.config.Serial = false
	m := r.boot(r.driver(), r.spec())
	if err := attach(t, m).Reboot(t.Context()); err != nil {
		t.Fatal(err)
	}
	if err := m.Wait(patiently(t)); err != nil {
		t.Errorf("wait: %v", err)
	}
	if c := m.Console(); len(c) != 0 {
		t.Errorf("a guest without a console has said %q", c)
	}
	if l := string(m.Log()); !strings.Contains(l, "exiting successfully") {
		t.Errorf("Firecracker's log is %q", l)
	}
	if strings.Contains(string(m.out.Bytes()), "Linux version") {
		t.Error("the guest has a serial console all the same")
	}
}

func TestOutOfMemory(t *testing.T) {
	r := newRig(t, fctest.Options{})
	if r.fs.mounts == "/proc/self/mounts" {
		t.Skip("the cgroups are real, and their counters not for tests to write")
	}
	s := r.spec()
	m := r.boot(r.driver(), s)
	events := filepath.Join(r.groups, r.config.ParentCgroup, s.ID, "memory.events")
	if err := os.WriteFile(events, []byte("low 0\noom 1\noom_kill 3\n"), 0o644); err != nil {
		t.Fatal(err)
	}
	pid, _ := m.Process()
	if err := unix.Kill(pid, unix.SIGKILL); err != nil {
		t.Fatal(err)
	}
	err := m.Wait(patiently(t))
	faultCode(t, err, "firecracker.oom")
	if !errors.Is(err, vm.ErrMemory) {
		t.Errorf("%v is not vm.ErrMemory", err)
	}
}

func TestLongPaths(t *testing.T) {
	r := newRig(t, fctest.Options{})
	r.config.ChrootBase = filepath.Join(r.dir, strings.Repeat("long/", 20), "jail")
	m := r.boot(r.driver(), r.spec())
	output(t, attach(t, m), "true")
	bare := newBareRig(t, fctest.Options{})
	s := bare.spec()
	s.Dir = filepath.Join(s.Dir, strings.Repeat("d", 120))
	if err := os.Mkdir(s.Dir, 0o700); err != nil {
		t.Fatal(err)
	}
	output(t, attach(t, bare.boot(bare.driver(), s)), "true")
}

func TestCrash(t *testing.T) {
	r := newRig(t, fctest.Options{})
	s := r.spec()
	before := r.driver()
	m := r.boot(before, s)
	after := r.driver() // of the next process
	if err := after.Sweep(t.Context()); err != nil {
		t.Errorf("sweep while the VMM runs: %v", err)
	}
	output(t, attach(t, m), "true")
	_, err := after.Boot(patiently(t), s)
	faultCode(t, err, "firecracker.busy")
	_, err = before.Boot(patiently(t), s)
	faultCode(t, err, "firecracker.busy")

	pid, _ := m.Process()
	if err := unix.Kill(pid, unix.SIGKILL); err != nil {
		t.Fatal(err)
	}
	if m.Wait(patiently(t)) == nil {
		t.Error("it was killed, and Wait does not say so")
	}
	// The VMM is gone, and everything of it is there yet. As long as who booted it lives, it is theirs to remove.
	if err := after.Sweep(t.Context()); err != nil {
		t.Errorf("sweep beside another flint: %v", err)
	}
	_, err = after.Boot(patiently(t), s)
	faultCode(t, err, "firecracker.busy")
	if _, err := os.Stat(filepath.Join(after.base, s.ID, "root")); err != nil {
		t.Errorf("a sweep took away what another flint has: %v", err)
	}
	m.Forget()
	again, err := after.Boot(patiently(t), s)
	if err != nil {
		t.Fatalf("boot over what a crash left: %v", err)
	}
	output(t, attach(t, again), "true")
	if reserved, err := after.uids.reservations(); err != nil || len(reserved) != 1 {
		t.Errorf("users %v are reserved, %v; want that of the new VM", reserved, err)
	}
	pid, _ = again.(*machine).Process()
	if err := unix.Kill(pid, unix.SIGKILL); err != nil {
		t.Fatal(err)
	}
	_ = again.Wait(patiently(t))
	again.(*machine).Forget()
	last := r.driver()
	if err := last.Sweep(t.Context()); err != nil {
		t.Errorf("sweep: %v", err)
	}
	if err := last.Sweep(t.Context()); err != nil {
		t.Errorf("sweep again: %v", err)
	}
	_ = os.Remove(filepath.Join(s.Dir, "unused"))
	r.clean()
	if err := errors.Join(m.Close(t.Context()), again.Close(t.Context())); err != nil {
		t.Errorf("close what was swept: %v", err)
	}
}

// TestSweepSparesNamesake has a reservation left of a VM whose name a running one has.
func TestSweepSparesNamesake(t *testing.T) {
	r := newRig(t, fctest.Options{})
	d, s := r.driver(), r.spec()
	m := r.boot(d, s)
	stale := d.uids.file(testUIDs.First + testUIDs.Count - 1)
	if err := os.WriteFile(stale, []byte(d.holder(s.ID)), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := r.driver().Sweep(t.Context()); err != nil {
		t.Error(err)
	}
	if _, err := os.Stat(stale); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("the old reservation is there yet: %v", err)
	}
	if _, err := os.Stat(filepath.Join(d.base, s.ID, "root")); err != nil {
		t.Errorf("the running VM lost its jail: %v", err)
	}
	output(t, attach(t, m), "true")
	if err := m.Close(t.Context()); err != nil {
		t.Error(err)
	}
	r.clean()
}

// TestReleaseFails has the kernel keep a cgroup, which is tried again later.
func TestReleaseFails(t *testing.T) {
	r := newRig(t, fctest.Options{})
	refuses := true
	remove := r.fs.remove
	r.fs.remove = func(dir string) error {
		if refuses {
			return &os.PathError{Op: "rmdir", Path: dir, Err: unix.EIO}
		}
		return remove(dir)
	}
	d, s := r.driver(), r.spec()
	m, err := d.Boot(patiently(t), s)
	if err != nil {
		t.Fatal(err)
	}
	if err := m.Close(t.Context()); !errors.Is(err, unix.EIO) {
		t.Errorf("close: %v", err)
	}
	if err := d.Sweep(t.Context()); !errors.Is(err, unix.EIO) {
		t.Errorf("sweep while the kernel still refuses: %v", err)
	}
	refuses = false
	if err := d.Sweep(t.Context()); err != nil {
		t.Errorf("sweep: %v", err)
	}
	r.clean()
}

// TestExitNames are Firecracker's own numbers (FcExitCode).
func TestExitNames(t *testing.T) {
	for code, word := range map[int]string{148: "system call", 149: "SIGBUS", 150: "SIGSEGV", 151: "SIGXFSZ", 154: "SIGXCPU", 155: "SIGPIPE", 156: "SIGHUP", 157: "SIGILL"} {
		if !strings.Contains(exitNames[code], word) {
			t.Errorf("code %d is called %q; want %s", code, exitNames[code], word)
		}
	}
}

// TestPeakMemory holds what a VMM is said to have used to the VMM, and not to the process that forked it.
func TestPeakMemory(t *testing.T) {
	r := newRig(t, fctest.Options{})
	if r.fs.mounts == "/proc/self/mounts" {
		t.Skip("the cgroups are real, and their counters not for tests to write")
	}
	s := r.spec()
	m := r.boot(r.driver(), s)
	if err := os.WriteFile(filepath.Join(r.groups, r.config.ParentCgroup, s.ID, "memory.peak"), []byte("1052672\n"), 0o644); err != nil {
		t.Fatal(err)
	}
	if err := m.Close(t.Context()); err != nil {
		t.Error(err)
	}
	if got := m.PeakMemory(); got != 1052672 {
		t.Errorf("peak memory %d; want the group's", got)
	}
}

// TestForeignJail finds a directory in the way that flint did not make.
func TestForeignJail(t *testing.T) {
	r := newRig(t, fctest.Options{})
	d, s := r.driver(), r.spec()
	theirs := filepath.Join(d.base, s.ID, "precious")
	if err := os.MkdirAll(theirs, 0o755); err != nil {
		t.Fatal(err)
	}
	_, err := d.Boot(patiently(t), s)
	faultCode(t, err, "firecracker.busy")
	if err := d.Sweep(t.Context()); err != nil {
		t.Error(err)
	}
	if _, err := os.Stat(theirs); err != nil {
		t.Errorf("what flint did not make is gone: %v", err)
	}
}
