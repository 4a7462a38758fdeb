// Package tool runs the external programs flint builds with: image builders, mmdebstrap, the go command, apt, depmod.
//
// A program gets a filtered environment, no terminal, and a process group that ends with its context; what it says is
// bounded. The package must not know any particular program, and must not run anything through a shell.
package tool

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"syscall"
	"time"
)

// Tool is an external program and how to run it.
type Tool struct {
	Path string // of the program; see Find
	Args []string
	Dir  string            // working directory; empty: ours
	Env  []string          // added to what Environ keeps of ours; the last of a name wins
	Line func(line string) // receives each line of its messages as it comes; may be nil
}

const (
	maxLine   = 4096             // bytes of one line of messages that are kept
	tailLines = 40               // lines of messages an error carries
	maxOutput = 4 << 20          // bytes of standard output that Output takes
	stopTime  = 10 * time.Second // what a program has to end after it was told to
)

// Error is how a program failed, with the end of what it wrote.
type Error struct {
	Name string   // the program and its subcommand
	Err  error    // *exec.ExitError, as a rule
	Tail []string // its last lines
}

// Error implements error.
func (e *Error) Error() string {
	s := e.Name + ": " + e.Err.Error()
	if len(e.Tail) > 0 {
		s += "\n" + strings.Join(e.Tail, "\n")
	}
	return s
}

// Unwrap implements errors.Unwrap.
func (e *Error) Unwrap() error { return e.Err }

// Find returns the path of a program, also where only root's PATH looks. Its error is exec.ErrNotFound.
func Find(name string) (string, error) {
	found, err := exec.LookPath(name)
	if err == nil {
		return found, nil
	}
	for _, dir := range []string{"/usr/sbin", "/sbin"} {
		if found, err := exec.LookPath(filepath.Join(dir, name)); err == nil {
			return found, nil
		}
	}
	return "", fmt.Errorf("find %s: %w", name, errors.Join(exec.ErrNotFound, err))
}

// Run runs the program; what it writes, to standard output or error, is messages. It returns an *Error when the program
// fails, and the context's cause when that ended it.
func (t Tool) Run(ctx context.Context) error {
	messages := &lines{emit: t.Line}
	return t.run(ctx, messages, messages)
}

// Output runs the program and returns its standard output, at most 4 MiB; only what it writes to standard error is
// messages. Its errors are those of Run.
func (t Tool) Output(ctx context.Context) ([]byte, error) {
	out := &limited{}
	if err := t.run(ctx, out, &lines{emit: t.Line}); err != nil {
		return nil, err
	}
	if out.over {
		return nil, fmt.Errorf("run %s: more than %d bytes of output", t.name(), maxOutput)
	}
	return out.buf.Bytes(), nil
}

// run runs the program in a process group of its own, which ends with ctx: first asked, then forced. The program itself ends with
// ours, however that ends; what it started is its own to end.
func (t Tool) run(ctx context.Context, out io.Writer, messages *lines) error {
	cmd := exec.CommandContext(ctx, t.Path, t.Args...)
	cmd.Dir = t.Dir
	cmd.Env = append(Environ(os.Environ()), t.Env...)
	cmd.Stdout, cmd.Stderr = out, messages
	// The kernel sends the signal when the thread ends that started the program, so that thread is kept for it alone.
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true, Pdeathsig: syscall.SIGKILL}
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	cmd.Cancel = func() error { return syscall.Kill(-cmd.Process.Pid, syscall.SIGTERM) }
	cmd.WaitDelay = stopTime
	err := cmd.Run()
	if cmd.Process != nil {
		// Whatever of the group outlived its leader. The number cannot be taken anew while a member lives.
		if kerr := syscall.Kill(-cmd.Process.Pid, syscall.SIGKILL); kerr != nil && !errors.Is(kerr, syscall.ESRCH) && err == nil {
			err = fmt.Errorf("end its processes: %w", kerr)
		}
	}
	messages.flush()
	if err == nil {
		return nil
	}
	if ctx.Err() != nil {
		return fmt.Errorf("run %s: %w", filepath.Base(t.Path), context.Cause(ctx))
	}
	return &Error{Name: t.name(), Err: err, Tail: messages.tail}
}

// name is the program and its subcommand: the first argument that is neither an option nor an option's value.
func (t Tool) name() string {
	name := filepath.Base(t.Path)
	for i, a := range t.Args {
		if !strings.HasPrefix(a, "-") && (i == 0 || !strings.HasPrefix(t.Args[i-1], "--")) {
			return name + " " + a
		}
	}
	return name
}

// lines is a writer that hands output on line by line and keeps the last lines. A carriage return ends a line too:
// progress bars draw with it.
type lines struct {
	emit func(string)
	part []byte
	tail []string
}

func (l *lines) Write(p []byte) (int, error) {
	n := len(p)
	for {
		i := bytes.IndexAny(p, "\r\n")
		if i < 0 {
			break
		}
		l.add(p[:i])
		l.flush()
		p = p[i+1:]
	}
	l.add(p)
	return n, nil
}

func (l *lines) add(p []byte) {
	if room := maxLine - len(l.part); len(p) > room {
		p = p[:room]
	}
	l.part = append(l.part, p...)
}

// flush ends the line begun.
func (l *lines) flush() {
	line := strings.ToValidUTF8(string(l.part), "\uFFFD")
	l.part = l.part[:0]
	if strings.TrimSpace(line) == "" {
		return
	}
	if l.emit != nil {
		l.emit(line)
	}
	if l.tail = append(l.tail, line); len(l.tail) > tailLines {
		l.tail = l.tail[1:]
	}
}

// limited keeps the first maxOutput bytes written to it.
type limited struct {
	buf  bytes.Buffer // not embedded: its ReadFrom would know no limit
	over bool
}

func (l *limited) Write(p []byte) (int, error) {
	if room := maxOutput - l.buf.Len(); len(p) > room {
		l.over = true
		l.buf.Write(p[:room])
		return len(p), nil
	}
	return l.buf.Write(p)
}
