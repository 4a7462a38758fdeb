package main

import (
	"errors"
	"fmt"
	"io"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"flint"
	"flint/internal/app"
)

func newKernel() *cobra.Command {
	c := &cobra.Command{
		Use: "kernel", Short: "Fetch, import, build, list or remove kernels for VMs, and say what jobs would miss in them",
		Long: "A kernel of VMs is kept as a pack: the kernel, its modules, and what a VM boots with. flint serve makes that of the configured\n" +
			"kernel when it starts; these commands are for a look at it, and for others. kernel.pack chooses one of them.",
	}
	open := stateFlags(c)
	c.AddCommand(newKernelPull(open), newKernelImport(open), newKernelBuild(open), newKernelList(open), newKernelInspect(open), newKernelRemove(open))
	return c
}

func newKernelPull(open openState) *cobra.Command {
	return &cobra.Command{
		Use: "pull [PACKAGE]", Short: "Fetch a kernel package by apt; the distribution's kernel for clouds by default",
		Long: "Pull asks apt for a kernel package, linux-image-6.1.0-56-cloud-amd64 or one that depends on it, and keeps its kernel. Without a\n" +
			"name it is kernel.package of the configuration, or the distribution's kernel for clouds. It installs nothing.",
		Args: atMostOne,
		RunE: func(c *cobra.Command, args []string) error {
			cfg, opt, err := open(c)
			if err != nil {
				return err
			}
			s := app.KernelSource{Package: cfg.Kernel.Package}
			if len(args) == 1 {
				s.Package = args[0]
			}
			opt.Progress = newSteps(c.ErrOrStderr()).report
			k, err := app.AddKernel(c.Context(), cfg, opt, s)
			return added(c.OutOrStdout(), k, err)
		},
	}
}

func newKernelImport(open openState) *cobra.Command {
	c := &cobra.Command{
		Use:   "import host | FILE.deb… | --vmlinuz FILE [--modules DIR]",
		Short: "Take this machine's own kernel, or one from files",
		Long: "Import keeps the kernel that this machine runs (host), that of .deb files, which together hold a kernel and its modules, or a\n" +
			"given file: a bzImage, an ELF vmlinux or an arm64 Image, with its modules (…/lib/modules/<version>) unless it has all built in.",
		Example: "  flint kernel import host\n  flint kernel import linux-image-6.1.0-56-cloud-amd64_6.1.192-2_amd64.deb\n" +
			"  flint kernel import --vmlinuz /boot/vmlinuz-6.8.0-31-generic --modules /lib/modules/6.8.0-31-generic",
	}
	var s app.KernelSource
	c.Flags().StringVar(&s.Vmlinuz, "vmlinuz", "", "a kernel")
	c.Flags().StringVar(&s.ModuleTree, "modules", "", "its modules; without, it is one that has all a guest needs built in")
	c.RunE = func(c *cobra.Command, args []string) error {
		cfg, opt, err := open(c)
		if err != nil {
			return err
		}
		switch {
		case slices.Contains(args, "host"):
			if len(args) > 1 || s.Vmlinuz != "" || s.ModuleTree != "" {
				return usage(c, errors.New("host stands alone: it is this machine's own kernel (a file of that name is ./host)"))
			}
			if s, err = app.OwnKernel(); err != nil {
				return err
			}
		case len(args) > 0:
			s.Debs = args
		case s.Vmlinuz == "" && s.ModuleTree == "":
			return usage(c, errors.New("name a kernel: host, .deb files, or --vmlinuz"))
		}
		for _, path := range append([]*string{&s.Vmlinuz, &s.ModuleTree}, pointers(s.Debs)...) {
			if *path == "" {
				continue
			}
			if *path, err = filepath.Abs(*path); err != nil {
				return fmt.Errorf("find kernel: %w", err)
			}
		}
		opt.Progress = newSteps(c.ErrOrStderr()).report
		k, err := app.AddKernel(c.Context(), cfg, opt, s)
		return added(c.OutOrStdout(), k, err)
	}
	return c
}

func pointers(list []string) (all []*string) {
	for i := range list {
		all = append(all, &list[i])
	}
	return all
}

// kernelSeries is what the build takes: Debian's packages are called linux-source-6.1, Ubuntu's linux-source-6.8.0.
var kernelSeries = regexp.MustCompile(`^[0-9]+\.[0-9]+(\.[0-9]+)?$`)

func newKernelBuild(open openState) *cobra.Command {
	c := &cobra.Command{
		Use: "build", Short: "Build a kernel without modules from the distribution's source, and keep it", Args: noArgs,
		Long: "Build does what make kernel does: it takes the distribution's linux-source package and flint's own configuration, and builds a\n" +
			"kernel that has all built in, in kernel-source of the state directory. That takes some 20 minutes on two processors and 5 GB of\n" +
			"disk meanwhile, installs a compiler by apt where there is none, and goes on where it was broken off.",
	}
	var b app.KernelBuild
	c.Flags().StringVar(&b.Series, "series", "", "of the source, such as 6.1; the newest that apt knows by default")
	c.Flags().IntVar(&b.Jobs, "jobs", 0, "compilers at once (default: one for each processor)")
	c.RunE = func(c *cobra.Command, _ []string) error {
		cfg, opt, err := open(c)
		if err != nil {
			return err
		}
		if c.Flags().Changed("jobs") && b.Jobs < 1 {
			return usage(c, fmt.Errorf("--jobs %d is less than one", b.Jobs))
		}
		if c.Flags().Changed("series") && !kernelSeries.MatchString(b.Series) {
			return usage(c, fmt.Errorf("--series %q is no series of kernels, such as 6.1", b.Series))
		}
		opt.Progress = saidAloud(newSteps(c.ErrOrStderr()))
		k, err := app.BuildKernel(c.Context(), cfg, opt, b)
		return added(c.OutOrStdout(), k, err)
	}
	return c
}

// saidAloud shows, where there is no terminal whose line could change, what the build says about itself.
func saidAloud(s *steps) flint.Progress {
	return func(m flint.Milestone) {
		if text, ours := strings.CutPrefix(m.Line, "flint: "); ours && !s.tty {
			fmt.Fprintln(s.w, "  "+oneLine(text))
			return
		}
		s.report(m)
	}
}

// added says what was kept, and how it is chosen.
func added(w io.Writer, k app.KeptKernel, err error) error {
	if err != nil {
		return err
	}
	fmt.Fprintf(w, "kernel %s is kept as %s", k.Version, k.ID)
	if k.Chosen {
		fmt.Fprintln(w, ", and is the configured one")
	} else {
		fmt.Fprintf(w, "; kernel.pack: %s in the configuration chooses it\n", k.ID)
	}
	if misses := misses(k.Workloads); misses != "-" {
		fmt.Fprintf(w, "jobs would miss: %s; flint kernel inspect %s says what\n", misses, k.ID)
	}
	return nil
}

func newKernelList(open openState) *cobra.Command {
	c := &cobra.Command{Use: "ls", Short: "List the kernels that are kept, the most recently used first", Args: noArgs}
	verbose := c.Flags().BoolP("verbose", "v", false, "show what each has for docker, k3s, kind, nftables, WireGuard and BPF")
	asJSON := c.Flags().Bool("json", false, "print an array of {id, version, arch, source, size, last_used, in_use, monolithic, path, workloads, chosen, pools}")
	c.RunE = func(c *cobra.Command, _ []string) error {
		cfg, opt, err := open(c)
		if err != nil {
			return err
		}
		list, err := app.ListKernels(c.Context(), cfg, opt)
		w := c.OutOrStdout()
		switch {
		case err != nil && len(list) == 0:
			return err // not that there is none
		case *asJSON:
			return errors.Join(err, printJSON(w, list))
		case *verbose:
			for i, k := range list {
				if i > 0 {
					fmt.Fprintln(w)
				}
				showKernel(w, k, time.Now())
			}
		default:
			showKernels(w, list, time.Now())
		}
		return err
	}
	return c
}

// showKernels writes a table.
func showKernels(w io.Writer, list []app.KeptKernel, now time.Time) {
	if len(list) == 0 {
		fmt.Fprintln(w, "None is kept; flint kernel pull fetches the distribution's.")
		return
	}
	rows := make([][]string, len(list))
	for i, k := range list {
		rows[i] = []string{
			k.ID, oneLine(k.Version), oneLine(k.Source), k.Size.String(), ago(now.Sub(k.Used)), yesOrNo(k.InUse), poolsOf(k), misses(k.Workloads),
		}
	}
	table(w, styleOf(w), []string{"id", "version", "source", "#size", "#last used", "in use", "pools", "jobs would miss"}, rows)
}

// poolsOf names the pools that boot a kernel.
func poolsOf(k app.KeptKernel) string {
	switch {
	case len(k.Pools) > 0:
		return strings.Join(k.Pools, ", ")
	case k.Chosen:
		return "(configured)"
	}
	return "-"
}

// misses names the workloads a kernel has not all for: "wireguard, some of bpf".
func misses(list []app.KernelWorkload) string {
	var all []string
	unknown := 0
	for _, w := range list {
		switch w.Verdict {
		case app.KernelFails:
			all = append(all, w.Name)
		case app.KernelPartly:
			all = append(all, "some of "+w.Name)
		case app.KernelUnknown:
			unknown++
			all = append(all, w.Name+" (perhaps)")
		}
	}
	switch {
	case len(all) == 0:
		return "-"
	case unknown == len(list):
		return "(not known)"
	}
	return strings.Join(all, ", ")
}

func newKernelInspect(open openState) *cobra.Command {
	c := &cobra.Command{
		Use: "inspect [VERSION-OR-ID]", Short: "Show one kernel, and what docker, k3s, kind, nftables, WireGuard and BPF would miss in it", Args: atMostOne,
		Long: "Inspect shows a kernel that is kept; the configured one by default. What it has is told by its configuration and by the modules\n" +
			"that came with it: an option whose module is in no package that was taken does not count.",
	}
	asJSON := c.Flags().Bool("json", false, "print it as flint kernel ls does")
	c.RunE = func(c *cobra.Command, args []string) error {
		cfg, opt, err := open(c)
		if err != nil {
			return err
		}
		k, err := app.FindKernel(c.Context(), cfg, opt, strings.Join(args, ""))
		if err != nil {
			return err
		}
		if *asJSON {
			return printJSON(c.OutOrStdout(), k)
		}
		showKernel(c.OutOrStdout(), k, time.Now())
		return nil
	}
	return c
}

// showKernel writes all that is known of a kernel.
func showKernel(w io.Writer, k app.KeptKernel, now time.Time) {
	s := styleOf(w)
	kind, use := "with modules", ""
	if k.Monolithic {
		kind = "all built in"
	}
	if k.InUse {
		use = ", in use"
	}
	fmt.Fprintln(w, s.paint(bold, oneLine(k.Version)), "", k.Arch+",", kind)
	for _, row := range [][2]string{
		{"id", k.ID}, {"source", oneLine(k.Source)}, {"size", k.Size.String()}, {"used", ago(now.Sub(k.Used)) + use}, {"pools", poolsOf(k)}, {"path", k.Path},
	} {
		fmt.Fprintf(w, "  %s  %s\n", s.paint(dim, pad(row[0], 9)), row[1])
	}
	colors := map[string]string{app.KernelWorks: green, app.KernelPartly: yellow, app.KernelFails: red, app.KernelUnknown: dim}
	for _, l := range k.Workloads {
		var why []string
		for _, part := range []struct {
			says    string
			options []string
		}{{"lacks", l.Lacks}, {"without", l.Without}, {"cannot tell of", l.Unknown}} {
			if len(part.options) > 0 {
				why = append(why, part.says+" "+strings.Join(part.options, ", "))
			}
		}
		line := fmt.Sprintf("  %s  %s  %s", s.paint(dim, pad(l.Name, 9)), s.paint(colors[l.Verdict], pad(l.Verdict, 7)), oneLine(strings.Join(why, "; ")))
		fmt.Fprintln(w, strings.TrimRight(line, " "))
	}
}

func newKernelRemove(open openState) *cobra.Command {
	return &cobra.Command{
		Use: "rm VERSION-OR-ID…", Short: "Remove kernels that nobody uses",
		Args: func(c *cobra.Command, args []string) error {
			if len(args) == 0 {
				return usage(c, errors.New("name a kernel, as flint kernel ls shows it"))
			}
			return nil
		},
		RunE: func(c *cobra.Command, args []string) error {
			cfg, opt, err := open(c)
			if err != nil {
				return err
			}
			for _, name := range args {
				k, err := app.RemoveKernel(c.Context(), cfg, opt, name)
				if err != nil {
					return err
				}
				fmt.Fprintln(c.OutOrStdout(), "removed", oneLine(k.Version), k.ID)
			}
			return nil
		},
	}
}
