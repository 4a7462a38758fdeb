package vm

import (
	"errors"
	"os"
	"os/exec"
	"testing"

	"flint"
)

// sleeper starts a process that goes on until its standard input, which is the second value, is closed.
func sleeper(t *testing.T) (*exec.Cmd, func() error) {
	t.Helper()
	cmd := exec.Command("cat")
	in, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Skipf("needs cat: %v", err)
	}
	t.Cleanup(func() { _ = cmd.Process.Kill(); _ = cmd.Wait() })
	// Some kernels round the memory of a program that has just begun down to nothing.
	if _, err := in.Write([]byte("x")); err != nil {
		t.Fatal(err)
	}
	if _, err := out.Read(make([]byte, 1)); err != nil {
		t.Fatal(err)
	}
	return cmd, in.Close
}

func hold(t *testing.T, pid int) *Pidfd {
	t.Helper()
	start, err := ProcessStart(pid)
	if err != nil {
		t.Fatal(err)
	}
	p, err := OpenProcess(pid, start)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = p.Close() })
	return p
}

func TestPidfd(t *testing.T) {
	t.Run("ends by itself", func(t *testing.T) {
		cmd, end := sleeper(t)
		p := hold(t, cmd.Process.Pid)
		if p.Ended() {
			t.Error("it has not ended")
		}
		if peak := ResidentPeak(cmd.Process.Pid); peak <= 0 {
			t.Errorf("it needed %s", peak)
		}
		if err := end(); err != nil {
			t.Fatal(err)
		}
		if err := p.Wait(); err != nil || !p.Ended() {
			t.Errorf("wait: %v; ended: %v", err, p.Ended())
		}
		// Nobody has asked how it ended: a name without a process.
		start, err := ProcessStart(cmd.Process.Pid)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := OpenProcess(cmd.Process.Pid, start); !errors.Is(err, flint.ErrNotFound) {
			t.Errorf("open a process that has ended: %v", err)
		}
		if peak := ResidentPeak(cmd.Process.Pid); peak != 0 {
			t.Errorf("after its end it needs %s", peak)
		}
		_ = cmd.Wait()
		if err := p.Kill(); err != nil {
			t.Errorf("kill a process that is gone: %v", err)
		}
		if peak := ResidentPeak(cmd.Process.Pid); peak != 0 {
			t.Errorf("gone, it needs %s", peak)
		}
	})
	t.Run("killed", func(t *testing.T) {
		cmd, _ := sleeper(t)
		p := hold(t, cmd.Process.Pid)
		if err := p.Kill(); err != nil {
			t.Fatal(err)
		}
		if err := p.Wait(); err != nil {
			t.Errorf("wait: %v", err)
		}
	})
	t.Run("let go", func(t *testing.T) {
		cmd, _ := sleeper(t)
		p := hold(t, cmd.Process.Pid)
		waited := make(chan error)
		go func() { waited <- p.Wait() }()
		if err := p.Close(); err != nil {
			t.Fatal(err)
		}
		if err := <-waited; !errors.Is(err, os.ErrClosed) {
			t.Errorf("wait: %v", err)
		}
		if err := p.Kill(); err != nil || !p.Ended() {
			t.Errorf("kill what is let go: %v; ended: %v", err, p.Ended())
		}
		if again := hold(t, cmd.Process.Pid); again.Ended() {
			t.Error("it ended when it was let go")
		}
	})
}

func TestOpenProcessRefuses(t *testing.T) {
	start, err := ProcessStart(os.Getpid())
	if err != nil {
		t.Fatal(err)
	}
	for name, p := range map[string]struct {
		pid   int
		start uint64
	}{
		"another start": {os.Getpid(), start + 1}, "no process": {1<<22 - 1, start}, "nothing": {0, 0}, "init": {1, start},
		"a group": {-os.Getpid(), start}, "no start": {os.Getpid(), 0},
	} {
		if _, err := OpenProcess(p.pid, p.start); !errors.Is(err, flint.ErrNotFound) {
			t.Errorf("%s: %v", name, err)
		}
	}
}
