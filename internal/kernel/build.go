package kernel

import (
	"context"
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"

	"flint"
	kernelsource "flint/images/kernel"
	"flint/internal/tool"
)

// Build says what kernel to build from the distribution's source.
type Build struct {
	Dir    string // to build in, and to leave the kernel in; a few GiB for a while
	Series string // such as 6.1; empty: the newest
	Jobs   int    // compilers at once; 0: as many as there are processors
}

// BuildFromSource builds a kernel without modules, as make kernel does, and returns its path. What is built already is not built
// again. It installs packages that it needs with apt-get.
func BuildFromSource(ctx context.Context, b Build, p flint.Progress) (string, error) {
	step := "build kernel from source"
	end := p.Step(step)
	var said string
	path, err := b.run(ctx, func(line string) {
		if line, ours := strings.CutPrefix(line, "flint: "); ours {
			said = line
		}
		p.Report(flint.Milestone{Step: step, Line: line})
	})
	space, dir := spaceFault(tool.OutOfSpace(err)), dirFault(step, err)
	switch {
	case err == nil:
	case ctx.Err() != nil:
		err = ctx.Err()
	case space != nil:
		err = space
	case dir != nil:
		err = dir
	default:
		err = &flint.Fault{
			Code: "kernel.build", What: step, Err: err,
			Fix: "see its last lines; it needs apt with linux-source, a compiler and 5 GB of disk for a while, and goes on where it stopped",
		}
	}
	end(said, err)
	return path, err
}

// run lays the script out and runs it.
func (b Build) run(ctx context.Context, line func(string)) (string, error) {
	out, err := filepath.Abs(b.Dir)
	if err != nil {
		return "", err
	}
	if err := os.MkdirAll(out, 0o755); err != nil {
		return "", err
	}
	if err := writable(out); err != nil { // before anything is installed
		return "", err
	}
	dir, err := os.MkdirTemp("", "flint-kernel-source-")
	if err != nil {
		return "", err
	}
	defer os.RemoveAll(dir)
	if err := os.CopyFS(dir, kernelsource.Files); err != nil {
		return "", err
	}
	bash, err := tool.Find("bash")
	if err != nil {
		return "", err
	}
	env := []string{"OUT=" + out, "ARCH=" + runtime.GOARCH, "VERSION=" + b.Series, "LOUD=1"}
	if b.Jobs > 0 {
		env = append(env, "JOBS="+strconv.Itoa(b.Jobs))
	}
	if err := (tool.Tool{Path: bash, Args: []string{kernelsource.Script}, Dir: dir, Env: env, Line: line}).Run(ctx); err != nil {
		return "", err
	}
	for _, name := range []string{"vmlinux", "Image"} {
		path := filepath.Join(out, name)
		if _, err := os.Stat(path); !errors.Is(err, fs.ErrNotExist) {
			return path, err
		}
	}
	return "", errors.New("it left no kernel")
}
