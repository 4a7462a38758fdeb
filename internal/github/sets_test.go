package github

import (
	"errors"
	"fmt"
	"net/http"
	"strings"
	"testing"
	"time"

	"flint"
)

// TestAdminTokenThatEndsEarly: the service refuses our tokens before their time. Signing in anew must not be held up by our own
// session.
func TestAdminTokenThatEndsEarly(t *testing.T) {
	bubble(t, nil, func(t *testing.T, d *desk, _ func()) {
		d.far.with(func() { d.far.stats = map[string]int{"totalAssignedJobs": 2} })
		settle(time.Second)
		d.far.with(func() { d.far.revokeAdmin(); d.far.token = "expired" })
		settle(10 * time.Second)
		if r := d.Waiting(); len(r) != 0 {
			t.Errorf("waiting: %v", r)
		}
		if n := d.far.count("POST sessions"); n != 2 || d.far.count("POST register") < 2 {
			t.Errorf("%d sessions, %d sign-ins", n, d.far.count("POST register"))
		}
		if got := d.Demand(); len(got) != 1 || got[0].Assigned != 2 {
			t.Errorf("demand %+v", got)
		}
		for n := range 3 {
			r := flint.Runner{ID: fmt.Sprint("flint-", n), Pool: "flint"}
			reg, err := d.Register(t.Context(), r)
			if err != nil {
				t.Errorf("register with a new token: %v", err)
			}
			d.far.with(func() { d.far.revokeAdmin() })
			if err := d.Remove(t.Context(), r.ID, reg.GitHubID); err != nil || len(d.far.agents) != 0 {
				t.Errorf("remove with a new token: %v, left %v", err, d.far.agents)
			}
			d.far.with(func() { d.far.revokeAdmin() })
		}
	})
}

func TestPoolNameThatGitHubRefuses(t *testing.T) {
	bubble(t, nil, func(t *testing.T, d *desk, _ func()) {
		d.far.with(func() {
			d.far.refuse = func(route string, _ int) *answer {
				if route == "POST sets" {
					return refusal(400, "GitHub.Actions.Runtime.WebApi.InvalidScaleSetNameException", "The name is reserved")
				}
				return nil
			}
		})
		settle(10 * time.Minute)
		r := d.Waiting()["flint"]
		if r.Code != "github.pool" || !strings.Contains(r.Text, "pool flint") || !strings.Contains(r.Text, "The name is reserved") {
			t.Errorf("waiting: %v", r)
		}
		if n := d.far.count("POST sets"); n > 20 {
			t.Errorf("asked %d times in ten minutes", n)
		}
		if _, err := d.Register(t.Context(), one); code(err) != "github.pool" || !errors.Is(err, flint.ErrConfig) {
			t.Errorf("register: %v", err)
		}
	})
}

// TestScaleSetIsCalledByTheFirstLabel, and all that is said of it by the pool's name.
func TestScaleSetIsCalledByTheFirstLabel(t *testing.T) {
	pools := func(c *Config) { c.Pools = []flint.Pool{{Name: "flint", Labels: []string{"big-linux"}, Max: 1}} }
	bubble(t, pools, func(t *testing.T, d *desk, _ func()) {
		d.far.with(func() { d.far.stats = map[string]int{"totalAssignedJobs": 1} })
		settle(time.Second)
		if len(d.far.sets) != 1 || d.far.sets[8] != "big-linux" {
			t.Errorf("sets %v", d.far.sets)
		}
		if got := d.Demand(); len(got) != 1 || got[0].Pool != "flint" {
			t.Errorf("demand %+v", got)
		}
	})
}

// TestRunnerIsFollowedByItsName: it takes a job that another pool's session tells of.
func TestRunnerIsFollowedByItsName(t *testing.T) {
	pools := func(c *Config) {
		c.Accounts = append(c.Accounts, Account{Name: "hooks", URL: c.Accounts[0].URL, Token: secretPAT, Mode: Webhooks})
		c.Pools = append(c.Pools, flint.Pool{Name: "other", Account: "hooks"})
	}
	bubble(t, pools, func(t *testing.T, d *desk, _ func()) {
		settle(time.Second)
		if _, err := d.Register(t.Context(), flint.Runner{ID: "flint-7", Pool: "other"}); err != nil {
			t.Fatal(err)
		}
		d.far.send(job("JobStarted", "flint-7", nil), job("JobStarted", "flint-of-before", nil), job("JobCompleted", "flint-7", nil))
		settle(time.Second)
		got := []string{}
		for _, e := range d.events {
			got = append(got, e.Pool+" "+e.Runner)
		}
		if s := strings.Join(got, ", "); s != "other flint-7, flint flint-of-before, other flint-7" {
			t.Errorf("events: %s", s)
		}
		if err := d.Remove(t.Context(), "flint-7", 0); err != nil || len(d.runners) != 0 {
			t.Errorf("remove: %v; remembered: %v", err, d.runners)
		}
	})
}

// TestOldMessagesInANewSession: GitHub sends again what an earlier session had, with the statistics of now. Nothing is started
// for them.
func TestOldMessagesInANewSession(t *testing.T) {
	bubble(t, nil, func(t *testing.T, d *desk, stop func()) {
		for range 3 {
			d.far.send(job("JobAssigned", "", nil), job("JobStarted", "flint-old", nil), job("JobCompleted", "flint-old", nil))
		}
		settle(time.Minute)
		if got := d.Demand(); len(got) != 1 || got[0].Assigned != 0 {
			t.Errorf("demand %+v", got)
		}
		if n := d.far.count("DELETE ack"); n != 3 || len(d.far.queue) != 0 {
			t.Errorf("%d acknowledged, %d left", n, len(d.far.queue))
		}
		stop()
	})
}

// TestRateLimitIsVisibleAndKept: the poller's own calls keep to the limit as well.
func TestRateLimitIsVisibleAndKept(t *testing.T) {
	bubble(t, nil, func(t *testing.T, d *desk, _ func()) {
		d.far.with(func() {
			d.far.refuse = func(route string, n int) *answer {
				if route == "POST registration-token" {
					return &answer{status: 403, header: limitHeader(0, time.Date(2000, 1, 1, 0, 50, 0, 0, time.UTC))}
				}
				return nil
			}
		})
		settle(49 * time.Minute)
		if r := d.Waiting()["flint"]; r.Code != "github.rate" {
			t.Errorf("waiting: %v", r)
		}
		if n := d.far.count("POST registration-token"); n != 1 {
			t.Errorf("%d requests before the reset", n)
		}
		d.far.with(func() { d.far.refuse = nil })
		settle(17 * time.Minute)
		if r := d.Waiting(); len(r) != 0 {
			t.Errorf("waiting: %v", r)
		}
	})
}

// TestGitHubItself: on github.com the REST API has a host of its own, and the scale set service another.
func TestGitHubItself(t *testing.T) {
	f := newFar(t)
	f.base = "https://pipelines.example.org"
	d := newDesk(t, f, func(c *Config) {
		c.Accounts[0].URL = "https://github.com/acme"
		c.Transport = roundTrip(func(r *http.Request) (*http.Response, error) {
			r = r.Clone(r.Context())
			switch r.URL.Host {
			case "api.github.com":
				r.URL.Path = "/api/v3" + r.URL.Path
			case "pipelines.example.org":
			default:
				t.Errorf("request to %s", r.URL)
			}
			return f.RoundTrip(r)
		})
	})
	reg, err := d.Register(t.Context(), one)
	if err != nil {
		t.Fatal(err)
	}
	if s, err := d.Status(t.Context(), "flint-1", reg.GitHubID); err != nil || s.Online {
		t.Errorf("%+v, %v", s, err)
	}
	f.with(func() { f.revokeAdmin() })
	if err := d.Remove(t.Context(), "flint-1", reg.GitHubID); err != nil || len(f.agents) != 0 {
		t.Errorf("after the service has signed us out: %v, left %v", err, f.agents)
	}
	f.refuse = func(route string, _ int) *answer {
		switch route {
		case "POST generatejitconfig":
			return refusal(403, "Microsoft.SomeException", "no")
		case "GET /orgs/{org}/actions/runners/{id}":
			return refusal(403, "", "Resource not accessible by integration")
		}
		return nil
	}
	if _, err := d.Register(t.Context(), one); status(err) != 403 || code(err) != "" {
		t.Errorf("the service refuses: %v", err)
	}
	if _, err := d.Status(t.Context(), "flint-1", 5); code(err) != "github.permission" {
		t.Errorf("the API refuses: %v", err)
	}
}
