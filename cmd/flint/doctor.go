package main

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"flint/internal/app"
	"flint/internal/config"
	"flint/internal/doctor"
)

func newDoctor() *cobra.Command {
	c := &cobra.Command{
		Use: "doctor", Short: "Check whether this machine is fit to run VMs, and say how to make it so", Args: noArgs,
		Long: "Doctor checks this machine against the configuration, or against the defaults where there is no file. It changes\n" +
			"nothing. Run it as the user that runs flint: root. Its exit code is 7 if a check failed, else 0.",
	}
	file := configFlag(c.Flags(), "configuration file")
	asJSON := c.Flags().Bool("json", false, "print an array of {id, verdict, text, fix}")
	c.RunE = func(c *cobra.Command, _ []string) error {
		cfg, source, err := doctorConfig(c, *file)
		if err != nil {
			return err
		}
		found, err := doctor.Run(c.Context(), examined(c.Context(), cfg), doctor.Here())
		if err != nil {
			return exitError(exitInterrupted)
		}
		if *asJSON {
			enc := json.NewEncoder(c.OutOrStdout())
			enc.SetIndent("", "  ")
			err = enc.Encode(found)
		} else {
			if os.Geteuid() != 0 {
				source += ", and with what an ordinary user may see; flint runs as root"
			}
			showFindings(c.OutOrStdout(), source, found)
		}
		if err == nil && doctor.Failed(found) {
			return exitError(exitChecks)
		}
		return err
	}
	return c
}

// doctorConfig reads the configuration and says where it is from.
func doctorConfig(c *cobra.Command, file string) (cfg config.Config, source string, err error) {
	cfg, there, err := loadOrDefault(c, file)
	if !there {
		return cfg, "the defaults, as there is no " + file, err
	}
	return cfg, file, err
}

// examined is what the checks need to know of the configuration.
func examined(ctx context.Context, cfg config.Config) doctor.Config {
	f, room := cfg.Firecracker, app.CapacityOf(cfg)
	d := doctor.Config{
		StateDir: cfg.StateDir, Driver: cfg.VM.Driver, Accel: cfg.VM.Accel, QEMU: cfg.VM.QEMU,
		Firecracker: f.Binary, Jailer: f.Jailer, NoJail: !f.Jail, Serial: f.Serial, ChrootBase: f.ChrootBase,
		UIDFirst: f.UIDFirst, UIDCount: f.UIDCount, ParentCgroup: f.ParentCgroup,
		Memory: room.Memory, QEMUOverhead: room.QEMU, FirecrackerOverhead: room.Firecracker,
		Pools: cfg.FlintPools(), IPv6: cfg.Network.IPv6.IsValid(),
		Monolithic: cfg.Kernel.Pack != "" || cfg.Kernel.Vmlinuz != "" && cfg.Kernel.Modules == "", Kernel: examinedKernel(ctx, cfg),
	}
	for _, r := range app.UsedRunners(cfg, slog.New(slog.DiscardHandler), time.Now()) {
		d.Runners = append(d.Runners, doctor.Software{Version: r.Version, Pool: r.Pool, Age: r.AgeDays, Left: r.DaysLeft, Soon: r.Soon(), Refused: r.TooOld()})
	}
	if d.ChrootBase == "" {
		d.ChrootBase = filepath.Join(cfg.StateDir, "jail")
	}
	for _, p := range cfg.Pools {
		d.Dockerfile = d.Dockerfile || isDockerfile(p.Image)
	}
	return d
}

// examinedKernel is what is known of the configured kernel; nothing where it is not kept yet.
func examinedKernel(ctx context.Context, cfg config.Config) (k doctor.Kernel) {
	found, err := app.FindKernel(ctx, cfg, app.Options{Log: slog.New(slog.DiscardHandler)}, "")
	if err != nil {
		return k
	}
	k.Version = found.Version
	for _, w := range found.Workloads {
		k.Work = append(k.Work, doctor.Work{Name: w.Name, Lacks: w.Lacks, Partly: w.Verdict == app.KernelPartly, Unknown: w.Verdict == app.KernelUnknown})
	}
	return k
}

// isDockerfile reports whether an image is one to be built.
func isDockerfile(image string) bool {
	for _, name := range []string{"Dockerfile", "Containerfile"} {
		if filepath.Base(image) == name {
			return true
		}
		if _, err := os.Stat(filepath.Join(image, name)); err == nil {
			return true
		}
	}
	return false
}

// showFindings writes a line for each finding, and its fix below it.
func showFindings(w io.Writer, source string, found []doctor.Finding) {
	s := styleOf(w)
	colors := map[doctor.Verdict]string{doctor.Pass: green, doctor.Warn: yellow, doctor.Fail: red, doctor.Skip: dim}
	width := 0
	for _, f := range found {
		width = max(width, len(f.ID))
	}
	fmt.Fprintln(w, s.paint(dim, "this machine against "+source))
	count := map[doctor.Verdict]int{}
	for _, f := range found {
		count[f.Verdict]++
		fmt.Fprintf(w, "%s %s  %s\n", s.paint(colors[f.Verdict], string(f.Verdict)), pad(f.ID, width), oneLine(f.Text))
		if f.Fix != "" {
			fmt.Fprintf(w, "%s  fix: %s\n", strings.Repeat(" ", len(f.Verdict)+1+width), s.paint(bold, oneLine(f.Fix)))
		}
	}
	fmt.Fprintln(w, s.paint(dim, fmt.Sprintf("%d passed, %d to look at, %d failed, %d skipped",
		count[doctor.Pass], count[doctor.Warn], count[doctor.Fail], count[doctor.Skip])))
}

func oneLine(text string) string {
	return strings.Join(strings.Fields(printable(text)), " ")
}
