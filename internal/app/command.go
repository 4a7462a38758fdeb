package app

import (
	"context"
	"io"

	"flint"
	"flint/internal/guest"
	"flint/internal/host"
)

// Command is one command for a VM of its own, as `flint run` takes it.
type Command struct {
	Pool   string // a prepared pool: the VM's image and shape
	Args   []string
	Env    []string // KEY=value, on top of the image's
	User   string   // empty: root
	Dir    string   // empty: the image's working directory, or /work
	Stdin  io.Reader
	Stdout io.Writer
	Stderr io.Writer
	// A terminal of this size when Cols is above 0; further sizes come by Resize.
	Cols, Rows uint16
	Resize     <-chan [2]uint16 // columns, rows
}

// Command boots a VM, runs the command in it and discards it. How the command ended is in the Result; an error means
// that it did not run to its end.
func (a *App) Command(ctx context.Context, c Command) (flint.Result, error) {
	a.sweep.Do(func() { a.undoEarlier(ctx) })
	supply, err := a.supplyOf(ctx, c.Pool)
	if err != nil {
		return flint.Result{}, err
	}
	cmd := guest.Command{Args: c.Args, Env: append(supply.Env[:len(supply.Env):len(supply.Env)], c.Env...), User: c.User, Dir: workDir(c.Dir, supply.Dir)}
	if c.Cols > 0 {
		cmd.TTY = &guest.Size{Cols: c.Cols, Rows: c.Rows}
	}
	resize := make(chan guest.Size, 1)
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	stopped := make(chan struct{})
	defer func() { cancel(); <-stopped }()
	go func() { // a copy loop; ends with ctx
		defer close(stopped)
		for {
			select {
			case s := <-c.Resize:
				select {
				case resize <- guest.Size{Cols: s[0], Rows: s[1]}:
				case <-ctx.Done():
					return
				}
			case <-ctx.Done():
				return
			}
		}
	}()
	runner := flint.Runner{ID: host.NewID("flint-", "run"), Pool: c.Pool, Reason: flint.Because("run", "a person asked for it")}
	return a.host.Command(ctx, runner, host.Command{
		Command: cmd,
		IO:      guest.IO{Stdin: c.Stdin, Stdout: c.Stdout, Stderr: c.Stderr, Resize: resize},
	})
}

// workDir is where a command starts: where it is asked to, or where the image says; at its root is no place to work.
func workDir(asked, image string) string {
	switch {
	case asked != "":
		return asked
	case image != "" && image != "/":
		return image
	}
	return "/work"
}
