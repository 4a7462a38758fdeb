package vmtest

import (
	"bytes"
	"context"
	"errors"
	"io"
	"os"
	"strconv"
	"testing"

	"flint"
	"flint/internal/guest"
	"flint/internal/vm"
)

// forgetter is implemented by machines a test can make let go of their VMM, as the end of the process that booted it
// would: all connections and pipes to it closed, and nothing else. Without it the VMM has two masters for a while.
type forgetter interface{ Forget() }

// adopt hands a machine from one driver to another.
func (s suite) adopt(t *testing.T) {
	d, spec := s.make(t)
	if _, ok := d.(vm.Adopter); !ok {
		return
	}
	second, _ := s.make(t)
	heir := second.(vm.Adopter)
	first := boot(t, d, spec)
	pid, start := first.(vm.Process).Process()
	name := vm.Spec{ID: spec.ID, Dir: spec.Dir} // the rest may be gone by the time a VM is adopted
	refuse(t, heir, name, pid, start)
	unheard(t, first)
	if f, ok := first.(forgetter); ok {
		f.Forget()
	}
	m, err := heir.Adopt(t.Context(), name, pid, start)
	if err != nil {
		t.Fatalf("adopt: %v", err)
	}
	t.Cleanup(func() {
		if err := m.Close(context.Background()); err != nil {
			t.Errorf("close: %v", err)
		}
	})
	if p, s := m.(vm.Process).Process(); p != pid || s != start {
		t.Errorf("adopted process %d of %d, want %d of %d", p, s, pid, start)
	}
	g := attach(t, m)
	resume(t, g)
	if exit, out, _ := execute(t, g, nil, "echo", "still here"); exit.Code != 0 || out != "still here\n" {
		t.Errorf("the adopted machine: exit %+v, stdout %q", exit, out)
	}
	if u, ok := m.(vm.Usage); ok && (u.PeakMemory() < flint.MiB || u.PeakMemory() > flint.TiB) {
		t.Errorf("peak memory is %s", u.PeakMemory())
	}
	if err := g.Reboot(t.Context()); err != nil {
		t.Errorf("reboot: %v", err)
	}
	if err := wait(t, m); err != nil {
		t.Errorf("wait after the guest's reboot: %v", err)
	}
	_ = wait(t, first) // what it saw of the end depends on what it had forgotten
	for range 2 {
		if err := m.Close(t.Context()); err != nil {
			t.Errorf("close: %v", err)
		}
	}
	gone(t, m, spec)
	if _, err := m.Dial(t.Context(), vm.AgentPort); err == nil {
		t.Error("a machine that is gone can be dialled")
	}
	if _, err := heir.Adopt(t.Context(), name, pid, start); !errors.Is(err, flint.ErrNotFound) {
		t.Errorf("adopt a machine that is gone: %v", err)
	}
}

// much is more than what is on the way between the guest and a host that does not listen.
const much = 3 << 20

// deaf is a writer that takes nothing until its process dies.
type deaf struct{ spoken, dead chan struct{} }

// Write implements io.Writer.
func (d deaf) Write([]byte) (int, error) {
	select {
	case <-d.spoken:
	default:
		close(d.spoken)
	}
	<-d.dead
	return 0, io.ErrClosedPipe
}

// unheard begins a process with much to say, which nobody hears, and has the host die meanwhile.
func unheard(t *testing.T, m vm.Machine) {
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
	defer g.Close()
	out := deaf{make(chan struct{}), make(chan struct{})}
	over := make(chan error, 1)
	go func() {
		_, err := g.Exec(ctx, guest.Command{Args: []string{"head", "-c", strconv.Itoa(much), "/dev/zero"}, Dir: "/"}, guest.IO{Stdout: out})
		over <- err
	}()
	select {
	case <-out.spoken:
	case <-ctx.Done():
		t.Error("the guest's process says nothing")
	}
	_ = conn.Close() // without a goodbye
	close(out.dead)
	if err := <-over; err == nil {
		t.Error("a process whose host died ended well")
	}
}

// resume hears all of what unheard did not.
func resume(t *testing.T, g *guest.Session) {
	t.Helper()
	running := g.Hello().Processes
	if len(running) != 1 {
		t.Fatalf("the guest has processes %+v; want the one that was left", running)
	}
	ctx, cancel := context.WithTimeout(t.Context(), Patience(t))
	defer cancel()
	var out bytes.Buffer
	exit, err := g.Resume(ctx, running[0], guest.IO{Stdout: &out})
	if err != nil || exit.Code != 0 || out.Len() != much || len(bytes.Trim(out.Bytes(), "\x00")) != 0 {
		t.Errorf("what an earlier host did not hear: exit %+v, %v, %d bytes of %d", exit, err, out.Len(), much)
	}
}

// refuse tries to adopt what is not the VM's process, which must harm nobody.
func refuse(t *testing.T, d vm.Adopter, spec vm.Spec, pid int, start uint64) {
	t.Helper()
	own, err := vm.ProcessStart(os.Getpid())
	if err != nil {
		t.Fatal(err)
	}
	other := vm.Spec{ID: spec.ID + "-other", Dir: t.TempDir()}
	for name, c := range map[string]struct {
		spec  vm.Spec
		pid   int
		start uint64
	}{
		"a process that began later": {spec, pid, start + 1},
		"another program":            {spec, os.Getpid(), own},
		"no process":                 {spec, 0, 0},
		"another VM's":               {other, pid, start},
	} {
		if m, err := d.Adopt(t.Context(), c.spec, c.pid, c.start); !errors.Is(err, flint.ErrNotFound) {
			t.Errorf("%s: adopted %v, %v", name, m, err)
		}
	}
}
