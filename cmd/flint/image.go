package main

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"slices"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"flint"
	"flint/internal/app"
	"flint/internal/config"
)

func newImage() *cobra.Command {
	c := &cobra.Command{Use: "image", Short: "Build, pull, list, inspect and remove what is kept on disk for VMs"}
	open := stateFlags(c)
	c.AddCommand(newImageBuild(open), newImagePull(open), newImageList(open), newImageInspect(open), newImageRemove(open), newImagePrune(open))
	return c
}

// stateFlags gives a command and those below it the flags that say which state directory is meant.
func stateFlags(c *cobra.Command) openState {
	file := configFlag(c.PersistentFlags(), "configuration file; without one, the defaults")
	stateDir := c.PersistentFlags().String("state-dir", "", "where images, kernels and runner software are kept (overrides the configuration)")
	return func(c *cobra.Command) (config.Config, app.Options, error) {
		cfg, _, err := loadOrDefault(c, *file)
		if err != nil {
			return cfg, app.Options{}, err
		}
		if *stateDir != "" {
			cfg.StateDir = *stateDir
		}
		log, err := logger(c, c.ErrOrStderr(), "warn", true)
		return cfg, app.Options{Log: log}, err
	}
}

type openState func(*cobra.Command) (config.Config, app.Options, error)

func newImageList(open openState) *cobra.Command {
	c := &cobra.Command{
		Use: "ls", Short: "List images, runner drives and kernels, the most recently used first", Args: noArgs,
	}
	asJSON := c.Flags().Bool("json", false, "print an array of {digest, kind, source, size, last_used, in_use, wanted, failed}")
	c.RunE = func(c *cobra.Command, _ []string) error {
		cfg, opt, err := open(c)
		if err != nil {
			return err
		}
		list, err := app.StoredImages(c.Context(), cfg, opt)
		slices.Reverse(list)
		if *asJSON {
			if list == nil {
				list = []app.Stored{}
			}
			return errors.Join(err, printJSON(c.OutOrStdout(), list))
		}
		if err == nil || len(list) > 0 {
			showStored(c.OutOrStdout(), list, time.Now())
		}
		return err
	}
	return c
}

func newImagePrune(open openState) *cobra.Command {
	c := &cobra.Command{
		Use: "prune", Short: "Remove what nobody uses and the configuration does not want", Args: noArgs,
		Long: "Prune removes images, runner drives, kernels and build caches that no process uses, flint or VM. What the configured\n" +
			"pools were served by last stays, unless --all is given. Everything removed is made again when it is needed.",
	}
	all := c.Flags().Bool("all", false, "also what the configured pools were served by last")
	asJSON := c.Flags().Bool("json", false, "print {freed, removed}")
	c.RunE = func(c *cobra.Command, _ []string) error {
		cfg, opt, err := open(c)
		if err != nil {
			return err
		}
		freed, removed, err := app.PruneImages(c.Context(), cfg, opt, *all)
		if *asJSON {
			return errors.Join(err, printJSON(c.OutOrStdout(), struct {
				Freed   flint.Bytes `json:"freed"`
				Removed []string    `json:"removed"`
			}{freed, append([]string{}, removed...)}))
		}
		for _, r := range removed {
			fmt.Fprintln(c.OutOrStdout(), "removed", oneLine(r))
		}
		if err == nil || freed > 0 {
			fmt.Fprintln(c.OutOrStdout(), freed, "freed")
		}
		return err
	}
	return c
}

func printJSON(w io.Writer, v any) error {
	enc := json.NewEncoder(w)
	enc.SetIndent("", "  ")
	return enc.Encode(v)
}

// showStored writes a table.
func showStored(w io.Writer, list []app.Stored, now time.Time) {
	if len(list) == 0 {
		fmt.Fprintln(w, "Nothing is kept.")
		return
	}
	rows := make([][]string, len(list))
	for i, s := range list {
		source := ""
		if n := len(s.Source); n > 0 {
			source = s.Source[n-1]
		}
		rows[i] = []string{short(s.Digest), s.Kind, orNone(source), s.Size.String(), ago(now.Sub(s.Used)), yesOrNo(s.InUse), orNone(s.Wanted)}
	}
	table(w, styleOf(w), []string{"digest", "kind", "source", "#size", "#last used", "in use", "wanted by"}, rows)
	for _, s := range list {
		if s.Failed != nil {
			fmt.Fprintf(w, "! %s is not newer: %s: %s\n", short(s.Digest), ago(now.Sub(s.Failed.At)), oneLine(s.Failed.Why))
		}
	}
}

// short is as much of a digest as people tell images apart by. An initramfs is called by its kernel's id, and little of its own.
func short(digest string) string {
	const hexDigits, ofInitramfs = 12, 4
	if name, ok := strings.CutPrefix(digest, "sha256:"); ok {
		return name[:min(hexDigits, len(name))]
	}
	if of, name, ok := strings.Cut(digest, "/initrd-"); ok {
		return of + "/" + name[:min(ofInitramfs, len(name))]
	}
	return digest
}

// ago says how long it is since, in one unit.
func ago(d time.Duration) string {
	switch {
	case d < time.Minute: // or ahead: the clock was put back
		return "now"
	case d < time.Hour:
		return fmt.Sprintf("%dm ago", d/time.Minute)
	case d < 48*time.Hour:
		return fmt.Sprintf("%dh ago", d/time.Hour)
	}
	return fmt.Sprintf("%dd ago", d/(24*time.Hour))
}
