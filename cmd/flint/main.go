// Command flint runs every GitHub Actions job in its own throw-away microVM.
//
// This package translates flags, signals and exit codes, and shows people what goes on: one file per subcommand. It must
// not hold logic that a room could hold; whatever takes more than a screen here belongs in internal/app.
package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"os/signal"
	"runtime/debug"
	"strings"
	"syscall"

	"github.com/spf13/cobra"

	"flint"
)

// version is set by the build (-ldflags "-X main.version=…").
var version = "development"

// Exit codes, as docs/reference.md lists them.
const (
	exitFailed     = 1
	exitUsage      = 2
	exitConfig     = 3
	exitDaemon     = 4
	exitNotFound   = 5
	exitPermission = 6
	exitChecks     = 7
	exitConflict   = 8
	exitTimeout    = 124
	// exitInterrupted is what a shell says of a program that Ctrl-C ended.
	exitInterrupted = 130
)

// exitError ends the program with a code and no message: the command has said what there was to say.
type exitError int

func (e exitError) Error() string { return fmt.Sprintf("exit %d", int(e)) }

// memoryGoal is what flint's memory stays below where it can: as much garbage as there is data would otherwise wait for its collection
// while an image of a million files is written. Nothing else comes near it.
const memoryGoal = 640 << 20

func main() {
	if os.Getenv("GOMEMLIMIT") == "" {
		debug.SetMemoryLimit(memoryGoal)
	}
	os.Exit(run(os.Args[1:], os.Stdin, os.Stdout, os.Stderr))
}

func run(args []string, stdin io.Reader, stdout, stderr io.Writer) int {
	// A second signal hurries flint serve, and changes nothing otherwise: what has to be given back is bounded in time.
	told := newSignals()
	asked, stop := told.watch(context.Background())
	defer stop()
	// A pipe nobody reads ends the program like a signal, not by one: a signal would leave everything behind.
	ctx, cancel := context.WithCancel(asked)
	defer cancel()
	pipe := make(chan os.Signal, 1)
	signal.Notify(pipe, syscall.SIGPIPE)
	defer signal.Stop(pipe)
	root := newRoot(told)
	root.SetArgs(args)
	root.SetIn(stdin)
	root.SetOut(&guard{stdout, cancel})
	root.SetErr(stderr)
	root.InitDefaultCompletionCmd()
	root.InitDefaultHelpCmd()
	groups(root)
	wrong := helpOfCommands(root)
	err := root.ExecuteContext(ctx)
	if err == nil {
		err = *wrong
	}
	err = interrupted(asked, err)
	var code exitError
	if err != nil && !errors.As(err, &code) {
		complain(stderr, err)
	}
	return exitCode(err)
}

// interrupted is what is left to say of err where a person, or the service manager, told the program to end: that it did, if
// nothing else went wrong.
func interrupted(asked context.Context, err error) error {
	if err == nil || asked.Err() == nil {
		return err
	}
	if rest := stopped(asked, err); rest != nil {
		return rest
	}
	return exitError(exitInterrupted)
}

func newRoot(told *signals) *cobra.Command {
	root := &cobra.Command{
		Use:           "flint",
		Short:         "Run every GitHub Actions job in its own throw-away microVM",
		SilenceErrors: true,
		SilenceUsage:  true,
		Args: func(c *cobra.Command, args []string) error {
			switch {
			case len(args) > 0 && seedGiven(c.Flags()): // it may be a secret that lost its flag
				return usage(c, errors.New("there is an argument that belongs to no flag"))
			}
			return knownCommand(c, args)
		},
	}
	var seed seedFlags
	seed.register(root.Flags())
	root.RunE = func(c *cobra.Command, _ []string) error {
		if seedGiven(c.Flags()) {
			return seed.run(c, told)
		}
		return c.Help()
	}
	root.PersistentFlags().String("log-level", "", "debug, info, warn or error (overrides the configuration)")
	root.SetFlagErrorFunc(func(c *cobra.Command, err error) error { return usage(c, withoutValues(err)) })
	root.AddCommand(newDemo(), newRun(), newServe(told), newExplain(), newImage(), newKernel(), newRunnerSoftware(), newDoctor(), newHost(), newConfig(), newDev(), newVersion())
	return root
}

func newVersion() *cobra.Command {
	return &cobra.Command{
		Use: "version", Short: "Print the version", Args: noArgs,
		Run: func(c *cobra.Command, _ []string) { fmt.Fprintln(c.OutOrStdout(), "flint", version) },
	}
}

// groups lets the commands that only have others below them refuse what is none of these. Cobra would show their help, and
// the program would succeed.
func groups(c *cobra.Command) {
	for _, below := range c.Commands() {
		groups(below)
		if below.Name() == "help" {
			below.Args = anyCommand
		}
	}
	if c.HasSubCommands() && !c.Runnable() {
		c.Args, c.DisableFlagsInUseLine = knownCommand, true
		c.RunE = func(c *cobra.Command, _ []string) error { return c.Help() }
	}
}

// helpOfCommands has --help behind what is no command refused, too. Cobra would show the help of the command above it, and the program
// would succeed. What is wrong is there after the execution.
func helpOfCommands(root *cobra.Command) *error {
	wrong, help := new(error), root.HelpFunc()
	root.SetHelpFunc(func(c *cobra.Command, args []string) {
		if c.HasSubCommands() {
			if *wrong = c.ValidateArgs(c.Flags().Args()); *wrong != nil {
				return
			}
		}
		help(c, args)
	})
	return wrong
}

// knownCommand refuses the arguments of a command that takes none: whoever gives one meant a command below it.
func knownCommand(c *cobra.Command, args []string) error {
	if len(args) == 0 {
		return nil
	}
	c.SuggestionsMinimumDistance = 2 // letters
	hint := ""
	if near := c.SuggestionsFor(args[0]); len(near) > 0 {
		hint = fmt.Sprintf("; did you mean %q?", near[0])
	}
	return usage(c, fmt.Errorf("unknown command %q%s", args[0], hint))
}

// anyCommand refuses what names no command. Cobra's help would say so and succeed.
func anyCommand(c *cobra.Command, args []string) error {
	found, rest, err := c.Root().Find(args)
	if err != nil {
		return usage(c, err)
	}
	return knownCommand(found, rest)
}

func usage(c *cobra.Command, err error) error {
	return &flint.Fault{
		Code: "usage", What: "understand the command line", Kind: flint.ErrUsage, Err: err, Fix: "see " + c.CommandPath() + " --help",
	}
}

// flagged turns what is wrong with values of the configuration that flags gave into wrong usage of these flags. keys says which
// flag stands for which key; where one was not given, its value came from elsewhere, but for pools: those are made of flags.
func flagged(c *cobra.Command, err error, keys map[string]string) error {
	var fault *flint.Fault
	if !errors.As(err, &fault) || !errors.Is(err, flint.ErrConfig) {
		return err
	}
	var ours, rest []error
	for _, e := range parts(fault.Err) {
		key, text, _ := strings.Cut(e.Error(), ": ")
		if flag, ok := keys[key]; ok && (c.Flags().Changed(flag) || strings.HasPrefix(key, "pools[")) {
			ours = append(ours, fmt.Errorf("--%s: %s", flag, text))
		} else {
			rest = append(rest, e)
		}
	}
	if len(ours) == 0 {
		return err
	}
	err = usage(c, errors.Join(ours...))
	if len(rest) > 0 {
		other := *fault
		other.Err = errors.Join(rest...)
		err = errors.Join(err, &other)
	}
	return err
}

func noArgs(c *cobra.Command, args []string) error {
	if len(args) > 0 {
		return usage(c, fmt.Errorf("unexpected argument %q", args[0]))
	}
	return nil
}

func atMostOne(c *cobra.Command, args []string) error {
	if len(args) > 1 {
		return usage(c, fmt.Errorf("unexpected argument %q", args[1]))
	}
	return nil
}

// exitCode turns an error's kind into the code of product-wide meaning.
func exitCode(err error) int {
	var code exitError
	switch {
	case err == nil:
		return 0
	case errors.As(err, &code):
		return int(code)
	case errors.Is(err, flint.ErrUsage):
		return exitUsage
	case errors.Is(err, flint.ErrConfig):
		return exitConfig
	case errors.Is(err, flint.ErrUnreachable):
		return exitDaemon
	case errors.Is(err, flint.ErrNotFound):
		return exitNotFound
	case errors.Is(err, flint.ErrPermission):
		return exitPermission
	case errors.Is(err, flint.ErrConflict):
		return exitConflict
	case errors.Is(err, flint.ErrTimeout):
		return exitTimeout
	}
	return exitFailed
}

// logger writes to w, at the level of the flag or else of the configuration; warnings and errors as notes to a person
// where notes are asked for.
func logger(c *cobra.Command, w io.Writer, configured string, notes bool) (*slog.Logger, error) {
	l, err := levelOf(c, configured)
	if err != nil {
		return nil, err
	}
	if style := styleOf(w); notes && l >= slog.LevelWarn {
		return slog.New(notices{style: style, level: l}), nil
	}
	return slog.New(slog.NewTextHandler(w, &slog.HandlerOptions{Level: l})), nil
}

// levelOf is the level of the flag, or else of the configuration.
func levelOf(c *cobra.Command, configured string) (l slog.Level, err error) {
	level := configured
	if f := levelFlag(c); f != "" {
		level = f
	}
	if err := l.UnmarshalText([]byte(level)); err != nil {
		return l, usage(c, fmt.Errorf("--log-level %q is none of debug, info, warn, error", level))
	}
	return l, nil
}

func levelFlag(c *cobra.Command) string {
	f, err := c.Flags().GetString("log-level")
	if err != nil {
		return "" // the command has no such flag
	}
	return f
}
