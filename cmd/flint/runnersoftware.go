package main

import (
	"errors"
	"fmt"
	"io"
	"time"

	"github.com/spf13/cobra"

	"flint/internal/app"
)

func newRunnerSoftware() *cobra.Command {
	c := &cobra.Command{
		Use: "runner-software", Short: "Fetch, import, list or remove GitHub's runner software",
		Long: "GitHub's runner software is what runs a job in its VM. flint serve fetches it by itself and refreshes it daily; these\n" +
			"commands are for a look at it, for another version, and for machines that do not reach GitHub. A running flint serve\n" +
			"takes over within a minute what they make current, unless runner.version names another, or runner.dir is set. A pool's\n" +
			"runner_version stays what it is.",
	}
	open := stateFlags(c)
	c.AddCommand(newRunnerPull(open), newRunnerImport(open), newRunnerList(open), newRunnerRemove(open))
	return c
}

func newRunnerPull(open openState) *cobra.Command {
	return &cobra.Command{
		Use: "pull [VERSION]", Short: "Fetch a release, verify it and make it current; the newest by default",
		Args: atMostOne,
		RunE: func(c *cobra.Command, args []string) error {
			cfg, opt, err := open(c)
			if err != nil {
				return err
			}
			version := ""
			if len(args) == 1 {
				version = args[0]
			}
			got, err := app.RunnerSoftware(cfg, opt.Log).Pull(c.Context(), version, newSteps(c.ErrOrStderr()).report)
			if err != nil {
				for _, have := range app.UsedRunners(cfg, opt.Log, time.Now()) {
					if have.Pool == "" && have.DaysLeft != nil {
						opt.Log.Warn("the present runner software stays", "version", have.Version, "days_left", *have.DaysLeft)
					}
				}
				return err
			}
			fmt.Fprintf(c.OutOrStdout(), "runner software %s is current: %s\n", got.Version, got.Dir)
			return nil
		},
	}
}

func newRunnerImport(open openState) *cobra.Command {
	c := &cobra.Command{
		Use: "import FILE.tar.gz", Short: "Take a release from a file, and make it current",
		Args: func(c *cobra.Command, args []string) error {
			if len(args) != 1 {
				return usage(c, errors.New("name one file: actions-runner-linux-x64-2.335.0.tar.gz"))
			}
			return nil
		},
	}
	var file app.RunnerFile
	c.Flags().StringVar(&file.Version, "version", "", "its version, where the file's name does not say it")
	c.Flags().StringVar(&file.SHA256, "sha256", "", "its digest as the release's notes have it; without, it is not verified")
	released := c.Flags().String("released", "", "the day of its release (2026-11-03); without, its age is not known")
	c.RunE = func(c *cobra.Command, args []string) error {
		cfg, opt, err := open(c)
		if err != nil {
			return err
		}
		if *released != "" {
			if file.Released, err = time.Parse(time.DateOnly, *released); err != nil {
				return usage(c, fmt.Errorf("--released %q is no day, such as 2026-11-03", *released))
			}
			if file.Released.After(time.Now()) {
				return usage(c, fmt.Errorf("--released %s is yet to come", *released))
			}
		}
		file.Path = args[0]
		got, err := app.RunnerSoftware(cfg, opt.Log).Import(c.Context(), file, newSteps(c.ErrOrStderr()).report)
		if err != nil {
			return err
		}
		fmt.Fprintf(c.OutOrStdout(), "runner software %s is current: %s\n", got.Version, got.Dir)
		return nil
	}
	return c
}

func newRunnerList(open openState) *cobra.Command {
	c := &cobra.Command{
		Use: "ls", Short: "List what is there, the newest first, with its age and how long GitHub takes it", Args: noArgs,
		Long: "Ls lists the runner software that is there. GitHub gives no job to software that is older than 30 days, unless it is the newest\n" +
			"there is; the column left says how many of these days are left.",
	}
	asJSON := c.Flags().Bool("json", false, "print an array of {version, arch, released, dir, size, current, pinned, age_days, days_left}")
	c.RunE = func(c *cobra.Command, _ []string) error {
		cfg, opt, err := open(c)
		if err != nil {
			return err
		}
		list, err := app.ListRunnerSoftware(cfg, opt.Log, time.Now())
		if err != nil {
			return err
		}
		if *asJSON {
			return printJSON(c.OutOrStdout(), list)
		}
		showSoftware(c.OutOrStdout(), list)
		return nil
	}
	return c
}

// showSoftware writes a table.
func showSoftware(w io.Writer, list []app.KeptRunner) {
	if len(list) == 0 {
		fmt.Fprintln(w, "None is there; flint runner-software pull fetches it.")
		return
	}
	rows := make([][]string, len(list))
	for i, s := range list {
		day, age, left, use := "-", "-", "-", "-"
		if s.AgeDays != nil && s.DaysLeft != nil {
			day, age, left = s.Released.Format(time.DateOnly), fmt.Sprintf("%d days", *s.AgeDays), fmt.Sprintf("%d days", *s.DaysLeft)
		}
		switch {
		case s.Pinned:
			use = "pinned"
		case s.Current:
			use = "current"
		}
		rows[i] = []string{s.Version, s.Arch, day, age, left, s.Size.String(), use}
	}
	table(w, styleOf(w), []string{"version", "arch", "released", "#age", "#left", "#size", "used"}, rows)
}

func newRunnerRemove(open openState) *cobra.Command {
	return &cobra.Command{
		Use: "rm VERSION…", Short: "Remove versions; VMs that run are not disturbed",
		Args: func(c *cobra.Command, args []string) error {
			if len(args) == 0 {
				return usage(c, errors.New("name a version, as flint runner-software ls shows it"))
			}
			return nil
		},
		RunE: func(c *cobra.Command, args []string) error {
			cfg, opt, err := open(c)
			if err != nil {
				return err
			}
			if err := app.RunnerSoftware(cfg, opt.Log).Remove(c.Context(), args...); err != nil {
				return err
			}
			for _, v := range args {
				fmt.Fprintln(c.OutOrStdout(), "removed", oneLine(v))
			}
			return nil
		},
	}
}
