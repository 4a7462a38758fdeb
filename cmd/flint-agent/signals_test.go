package main

import (
	"bufio"
	"fmt"
	"os"
	"os/exec"
	"strings"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"
)

// asInit names the environment variable that makes this test's program behave as PID 1 does with signals.
const asInit = "FLINT_TEST_AS_INIT"

// None of the signals that anybody in the guest may send ends PID 1, but those that ask for its end are obeyed.
func TestSignalsToInit(t *testing.T) {
	if os.Getenv(asInit) != "" {
		signals := catchSignals()
		fmt.Println("ready")
		stop := make(chan struct{})
		ends := 0
		obey(signals, stop, func() {
			fmt.Println("end")
			if ends++; ends == 5 {
				close(stop)
			}
		})
		os.Exit(42)
	}
	cmd := exec.Command(os.Args[0], "-test.run=^TestSignalsToInit$")
	cmd.Env = append(os.Environ(), asInit+"=1")
	cmd.Stderr = os.Stderr
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	lines := bufio.NewScanner(out)
	next := func(want string) {
		t.Helper()
		if !lines.Scan() || lines.Text() != want {
			t.Fatalf("it says %q, want %q", lines.Text(), want)
		}
	}
	next("ready")
	var asked []string
	for s := syscall.Signal(1); s <= 64; s++ {
		switch {
		case s == unix.SIGKILL || s == unix.SIGSTOP || s >= 32 && s <= 34: // the last three are C libraries' (the runtime takes none of them), and the kernel spares PID 1
			continue
		case endsInit(s):
			asked = append(asked, unix.SignalName(s))
		}
		if err := cmd.Process.Signal(s); err != nil {
			t.Fatalf("send %v: %v", s, err)
		}
		if endsInit(s) {
			next("end")
		}
	}
	if got := strings.Join(asked, " "); got != "SIGINT SIGUSR1 SIGUSR2 SIGTERM SIGPWR" {
		t.Errorf("these end it: %s", got)
	}
	_ = cmd.Wait() // says how it ended, which is looked at below
	if code := cmd.ProcessState.ExitCode(); code != 42 {
		t.Errorf("it ended by %v", cmd.ProcessState)
	}
}
