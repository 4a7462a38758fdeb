package kernel

import (
	"context"

	"flint/internal/tool"
)

// runner runs a program in a directory and returns its standard output. The error holds the end of its standard error,
// and is exec.ErrNotFound where there is no such program.
type runner func(ctx context.Context, dir, name string, args ...string) ([]byte, error)

// run is the runner of production. The output is in English.
func run(ctx context.Context, dir, name string, args ...string) ([]byte, error) {
	path, err := tool.Find(name)
	if err != nil {
		return nil, err
	}
	out, err := tool.Tool{Path: path, Args: args, Dir: dir, Env: []string{"LC_ALL=C"}}.Output(ctx)
	return out, tool.OutOfSpace(err)
}
