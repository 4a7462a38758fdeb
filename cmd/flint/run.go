package main

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"os/signal"
	"syscall"
	"time"

	"github.com/spf13/cobra"
	"golang.org/x/term"

	"flint"
	"flint/internal/app"
	"flint/internal/config"
)

// Exit codes of `flint run` when it is not the command's own, as docker run has them.
const (
	exitRunFailed = 125 // flint itself
	// 126 and 127 come from the guest: the command cannot be executed, or is not there.
)

// maxInstances bounds how many `flint run` there may be at the same time on one state directory.
const maxInstances = 16

type runFlags struct {
	image, file, user, dir, stateDir string
	env                              []string
	memory, disk                     string
	cpus                             int
	interactive, tty, verbose        bool
}

func newRun() *cobra.Command {
	var f runFlags
	c := &cobra.Command{
		Use:   "run [flags] -- command [argument…]",
		Short: "Run one command in a fresh VM, which is discarded afterwards",
		Long: "Run boots a VM from an image, runs one command in it, and discards the VM. Its exit code is the command's;\n" +
			"125 means that flint itself failed, 126 and 127 that the command cannot be executed or is not there.",
		Example: "  flint run --image ./images/demo -- uname -a\n  flint run -it -- bash",
		Args: func(c *cobra.Command, args []string) error {
			if len(args) == 0 {
				return usage(c, errors.New("no command to run"))
			}
			return nil
		},
	}
	fl := c.Flags()
	fl.SetInterspersed(false)
	fl.StringVar(&f.image, "image", "images/demo", "a Dockerfile's directory, an OCI layout, an archive, or an OCI reference")
	fl.StringVarP(&f.file, "config", "c", "", "configuration file (network, kernel, vm; its pools are not used)")
	fl.StringVarP(&f.user, "user", "u", "", "user in the guest (default root)")
	fl.StringVarP(&f.dir, "workdir", "w", "", "working directory in the guest (default /work)")
	fl.StringArrayVarP(&f.env, "env", "e", nil, "KEY=value for the command; may be given again")
	fl.StringVar(&f.memory, "memory", "512MiB", "guest memory")
	fl.StringVar(&f.disk, "disk", "4GiB", "scratch disk")
	fl.IntVar(&f.cpus, "cpus", 1, "virtual CPUs")
	fl.BoolVarP(&f.interactive, "interactive", "i", false, "hand standard input to the command")
	fl.BoolVarP(&f.tty, "tty", "t", false, "give the command a terminal")
	fl.BoolVarP(&f.verbose, "verbose", "v", false, "show what is done, and how long it takes")
	fl.StringVar(&f.stateDir, "state-dir", "", "where images, kernels and records are kept (overrides the configuration)")
	c.RunE = func(c *cobra.Command, args []string) error {
		code, err := f.run(c, args)
		if err != nil {
			if stopped(c.Context(), err) == nil {
				return exitError(exitInterrupted)
			}
			complain(c.ErrOrStderr(), err)
			if errors.Is(err, flint.ErrTimeout) {
				return exitError(exitTimeout)
			}
			return exitError(exitRunFailed)
		}
		if code != 0 {
			return exitError(code)
		}
		return nil
	}
	return c
}

func (f *runFlags) config() (config.Config, error) {
	var cfg config.Config
	var err error
	if f.file != "" {
		cfg, err = config.Load(f.file, os.Environ())
	} else {
		cfg, err = config.FromEnvironment(os.Environ())
	}
	if err != nil {
		return cfg, err
	}
	if f.stateDir != "" {
		cfg.StateDir = f.stateDir
	}
	pool := config.Pool{Name: "run", Image: f.image, Max: 1, VM: config.Shape{CPUs: f.cpus}}
	if pool.VM.Memory, err = flint.ParseBytes(f.memory); err != nil {
		return cfg, fmt.Errorf("--memory: %w", err)
	}
	if pool.VM.Disk, err = flint.ParseBytes(f.disk); err != nil {
		return cfg, fmt.Errorf("--disk: %w", err)
	}
	cfg.Pools, cfg.Runner.Dir = []config.Pool{pool}, ""
	return cfg, cfg.Complete()
}

func (f *runFlags) run(c *cobra.Command, args []string) (code int, err error) {
	cfg, err := f.config()
	if err != nil {
		return 0, err
	}
	level := "error"
	var progress flint.Progress
	if f.verbose {
		level, progress = "info", newSteps(c.ErrOrStderr()).report
	}
	log, err := logger(c, c.ErrOrStderr(), level)
	if err != nil {
		return 0, err
	}
	ctx := c.Context()
	a, err := openInstance(ctx, cfg, app.Options{Log: log, Progress: progress, LocalBase: true})
	if err != nil {
		return 0, err
	}
	defer func() { err = errors.Join(err, a.Close(ctx)) }()
	if err := a.Prepare(ctx); err != nil {
		return 0, err
	}
	cmd := app.Command{
		Pool: "run", Args: args, Env: f.env, User: f.user, Dir: f.dir, Stdout: c.OutOrStdout(), Stderr: c.ErrOrStderr(),
	}
	if f.interactive {
		cmd.Stdin = c.InOrStdin()
	}
	restore, err := f.terminal(c, &cmd)
	if err != nil {
		return 0, err
	}
	res, err := a.Command(ctx, cmd)
	restore()
	if f.verbose && err == nil {
		t := res.Timeline
		fmt.Fprintf(c.ErrOrStderr(), "agent ready after %d ms, command ended after %d ms; VM used at most %s\n",
			t[flint.Ready].Sub(t[flint.Planned]).Milliseconds(), t[flint.Finishing].Sub(t[flint.Planned]).Milliseconds(), res.PeakMemory)
	}
	return res.ExitCode, err
}

// openInstance takes the first instance no other `flint run` uses, with a bridge and a subnet of its own.
func openInstance(ctx context.Context, cfg config.Config, opt app.Options) (*app.App, error) {
	for n := range maxInstances {
		opt.Instance = fmt.Sprintf("run%d", n)
		cfg.Network.Bridge = fmt.Sprintf("flintrun%d", n)
		cfg.Network.IPv4 = netip.PrefixFrom(netip.AddrFrom4([4]byte{10, 213, byte(32 + n), 0}), 24)
		cfg.Network.IPv6 = netip.MustParsePrefix(fmt.Sprintf("fd4f:6c69:6e74:%x::/64", 32+n))
		a, err := app.New(ctx, cfg, opt)
		var fault *flint.Fault
		if errors.As(err, &fault) && fault.Code == "state.locked" {
			continue
		}
		return a, err
	}
	return nil, &flint.Fault{
		Code: "run.many", What: "start", Kind: flint.ErrConflict, Err: fmt.Errorf("%d flint run are under way on %s", maxInstances, cfg.StateDir),
		Fix: "wait for one to end, or give --state-dir",
	}
}

// terminal makes this terminal the command's, and returns what gives it back.
func (f *runFlags) terminal(c *cobra.Command, cmd *app.Command) (restore func(), err error) {
	if !f.tty {
		return func() {}, nil
	}
	in, ok := c.InOrStdin().(*os.File)
	if !ok || !term.IsTerminal(int(in.Fd())) {
		return nil, usage(c, errors.New("--tty needs a terminal on standard input"))
	}
	size := func() (s [2]uint16) {
		if w, h, err := term.GetSize(int(in.Fd())); err == nil {
			s = [2]uint16{uint16(w), uint16(h)}
		}
		return s
	}
	s := size()
	cmd.Cols, cmd.Rows = max(s[0], 1), max(s[1], 1)
	if os.Getenv("TERM") != "" {
		cmd.Env = append(cmd.Env, "TERM="+os.Getenv("TERM"))
	}
	state, err := term.MakeRaw(int(in.Fd()))
	if err != nil {
		return nil, fmt.Errorf("make terminal raw: %w", err)
	}
	changed := make(chan os.Signal, 1)
	signal.Notify(changed, syscall.SIGWINCH)
	sizes := make(chan [2]uint16, 1)
	cmd.Resize = sizes
	done := make(chan struct{})
	go func() { // a copy loop from the signal to the guest; ended by restore
		for {
			select {
			case <-changed:
				select {
				case sizes <- size():
				case <-time.After(time.Second):
				}
			case <-done:
				return
			}
		}
	}()
	return func() {
		signal.Stop(changed)
		close(done)
		_ = term.Restore(int(in.Fd()), state)
	}, nil
}
