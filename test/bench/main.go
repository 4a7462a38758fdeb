// Command bench measures flint's part of a job's way on this machine and prints medians: preparing a VM, for a small and
// a large image; the VM's boot, with the agent as its init and with systemd; what the coordinator adds around the job; the memory it takes with eight VMs.
//
// It runs the real rooms, needs root, and judges nothing. What it prints depends on what else the machine does. It must not
// be run as a test.
package main

import (
	"context"
	"flag"
	"fmt"
	"io"
	"log/slog"
	"os"
	"os/signal"
	"regexp"
	"slices"
	"strconv"
	"sync"
	"time"

	"golang.org/x/sync/errgroup"

	"flint"
	"flint/internal/app"
	"flint/internal/config"
)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt)
	defer stop()
	state := flag.String("state", "build/state", "state directory")
	agent := flag.String("agent", "build/flint-agent", "the guest's program")
	runs := flag.Int("n", 15, "VMs per figure")
	kernel := flag.String("kernel", "", "boot VMs with this kernel, which has all built in, and measure nothing else")
	layout := flag.String("layout", "", "compare making a base image of this OCI layout with other programs, and measure nothing else; synthetic: tell the memory it takes for a large one made up")
	rounds := flag.Int("rounds", 3, "of -layout")
	base := flag.String("base", "", "make a base image of this OCI layout in a store at -state, and nothing else")
	content := 5 * flint.GiB
	flag.TextVar(&content, "content", content, "of the synthetic image")
	small := flag.Int("files", 0, "so many small files are the content of the synthetic image, instead")
	flag.Parse()
	b := &bench{state: *state, agent: *agent, kernel: *kernel, runs: *runs, laps: map[string][]time.Duration{}}
	var err error
	switch {
	case *base != "":
		err = makeBase(ctx, *state, *base)
	case *layout == "synthetic":
		err = b.peak(ctx, content, *small)
	case *layout != "":
		err = b.images(ctx, *layout, *rounds)
	default:
		err = b.run(ctx)
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, "bench:", err)
		os.Exit(1)
	}
}

type bench struct {
	state, agent string
	kernel       string // empty: the distribution's
	runs         int

	mu   sync.Mutex
	laps map[string][]time.Duration
}

func (b *bench) run(ctx context.Context) error {
	cfg := config.Default()
	cfg.StateDir, cfg.VM.Agent, cfg.Kernel.Vmlinuz = b.state, b.agent, b.kernel
	cfg.Network.Bridge = "flintbench"
	cfg.Host.Memory = 16 * flint.GiB
	cfg.Host.CPUs = 16
	cfg.VM.BootTimeout = config.Duration(5 * time.Minute) // systemd takes its time in software
	shape := config.Shape{CPUs: 1, Memory: 512 * flint.MiB, Disk: 4 * flint.GiB}
	cfg.Pools = []config.Pool{
		{Name: "small", Image: "./test/bench/small", Max: 1, VM: shape},
		{Name: "large", Image: "./test/bench/large", Max: 1, VM: shape},
		{Name: "systemd", Image: "./test/bench/systemd", Max: 1, VM: shape},
	}
	if b.kernel != "" {
		cfg.Pools = cfg.Pools[:1]
	}
	if err := cfg.Complete(); err != nil {
		return err
	}
	a, err := app.New(ctx, cfg, app.Options{
		Log: slog.New(&listener{b: b}), Instance: "bench", LocalBase: true,
		Progress: func(m flint.Milestone) {
			if m.Done && m.Err == nil {
				fmt.Printf("# %s: %s\n", m.Step, m.Detail)
			}
		},
	})
	if err != nil {
		return err
	}
	defer a.Close(ctx)
	if err := a.Prepare(ctx); err != nil {
		return err
	}
	for _, pool := range cfg.Pools {
		info, err := os.Stat(a.Supplies()[pool.Name].Base)
		if err != nil {
			return err
		}
		if err := b.lives(ctx, a, pool.Name, flint.Bytes(info.Size())); err != nil {
			return err
		}
	}
	if b.kernel != "" {
		return nil
	}
	if err := b.memory(ctx, a); err != nil {
		return err
	}
	return b.jobs(ctx, cfg)
}

// lives boots VMs one after the other and prints the medians of their parts.
func (b *bench) lives(ctx context.Context, a *app.App, pool string, size flint.Bytes) error {
	b.reset()
	for range b.runs {
		res, err := a.Command(ctx, app.Command{Pool: pool, Args: []string{"/bin/true"}, Stdout: io.Discard, Stderr: io.Discard})
		if err != nil {
			return err
		}
		b.lap("agent ready → command ended", res.Timeline[flint.Finishing].Sub(res.Timeline[flint.Ready]))
		b.lap("command ended → nothing left", res.Timeline[flint.Gone].Sub(res.Timeline[flint.Finishing]))
		b.lap("decision → agent ready", res.Timeline[flint.Ready].Sub(res.Timeline[flint.Planned]))
	}
	fmt.Printf("\n%s image of %s, %d VMs one after the other\n", pool, size, b.runs)
	b.mu.Lock()
	defer b.mu.Unlock()
	prepare := make([]time.Duration, 0, b.runs)
	for i := range b.laps["host"] {
		prepare = append(prepare, b.laps["host"][i]+b.laps["driver"][i])
	}
	show("decision → VMM exec", prepare)
	var boot []time.Duration
	for i, d := range b.laps["decision → agent ready"] {
		boot = append(boot, d-prepare[i])
	}
	show("VMM exec → agent ready and configured", boot)
	for _, name := range []string{"decision → agent ready", "agent ready → command ended", "command ended → nothing left"} {
		show(name, b.laps[name])
	}
	return nil
}

// memory prints this process's resident memory with eight VMs running.
func (b *bench) memory(ctx context.Context, a *app.App) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	var vms errgroup.Group
	up, failed := make(chan struct{}, 8), make(chan error, 8)
	for range 8 {
		vms.Go(func() error {
			_, err := a.Command(ctx, app.Command{
				Pool: "small", Args: []string{"/bin/sh", "-c", "echo up; exec sleep 1000"}, Stdout: signalWriter(up), Stderr: io.Discard,
			})
			if ctx.Err() == nil && err != nil {
				failed <- err
			}
			return nil
		})
	}
	for range 8 {
		select {
		case <-up:
		case err := <-failed:
			return err
		case <-time.After(3 * time.Minute):
			return fmt.Errorf("eight VMs did not come up")
		}
	}
	status, err := os.ReadFile("/proc/self/status")
	if err != nil {
		return err
	}
	m := regexp.MustCompile(`VmRSS:\s+(\d+) kB`).FindSubmatch(status)
	if m == nil {
		return fmt.Errorf("no VmRSS in /proc/self/status")
	}
	kib, err := strconv.Atoi(string(m[1]))
	if err != nil {
		return err
	}
	fmt.Printf("\nresident memory of flint with 8 VMs: %s\n", flint.Bytes(kib)*flint.KiB)
	cancel()
	return vms.Wait()
}

type signalWriter chan<- struct{}

func (w signalWriter) Write(p []byte) (int, error) {
	w <- struct{}{}
	return len(p), nil
}

func (b *bench) reset() {
	b.mu.Lock()
	defer b.mu.Unlock()
	clear(b.laps)
}

func (b *bench) lap(name string, d time.Duration) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.laps[name] = append(b.laps[name], d)
}

func show(name string, laps []time.Duration) {
	laps = slices.Sorted(slices.Values(laps))
	if len(laps) == 0 {
		fmt.Printf("  %-40s no figure\n", name)
		return
	}
	ms := func(d time.Duration) float64 { return float64(d.Microseconds()) / 1000 }
	fmt.Printf("  %-40s median %8.1f ms   (%.1f to %.1f)\n", name, ms(laps[len(laps)/2]), ms(laps[0]), ms(laps[len(laps)-1]))
}

// listener picks the durations out of the log.
type listener struct {
	b *bench
}

func (l *listener) Enabled(context.Context, slog.Level) bool { return true }

func (l *listener) Handle(_ context.Context, r slog.Record) error {
	if r.Level >= slog.LevelWarn {
		fmt.Fprint(os.Stderr, "# ", r.Message)
		r.Attrs(func(a slog.Attr) bool {
			fmt.Fprintf(os.Stderr, " %s", a)
			return true
		})
		fmt.Fprintln(os.Stderr)
	}
	r.Attrs(func(a slog.Attr) bool {
		switch {
		case r.Message == "prepared" && a.Key == "took":
			l.b.lap("host", a.Value.Duration())
		case r.Message == "QEMU runs" && a.Key == "prepared":
			l.b.lap("driver", a.Value.Duration())
		}
		return true
	})
	return nil
}

func (l *listener) WithAttrs([]slog.Attr) slog.Handler { return l }
func (l *listener) WithGroup(string) slog.Handler      { return l }
