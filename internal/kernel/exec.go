package kernel

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

// runner runs a program in a directory and returns its standard output. The error holds the end of its standard error,
// and is exec.ErrNotFound where there is no such program.
type runner func(ctx context.Context, dir, name string, args ...string) ([]byte, error)

// maxOutput bounds what is kept of a program's output.
const maxOutput = 4 << 20

// run is the runner of production.
func run(ctx context.Context, dir, name string, args ...string) ([]byte, error) {
	program, err := lookPath(name)
	if err != nil {
		return nil, err
	}
	var stdout, stderr limited
	cmd := exec.CommandContext(ctx, program, args...)
	cmd.Dir, cmd.Env, cmd.Stdout, cmd.Stderr = dir, toolEnv(), &stdout, &stderr
	cmd.Cancel = func() error { return cmd.Process.Signal(syscall.SIGTERM) }
	cmd.WaitDelay = 5 * time.Second
	if err := cmd.Run(); err != nil {
		if ctx.Err() != nil {
			return nil, ctx.Err()
		}
		said := strings.TrimSpace(stderr.buf.String())
		if len(said) > 1000 {
			said = "…" + said[len(said)-1000:]
		}
		if said == "" {
			return nil, fmt.Errorf("run %s: %w", name, err)
		}
		return nil, fmt.Errorf("run %s: %w: %s", name, err, said)
	}
	if stdout.over {
		return nil, fmt.Errorf("run %s: more than %d bytes of output", name, maxOutput)
	}
	return stdout.buf.Bytes(), nil
}

// lookPath finds a program, also where only root's PATH looks.
func lookPath(name string) (string, error) {
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

// toolEnv is our environment less all that is none of the tools' business: it may hold secrets.
func toolEnv() []string {
	keep := []string{"PATH", "HOME", "TMPDIR", "APT_CONFIG", "http_proxy", "https_proxy", "no_proxy", "HTTPS_PROXY", "NO_PROXY"}
	env := []string{"LC_ALL=C"}
	for _, kv := range os.Environ() {
		if name, _, _ := strings.Cut(kv, "="); slices.Contains(keep, name) {
			env = append(env, kv)
		}
	}
	return env
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
