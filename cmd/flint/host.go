package main

import (
	"context"
	"fmt"
	"io"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"

	"flint"
	"flint/internal/api"
)

// daemonFlags say where the running flint is.
type daemonFlags struct {
	file   *string
	socket string
}

func (f *daemonFlags) register(fl *pflag.FlagSet) {
	f.file = configFlag(fl, "configuration file of the running flint")
	fl.StringVar(&f.socket, "socket", "", "path of its API's socket (overrides the configuration)")
}

// connect finds the running flint.
func (f *daemonFlags) connect(c *cobra.Command) (*api.Client, error) {
	if f.socket != "" {
		return api.Connect(f.socket), nil
	}
	cfg, _, err := loadOrDefault(c, *f.file)
	if err != nil {
		return nil, err
	}
	return api.Connect(cfg.API.Socket), nil
}

func newHost() *cobra.Command {
	c := &cobra.Command{Use: "host", Short: "Show the host, take it out of service, or put it back"}
	c.AddCommand(
		newHostLs(),
		newHostDrain("drain", "Start no new runner on a host; those it has finish",
			"Drain lets a host take no new runner, until uncordon. Those it has finish their jobs. It holds over restarts of flint.",
			(*api.Client).Drain),
		newHostDrain("uncordon", "Let a drained host take runners again", "", (*api.Client).Uncordon),
	)
	return c
}

func newHostLs() *cobra.Command {
	var f daemonFlags
	c := &cobra.Command{Use: "ls", Short: "Show what is free on the host, and why it takes no runner", Args: noArgs}
	f.register(c.Flags())
	asJSON := c.Flags().Bool("json", false, "print an array of {name, state, reasons, runners, cpus, memory}")
	c.RunE = func(c *cobra.Command, _ []string) error {
		client, err := f.connect(c)
		if err != nil {
			return err
		}
		hosts, err := client.Hosts(c.Context())
		if err != nil {
			return err
		}
		if *asJSON {
			return printJSON(c.OutOrStdout(), hosts)
		}
		showHosts(c.OutOrStdout(), hosts)
		return nil
	}
	return c
}

func newHostDrain(verb, short, long string, do func(*api.Client, context.Context, string) (api.Host, error)) *cobra.Command {
	var f daemonFlags
	c := &cobra.Command{
		Use: verb + " [HOST]", Short: short, Long: long,
		Args: func(c *cobra.Command, args []string) error {
			if len(args) > 1 {
				return usage(c, fmt.Errorf("unexpected argument %q", args[1]))
			}
			return nil
		},
	}
	f.register(c.Flags())
	c.RunE = func(c *cobra.Command, args []string) error {
		client, err := f.connect(c)
		if err != nil {
			return err
		}
		name := ""
		if len(args) == 1 {
			name = args[0]
		}
		host, err := do(client, c.Context(), name)
		if err != nil {
			return err
		}
		showHosts(c.OutOrStdout(), []api.Host{host})
		return nil
	}
	return c
}

// showHosts writes a table, and below it why a host takes no runner.
func showHosts(w io.Writer, hosts []api.Host) {
	s := styleOf(w)
	rows := make([][]string, len(hosts))
	for i, h := range hosts {
		rows[i] = []string{
			oneLine(h.Name), h.State, fmt.Sprint(len(h.Runners)), fmt.Sprintf("%d of %d", h.CPUs.Free, h.CPUs.Of),
			fmt.Sprintf("%s of %s", flint.Bytes(h.Memory.Free), flint.Bytes(h.Memory.Of)),
		}
	}
	table(w, s, []string{"host", "state", "#runners", "#free cpus", "#free memory"}, rows)
	for _, h := range hosts {
		for _, r := range h.Reasons {
			fmt.Fprintf(w, "\n  %s: %s %s\n", oneLine(h.Name), oneLine(r.Text), s.paint(dim, "["+oneLine(r.Code)+"]"))
		}
	}
}
