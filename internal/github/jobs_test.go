package github

import (
	"errors"
	"fmt"
	"net/url"
	"slices"
	"strings"
	"testing"
	"time"

	"flint"
)

func TestParseQuery(t *testing.T) {
	for in, want := range map[string]query{
		"https://github.com/acme/app/actions/runs/12":                        {host: "github.com", run: 12},
		"https://github.com/acme/app/actions/runs/12/":                       {host: "github.com", run: 12},
		"https://github.com/acme/app/actions/runs/12/attempts/2":             {host: "github.com", run: 12, attempt: 2},
		"https://github.com/acme/app/actions/runs/12/job/34#step:3:1":        {host: "github.com", run: 12, job: 34},
		"https://github.com/acme/app/actions/runs/12/job/34?pr=5":            {host: "github.com", run: 12, job: 34},
		"https://github.com/acme/app/actions/runs/12/attempts/1/job/34":      {host: "github.com", run: 12, job: 34, attempt: 1},
		"https://github.com/acme/app/actions/runs/12/workflow":               {host: "github.com", run: 12},
		"https://GitHub.com/acme/app/runs/34":                                {host: "github.com", job: 34},
		"github.com/acme/app/actions/runs/12":                                {host: "github.com", run: 12},
		"https://api.github.com/repos/acme/app/actions/jobs/34":              {host: "api.github.com", job: 34},
		"https://api.github.com/repos/acme/app/actions/runs/12/jobs":         {host: "api.github.com", run: 12},
		"http://127.0.0.1:8080/api/v3/repos/acme/app/actions/runs/12":        {host: "127.0.0.1:8080", run: 12},
		"https://git.example.org/api/v3/repos/acme/app/actions/jobs/34/logs": {host: "git.example.org", job: 34},
		"acme/app 34":                 {id: 34},
		"  acme/app#34 ":              {id: 34},
		"acme/app/34":                 {id: 34},
		"acme/app/actions/runs/12":    {run: 12},
		"acme/my.app/actions/jobs/34": {job: 34, repository: "acme/my.app"},
	} {
		if want.repository == "" {
			want.repository = "acme/app"
		}
		if got, err := parseQuery(in); err != nil || got != want {
			t.Errorf("%s: %+v, %v; want %+v", in, got, err, want)
		}
	}
	for _, in := range []string{
		"", " ", "acme", "acme/app", "acme/app x", "acme/app -1", "acme/app 0", "acme/../34", "acme/app/pulls/3", "https://github.com/acme",
		"https://github.com/acme/app/actions", "https://github.com/acme/app/actions/runs", "https://github.com/acme/app/actions/runs/x",
		"ftp://github.com/acme/app/actions/runs/1", "acme/app 9999999999999999999", "a b/c 1", "acme/app%2f.. 1", strings.Repeat("a", 3000),
		"https://github.com/acme/app/actions/workflows/1",
	} {
		if q, err := parseQuery(in); code(err) != "github.query" || !errors.Is(err, flint.ErrUsage) {
			t.Errorf("%q: %+v, %v", in, q, err)
		}
	}
}

// FuzzQuery: whatever a person types, what goes into a path is a repository's name and positive numbers.
func FuzzQuery(f *testing.F) {
	for _, s := range []string{"https://github.com/acme/app/actions/runs/12/job/34", "acme/app 34", "acme/../../x 1", "acme/app#1", "http://[::1/a/b/c/d/e"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, in string) {
		q, err := parseQuery(in)
		if err != nil {
			if code(err) != "github.query" || strings.ContainsAny(err.Error(), "\n\x1b") {
				t.Errorf("%q", err)
			}
			return
		}
		if url.PathEscape(q.repository) != strings.Replace(q.repository, "/", "%2F", 1) || strings.Contains("/"+q.repository+"/", "/../") {
			t.Errorf("repository %q", q.repository)
		}
		if q.job < 0 || q.run < 0 || q.attempt < 0 || q.id < 0 || q.job+q.run+q.id == 0 {
			t.Errorf("%+v", q)
		}
	})
}

func jobMap(id, run int, status, conclusion, runner string) map[string]any {
	return map[string]any{
		"id": id, "run_id": run, "run_attempt": 1, "status": status, "conclusion": conclusion, "runner_name": runner, "name": "build \x1b[31m",
		"labels": []string{"self-hosted", "big"}, "created_at": "2026-11-21T12:00:00Z", "repository": "acme/app", "run_status": "in_progress",
		"html_url": fmt.Sprintf("https://github.com/acme/app/actions/runs/%d/job/%d", run, id),
	}
}

func TestFind(t *testing.T) {
	d := newDesk(t, newFar(t), func(c *Config) {
		c.Accounts[0].Name = "main"
		c.Pools[0].Account = "main"
		c.Accounts = append(c.Accounts, Account{Name: "other", URL: "https://git.example.org/x", Token: "unused"})
	})
	d.far.jobs = []map[string]any{jobMap(34, 12, "queued", "", ""), jobMap(35, 12, "completed", "failure", "flint-1")}
	found, err := d.Find(t.Context(), d.far.base+"/acme/app/actions/runs/12/job/34")
	if err != nil || len(found) != 1 {
		t.Fatalf("%+v, %v", found, err)
	}
	want := flint.JobStatus{
		Job:   flint.Job{ID: "34", Name: "build  [31m", Repository: "acme/app", RunID: 12},
		State: "queued", Labels: []string{"self-hosted", "big"}, Public: true, Queued: time.Date(2026, 11, 21, 12, 0, 0, 0, time.UTC),
		Account: "main", URL: "https://github.com/acme/app/actions/runs/12/job/34",
	}
	if fmt.Sprintf("%+v", found[0]) != fmt.Sprintf("%+v", want) {
		t.Errorf("got %+v\nwant %+v", found[0], want)
	}
	for what, n := range map[string]int{"acme/app 35": 1, "acme/app#12": 2, "acme/app/actions/runs/12": 2, d.far.base + "/api/v3/repos/acme/app/actions/jobs/35": 1} {
		if found, err := d.Find(t.Context(), what); err != nil || len(found) != n {
			t.Errorf("%s: %d jobs, %v", what, len(found), err)
		}
	}
	for what, says := range map[string]string{
		"https://gitlab.com/acme/app/actions/runs/12": "on that server", d.far.base + "/acme/app/actions/runs/99": "sees it",
		d.far.base + "/globex/app/actions/runs/1": "sees it",
	} {
		if _, err := d.Find(t.Context(), what); code(err) != "github.job" || !errors.Is(err, flint.ErrNotFound) || !strings.Contains(err.Error(), says) {
			t.Errorf("%s: %v", what, err)
		}
	}
	if n := d.far.count("GET /repos/{org}/{repo}"); n > 3 {
		t.Errorf("the repository is looked up %d times", n)
	}
}

// TestFindAsksTheAccountThatServesTheRepository, and goes on to others where that one does not see it.
func TestFindAsksTheAccountThatServesTheRepository(t *testing.T) {
	d := newDesk(t, newFar(t), func(c *Config) {
		c.Accounts[0].URL = strings.Replace(c.Accounts[0].URL, "acme", "globex", 1)
		c.Accounts = append(c.Accounts, Account{Name: "two", URL: strings.Replace(c.Accounts[0].URL, "globex", "acme", 1), Token: secretPAT})
	})
	d.far.installations["/orgs/globex"] = 77
	d.far.repos = append(d.far.repos, map[string]any{"id": 2, "full_name": "initech/app", "private": true})
	d.far.jobs = []map[string]any{jobMap(34, 12, "queued", "", "")}
	if found, err := d.Find(t.Context(), "acme/app 34"); err != nil || found[0].Account != "two" {
		t.Errorf("%+v, %v", found, err)
	}
	if found, err := d.Find(t.Context(), "initech/app 34"); err != nil || found[0].Account != "" || found[0].Public {
		t.Errorf("%+v, %v", found, err)
	}
	d.far.installations = nil // the account that has nothing to do with it is not installed any more
	d.accounts[0].base.uninstalled()
	d.scopes[0].uninstalled()
	if found, err := d.Find(t.Context(), "initech/app 34"); err != nil || found[0].Account != "two" {
		t.Errorf("%+v, %v", found, err)
	}
}

func TestRerun(t *testing.T) {
	attempt := jobMap(35, 12, "completed", "failure", "flint-1")
	attempt["run_attempt"] = 2
	for name, tc := range map[string]struct {
		job  map[string]any
		kind error
		code string
		run  []int64
	}{
		"lost":             {jobMap(35, 12, "completed", "failure", "flint-1"), nil, "", []int64{35}},
		"cancelled":        {jobMap(35, 12, "completed", "cancelled", "flint-1"), nil, "", []int64{35}},
		"succeeded":        {jobMap(35, 12, "completed", "success", "flint-1"), nil, "", nil},
		"not given up yet": {jobMap(35, 12, "in_progress", "", "flint-1"), flint.ErrConflict, "", nil},
		"another's":        {jobMap(35, 12, "completed", "failure", "flint-10"), flint.ErrNotFound, "", nil},
		"second attempt":   {attempt, nil, "github.rerun", nil},
	} {
		t.Run(name, func(t *testing.T) {
			d := newDesk(t, newFar(t), nil)
			for id := range 120 { // the job is on the second page
				d.far.jobs = append(d.far.jobs, jobMap(1000+id, 12, "completed", "success", "x"))
			}
			d.far.jobs = append(d.far.jobs, tc.job)
			err := d.Rerun(t.Context(), flint.Job{ID: "guid", Repository: "acme/app", RunID: 12}, "flint-1")
			if tc.kind != nil && !errors.Is(err, tc.kind) || code(err) != tc.code || (err == nil) != (tc.kind == nil && tc.code == "") || !slices.Equal(d.far.reruns, tc.run) {
				t.Errorf("%v, started again %v", err, d.far.reruns)
			}
		})
	}
	d := newDesk(t, newFar(t), nil)
	// Two jobs of a run were lost: when the other was run again, the second attempt got a copy of this one.
	original := jobMap(25, 12, "completed", "failure", "flint-1")
	original["run_attempt"] = 1
	d.far.jobs = []map[string]any{original, attempt}
	if err := d.Rerun(t.Context(), flint.Job{Repository: "acme/app", RunID: 12}, "flint-1"); err != nil || !slices.Equal(d.far.reruns, []int64{35}) {
		t.Errorf("the second job of a run: %v, started again %v", err, d.far.reruns)
	}
	d = newDesk(t, newFar(t), nil)
	for _, j := range []flint.Job{{}, {Repository: "acme/app"}, {Repository: "../..", RunID: 1}, {Repository: "acme/app", RunID: 99}, {Repository: "globex/app", RunID: 1}} {
		if err := d.Rerun(t.Context(), j, "flint-1"); !errors.Is(err, flint.ErrNotFound) {
			t.Errorf("%+v: %v", j, err)
		}
	}
}

func TestLatestRunner(t *testing.T) {
	d := newDesk(t, newFar(t), nil)
	if _, _, err := d.LatestRunner(t.Context()); !errors.Is(err, flint.ErrNotFound) {
		t.Errorf("a server without it: %v", err)
	}
	d.far.release = map[string]any{"tag_name": "v2.330.1", "published_at": "2026-11-01T10:00:00Z"}
	version, at, err := d.LatestRunner(t.Context())
	if err != nil || version != "2.330.1" || !at.Equal(time.Date(2026, 11, 1, 10, 0, 0, 0, time.UTC)) {
		t.Errorf("%s of %s, %v", version, at, err)
	}
	for _, bad := range []map[string]any{{"tag_name": "v2.330.1"}, {"tag_name": "../2", "published_at": "2026-11-01T10:00:00Z"}} {
		d.far.release = bad
		if v, _, err := d.LatestRunner(t.Context()); err == nil || errors.Is(err, flint.ErrNotFound) {
			t.Errorf("%v: %s, %v", bad, v, err)
		}
	}
}
