package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/netip"
	"os"
	"os/signal"
	"slices"
	"strings"
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
	image, kernel, file, user, dir, stateDir string
	env                                      []string
	memory, disk                             flint.Bytes
	root, tools, format                      string
	cpus                                     int
	timeout                                  time.Duration
	ipv4                                     netip.Prefix
	interactive, tty, verbose                bool
	preset                                   *config.Config // what the other flags would say
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
				return runFailed(c, usage(c, errors.New("no command to run")))
			}
			return nil
		},
	}
	c.SetFlagErrorFunc(func(c *cobra.Command, err error) error { return runFailed(c, usage(c, withoutValues(err))) })
	fl := c.Flags()
	fl.SetInterspersed(false)
	fl.StringVar(&f.image, "image", demoImage, "a Dockerfile's directory, an OCI layout, an archive, or an OCI reference")
	fl.StringVar(&f.kernel, "kernel", "", "a kernel that has all it needs built in, such as make kernel builds (overrides the configuration)")
	fl.StringVarP(&f.file, "config", "c", os.Getenv(config.FileVariable), "configuration file (kernel, vm, state_dir; the VM has a network of its own, and pools are not used)")
	fl.StringVarP(&f.user, "user", "u", "", "user in the guest (default root)")
	fl.StringVarP(&f.dir, "workdir", "w", "", "working directory in the guest (default: the image's WORKDIR, or /work)")
	fl.StringArrayVarP(&f.env, "env", "e", nil, "KEY=value for the command, or KEY to hand on its value here; may be given again")
	fl.TextVar(&f.memory, "memory", 512*flint.MiB, "`size` of the guest's memory")
	fl.TextVar(&f.disk, "disk", 4*flint.GiB, "`size` of the scratch disk")
	fl.StringVar(&f.root, "root", config.DiskRoot, "where what is written to the root goes: disk, or memory (at most half of it)")
	fl.StringVar(&f.tools, "tool-cache", "", "a directory that the VM finds as actions' tool cache, /opt/hostedtoolcache")
	fl.StringVar(&f.format, "filesystem", config.Ext4, "of the image that is made: ext4 or erofs")
	fl.IntVar(&f.cpus, "cpus", 1, "virtual CPUs")
	fl.DurationVar(&f.timeout, "timeout", 0, "end the command after so long (default vm.job_timeout): by SIGTERM, and by force 10 s later")
	fl.TextVar(&f.ipv4, "ipv4", netip.Prefix{}, "`subnet` of the VM's network (default the first free of 10.213.32.0/24, 10.213.33.0/24, …)")
	fl.BoolVarP(&f.interactive, "interactive", "i", false, "hand standard input to the command")
	fl.BoolVarP(&f.tty, "tty", "t", false, "give the command a terminal")
	fl.BoolVarP(&f.verbose, "verbose", "v", false, "show what is done, and how long it takes")
	fl.StringVar(&f.stateDir, "state-dir", "", "where images, kernels and records are kept (overrides the configuration)")
	c.RunE = f.command
	return c
}

// command runs the VM and turns how it ended into an exit code.
func (f *runFlags) command(c *cobra.Command, args []string) error {
	code, err := f.run(c, args)
	if err != nil {
		return runFailed(c, err)
	}
	if c.Context().Err() != nil {
		return exitError(exitInterrupted)
	}
	if code != 0 {
		return exitError(code)
	}
	return nil
}

// runFailed says what went wrong with flint itself, down to its flags. The exit code is none that a command is likely to have.
func runFailed(c *cobra.Command, err error) error {
	complain(c.ErrOrStderr(), err)
	if errors.Is(err, flint.ErrTimeout) {
		return exitError(exitTimeout)
	}
	return exitError(exitRunFailed)
}

// runKeys are the keys of the configuration that flags stand for.
func runKeys() map[string]string {
	return map[string]string{
		"pools[0].image": "image", "pools[0].vm.cpus": "cpus", "pools[0].vm.memory": "memory", "pools[0].vm.disk": "disk",
		"pools[0].root": "root", "pools[0].filesystem": "filesystem", "vm.job_timeout": "timeout", "network.ipv4": "ipv4",
	}
}

func (f *runFlags) config(c *cobra.Command) (config.Config, error) {
	if f.preset != nil {
		cfg := *f.preset
		cfg.Pools[0].Name = "run"
		return cfg, nil
	}
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
	if f.kernel != "" {
		cfg.Kernel = config.Kernel{Vmlinuz: f.kernel}
	}
	if f.timeout != 0 { // a negative one is refused below
		cfg.VM.JobTimeout = config.Duration(f.timeout)
	}
	ref, err := fromAnywhere(f.image)
	if err != nil {
		return cfg, err
	}
	cfg.Pools = []config.Pool{{
		Name: "run", Image: ref, Max: 1, VM: config.Shape{CPUs: f.cpus, Memory: f.memory, Disk: f.disk}, Root: f.root, Format: f.format, Tools: f.tools,
	}}
	cfg.Runner.Dir = ""
	f.network(&cfg, 0)
	return cfg, flagged(c, cfg.Complete(), runKeys())
}

// environment is what --env gave, as a command takes it. As with docker, a name alone hands on a variable that is set here: its value
// need not be on a command line then.
func (f *runFlags) environment(c *cobra.Command) (env []string, err error) {
	for _, e := range f.env {
		name, _, given := strings.Cut(e, "=")
		if name == "" {
			return nil, usage(c, fmt.Errorf("--env %q is neither KEY=value nor KEY", e))
		}
		if value, set := os.LookupEnv(name); !given && set {
			env = append(env, name+"="+value)
		} else if given {
			env = append(env, e)
		}
	}
	return env, nil
}

func (f *runFlags) run(c *cobra.Command, args []string) (code int, err error) {
	env, err := f.environment(c)
	if err != nil {
		return 0, err
	}
	cfg, err := f.config(c)
	if err != nil {
		return 0, err
	}
	level := "warn"
	steps := newSteps(c.ErrOrStderr())
	steps.brief = !f.verbose // the rest is the command's
	log, err := logger(c, c.ErrOrStderr(), level, true)
	if err != nil {
		return 0, err
	}
	if f.preset == nil {
		if err := inCheckout(c); err != nil {
			return 0, err
		}
	}
	ctx := c.Context()
	a, err := f.openInstance(ctx, cfg, app.Options{Log: log, Progress: steps.report, LocalBase: true})
	if err != nil {
		return 0, err
	}
	defer func() { err = errors.Join(stopped(ctx, err), a.Close(ctx)) }()
	if err := a.Prepare(ctx); err != nil {
		return 0, err
	}
	cmd := app.Command{
		Pool: "run", Args: args, Env: env, User: f.user, Dir: f.dir, Stdout: c.OutOrStdout(), Stderr: c.ErrOrStderr(),
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
	if res.Unstarted != "" {
		fmt.Fprintf(c.ErrOrStderr(), "flint: cannot start %s: %s\n", args[0], printable(res.Unstarted))
	}
	if err == nil {
		f.explain(c.ErrOrStderr(), res.Reason)
	}
	if f.verbose && err == nil {
		t := res.Timeline
		fmt.Fprintf(c.ErrOrStderr(), "agent ready after %d ms, command ended after %d ms; VM used at most %s\n",
			t[flint.Ready].Sub(t[flint.Planned]).Milliseconds(), t[flint.Finishing].Sub(t[flint.Planned]).Milliseconds(), res.PeakMemory)
	}
	return res.ExitCode, err
}

// explain says what the VM ran out of, if it did: the command may have said nothing, or what is hard to understand.
func (f *runFlags) explain(w io.Writer, why flint.Reason) {
	fix, ok := map[string]string{
		"runner.oom":       "give it more with --memory, or see what uses so much",
		"runner.pids":      "see what starts so many; a VM with more --memory may have more",
		"runner.disk_full": "give it more with --disk, or write less",
		"runner.root_full": "give it more with --memory, write less, or leave its root on the disk",
	}[why.Code]
	if ok {
		s := styleOf(w)
		fmt.Fprintf(w, "%s %s\n  fix: %s\n", s.paint(red, "flint: "+printable(why.Text)), s.paint(dim, "["+why.Code+"]"), s.paint(bold, fix))
	}
}

// openInstance takes the first instance no other `flint run` uses, with a bridge and a subnet of its own, and undoes what
// dead ones left.
func (f *runFlags) openInstance(ctx context.Context, cfg config.Config, opt app.Options) (*app.App, error) {
	var opened *app.App
	var last error
	for n := range maxInstances {
		opt.Instance = fmt.Sprintf("run%d", n)
		f.network(&cfg, n)
		if opened != nil {
			if err := app.Recover(ctx, cfg, opt); err != nil {
				opt.Log.Warn("what a dead flint run left could not be undone", "instance", opt.Instance, "err", err)
			}
			continue
		}
		a, err := app.New(ctx, cfg, opt)
		var fault *flint.Fault
		switch {
		case err == nil:
			opened = a
		case !errors.As(err, &fault) || !slices.Contains([]string{"state.locked", "network.busy", "network.overlap"}, fault.Code):
			return nil, err
		default:
			last = err
		}
	}
	if opened == nil {
		return nil, &flint.Fault{
			Code: "run.many", What: "find a free network for the VM", Kind: flint.ErrConflict, Err: last,
			Fix: fmt.Sprintf("wait for one of the %d flint run to end, or give a free subnet with --ipv4", maxInstances),
		}
	}
	return opened, nil
}

// network gives an instance its bridge and subnets.
func (f *runFlags) network(cfg *config.Config, n int) {
	cfg.Network = config.Network{
		Bridge: fmt.Sprintf("flintrun%d", n),
		IPv4:   netip.PrefixFrom(netip.AddrFrom4([4]byte{10, 213, byte(32 + n), 0}), 24),
		IPv6:   netip.MustParsePrefix(fmt.Sprintf("fd4f:6c69:6e74:%x::/64", 32+n)),
	}
	if f.ipv4.IsValid() {
		cfg.Network.IPv4 = f.ipv4
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
	giveBack := func() {}
	if f.interactive { // else the terminal goes on turning Ctrl-C into a signal for us
		state, err := term.MakeRaw(int(in.Fd()))
		if err != nil {
			return nil, fmt.Errorf("make terminal raw: %w", err)
		}
		giveBack = func() { _ = term.Restore(int(in.Fd()), state) }
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
		giveBack()
	}, nil
}
