package image

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"time"
)

// tool is an external program and how to run it.
type tool struct {
	path string
	args []string
	dir  string            // working directory; empty: ours
	env  []string          // added to what every tool gets
	line func(line string) // receives each line of output; may be nil
}

const (
	maxLine   = 4096             // bytes of one line of a tool's output that are kept
	tailLines = 40               // lines of output an error carries
	stopTime  = 10 * time.Second // what a tool has to end after it was told to
)

// toolError is how a tool failed, with the end of what it wrote.
type toolError struct {
	name string
	err  error
	tail []string
}

func (e *toolError) Error() string {
	s := e.name + ": " + e.err.Error()
	if len(e.tail) > 0 {
		s += "\n" + strings.Join(e.tail, "\n")
	}
	return s
}

func (e *toolError) Unwrap() error { return e.err }

// run runs the tool in a process group of its own, which ends with ctx: first asked, then forced.
func (t tool) run(ctx context.Context) error {
	out := &lines{emit: t.line}
	cmd := exec.CommandContext(ctx, t.path, t.args...)
	cmd.Dir = t.dir
	cmd.Env = append(toolEnv(os.Environ()), t.env...)
	cmd.Stdout, cmd.Stderr = out, out
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	cmd.Cancel = func() error { return syscall.Kill(-cmd.Process.Pid, syscall.SIGTERM) }
	cmd.WaitDelay = stopTime
	err := cmd.Run()
	if cmd.Process != nil {
		// Whatever of the group outlived its leader. The number cannot be taken anew while a member lives.
		if kerr := syscall.Kill(-cmd.Process.Pid, syscall.SIGKILL); kerr != nil && !errors.Is(kerr, syscall.ESRCH) && err == nil {
			err = fmt.Errorf("end its processes: %w", kerr)
		}
	}
	out.flush()
	if err == nil {
		return nil
	}
	if ctx.Err() != nil {
		return fmt.Errorf("run %s: %w", filepath.Base(t.path), context.Cause(ctx))
	}
	return &toolError{name: filepath.Base(t.path) + " " + firstWord(t.args), err: err, tail: out.tail}
}

// firstWord is the subcommand: the first argument that is neither an option nor an option's value.
func firstWord(args []string) string {
	for i, a := range args {
		if !strings.HasPrefix(a, "-") && (i == 0 || !strings.HasPrefix(args[i-1], "--")) {
			return a
		}
	}
	return ""
}

// toolEnv keeps what builders and compilers need of an environment. Ours may hold secrets that are none of their
// business.
func toolEnv(environ []string) []string {
	exact := []string{
		"PATH", "HOME", "USER", "LOGNAME", "LANG", "TZ", "TMPDIR", "SSL_CERT_FILE", "SSL_CERT_DIR",
		"REGISTRY_AUTH_FILE", "GOPATH", "GOMODCACHE", "GOCACHE", "GOPROXY", "GOSUMDB", "GOTOOLCHAIN", "GONOSUMDB", "GONOPROXY", "GOPRIVATE", "GOROOT",
	}
	prefixes := []string{"LC_", "XDG_", "DOCKER_", "BUILDAH_", "BUILDKIT_", "CONTAINERS_", "STORAGE_"}
	var env []string
	for _, kv := range environ {
		name, _, _ := strings.Cut(kv, "=")
		if slices.Contains(exact, name) || strings.HasSuffix(strings.ToLower(name), "_proxy") ||
			slices.ContainsFunc(prefixes, func(p string) bool { return strings.HasPrefix(name, p) }) {
			env = append(env, kv)
		}
	}
	return env
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
