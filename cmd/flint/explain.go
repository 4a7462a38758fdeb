package main

import (
	"fmt"
	"io"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"flint"
)

func newExplain() *cobra.Command {
	c := &cobra.Command{
		Use: "explain [URL | OWNER/REPO RUN]", Short: "Say in one sentence why a job waits; without a job, why anything waits",
		Long: "Explain asks the running flint (flint serve) why a job is where it is. A job or a run is named by its address, as\n" +
			"the browser shows it, or as OWNER/REPOSITORY followed by the number of the run: acme/app 1234.",
		Example: "  flint explain https://github.com/acme/app/actions/runs/1234/job/5678\n  flint explain acme/app 1234\n  flint explain",
		Args: func(c *cobra.Command, args []string) error {
			if len(args) > 2 {
				return usage(c, fmt.Errorf("unexpected argument %q", args[2]))
			}
			return nil
		},
	}
	var daemon daemonFlags
	daemon.register(c.Flags())
	asJSON := c.Flags().Bool("json", false, "print an array of {job, pool, reason}")
	c.RunE = func(c *cobra.Command, args []string) error {
		client, err := daemon.connect(c)
		if err != nil {
			return err
		}
		found, err := client.Explain(c.Context(), strings.Join(args, " "))
		if err != nil {
			return err
		}
		if *asJSON {
			return printJSON(c.OutOrStdout(), found)
		}
		showExplanations(c.OutOrStdout(), found, time.Now())
		return nil
	}
	return c
}

// showExplanations writes what each thing is, and below it why.
func showExplanations(w io.Writer, found []flint.Explanation, now time.Time) {
	s := styleOf(w)
	if len(found) == 0 {
		fmt.Fprintln(w, "Nothing waits.")
	}
	for _, e := range found {
		fmt.Fprintln(w, subject(s, e, now))
		fmt.Fprintf(w, "  %s %s\n", oneLine(e.Reason.Text), s.paint(dim, "["+oneLine(e.Reason.Code)+"]"))
	}
}

// subject is the line that says what is explained. Names are of people's choosing.
func subject(s style, e flint.Explanation, now time.Time) string {
	if e.Job == nil {
		return s.paint(bold, "pool "+oneLine(e.Pool))
	}
	j := e.Job
	line := s.paint(bold, oneLine(j.Repository+"  "+j.Name)) + "  " + s.paint(stateColor(j), oneLine(j.State))
	if j.Conclusion != "" {
		line += " (" + oneLine(j.Conclusion) + ")"
	}
	if j.State == "queued" && !j.Queued.IsZero() {
		line += " for " + max(0, now.Sub(j.Queued)).Round(time.Second).String()
	}
	if len(j.Labels) > 0 {
		line += s.paint(dim, "  runs-on: "+oneLine(strings.Join(j.Labels, ", ")))
	}
	return line
}

func stateColor(j *flint.JobStatus) string {
	switch {
	case j.State == "in_progress", j.Conclusion == "success":
		return green
	case j.State == "completed":
		return red
	}
	return yellow
}
