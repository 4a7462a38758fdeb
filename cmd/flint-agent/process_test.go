package main

import (
	"bytes"
	"errors"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"

	"flint/internal/guest"

	"golang.org/x/sys/unix"
)

// startable returns a system whose reaper runs. Its accounts are those of a root of its own.
func startable(t *testing.T) *system {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("needs root: processes get a user and groups")
	}
	s := newSystem(false)
	s.users.root = t.TempDir()
	stop := make(chan struct{})
	var wg sync.WaitGroup
	wg.Go(func() { s.reaper.run(stop) })
	t.Cleanup(func() {
		close(stop)
		wg.Wait()
	})
	return s
}

// finish reads a process's outputs to their end and waits for it.
func finish(t *testing.T, p guest.Process) (stdout, stderr string, e guest.Exit) {
	t.Helper()
	_, out, errs := p.Stdio()
	var o, x bytes.Buffer
	var wg sync.WaitGroup
	wg.Go(func() { io.Copy(&o, out) })
	if errs != nil {
		wg.Go(func() { io.Copy(&x, errs) })
	}
	e, err := p.Wait()
	if err != nil {
		t.Fatal(err)
	}
	wg.Wait()
	return o.String(), x.String(), e
}

func TestProcess(t *testing.T) {
	s := startable(t)
	dir := filepath.Join(t.TempDir(), "made/here")
	if err := os.Chmod(filepath.Dir(filepath.Dir(filepath.Dir(dir))), 0o755); err != nil {
		t.Fatal(err)
	}
	p, err := s.Start(guest.Command{
		Args: []string{"sh", "-c", "id -u; id -g; pwd; echo $A $HOME; cat; echo oops >&2; echo named > /dev/stdout; exit 9"},
		Env:  []string{"A=b"}, User: "12345:54321", Dir: dir,
	})
	if err != nil {
		t.Fatal(err)
	}
	in, _, _ := p.Stdio()
	io.WriteString(in, "typed\n")
	in.Close()
	out, errs, e := finish(t, p)
	if want := "12345\n54321\n" + dir + "\nb /\ntyped\nnamed\n"; out != want || errs != "oops\n" || e.Code != 9 || e.Signal != "" {
		t.Errorf("stdout %q, stderr %q, exit %+v", out, errs, e)
	}
}

func TestSignalReachesTheGroup(t *testing.T) {
	s := startable(t)
	p, err := s.Start(guest.Command{Args: []string{"sh", "-c", "sleep 1000 & echo started; wait"}})
	if err != nil {
		t.Fatal(err)
	}
	_, out, _ := p.Stdio()
	b := make([]byte, 64)
	if n, err := out.Read(b); err != nil || string(b[:n]) != "started\n" {
		t.Fatalf("%q, %v", b[:n], err)
	}
	if err := p.Signal("SIGNONE"); err == nil {
		t.Error("a signal that is none was sent")
	}
	if err := p.Signal("SIGKILL"); err != nil {
		t.Fatal(err)
	}
	_, _, e := finish(t, p) // returns only when the sleep, which holds stdout open, has ended too
	if e.Code != 137 || e.Signal != "SIGKILL" {
		t.Errorf("exit %+v", e)
	}
	if err := p.Signal("SIGTERM"); err != nil {
		t.Errorf("signal to an ended process: %v", err)
	}
}

// What a process left behind in its group gets the signal, too.
func TestSignalReachesWhatALeaderLeft(t *testing.T) {
	s := startable(t)
	p, err := s.Start(guest.Command{Args: []string{"sh", "-c", "(while :; do echo x; sleep 0.01; done) & exit 3"}})
	if err != nil {
		t.Fatal(err)
	}
	e, err := p.Wait()
	if err != nil || e.Code != 3 {
		t.Fatalf("exit %+v, %v", e, err)
	}
	if err := p.Signal("SIGKILL"); err != nil {
		t.Fatal(err)
	}
	_, out, _ := p.Stdio()
	if _, err := io.Copy(io.Discard, out); err != nil { // ends when nobody holds it open any more
		t.Error(err)
	}
}

// A number that was given to another process since is not signalled.
func TestSignalSparesWhoHasTheNumberNow(t *testing.T) {
	r := newReaper()
	other := exec.Command("sleep", "1000")
	other.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	if err := other.Start(); err != nil {
		t.Fatal(err)
	}
	if err := r.signal(other.Process.Pid, unix.SIGTERM); err != nil {
		t.Error(err)
	}
	if err := other.Process.Kill(); err != nil {
		t.Fatal(err)
	}
	_ = other.Wait() // says how it ended, which is looked at below
	if ws := other.ProcessState.Sys().(syscall.WaitStatus); ws.Signal() != unix.SIGKILL {
		t.Errorf("it ended by %v", ws.Signal())
	}
}

func TestTerminalProcess(t *testing.T) {
	s := startable(t)
	p, err := s.Start(guest.Command{Args: []string{"sh", "-c", "stty size; read x; stty size; cat; echo got $x"}, TTY: &guest.Size{Cols: 100, Rows: 40}})
	if err != nil {
		t.Fatal(err)
	}
	if err := p.Resize(guest.Size{Cols: 90, Rows: 30}); err != nil {
		t.Fatal(err)
	}
	in, _, _ := p.Stdio()
	io.WriteString(in, "word\n")
	in.Close() // ends the cat, and not the terminal
	out, _, e := finish(t, p)
	if e.Code != 0 || !strings.Contains(out, "30 90") || !strings.HasSuffix(out, "got word\r\n") {
		t.Errorf("exit %+v, output %q", e, out)
	}
}

func TestProgramsThatCannotRun(t *testing.T) {
	s := startable(t)
	dir := t.TempDir()
	write(t, dir, "plain", "")
	write(t, dir, "script", "#!/no/such/interpreter\n")
	if err := os.Chmod(filepath.Join(dir, "script"), 0o755); err != nil {
		t.Fatal(err)
	}
	for program, code := range map[string]int{
		"no-such-program": 127, "/no/such/program": 127, "./plain": 126, "plain": 126, dir: 126, "./script": 126, "plain/x": 127,
	} {
		_, err := s.Start(guest.Command{Args: []string{program}, Env: []string{"PATH=" + dir}, Dir: dir})
		var e *guest.ExitError
		if !errors.As(err, &e) || e.Exit.Code != code || e.Exit.Err == "" {
			t.Errorf("%s: %v", program, err)
		}
	}
	for _, c := range []guest.Command{
		{Args: []string{"true"}, User: "nobodyknows"},
		{Args: []string{"true"}, Dir: "relative"},
		{Args: []string{"true"}, Dir: filepath.Join(dir, "plain")},
	} {
		if _, err := s.Start(c); err == nil {
			t.Errorf("%+v was started", c)
		}
	}
}

// An orphan whose parent has gone becomes a child of PID 1, or here of the test, and must not stay a zombie.
func TestOrphansAreReaped(t *testing.T) {
	s := startable(t)
	if err := unix.Prctl(unix.PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0); err != nil {
		t.Skipf("needs PR_SET_CHILD_SUBREAPER: %v", err)
	}
	defer unix.Prctl(unix.PR_SET_CHILD_SUBREAPER, 0, 0, 0, 0)
	p, err := s.Start(guest.Command{Args: []string{"sh", "-c", "sh -c 'read x < /dev/null; exit 3' & echo $!"}})
	if err != nil {
		t.Fatal(err)
	}
	out, _, _ := finish(t, p)
	pid, err := strconv.Atoi(strings.TrimSpace(out))
	if err != nil {
		t.Fatal(err)
	}
	if err := retry(t.Context(), func() error {
		if syscall.Kill(pid, 0) == nil {
			return errors.New("still there")
		}
		return nil
	}); err != nil {
		t.Error(err)
	}
}

func TestCompleteEnv(t *testing.T) {
	got := completeEnv([]string{"HOME=/y", "A=1", "PATH=/x", "A=2", "HOME=/z", "USER="}, user{Name: "u", Home: "/h", Shell: "/bin/sh"}, true)
	if s := strings.Join(got, " "); s != "PATH=/x A=2 HOME=/z USER=u LOGNAME=u SHELL=/bin/sh TERM=xterm-256color" {
		t.Error(s)
	}
}

// The newest connection wins, as a host that comes back must not wait for the old one to be found dead.
func TestNewestConnectionWins(t *testing.T) {
	l, err := net.ListenUnix("unix", &net.UnixAddr{Name: filepath.Join(t.TempDir(), "s"), Net: "unix"})
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	f, err := l.File()
	if err != nil {
		t.Fatal(err)
	}
	fd := dup(t, int(f.Fd()))
	f.Close()
	if err := unix.SetNonblock(fd, true); err != nil { // after Fd, which undoes it
		t.Fatal(err)
	}
	listener := os.NewFile(uintptr(fd), "listener")
	a := guest.NewAgent(&broken{errors.New("nothing to boot")}, guest.Hello{Kernel: "k"}, nil)
	defer a.Close()
	served := make(chan error, 1)
	go func() { served <- acceptNewest(t.Context(), a, listener) }()
	var sessions []*guest.Session
	for range 3 {
		c, err := net.Dial("unix", l.Addr().String())
		if err != nil {
			t.Fatal(err)
		}
		s, err := guest.Attach(t.Context(), c, guest.Options{})
		if err != nil {
			t.Fatal(err)
		}
		defer s.Close()
		sessions = append(sessions, s)
	}
	<-sessions[0].Done()
	<-sessions[1].Done()
	if _, err := sessions[2].Stats(t.Context()); err == nil || !strings.Contains(err.Error(), "nothing to boot") {
		t.Errorf("stats of a guest that could not boot: %v", err)
	}
	listener.Close()
	if err := <-served; err == nil {
		t.Error("accepting ended well")
	}
}

func dup(t *testing.T, fd int) int {
	t.Helper()
	n, err := unix.FcntlInt(uintptr(fd), unix.F_DUPFD_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	return n
}
