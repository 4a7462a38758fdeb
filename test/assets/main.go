// Command assets makes what tests and benchmarks boot real VMs from: kernel, initramfs, modules, the demo image, an
// image with systemd, the demo runner's drive and program, and a scratch disk, as links in one directory.
//
// Tests name that directory in FLINT_TEST_ASSETS. It uses the same code as flint itself; it must not have ways of its own
// to make anything.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"log/slog"
	"os"
	"os/signal"
	"path/filepath"

	"golang.org/x/sync/errgroup"

	"flint"
	"flint/internal/app"
	"flint/internal/config"
)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt)
	defer stop()
	state := flag.String("state", "build/state", "state directory, shared with make demo")
	out := flag.String("out", "build/test-assets", "directory of links")
	agent := flag.String("agent", "build/flint-agent", "the guest's program")
	given := foreign{}
	flag.StringVar(&given.kernel, "kernel", "", "a kernel for guests of another architecture; then -modules and -image are needed, and no runner is made")
	flag.StringVar(&given.modules, "modules", "", "its modules, …/lib/modules/<version>")
	flag.StringVar(&given.image, "image", "", "their base image")
	shipped := flag.Bool("shipped", false, "make the images that flint ships instead, on a Debian base")
	flag.Parse()
	make := func() error { return run(ctx, *state, *out, *agent, given) }
	if *shipped {
		make = func() error { return shippedImages(ctx, *state, *out, *agent) }
	}
	if err := make(); err != nil {
		fmt.Fprintln(os.Stderr, "assets:", err)
		var fault *flint.Fault
		if errors.As(err, &fault) {
			fmt.Fprintln(os.Stderr, "  fix:", fault.Fix)
		}
		os.Exit(1)
	}
}

// foreign is what guests of another architecture boot, which cannot be fetched and built as this machine's own.
type foreign struct{ kernel, modules, image string }

func options() app.Options {
	return app.Options{
		Log:       slog.New(slog.NewTextHandler(os.Stderr, &slog.HandlerOptions{Level: slog.LevelWarn})),
		LocalBase: true,
		Progress: func(m flint.Milestone) {
			if m.Done && m.Err == nil {
				fmt.Printf("assets: %s: %s (%.1f s)\n", m.Step, m.Detail, m.Took.Seconds())
			}
		},
	}
}

// suite is the Debian release of the shipped images' base in tests: the oldest that has buildx, and compose 2.
const suite = "trixie"

// shippedImages builds what is in images/ for jobs.
func shippedImages(ctx context.Context, state, out, agent string) error {
	opt := options()
	cfg := config.Default()
	cfg.StateDir, cfg.VM.Agent = state, agent
	if err := cfg.Complete(); err != nil {
		return err
	}
	base, err := app.DebianBase(ctx, cfg, opt, suite)
	if err != nil {
		return err
	}
	both, ctx := errgroup.WithContext(ctx) // one is built while the other is flattened
	for _, name := range []string{"minimal", "runner"} {
		p := config.NewPool(name, "./images/"+name)
		p.Args = map[string]string{"BASE": base}
		cfg := cfg
		cfg.Pools = []config.Pool{p}
		both.Go(func() error {
			if err := cfg.Complete(); err != nil {
				return err
			}
			supplies, err := app.Assets(ctx, cfg, opt)
			if err != nil {
				return err
			}
			return link(supplies[name].Base, filepath.Join(out, "image-"+name+".ext4"))
		})
	}
	return both.Wait()
}

// link replaces a link.
func link(target, link string) error {
	made := own(link)
	if err := os.Symlink(target, made); err != nil {
		return err
	}
	return os.Rename(made, link)
}

// own is the name under which this process makes what is to be found at path, where others may read meanwhile.
func own(path string) string { return fmt.Sprintf("%s.%d", path, os.Getpid()) }

func run(ctx context.Context, state, out, agent string, given foreign) error {
	opt := options()
	cfg := config.Default()
	cfg.StateDir, cfg.VM.Agent = state, agent
	cfg.Pools = []config.Pool{config.NewPool("demo", "./images/demo")}
	if given.kernel == "" {
		cfg.Pools = append(cfg.Pools, config.NewPool("systemd", "./test/e2e/systemd"), config.NewPool("network", "./test/e2e/network"))
	} else {
		cfg.Kernel.Vmlinuz, cfg.Kernel.Modules, cfg.Pools[0].Image = given.kernel, given.modules, given.image
	}
	for i := range cfg.Pools {
		cfg.Pools[i].Pull = config.PullMissing
	}
	if err := cfg.Complete(); err != nil {
		return err
	}
	if given.kernel == "" {
		runner, err := app.DemoRunner(ctx, cfg.StateDir, "images/demo-runner", opt.Progress)
		if err != nil {
			return err
		}
		cfg.Runner.Dir = runner
	}
	supplies, err := app.Assets(ctx, cfg, opt)
	if err != nil {
		return err
	}
	s := supplies["demo"]
	if err := os.MkdirAll(out, 0o755); err != nil {
		return err
	}
	links := map[string]string{"vmlinux": s.Kernel, "initrd": s.Initrd, "modules.ext4": s.Modules, "base.ext4": s.Base}
	if s.Runner != "" {
		links["runner.ext4"], links["github-act-runner"] = s.Runner, filepath.Join(cfg.Runner.Dir, "github-act-runner")
	}
	if base := supplies["systemd"].Base; base != "" {
		links["base-systemd.ext4"] = base
	}
	for name, target := range links {
		if err := link(target, filepath.Join(out, name)); err != nil {
			return err
		}
	}
	scratch := filepath.Join(out, "scratch.ext4")
	made := own(scratch)
	defer os.Remove(made)
	if err := app.Scratch(cfg, opt, made, 4*flint.GiB); err != nil {
		return err
	}
	return os.Rename(made, scratch)
}
