package github

import (
	"errors"
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"

	"flint"
	"flint/internal/github/webhook"
)

func TestDeliveries(t *testing.T) {
	now := time.Date(2026, 11, 21, 12, 0, 0, 0, time.UTC)
	for name, change := range map[string]func(*Config){
		"app": webhooks,
		"hook": func(c *Config) {
			webhooks(c)
			c.Accounts[0].Token, c.Accounts[0].HookID = secretPAT, 7
		},
	} {
		t.Run(name, func(t *testing.T) {
			d := newDesk(t, newFar(t), change)
			for i := range 250 { // one a minute, newest first
				d.far.deliveries = append(d.far.deliveries, map[string]any{
					"id": 1000 - i, "guid": fmt.Sprintf("g%d", i/2), "event": "workflow_job", "action": "queued", "status_code": 502, "redelivery": i%2 == 0,
					"delivered_at": now.Add(-time.Duration(i) * time.Minute).Format(time.RFC3339),
				})
			}
			api := d.API("")
			got, err := api.Deliveries(t.Context(), now.Add(-150*time.Minute))
			if err != nil || len(got) != 151 {
				t.Fatalf("%d deliveries, %v", len(got), err)
			}
			want := webhook.Delivery{ID: 1000, GUID: "g0", Event: "workflow_job", Action: "queued", At: now, Redelivery: true, Status: 502}
			if g := got[0]; g != want {
				t.Errorf("got %+v, want %+v", g, want)
			}
			if got, err := api.Deliveries(t.Context(), now.Add(-72*time.Hour)); err != nil || len(got) != 250 {
				t.Errorf("all: %d, %v", len(got), err)
			}
			if err := api.Redeliver(t.Context(), 998); err != nil || !slices.Equal(d.far.again, []int64{998}) {
				t.Errorf("%v, again %v", err, d.far.again)
			}
			if err := api.Redeliver(t.Context(), 5); !errors.Is(err, flint.ErrNotFound) {
				t.Errorf("unknown: %v", err)
			}
		})
	}
	d := newDesk(t, newFar(t), func(c *Config) { webhooks(c); c.Accounts[0].Token = secretPAT })
	if _, err := d.API("").Deliveries(t.Context(), now); !errors.Is(err, errors.ErrUnsupported) || code(err) != "github.hook" {
		t.Errorf("token without a hook: %v", err)
	}
	if err := d.API("").Redeliver(t.Context(), 1); !errors.Is(err, errors.ErrUnsupported) {
		t.Errorf("token without a hook: %v", err)
	}
	if d.API("none") != nil {
		t.Error("an account that is not configured has an API")
	}
}

func TestJobOverREST(t *testing.T) {
	d := newDesk(t, newFar(t), webhooks)
	d.far.jobs = []map[string]any{jobMap(34, 12, "in_progress", "", "flint-1")}
	for range 3 {
		j, err := d.API("").Job(t.Context(), "acme/app", 34)
		if err != nil || j.ID != "34" || j.State != "in_progress" || j.Runner != "flint-1" || !j.Public {
			t.Errorf("%+v, %v", j, err)
		}
	}
	if n := d.far.count("GET /repos/{org}/{repo}"); n != 1 {
		t.Errorf("the repository is looked up %d times", n)
	}
	for _, r := range []string{"acme/app", "acme/gone", "../x", "acme/app/../..", ""} {
		if _, err := d.API("").Job(t.Context(), r, 99); !errors.Is(err, flint.ErrNotFound) {
			t.Errorf("%q: %v", r, err)
		}
	}
}

func ids(jobs []flint.JobStatus) string {
	var all []string
	for _, j := range jobs {
		all = append(all, j.ID)
	}
	slices.Sort(all)
	return strings.Join(all, " ")
}

// fill gives the far end repositories, runs and jobs: in each, two that are queued, one that runs, one that is over.
func fill(d *desk) {
	d.far.repos = nil
	for i, name := range []string{"acme/a", "acme/b", "acme/c", "acme/old", "globex/x"} {
		d.far.repos = append(d.far.repos, map[string]any{"id": i + 1, "full_name": name, "private": i > 0, "archived": name == "acme/old"})
		waiting, running, done := jobMap(10*i+1, 100+i, "queued", "", ""), jobMap(10*i+2, 100+i, "in_progress", "", "r"), jobMap(10*i+3, 100+i, "completed", "success", "r")
		for _, j := range []map[string]any{waiting, running, done} {
			j["repository"] = name
			d.far.jobs = append(d.far.jobs, j)
		}
		lone := jobMap(10*i+4, 200+i, "queued", "", "")
		lone["repository"], lone["run_status"] = name, "queued"
		d.far.jobs = append(d.far.jobs, lone)
	}
}

func TestOpenJobs(t *testing.T) {
	for name, change := range map[string]func(*Config){
		"app": webhooks, "token": func(c *Config) { webhooks(c); c.Accounts[0].Token = secretPAT },
	} {
		t.Run(name, func(t *testing.T) {
			d := newDesk(t, newFar(t), change)
			fill(d)
			found, err := d.API("").Open(t.Context(), nil, 100)
			if err != nil || ids(found) != "1 11 12 14 2 21 22 24 4" {
				t.Fatalf("%s, %v", ids(found), err)
			}
			for _, j := range found {
				if j.Public != (j.Repository == "acme/a") || j.Account != "" || len(j.Labels) != 2 {
					t.Errorf("%+v", j)
				}
			}
			found, err = d.API("").Open(t.Context(), []string{"acme/b", "acme/gone", "no name"}, 100)
			if err != nil || ids(found) != "11 12 14" {
				t.Errorf("of one repository: %s, %v", ids(found), err)
			}
			if found, err := d.API("").Open(t.Context(), []string{}, 100); err != nil || len(found) != 0 {
				t.Errorf("of none: %s, %v", ids(found), err)
			}
		})
	}
	t.Run("repository", func(t *testing.T) {
		d := newDesk(t, newFar(t), func(c *Config) { webhooks(c); c.Accounts[0].URL += "/a" })
		fill(d)
		d.far.installations["/repos/acme/a"] = 99
		if found, err := d.API("").Open(t.Context(), nil, 100); err != nil || ids(found) != "1 2 4" {
			t.Errorf("%s, %v", ids(found), err)
		}
	})
	t.Run("enterprise", func(t *testing.T) {
		d := newDesk(t, newFar(t), func(c *Config) {
			webhooks(c)
			c.Accounts[0].URL, c.Accounts[0].Token = strings.Replace(c.Accounts[0].URL, "acme", "enterprises/e", 1), secretPAT
		})
		if _, err := d.API("").Open(t.Context(), nil, 100); !errors.Is(err, errors.ErrUnsupported) {
			t.Errorf("got %v", err)
		}
	})
}

func TestOpenJobsWithinLimits(t *testing.T) {
	t.Run("budget", func(t *testing.T) {
		d := newDesk(t, newFar(t), webhooks)
		fill(d)
		seen := map[string]bool{}
		for range 3 {
			before := len(d.far.log)
			found, err := d.API("").Open(t.Context(), nil, 5) // the list, and the four requests of one repository
			if err != nil {
				t.Fatal(err)
			}
			asked := 0
			for _, route := range d.far.log[before:] {
				if strings.HasPrefix(route, "GET /") {
					asked++
				}
			}
			if asked > 5 {
				t.Errorf("%d requests: %v", asked, d.far.log[before:])
			}
			for _, j := range found {
				seen[j.ID] = true
			}
		}
		if len(seen) != 9 {
			t.Errorf("three surveys found %v", seen)
		}
	})
	t.Run("rate limit", func(t *testing.T) {
		d := newDesk(t, newFar(t), webhooks)
		fill(d)
		d.far.limit = limitHeader(100, time.Now().Add(time.Hour))
		found, err := d.API("").Open(t.Context(), nil, 100)
		if code(err) != "github.rate" || len(found) != 0 {
			t.Errorf("%s, %v", ids(found), err)
		}
		if _, err := d.Register(t.Context(), one); err != nil {
			t.Errorf("register all the same: %v", err)
		}
	})
	t.Run("broken off", func(t *testing.T) {
		d := newDesk(t, newFar(t), webhooks)
		fill(d)
		d.far.refuse = func(route string, n int) *answer {
			if strings.HasSuffix(route, "/actions/runs") && n > 2 {
				return &answer{status: 502}
			}
			return nil
		}
		found, err := d.API("").Open(t.Context(), nil, 100)
		if code(err) != "github.unreachable" || ids(found) != "1 2 4" {
			t.Errorf("%s, %v", ids(found), err)
		}
	})
}
