package main

import (
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"

	"flint/internal/guest"

	"github.com/creack/pty"
	"golang.org/x/sys/unix"
)

const defaultPath = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"

// process is a guest.Process: a process group of this guest.
type process struct {
	sys      *system
	pid      int
	ended    <-chan syscall.WaitStatus
	stdin    io.WriteCloser
	stdout   io.ReadCloser
	stderr   io.ReadCloser // nil on a terminal
	terminal *os.File      // nil without one
	before   trouble       // as it was when the process was started
}

// Start implements guest.System.
func (s *system) Start(c guest.Command) (guest.Process, error) {
	u, err := s.users.resolve(c.User)
	if err != nil {
		return nil, fmt.Errorf("find user %q: %w", c.User, err)
	}
	dir, err := workDir(c.Dir, u)
	if err != nil {
		return nil, err
	}
	env := completeEnv(c.Env, u, c.TTY != nil)
	program, err := lookPath(c.Args[0], dir, env)
	if err != nil {
		return nil, &guest.ExitError{Exit: guest.Exit{Code: exitCode(err), Err: err.Error()}}
	}
	p := &process{sys: s, before: s.trouble()}
	files, err := p.open(c.TTY, u)
	if err != nil {
		return nil, err
	}
	attr := &syscall.ProcAttr{
		Dir: dir, Env: env,
		Sys: &syscall.SysProcAttr{
			Setsid: true, Setctty: c.TTY != nil,
			Credential: &syscall.Credential{Uid: u.UID, Gid: u.GID, Groups: u.Groups},
		},
	}
	if s.cgroups != nil {
		attr.Sys.UseCgroupFD, attr.Sys.CgroupFD = true, int(s.cgroups.jobs.Fd())
	}
	for _, f := range files {
		attr.Files = append(attr.Files, f.Fd())
	}
	p.pid, p.ended, err = s.fork(program, c.Args, attr)
	closeAll(files)
	if err != nil {
		p.close()
		err = fmt.Errorf("execute %s: %w", program, err)
		return nil, &guest.ExitError{Exit: guest.Exit{Code: 126, Err: err.Error()}}
	}
	return p, nil
}

// fork starts a process, which may be killed for memory even if the agent may not.
func (s *system) fork(program string, args []string, attr *syscall.ProcAttr) (int, <-chan syscall.WaitStatus, error) {
	return s.reaper.start(func() (int, error) {
		if s.shielded {
			setOOMScore(0)
			defer setOOMScore(shieldedScore)
		}
		return syscall.ForkExec(program, args, attr)
	})
}

// open makes the process's ends, ours in p, and returns its own.
func (p *process) open(size *guest.Size, u user) ([]*os.File, error) {
	if size != nil {
		master, slave, err := pty.Open()
		if err != nil {
			return nil, fmt.Errorf("open terminal: %w", err)
		}
		p.terminal, p.stdin, p.stdout = master, &terminalInput{master}, &terminalOutput{master}
		if err := errors.Join(p.Resize(*size), slave.Chown(int(u.UID), -1)); err != nil {
			p.close()
			slave.Close()
			return nil, fmt.Errorf("prepare terminal: %w", err)
		}
		return []*os.File{slave, slave, slave}, nil
	}
	var theirs []*os.File
	fail := func(err error) ([]*os.File, error) {
		p.close()
		closeAll(theirs)
		return nil, fmt.Errorf("make pipe: %w", err)
	}
	for i := range 3 {
		r, w, err := os.Pipe()
		if err != nil {
			return fail(err)
		}
		end := w
		switch i {
		case 0:
			end, p.stdin = r, w
		case 1:
			p.stdout = r
		case 2:
			p.stderr = r
		}
		theirs = append(theirs, end)
		// Opening /dev/stdout by name asks for the pipe's permission.
		if err := end.Chown(int(u.UID), int(u.GID)); err != nil {
			return fail(err)
		}
	}
	return theirs, nil
}

func closeAll(files []*os.File) {
	for _, f := range files {
		f.Close() // a second close of the terminal only says so
	}
}

// close closes our ends.
func (p *process) close() {
	for _, c := range []io.Closer{p.stdin, p.stdout, p.stderr} {
		switch c := c.(type) {
		case nil:
		case *os.File:
			if c != nil {
				c.Close()
			}
		case *terminalOutput:
			c.Close()
		}
	}
}

// Stdio implements guest.Process.
func (p *process) Stdio() (io.WriteCloser, io.Reader, io.Reader) {
	if p.stderr == nil {
		return p.stdin, p.stdout, nil
	}
	return p.stdin, p.stdout, p.stderr
}

// Signal implements guest.Process.
func (p *process) Signal(name string) error {
	sig := unix.SignalNum(name)
	if sig == 0 {
		return fmt.Errorf("send signal: there is none called %q", name)
	}
	if err := p.sys.reaper.signal(p.pid, sig); err != nil {
		return fmt.Errorf("send %s: %w", name, err)
	}
	return nil
}

// Resize implements guest.Process.
func (p *process) Resize(s guest.Size) error {
	if p.terminal == nil {
		return nil
	}
	if err := pty.Setsize(p.terminal, &pty.Winsize{Rows: s.Rows, Cols: s.Cols}); err != nil {
		return fmt.Errorf("resize terminal: %w", err)
	}
	return nil
}

// Wait implements guest.Process.
func (p *process) Wait() (guest.Exit, error) {
	e := exitOf(<-p.ended)
	now := p.sys.trouble()
	e.OOM, e.PIDs, e.DiskFull = now.killed > p.before.killed, now.refused > p.before.refused, now.filled > p.before.filled
	e.RootFull = now.crammed > p.before.crammed
	return e, nil
}

// exitOf says how a process ended as a shell does.
func exitOf(ws syscall.WaitStatus) guest.Exit {
	if ws.Signaled() {
		return guest.Exit{Code: 128 + int(ws.Signal()), Signal: unix.SignalName(ws.Signal())}
	}
	return guest.Exit{Code: ws.ExitStatus()}
}

// terminalInput types into a terminal. Its end is typed, too: closing the terminal would hang up on the process.
type terminalInput struct{ *os.File }

const endOfTransmission = 4 // what a terminal takes for the end of the input (VEOF)

func (t *terminalInput) Close() error {
	_, err := t.Write([]byte{endOfTransmission})
	return err
}

// terminalOutput reads a terminal. EIO is its end: the last process with the terminal open has gone.
type terminalOutput struct{ *os.File }

func (t *terminalOutput) Read(b []byte) (int, error) {
	n, err := t.File.Read(b)
	if errors.Is(err, unix.EIO) {
		err = io.EOF
	}
	return n, err
}

// workDir returns where the process starts, which it makes if it was asked for.
func workDir(dir string, u user) (string, error) {
	if dir == "" {
		if st, err := os.Stat(u.Home); err == nil && st.IsDir() {
			return u.Home, nil
		}
		return "/", nil
	}
	if !filepath.IsAbs(dir) {
		return "", fmt.Errorf("enter directory %s: it is not absolute", dir)
	}
	switch st, err := os.Stat(dir); {
	case err == nil && st.IsDir():
		return dir, nil
	case err == nil:
		return "", fmt.Errorf("enter directory %s: it is a file", dir)
	}
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return "", fmt.Errorf("make working directory: %w", err)
	}
	if err := os.Chown(dir, int(u.UID), int(u.GID)); err != nil {
		return "", fmt.Errorf("make working directory: %w", err)
	}
	return dir, nil
}

// completeEnv adds what a login would have set and env does not. Of each name the last is left: programs disagree about which of
// several counts.
func completeEnv(env []string, u user, terminal bool) []string {
	defaults := []string{
		"HOME=" + u.Home, "USER=" + u.Name, "LOGNAME=" + u.Name, "SHELL=" + u.Shell, "PATH=" + defaultPath,
	}
	if terminal {
		defaults = append(defaults, "TERM=xterm-256color")
	}
	all := slices.Clone(env)
	for _, d := range defaults {
		name, _, _ := strings.Cut(d, "=")
		if lookupEnv(env, name) == "" {
			all = append(all, d)
		}
	}
	var out []string
	later := map[string]bool{}
	for _, e := range slices.Backward(all) {
		if name, _, _ := strings.Cut(e, "="); !later[name] {
			later[name] = true
			out = append(out, e)
		}
	}
	slices.Reverse(out)
	return out
}

func lookupEnv(env []string, name string) string {
	for _, e := range slices.Backward(env) {
		if v, ok := strings.CutPrefix(e, name+"="); ok {
			return v
		}
	}
	return ""
}

var (
	errNotFound      = errors.New("not found")
	errNotExecutable = errors.New("not executable")
)

func exitCode(err error) int {
	if errors.Is(err, errNotFound) {
		return 127
	}
	return 126
}

// lookPath finds a program as a shell would: by the PATH of env, unless its name has a slash.
func lookPath(name, dir string, env []string) (string, error) {
	if strings.Contains(name, "/") {
		if !filepath.IsAbs(name) {
			name = filepath.Join(dir, name)
		}
		return name, executable(name)
	}
	result := fmt.Errorf("%s: %w in PATH", name, errNotFound)
	for _, d := range filepath.SplitList(lookupEnv(env, "PATH")) {
		if !filepath.IsAbs(d) {
			d = filepath.Join(dir, d)
		}
		p := filepath.Join(d, name)
		err := executable(p)
		if err == nil {
			return p, nil
		}
		if errors.Is(err, errNotExecutable) {
			result = err
		}
	}
	return "", result
}

func executable(name string) error {
	st, err := os.Stat(name)
	switch {
	case errors.Is(err, os.ErrNotExist) || errors.Is(err, unix.ENOTDIR):
		return fmt.Errorf("%s: %w", name, errNotFound)
	case err != nil:
		return err
	case st.IsDir() || st.Mode()&0o111 == 0:
		return fmt.Errorf("%s: %w", name, errNotExecutable)
	}
	return nil
}
