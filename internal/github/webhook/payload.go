package webhook

import (
	"encoding/json"
	"errors"
	"fmt"
	"net/url"
	"slices"
	"strconv"
	"strings"
	"time"
	"unicode"

	"flint"
)

const (
	maxLabels = 100 // of a job; GitHub lets a runner have no more
	maxLabel  = 256 // bytes of one label
	maxText   = 512 // bytes of what people choose: names of jobs, repositories, runners
)

// errForeign is what decode says of a delivery that is well-formed and none of our business.
var errForeign = errors.New("not about the state of a job")

// payload is what is used of a workflow_job webhook.
type payload struct {
	Action string `json:"action"`
	Job    struct {
		ID          int64    `json:"id"`
		RunID       int64    `json:"run_id"`
		Name        string   `json:"name"`
		URL         string   `json:"html_url"`
		Conclusion  string   `json:"conclusion"`
		Labels      []string `json:"labels"`
		Runner      string   `json:"runner_name"`
		CreatedAt   string   `json:"created_at"`
		StartedAt   string   `json:"started_at"`
		CompletedAt string   `json:"completed_at"`
	} `json:"workflow_job"`
	Repository struct {
		FullName string `json:"full_name"`
		Private  bool   `json:"private"`
	} `json:"repository"`
	Enterprise struct {
		Slug string `json:"slug"`
	} `json:"enterprise"`
}

// decode reads the body of a workflow_job webhook. The job's Place and Account are left to the caller.
func decode(body []byte, now time.Time) (j *job, enterprise string, err error) {
	var p payload
	if err := json.Unmarshal(body, &p); err != nil {
		return nil, "", fmt.Errorf("read payload: %w", err)
	}
	state, ok := parseRank(p.Action)
	if !ok {
		if p.Action == "" {
			return nil, "", errors.New("read payload: it names no action")
		}
		return nil, "", errForeign
	}
	j = &job{
		ID: p.Job.ID, RunID: p.Job.RunID, Repository: p.Repository.FullName, Name: clean(p.Job.Name), Labels: p.Job.Labels,
		Public: !p.Repository.Private, State: state, URL: webURL(p.Job.URL), Queued: parseTime(p.Job.CreatedAt),
		First: now, At: now,
	}
	if state >= running {
		j.Runner, j.Started = clean(p.Job.Runner), parseTime(p.Job.StartedAt)
	}
	if state == completed {
		j.Conclusion, j.Completed = clean(p.Job.Conclusion), parseTime(p.Job.CompletedAt)
	}
	return j, p.Enterprise.Slug, j.check()
}

// fromStatus takes over what the REST API says of a job.
func fromStatus(s flint.JobStatus, now time.Time) (*job, error) {
	id, err := strconv.ParseInt(s.ID, 10, 64)
	if err != nil {
		return nil, fmt.Errorf("read job: its id is %q", clean(s.ID))
	}
	state, ok := parseRank(s.State)
	if !ok {
		return nil, fmt.Errorf("read job %d: its state is %q", id, clean(s.State))
	}
	j := &job{
		ID: id, RunID: s.RunID, Repository: s.Repository, Name: clean(s.Name), Labels: s.Labels, Public: s.Public, State: state,
		URL: webURL(s.URL), Queued: s.Queued, First: now, At: now,
	}
	if state >= running {
		j.Runner = clean(s.Runner)
	}
	if state == completed {
		j.Conclusion = clean(s.Conclusion)
	}
	return j, j.check()
}

// check refuses what no GitHub says, and what cannot be kept within bounds without changing its meaning.
func (j *job) check() error {
	if j.ID <= 0 || j.RunID < 0 {
		return fmt.Errorf("read job: its id is %d, that of its run %d", j.ID, j.RunID)
	}
	owner, name, ok := strings.Cut(j.Repository, "/")
	if !ok || owner == "" || name == "" || strings.Contains(name, "/") || len(j.Repository) > maxText ||
		clean(j.Repository) != j.Repository {
		return fmt.Errorf("read job %d: %q is no repository", j.ID, clean(j.Repository))
	}
	if len(j.Labels) > maxLabels {
		return fmt.Errorf("read job %d: it has %d labels, and at most %d are known to GitHub", j.ID, len(j.Labels), maxLabels)
	}
	j.Labels = slices.Clone(j.Labels)
	for i, l := range j.Labels {
		if l == "" || len(l) > maxLabel {
			return fmt.Errorf("read job %d: a label has %d bytes", j.ID, len(l))
		}
		j.Labels[i] = clean(l)
	}
	if y := j.Queued.Year(); !j.Queued.IsZero() && (y < 2000 || y > 9999) {
		j.Queued = time.Time{}
	}
	return nil
}

// parseTime reads a time, leniently: what depends on one has another to fall back on.
func parseTime(s string) time.Time {
	t, err := time.Parse(time.RFC3339, s)
	if err != nil || t.Year() < 2000 || t.Year() > 9999 {
		return time.Time{}
	}
	return t.UTC()
}

// webURL keeps a URL that a browser may be sent to.
func webURL(s string) string {
	u, err := url.Parse(s)
	if err != nil || len(s) > 4*maxText || u.Scheme != "https" && u.Scheme != "http" || u.Host == "" {
		return ""
	}
	return clean(u.String())
}

// clean makes text fit for a log: bounded, and nothing that does not print.
func clean(s string) string {
	const bound = maxText
	if len(s) > bound {
		s = strings.ToValidUTF8(s[:bound], "") + "…"
	}
	return strings.Map(func(r rune) rune {
		if unicode.IsPrint(r) {
			return r
		}
		return ' '
	}, s)
}
