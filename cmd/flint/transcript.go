package main

import (
	"context"
	"fmt"
	"io"
	"slices"
	"strings"
	"sync"
	"time"

	"flint"
	"flint/internal/githubsim"
)

// transcript shows a run of a workflow while it goes on, and sums it up at the end.
type transcript struct {
	out     io.Writer
	style   style
	verbose bool // the runner's own lines too

	mu      sync.Mutex
	giveUp  func()   // ends the run, when a job would wait for ever
	order   []string // jobs, in the order they were queued
	jobs    map[string]*jobStory
	results map[string]flint.Result // by runner
	changed chan struct{}           // closed and replaced when a result arrives
}

// jobStory is what the simulated GitHub saw of a job.
type jobStory struct {
	runner                string
	queued, started, done time.Time
	conclusion            githubsim.Conclusion
}

func newTranscript(out io.Writer, s style) *transcript {
	return &transcript{out: out, style: s, jobs: map[string]*jobStory{}, results: map[string]flint.Result{}, changed: make(chan struct{})}
}

// event is the simulated GitHub's observer.
func (t *transcript) event(e githubsim.Event) {
	t.mu.Lock()
	defer t.mu.Unlock()
	j := t.jobs[e.Job]
	if j == nil && e.Job != "" {
		j = &jobStory{queued: e.At}
		t.jobs[e.Job], t.order = j, append(t.order, e.Job)
	}
	switch e.Kind {
	case githubsim.JobQueued:
		j.queued = e.At
		t.say(e.Job, "", dim, "queued")
	case githubsim.JobStarted:
		j.started, j.runner = e.At, e.Runner
		t.say(e.Job, "", dim, "runs on "+e.Runner)
	case githubsim.JobUnserved:
		t.say(e.Job, "", red, fmt.Sprintf("no pool serves runs-on: %s; the demo's is named flint", printable(strings.Join(e.Labels, ", "))))
		if t.giveUp != nil {
			t.giveUp()
		}
	case githubsim.JobSkipped:
		j.conclusion = githubsim.Skipped
		t.say(e.Job, "", dim, "skipped")
	case githubsim.StepStarted:
		if t.verbose || !runnersOwn(e.Step, "") {
			t.say(e.Job, e.Step, dim, "▸")
		}
	case githubsim.LogLine:
		t.line(e)
	case githubsim.JobCompleted:
		j.done, j.conclusion = e.At, e.Conclusion
		t.say(e.Job, "", colourOf(e.Conclusion), string(e.Conclusion))
	}
}

// line shows a line of the log. What the runner says of itself is left out, unless asked for.
func (t *transcript) line(e githubsim.Event) {
	text, failed := strings.CutPrefix(printable(e.Line), "##[error]")
	sgr := ""
	if failed {
		sgr = red
	}
	if !t.verbose && runnersOwn(e.Step, text) {
		return
	}
	t.say(e.Job, e.Step, sgr, text)
}

// runnersOwn tells the lines with which github-act-runner decorates a log.
func runnersOwn(step, line string) bool {
	if step == "Set up Worker" || step == "Set up job" || step == "Complete job" {
		return true
	}
	line = strings.TrimSpace(line)
	for _, prefix := range []string{"⭐ Run ", "✅  Success", "❌  Failure", "🏁  Job ", "Stopping and removing Container"} {
		if strings.HasPrefix(line, prefix) {
			return true
		}
	}
	return false
}

func colourOf(c githubsim.Conclusion) string {
	switch c {
	case githubsim.Success:
		return green
	case githubsim.Skipped:
		return dim
	}
	return red
}

// jobColours tell the jobs apart on a terminal.
var jobColours = [...]string{cyan, yellow, "35", "34"}

func (t *transcript) say(job, step, sgr, text string) {
	width := 0
	for _, name := range t.order {
		width = max(width, len([]rune(name)))
	}
	const stepWidth = 24
	prefix := t.style.paint(jobColours[max(slices.Index(t.order, job), 0)%len(jobColours)], pad(job, width))
	fmt.Fprintf(t.out, "  %s %s %s\n", prefix, t.style.paint(dim, fit(step, stepWidth)+" │"), t.style.paint(sgr, text))
}

// result is told how each runner ended.
func (t *transcript) result(r flint.Result, err error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.results[r.Runner.ID] = r
	close(t.changed)
	t.changed = make(chan struct{})
	if err != nil && r.Reason.Code != "runner.unneeded" && r.Reason.Code != "runner.stopped" {
		fmt.Fprintf(t.out, "  %s %s\n", t.style.paint(red, "✗ "+r.Runner.ID), printable(r.Reason.Text))
		if len(r.Console) > 0 {
			fmt.Fprintf(t.out, "    end of the guest's console:\n%s", indent([]byte(r.Console), 20))
		}
	}
}

// awaitResults waits until each job's runner is gone, or ctx ends.
func (t *transcript) awaitResults(ctx context.Context) {
	for {
		t.mu.Lock()
		missing, changed := false, t.changed
		for _, j := range t.jobs {
			if _, ok := t.results[j.runner]; j.runner != "" && !ok {
				missing = true
			}
		}
		t.mu.Unlock()
		if !missing {
			return
		}
		select {
		case <-changed:
		case <-ctx.Done():
			return
		}
	}
}

// end sums up: the way of each job in milliseconds, the memory its VM took, and what is left of it all.
func (t *transcript) end(conclusion githubsim.Conclusion, left []string) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if len(t.order) > 0 {
		t.timeline()
	}
	fmt.Fprintln(t.out)
	if len(left) == 0 {
		fmt.Fprintf(t.out, "  %s nothing is left: no process, no file, no tap, no namespace, no nftables table, no registration\n", t.style.paint(green, "✓"))
	} else {
		fmt.Fprintf(t.out, "  %s left behind:\n    %s\n", t.style.paint(red, "✗"), strings.Join(left, "\n    "))
	}
	switch conclusion {
	case "":
		fmt.Fprintf(t.out, "  %s the workflow did not end\n\n", t.style.paint(red, "✗"))
	case githubsim.Success:
		fmt.Fprintf(t.out, "  %s workflow: %s\n\n", t.style.paint(green, "✓"), conclusion)
	default:
		fmt.Fprintf(t.out, "  %s workflow: %s\n\n", t.style.paint(red, "✗"), conclusion)
	}
}

func (t *transcript) timeline() {
	header := []string{
		"ms since queued", "#planned", "#booting", "#agent ready", "#registered", "#job started", "#job done", "#gone", "#VM memory", "#in the guest",
	}
	var rows [][]string
	for _, name := range t.order {
		j := t.jobs[name]
		r, ok := t.results[j.runner]
		if !ok {
			rows = append(rows, []string{name, string(j.conclusion)})
			continue
		}
		row := []string{name}
		for _, at := range []time.Time{
			r.Timeline[flint.Planned], r.Timeline[flint.Booting], r.Timeline[flint.Ready], r.Timeline[flint.Registered],
			j.started, j.done, r.Timeline[flint.Gone],
		} {
			cell := "–"
			if !at.IsZero() {
				cell = fmt.Sprint(at.Sub(j.queued).Milliseconds())
			}
			row = append(row, cell)
		}
		rows = append(rows, append(row, r.PeakMemory.String(), r.GuestMemory.String()))
	}
	fmt.Fprintln(t.out)
	table(t.out, t.style, header, rows)
}
