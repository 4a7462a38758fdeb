package main

import (
	"fmt"
	"io"
	"net/http"
	"slices"
	"strings"
	"sync"
	"time"

	"flint/internal/githubsim"
)

// devLogKept bounds what devLog keeps, in bytes.
const devLogKept = 1 << 20

// devLog keeps the end of what was printed, for those who cannot see it: it is served as text.
type devLog struct {
	mu  sync.Mutex
	buf []byte
}

func (l *devLog) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.buf = append(l.buf, p...)
	if len(l.buf) > 2*devLogKept {
		l.buf = slices.Clone(l.buf[len(l.buf)-devLogKept:])
	}
	return len(p), nil
}

func (l *devLog) ServeHTTP(w http.ResponseWriter, _ *http.Request) {
	l.mu.Lock()
	text := slices.Clone(l.buf)
	l.mu.Unlock()
	w.Header().Set("Content-Type", "text/plain; charset=utf-8")
	_, _ = w.Write(text) // a client that has gone is not our error
}

// devEvents shows what happens at a simulated GitHub, a line each.
type devEvents struct {
	out   io.Writer
	style style
	mu    sync.Mutex
}

// introduce says what a client needs.
func (d *devEvents) introduce(cfg githubsim.Config, app githubsim.App, key string) {
	s := d.style
	fmt.Fprintf(d.out, "\n%s  serves a simulated GitHub until Ctrl-C\n\n", s.paint(bold, "flint dev github"))
	for _, row := range [][2]string{
		{"address", cfg.URL},
		{"REST API", cfg.URL + "/api/v3"},
		{"organisation", cfg.Owner},
		{"repository", cfg.Owner + "/" + cfg.Repo},
		{"App id", fmt.Sprint(app.ID)},
		{"installation id", fmt.Sprint(app.InstallationID)},
		{"private key", key},
	} {
		fmt.Fprintf(d.out, "  %s %s\n", s.paint(dim, pad(row[0], 16)), row[1])
	}
	fmt.Fprintf(d.out, "\n  %s\n\n", s.paint(dim, "a configuration with which flint serve works against it; VMs must reach the address, too:"))
	for _, line := range strings.Split(strings.TrimSpace(devConfig(cfg, app, key)), "\n") {
		fmt.Fprintf(d.out, "    %s\n", line)
	}
	fmt.Fprintln(d.out)
}

// devConfig is an example configuration of flint.
func devConfig(cfg githubsim.Config, app githubsim.App, key string) string {
	return fmt.Sprintf(`schema_version: 1
github:
  url: %s
  organization: %s
  app_id: %d
  installation_id: %d
  private_key_file: %q
runner:
  dir: /var/lib/flint/demo-runner
pools:
  - {name: flint, image: ./images/demo, max: 2}
`, cfg.URL, cfg.Owner, app.ID, app.InstallationID, key)
}

// event is the simulated GitHub's observer.
func (d *devEvents) event(e githubsim.Event) {
	sgr := dim
	switch e.Kind {
	case githubsim.JobUnserved:
		sgr = red
	case githubsim.JobStarted, githubsim.RunnerOnline:
		sgr = cyan
	case githubsim.JobCompleted, githubsim.RunCompleted:
		sgr = colourOf(e.Conclusion)
	case githubsim.LogLine:
		sgr = ""
	}
	var parts []string
	for _, part := range []struct{ label, text string }{
		{"", e.Job}, {"step ", e.Step}, {"runner ", e.Runner}, {"runs-on ", strings.Join(e.Labels, ",")}, {"", string(e.Conclusion)}, {"│ ", e.Line},
	} {
		if part.text != "" {
			parts = append(parts, part.label+printable(part.text))
		}
	}
	if e.RunID != 0 {
		parts = append([]string{fmt.Sprintf("run %d", e.RunID)}, parts...)
	}
	d.say(e.At, sgr, e.Kind.String(), strings.Join(parts, "  "))
}

func (d *devEvents) say(at time.Time, sgr, what, text string) {
	d.mu.Lock()
	defer d.mu.Unlock()
	fmt.Fprintf(d.out, "  %s %s %s\n", d.style.paint(dim, at.Format("15:04:05.000")), d.style.paint(sgr, pad(what, 17)), text)
}

// end says how GitHub misbehaved and what is left at it.
func (d *devEvents) end(sim *githubsim.Server) {
	counts := sim.Misbehaved()
	names := make([]string, 0, len(counts))
	for name := range counts {
		names = append(names, name)
	}
	slices.Sort(names)
	fmt.Fprintln(d.out)
	for _, name := range names {
		fmt.Fprintf(d.out, "  %s %d ×\n", d.style.paint(yellow, pad(name, 28)), counts[name])
	}
	inv := sim.Inventory()
	fmt.Fprintf(d.out, "  left: %d open jobs, %d registrations, %d scale sets\n\n", inv.OpenJobs, len(inv.Runners), len(inv.ScaleSets))
}
