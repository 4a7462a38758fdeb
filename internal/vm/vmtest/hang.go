package vmtest

import (
	"context"
	"syscall"
	"testing"
	"time"

	"flint/internal/guest"
	"flint/internal/vm"
)

// vmmHangs stops a VMM without ending it: the session notices by itself, and the machine can be closed.
func (s suite) vmmHangs(t *testing.T) {
	m, spec := s.boot(t)
	p, ok := m.(vm.Process)
	if !ok {
		t.Skip("the VMM is no process")
	}
	ctx, cancel := context.WithTimeout(t.Context(), Patience(t))
	defer cancel()
	conn, err := m.Dial(ctx, vm.AgentPort)
	if err != nil {
		t.Fatalf("dial: %v", err)
	}
	g, err := guest.Attach(ctx, conn, guest.Options{Heartbeat: time.Second})
	if err != nil {
		t.Fatalf("attach: %v", err)
	}
	defer g.Close()
	pid, _ := p.Process()
	if err := syscall.Kill(pid, syscall.SIGSTOP); err != nil {
		t.Fatal(err)
	}
	select {
	case <-g.Done():
		if g.Err() == nil {
			t.Error("the session does not say why it is over")
		}
	case <-ctx.Done():
		t.Error("the session does not notice that the VMM hangs")
	}
	if err := m.Close(ctx); err != nil {
		t.Errorf("close: %v", err)
	}
	if err := wait(t, m); err != nil {
		t.Errorf("wait: %v", err)
	}
	gone(t, m, spec)
}
