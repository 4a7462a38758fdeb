package vmtest

import (
	"bytes"
	"context"
	"errors"
	"io"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"flint"
	"flint/internal/guest"
	"flint/internal/vm"
)

// Patience bounds everything a test of a driver waits for. It is long, because a guest may be emulated on a busy machine; it
// only matters when something is broken. FLINT_TEST_PATIENCE sets another, for a host that is emulated itself.
func Patience(t testing.TB) time.Duration {
	t.Helper()
	const usual = 2 * time.Minute
	text := os.Getenv("FLINT_TEST_PATIENCE")
	if text == "" {
		return usual
	}
	d, err := time.ParseDuration(text)
	if err != nil || d <= 0 {
		t.Errorf("FLINT_TEST_PATIENCE is %q: want a time such as 5m", text)
		return usual
	}
	return d
}

// Run holds a driver to the contract of vm.Driver and vm.Machine. Each call of make returns a driver (it may be the same) and a
// bootable spec whose Dir, and writable drives, nothing else uses. The guest must have the agent and a shell with the usual programs;
// its machines are thrown away. Abilities beyond the contract (vm.Console, vm.Usage, vm.Process, vm.Adopter) are tested where a
// machine or a driver has them; an Adopter must be a new one each time, as if each were another process's.
func Run(t *testing.T, make func(t *testing.T) (vm.Driver, vm.Spec)) {
	s := suite{make}
	t.Run("Life", s.life)
	t.Run("CloseWhileRunning", s.closeWhileRunning)
	t.Run("DialAgain", s.dialAgain)
	t.Run("CancelledBoot", s.cancelledBoot)
	t.Run("BadSpec", s.badSpec)
	t.Run("GuestPanics", s.guestPanics)
	t.Run("VMMKilled", s.vmmKilled)
	t.Run("VMMHangs", s.vmmHangs)
	t.Run("TwoAtOnce", s.twoAtOnce)
	t.Run("Adopt", s.adopt)
}

type suite struct {
	make func(t *testing.T) (vm.Driver, vm.Spec)
}

// boot boots a machine that is closed when the test ends.
func (s suite) boot(t *testing.T) (vm.Machine, vm.Spec) {
	t.Helper()
	d, spec := s.make(t)
	return boot(t, d, spec), spec
}

func boot(t *testing.T, d vm.Driver, spec vm.Spec) vm.Machine {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), Patience(t))
	defer cancel() // a machine does not depend on the context it was booted with
	m, err := d.Boot(ctx, spec)
	if err != nil {
		t.Fatalf("boot: %v", err)
	}
	t.Cleanup(func() {
		if err := m.Close(context.Background()); err != nil {
			t.Errorf("close: %v", err)
		}
		if c, ok := m.(vm.Console); ok && t.Failed() {
			t.Logf("console of %s:\n%q", spec.ID, c.Console())
		}
	})
	return m
}

// attach opens a session that is closed when the test ends.
func attach(t *testing.T, m vm.Machine) *guest.Session {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), Patience(t))
	defer cancel()
	conn, err := m.Dial(ctx, vm.AgentPort)
	if err != nil {
		t.Fatalf("dial: %v", err)
	}
	g, err := guest.Attach(ctx, conn, guest.Options{Heartbeat: Patience(t)})
	if err != nil {
		t.Fatalf("attach: %v", err)
	}
	t.Cleanup(func() { _ = g.Close() })
	return g
}

// wait returns what Wait says, and fails the test if it says nothing.
func wait(t *testing.T, m vm.Machine) error {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), Patience(t))
	defer cancel()
	err := m.Wait(ctx)
	if errors.Is(err, context.DeadlineExceeded) {
		t.Fatal("the machine does not end")
	}
	return err
}

func execute(t *testing.T, g *guest.Session, stdin io.Reader, args ...string) (guest.Exit, string, string) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), Patience(t))
	defer cancel()
	var out, errs bytes.Buffer
	exit, err := g.Exec(ctx, guest.Command{Args: args, Dir: "/"}, guest.IO{Stdin: stdin, Stdout: &out, Stderr: &errs})
	if err != nil {
		t.Errorf("execute %q: %v", args, err)
	}
	return exit, out.String(), errs.String()
}

// gone checks that nothing of an ended machine is left.
func gone(t *testing.T, m vm.Machine, spec vm.Spec) {
	t.Helper()
	entries, err := os.ReadDir(spec.Dir)
	if err != nil {
		t.Fatal(err)
	}
	for _, e := range entries {
		path := filepath.Join(spec.Dir, e.Name())
		if !mentions(spec, path) {
			t.Errorf("%s is left", path)
		}
	}
	if p, ok := m.(vm.Process); ok {
		if pid, _ := p.Process(); syscall.Kill(pid, 0) == nil {
			t.Errorf("VMM process %d is left", pid)
		}
	}
}

func mentions(spec vm.Spec, path string) bool {
	for _, d := range spec.Drives {
		if d.Path == path {
			return true
		}
	}
	return path == spec.Kernel || path == spec.Initrd
}

func (s suite) life(t *testing.T) {
	m, spec := s.boot(t)
	g := attach(t, m)
	if h := g.Hello(); h.Version != guest.Version || h.Boot == "" || h.Kernel == "" {
		t.Errorf("hello %+v lacks version, boot or kernel", h)
	}
	_, err := g.Configure(t.Context(), guest.Config{
		Hostname: spec.ID, MachineID: strings.Repeat("5a", 16), Time: time.Now(), Entropy: bytes.Repeat([]byte{0x5a}, 32),
	})
	if err != nil {
		t.Fatalf("configure: %v", err)
	}
	for _, c := range []struct {
		args           []string
		stdin          string
		code           int
		stdout, stderr string
	}{
		{args: []string{"true"}},
		{args: []string{"false"}, code: 1},
		{args: []string{"echo", "hello", "flint"}, stdout: "hello flint\n"},
		{args: []string{"sh", "-c", "echo out; echo err >&2; exit 42"}, code: 42, stdout: "out\n", stderr: "err\n"},
		{args: []string{"cat"}, stdin: "through and back", stdout: "through and back"},
	} {
		exit, out, errs := execute(t, g, strings.NewReader(c.stdin), c.args...)
		if exit.Code != c.code || out != c.stdout || errs != c.stderr {
			t.Errorf("%q: exit %+v, stdout %q, stderr %q; want code %d, %q, %q", c.args, exit, out, errs, c.code, c.stdout, c.stderr)
		}
	}
	if exit, _, _ := execute(t, g, nil, "no-such-program-in-any-image"); exit.Code != 127 {
		t.Errorf("a program that does not exist: exit %+v, want code 127", exit)
	}
	big(t, g)
	processBasics(t, m)
	if err := g.Reboot(t.Context()); err != nil {
		t.Errorf("reboot: %v", err)
	}
	if err := wait(t, m); err != nil {
		t.Errorf("wait after the guest's reboot: %v", err)
	}
	for range 2 {
		if err := m.Close(t.Context()); err != nil {
			t.Errorf("close: %v", err)
		}
	}
	gone(t, m, spec)
	afterwards(t, m)
}

// big pushes more through two processes at once than any buffer on the way holds, both ways.
func big(t *testing.T, g *guest.Session) {
	const size = 3 << 20
	var both sync.WaitGroup
	both.Go(func() {
		if exit, out, _ := execute(t, g, nil, "head", "-c", "3145728", "/dev/zero"); exit.Code != 0 || len(out) != size || strings.Trim(out, "\x00") != "" {
			t.Errorf("much output: exit %+v, %d bytes of %d", exit, len(out), size)
		}
	})
	both.Go(func() {
		in := strings.Repeat("0123456789abcdef", size/16)
		if exit, out, _ := execute(t, g, strings.NewReader(in), "cat"); exit.Code != 0 || out != in {
			t.Errorf("much input: exit %+v, %d bytes of %d", exit, len(out), size)
		}
	})
	both.Wait()
}

func processBasics(t *testing.T, m vm.Machine) {
	p, ok := m.(vm.Process)
	if !ok {
		return
	}
	pid, start := p.Process()
	if pid <= 1 || start == 0 || syscall.Kill(pid, 0) != nil {
		t.Errorf("process %d that began at %d is not the VMM's", pid, start)
	}
}

// afterwards checks what must still be known of a machine that is gone.
func afterwards(t *testing.T, m vm.Machine) {
	if c, ok := m.(vm.Console); ok && len(c.Console()) > 1<<20 {
		t.Errorf("console has %d bytes: it is not bounded", len(c.Console()))
	}
	if u, ok := m.(vm.Usage); ok && (u.PeakMemory() < flint.MiB || u.PeakMemory() > flint.TiB) {
		t.Errorf("peak memory was %s", u.PeakMemory())
	}
	if _, err := m.Dial(t.Context(), vm.AgentPort); err == nil {
		t.Error("a machine that is gone can be dialled")
	}
}

func (s suite) closeWhileRunning(t *testing.T) {
	m, spec := s.boot(t)
	attach(t, m)
	impatient, cancel := context.WithCancel(t.Context())
	cancel()
	if err := m.Wait(impatient); !errors.Is(err, context.Canceled) {
		t.Errorf("wait with a context that is over: %v", err)
	}
	var waiters, closers sync.WaitGroup
	for range 5 {
		waiters.Go(func() {
			if err := wait(t, m); err != nil {
				t.Errorf("wait while the machine is closed: %v", err)
			}
		})
	}
	for range 2 {
		closers.Go(func() {
			if err := m.Close(t.Context()); err != nil {
				t.Errorf("close: %v", err)
			}
			gone(t, m, spec)
		})
	}
	closers.Wait()
	waiters.Wait()
	afterwards(t, m)
}

func (s suite) dialAgain(t *testing.T) {
	m, _ := s.boot(t)
	if _, err := m.Dial(t.Context(), vm.AgentPort+1); err == nil {
		t.Error("a port nobody listens on can be dialled")
	}
	over, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := m.Dial(over, vm.AgentPort); !errors.Is(err, context.Canceled) {
		t.Errorf("dial with a context that is over: %v", err)
	}
	// A host that gives up before the guest is up leaves half a greeting behind.
	short, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
	defer cancel()
	if conn, err := m.Dial(short, vm.AgentPort); err == nil {
		if early, err := guest.Attach(short, conn, guest.Options{}); err == nil {
			_ = early.Close() // a Fake's guest is up at once
		}
	}
	first := attach(t, m)
	if exit, out, _ := execute(t, first, nil, "echo", "one"); exit.Code != 0 || out != "one\n" {
		t.Errorf("first session: exit %+v, stdout %q", exit, out)
	}
	second := attach(t, m)
	select {
	case <-first.Done():
	case <-time.After(Patience(t)):
		t.Error("the first stream goes on beside the second")
	}
	if exit, out, _ := execute(t, second, nil, "echo", "two"); exit.Code != 0 || out != "two\n" {
		t.Errorf("second session: exit %+v, stdout %q", exit, out)
	}
}

func (s suite) guestPanics(t *testing.T) {
	m, spec := s.boot(t)
	g := attach(t, m)
	ctx, cancel := context.WithTimeout(t.Context(), Patience(t))
	defer cancel()
	if exit, err := g.Exec(ctx, guest.Command{Args: []string{"sh", "-c", crashScript}, Dir: "/"}, guest.IO{}); err == nil || ctx.Err() != nil {
		t.Errorf("a command that crashed the guest: exit %+v, %v", exit, err)
	}
	if err := wait(t, m); err == nil {
		t.Error("wait after the guest panicked: no error")
	}
	if err := m.Close(t.Context()); err != nil {
		t.Errorf("close: %v", err)
	}
	if c, ok := m.(vm.Console); ok && !bytes.Contains(c.Console(), []byte("Kernel panic")) {
		t.Errorf("console does not tell of the panic: %q", c.Console())
	}
	gone(t, m, spec)
}

// crasher is implemented by drivers whose machines are not processes.
type crasher interface{ Crash(id string) bool }

func (s suite) vmmKilled(t *testing.T) {
	d, spec := s.make(t)
	m := boot(t, d, spec)
	g := attach(t, m)
	switch v := any(d).(type) {
	case crasher:
		if !v.Crash(spec.ID) {
			t.Fatal("there is no machine to crash")
		}
	default:
		p, ok := m.(vm.Process)
		if !ok {
			t.Skip("the VMM is no process, and the driver cannot crash it")
		}
		pid, _ := p.Process()
		if err := syscall.Kill(pid, syscall.SIGKILL); err != nil {
			t.Fatal(err)
		}
	}
	if err := wait(t, m); err == nil {
		t.Error("wait after the VMM was killed: no error")
	}
	select {
	case <-g.Done():
	case <-time.After(Patience(t)):
		t.Error("the session outlives its machine")
	}
	if err := m.Close(t.Context()); err != nil {
		t.Errorf("close: %v", err)
	}
	if err := wait(t, m); err == nil {
		t.Error("closing a dead machine made its death forgotten")
	}
	gone(t, m, spec)
}

func (s suite) twoAtOnce(t *testing.T) {
	m1, _ := s.boot(t)
	m2, _ := s.boot(t)
	g1, g2 := attach(t, m1), attach(t, m2)
	if g1.Hello().Boot == g2.Hello().Boot {
		t.Errorf("both guests are boot %q", g1.Hello().Boot)
	}
	if err := m1.Close(t.Context()); err != nil {
		t.Errorf("close: %v", err)
	}
	if exit, out, _ := execute(t, g2, nil, "echo", "still here"); exit.Code != 0 || out != "still here\n" {
		t.Errorf("the other machine: exit %+v, stdout %q", exit, out)
	}
}
