package main

import (
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"flint/internal/app"
)

// oneArg takes exactly one argument.
func oneArg(what string) cobra.PositionalArgs {
	return func(c *cobra.Command, args []string) error {
		switch {
		case len(args) == 0:
			return usage(c, errors.New("name "+what))
		case len(args) > 1:
			return usage(c, fmt.Errorf("unexpected argument %q", args[1]))
		}
		return nil
	}
}

func newImageBuild(open openState) *cobra.Command {
	c := &cobra.Command{
		Use: "build DIR", Short: "Build a Dockerfile, and print the image's digest", Args: oneArg("a directory with a Dockerfile, or the file"),
		Long: "Build does what flint serve does for the pools whose image is this directory, with their file systems, and with their build\n" +
			"arguments where none are given. A running one takes over the result at its next look, within the hour, or at once with\n" +
			"flint config reload. The base is asked for again at its registry, unless the first pool with this image has pull: missing.",
	}
	given := c.Flags().StringArray("build-arg", nil, "KEY=value; may be given again")
	output := c.Flags().StringP("output", "o", "", "also write the file system to this file: ext4, unless the first pool with this image has another")
	local := c.Flags().Bool("local-base", false, "where the registry of the Dockerfile's ARG BASE cannot be reached, build on a Debian root made here")
	c.RunE = func(c *cobra.Command, args []string) error {
		build := map[string]string{}
		for _, kv := range *given {
			k, v, ok := strings.Cut(kv, "=")
			if !ok || k == "" {
				return usage(c, fmt.Errorf("--build-arg %q is not KEY=value", kv))
			}
			build[k] = v
		}
		// Pools name it so, and it is no reference to a registry.
		at, err := filepath.Abs(args[0])
		if err != nil {
			return fmt.Errorf("find %s: %w", args[0], err)
		}
		return makeImage(c, open, at, build, *local, *output)
	}
	return c
}

func newImagePull(open openState) *cobra.Command {
	c := &cobra.Command{
		Use: "pull REF", Short: "Pull or build an image anew, and print its digest", Args: oneArg("an image"),
		Long: "Pull takes every reference that a pool's image may be. A pool with pull: missing has what was pulled last; a running\n" +
			"flint serve takes it over at its next look, within the hour, or at once with flint config reload.",
	}
	c.RunE = func(c *cobra.Command, args []string) error {
		ref, err := fromAnywhere(args[0])
		if err != nil {
			return err
		}
		return makeImage(c, open, ref, nil, false, "")
	}
	return c
}

// fromAnywhere makes a reference that is a path absolute: what is kept is listed and found by what it was made of.
func fromAnywhere(ref string) (string, error) {
	if _, err := os.Stat(ref); err != nil {
		return ref, nil // perhaps no path
	}
	at, err := filepath.Abs(ref)
	if err != nil {
		return "", fmt.Errorf("find %s: %w", ref, err)
	}
	return at, nil
}

func makeImage(c *cobra.Command, open openState, ref string, args map[string]string, localBase bool, output string) error {
	cfg, opt, err := open(c)
	if err != nil {
		return err
	}
	opt.Progress, opt.LocalBase = newSteps(c.ErrOrStderr()).report, localBase
	made, err := app.MakeImage(c.Context(), cfg, opt, ref, args)
	if err != nil {
		return err
	}
	if output != "" {
		done := opt.Progress.Step("write " + output)
		err := app.CopyImage(made[0], output)
		done(made[0].Size.String(), err)
		if err != nil {
			return err
		}
	}
	for _, base := range made {
		fmt.Fprintln(c.OutOrStdout(), base.Digest)
	}
	return nil
}

func newImageInspect(open openState) *cobra.Command {
	c := &cobra.Command{
		Use: "inspect DIGEST-OR-REF", Short: "Show what is known of an image that is kept", Args: oneArg("a digest, or what the image was made of"),
	}
	asJSON := c.Flags().Bool("json", false, "print it as an object, as ls prints it, with env, user, dir, cmd and contents")
	c.RunE = func(c *cobra.Command, args []string) error {
		cfg, opt, err := open(c)
		if err != nil {
			return err
		}
		d, err := app.InspectImage(c.Context(), cfg, opt, args[0])
		if err != nil {
			return err
		}
		if *asJSON {
			return printJSON(c.OutOrStdout(), d)
		}
		showImage(c.OutOrStdout(), d, time.Now())
		return nil
	}
	return c
}

// showImage writes all that is known of an image.
func showImage(w io.Writer, d app.ImageDetails, now time.Time) {
	var rows [][2]string
	row := func(key string, values ...string) {
		for _, v := range values {
			if v != "" {
				rows = append(rows, [2]string{key, oneLine(v)})
				key = ""
			}
		}
	}
	row("digest", d.Digest)
	row("kind", d.Kind)
	row("made of", d.Source...)
	row("size", d.Size.String())
	row("last used", ago(now.Sub(d.Used)))
	row("in use", yesOrNo(d.InUse))
	row("wanted by", d.Wanted)
	if has := d.Contents; has != nil {
		row("system", has.OS)
		row("machine", has.Arch)
		row("C library", has.Libc)
		row("has", found(*has))
	}
	row("user", d.User)
	row("directory", d.Dir)
	row("command", strings.Join(d.Cmd, " "))
	row("environment", d.Env...)
	if d.Failed != nil {
		row("not newer", fmt.Sprintf("%s: %s", ago(now.Sub(d.Failed.At)), d.Failed.Why))
	}
	facts(w, styleOf(w), rows)
}

// found names what flint looks for in an image and found.
func found(has app.ImageContents) string {
	var list []string
	for _, f := range []struct {
		what string
		is   bool
	}{{"a shell", has.Shell}, {"systemd", has.Systemd}, {"docker", has.Docker}, {"the user runner", has.Runner}} {
		if f.is {
			list = append(list, f.what)
		}
	}
	if len(list) == 0 {
		return "neither a shell, systemd, docker nor the user runner"
	}
	return strings.Join(list, ", ")
}

func newImageRemove(open openState) *cobra.Command {
	return &cobra.Command{
		Use: "rm DIGEST-OR-REF", Short: "Remove one image; what a process uses stays", Args: oneArg("a digest, or what the image was made of"),
		RunE: func(c *cobra.Command, args []string) error {
			cfg, opt, err := open(c)
			if err != nil {
				return err
			}
			gone, err := app.RemoveImage(c.Context(), cfg, opt, args[0])
			if err != nil {
				return err
			}
			fmt.Fprintf(c.OutOrStdout(), "removed %s, %s freed\n", oneLine(gone.Digest), gone.Size)
			return nil
		},
	}
}
