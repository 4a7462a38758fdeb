package github

import (
	"errors"
	"fmt"
	"net/http"
	"strconv"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"flint"
)

func webhooks(c *Config) { c.Accounts[0].Mode = Webhooks }

// inBubble is a test with a far end and a client that is not started.
func inBubble(t *testing.T, change func(*Config), f func(t *testing.T, d *desk)) {
	t.Helper()
	testKey()
	synctest.Test(t, func(t *testing.T) { f(t, newDesk(t, newFar(t), change)) })
}

func code(err error) string {
	var f *flint.Fault
	if errors.As(err, &f) {
		return f.Code
	}
	return ""
}

func fix(err error) string {
	var f *flint.Fault
	if errors.As(err, &f) {
		return f.Fix
	}
	return ""
}

func TestTokenIsRenewedBeforeItsEnd(t *testing.T) {
	inBubble(t, webhooks, func(t *testing.T, d *desk) {
		d.far.life = 40 * time.Minute
		for range 100 { // 100 minutes; the far end refuses tokens that have ended
			if _, err := d.Status(t.Context(), "flint-1", 0); !errors.Is(err, flint.ErrNotFound) {
				t.Fatal(err)
			}
			time.Sleep(time.Minute)
		}
		if n := d.far.count("POST access_token"); n != 3 { // at 0, 35 and 70 minutes
			t.Errorf("%d tokens, want 3", n)
		}
		if n := d.far.count("GET installation"); n != 1 {
			t.Errorf("the installation was looked up %d times", n)
		}
	})
}

func TestTokenLifeIsMeasuredByGitHubsClock(t *testing.T) {
	inBubble(t, webhooks, func(t *testing.T, d *desk) {
		ahead := 50 * time.Minute // GitHub's clock
		d.far.refuse = func(route string, n int) *answer {
			if route != "POST access_token" {
				return nil
			}
			now := time.Now().Add(ahead)
			return &answer{
				status: 201, body: fmt.Sprintf(`{"token":%q,"expires_at":%q}`, secretInst, now.Add(time.Hour).Format(time.RFC3339)),
				header: http.Header{"Date": {now.UTC().Format(http.TimeFormat)}},
			}
		}
		for range 3 {
			if _, err := d.Status(t.Context(), "flint-1", 0); !errors.Is(err, flint.ErrNotFound) {
				t.Fatal(err)
			}
			time.Sleep(30 * time.Minute)
		}
		if n := d.far.count("POST access_token"); n != 2 {
			t.Errorf("%d tokens in an hour, want 2", n)
		}
	})
}

// TestSignInByGitHubsClock: somebody has set ours by an hour.
func TestSignInByGitHubsClock(t *testing.T) {
	for name, ahead := range map[string]time.Duration{"forwards": -time.Hour, "back": time.Hour} {
		t.Run(name, func(t *testing.T) {
			inBubble(t, webhooks, func(t *testing.T, d *desk) {
				d.far.ahead = ahead
				if _, err := d.Status(t.Context(), "flint-1", 0); !errors.Is(err, flint.ErrNotFound) {
					t.Error(err)
				}
				if n := d.far.count("POST access_token"); n != 2 {
					t.Errorf("asked %d times for a token, want twice: as our clock has it, and GitHub's", n)
				}
			})
		})
	}
}

func TestTokenThatIsRefusedIsReplacedOnce(t *testing.T) {
	inBubble(t, webhooks, func(t *testing.T, d *desk) {
		d.far.life = 2 * time.Hour
		if _, err := d.Status(t.Context(), "flint-1", 0); !errors.Is(err, flint.ErrNotFound) {
			t.Fatal(err)
		}
		clear(d.far.tokens) // revoked, all of them
		d.far.tokens[secretInst+"1"] = time.Now()
		if _, err := d.Status(t.Context(), "flint-1", 0); !errors.Is(err, flint.ErrNotFound) {
			t.Errorf("after the token was revoked: %v", err)
		}
		if n := d.far.count("POST access_token"); n != 2 {
			t.Errorf("%d tokens, want 2", n)
		}
		d.far.refuse = func(route string, _ int) *answer {
			if strings.HasPrefix(route, "GET /orgs") {
				return refusal(401, "", "Bad credentials")
			}
			return nil
		}
		before := d.far.count("GET /orgs/{org}/actions/runners")
		if _, err := d.Status(t.Context(), "flint-1", 0); code(err) != "github.permission" {
			t.Errorf("tokens are refused: %v", err)
		}
		if n := d.far.count("GET /orgs/{org}/actions/runners") - before; n != 2 {
			t.Errorf("asked %d times, want 2", n)
		}
	})
}

// TestInstallationThatIsReplaced: the App was removed and installed anew, so that its installation has another id.
func TestInstallationThatIsReplaced(t *testing.T) {
	for name, mode := range map[string]Mode{"webhooks": Webhooks, "scale sets": ScaleSets} {
		t.Run(name, func(t *testing.T) {
			inBubble(t, func(c *Config) { c.Accounts[0].Mode = mode }, func(t *testing.T, d *desk) {
				if _, err := d.Register(t.Context(), one); err != nil {
					t.Fatal(err)
				}
				d.far.installations = map[string]int{"/orgs/acme": 100}
				time.Sleep(2 * time.Hour)
				two := flint.Runner{ID: "flint-2", Pool: "flint"}
				if _, err := d.Register(t.Context(), two); code(err) != "github.installation" {
					t.Errorf("with the old installation: %v", err)
				}
				if _, err := d.Register(t.Context(), two); err != nil {
					t.Errorf("with the new installation: %v", err)
				}
			})
		})
	}
}

func limitHeader(remaining int, reset time.Time) http.Header {
	return http.Header{
		"X-Ratelimit-Limit": {"1000"}, "X-Ratelimit-Remaining": {strconv.Itoa(remaining)},
		"X-Ratelimit-Reset": {strconv.FormatInt(reset.Unix(), 10)},
	}
}

const listRoute = "GET /orgs/{org}/actions/runners"

// ask makes a call that lists runners and checks the fault it comes to.
func ask(t *testing.T, d *desk, want string) {
	t.Helper()
	if _, err := d.Status(t.Context(), "flint-1", 0); code(err) != want && !(want == "" && errors.Is(err, flint.ErrNotFound)) {
		t.Errorf("got %v, want %q", err, want)
	}
}

func refuseOnce(d *desk, route string, a *answer) {
	d.far.refuse = func(r string, n int) *answer {
		if r == route && n == 1 {
			return a
		}
		return nil
	}
}

func TestNothingIsAskedBeyondTheRateLimit(t *testing.T) {
	t.Run("primary, known before it is refused", func(t *testing.T) {
		inBubble(t, webhooks, func(t *testing.T, d *desk) {
			d.far.limit = limitHeader(0, time.Now().Add(10*time.Minute))
			ask(t, d, "")
			ask(t, d, "github.rate")
			time.Sleep(9 * time.Minute)
			ask(t, d, "github.rate")
			if n := d.far.count(listRoute); n != 1 {
				t.Errorf("%d requests", n)
			}
			d.far.limit = limitHeader(1000, time.Now().Add(time.Hour))
			time.Sleep(time.Minute)
			ask(t, d, "")
			ask(t, d, "")
			if n := d.far.count(listRoute); n != 3 {
				t.Errorf("%d requests after the reset, want 3 in all", n)
			}
		})
	})
	t.Run("primary, refused", func(t *testing.T) {
		inBubble(t, webhooks, func(t *testing.T, d *desk) {
			no := refusal(403, "", "API rate limit exceeded for installation")
			no.header = limitHeader(0, time.Now().Add(30*time.Minute))
			refuseOnce(d, listRoute, no)
			ask(t, d, "github.rate")
			time.Sleep(29 * time.Minute)
			_, err := d.Status(t.Context(), "flint-1", 0)
			if code(err) != "github.rate" || !strings.Contains(fix(err), "wait until 00:30:00") || d.far.count(listRoute) != 1 {
				t.Errorf("%v, fix %q, %d requests", err, fix(err), d.far.count(listRoute))
			}
			// Registrations are counted apart.
			if _, err := d.Register(t.Context(), one); err != nil {
				t.Errorf("register: %v", err)
			}
		})
	})
}

func TestNothingIsAskedInAPause(t *testing.T) {
	t.Run("Retry-After silences everything", func(t *testing.T) {
		inBubble(t, webhooks, func(t *testing.T, d *desk) {
			refuseOnce(d, listRoute, &answer{status: 429, header: http.Header{"Retry-After": {"300"}}})
			ask(t, d, "github.rate")
			time.Sleep(299 * time.Second)
			if _, err := d.Register(t.Context(), one); code(err) != "github.rate" {
				t.Errorf("register: %v", err)
			}
			if len(d.far.agents) != 0 || d.far.count("POST /orgs/{org}/actions/runners/generate-jitconfig") != 0 {
				t.Error("GitHub was asked")
			}
			time.Sleep(time.Second)
			if _, err := d.Register(t.Context(), one); err != nil {
				t.Error(err)
			}
		})
	})
	t.Run("secondary without a time", func(t *testing.T) {
		inBubble(t, webhooks, func(t *testing.T, d *desk) {
			d.far.refuse = func(r string, n int) *answer {
				if r == listRoute && n <= 3 {
					return refusal(403, "", "You have exceeded a secondary rate limit. Please wait a few minutes")
				}
				return nil
			}
			began, at := time.Now(), []time.Duration{}
			for n := 0; n < 4; {
				_, _ = d.Status(t.Context(), "flint-1", 0)
				if d.far.count(listRoute) > n {
					n, at = d.far.count(listRoute), append(at, time.Since(began))
				}
				time.Sleep(time.Second)
			}
			if got := fmt.Sprint(at); got != "[0s 1m0s 3m0s 7m0s]" {
				t.Errorf("asked at %s", got)
			}
		})
	})
	t.Run("the App's own limit is another", func(t *testing.T) {
		inBubble(t, webhooks, func(t *testing.T, d *desk) {
			refuseOnce(d, "GET /app/hook/deliveries", &answer{status: 429, header: http.Header{"Retry-After": {"300"}}})
			if _, err := d.API("").Deliveries(t.Context(), time.Time{}); code(err) != "github.rate" {
				t.Errorf("got %v", err)
			}
			d.account("").signed = map[int64]*credential{} // forgets the token
			if _, err := d.Status(t.Context(), "flint-1", 0); code(err) != "github.rate" {
				t.Errorf("a token is got as the App: %v", err)
			}
		})
	})
}

// TestLimitOfTheScaleSetService: its refusals hold for registrations as well as for polls.
func TestLimitOfTheScaleSetService(t *testing.T) {
	inBubble(t, nil, func(t *testing.T, d *desk) {
		d.far.refuse = func(r string, n int) *answer {
			if r == "POST generatejitconfig" && n == 1 {
				return &answer{status: 429, header: http.Header{"Retry-After": {"60"}}}
			}
			return nil
		}
		for range 60 {
			if _, err := d.Register(t.Context(), one); code(err) != "github.rate" {
				t.Fatalf("after %v", err)
			}
			time.Sleep(time.Second)
		}
		if _, err := d.Register(t.Context(), one); err != nil || d.far.count("POST generatejitconfig") != 2 {
			t.Errorf("%v, %d requests", err, d.far.count("POST generatejitconfig"))
		}
	})
}

func TestRedirectElsewhereIsNotFollowed(t *testing.T) {
	inBubble(t, webhooks, func(t *testing.T, d *desk) {
		d.far.refuse = func(r string, _ int) *answer {
			if r == "GET /orgs/{org}/actions/runners" {
				return &answer{status: 301, header: http.Header{"Location": {"https://example.org/api/v3/orgs/acme/actions/runners"}}}
			}
			return nil
		}
		if _, err := d.Status(t.Context(), "flint-1", 0); err == nil || errors.Is(err, flint.ErrNotFound) {
			t.Errorf("got %v", err)
		}
	})
}

func TestRESTFaultsNameThePermission(t *testing.T) {
	no := refusal(403, "", "Resource not accessible by integration")
	job := flint.Job{Repository: "acme/app", RunID: 42}
	status := func(d *desk) error { _, err := d.Status(t.Context(), "flint-1", 5); return err }
	register := func(d *desk) error { _, err := d.Register(t.Context(), one); return err }
	find := func(d *desk) error { _, err := d.Find(t.Context(), "acme/app#1"); return err }
	rerun := func(d *desk) error { return d.Rerun(t.Context(), job, "flint-9") }
	for _, tc := range []struct {
		name, scope, route string
		token              bool
		no                 *answer
		do                 func(*desk) error
		code, fix          string
	}{
		{"organisation", "/acme", "GET /orgs/{org}/actions/runners/{id}", false, no, status, "github.permission", "organisation permission \"Self-hosted runners"},
		{"repository", "/acme/app", "GET /repos/{org}/{repo}/actions/runners/{id}", false, no, status, "github.permission", "repository permission \"Administration"},
		{"organisation, token", "/acme", "GET /orgs/{org}/actions/runners/{id}", true, no, status, "github.permission", "admin:org"},
		{"mint", "/acme", "POST /orgs/{org}/actions/runners/generate-jitconfig", false, no, register, "github.permission", "Self-hosted runners"},
		{"mint, hidden", "/acme", "POST /orgs/{org}/actions/runners/generate-jitconfig", false, refusal(404, "", "Not Found"), register, "github.permission", "Self-hosted runners"},
		{"group full", "/acme", "POST /orgs/{org}/actions/runners/generate-jitconfig", false, refusal(422, "", "Invalid Argument - Runner group 1 has reached max limit of 10000 runners."), register, "github.group-full", "offline"},
		{"jobs", "/acme", "GET /repos/{org}/{repo}/actions/jobs/{id}", false, no, find, "github.permission", "Actions: read\""},
		{"jobs, token", "/acme", "GET /repos/{org}/{repo}/actions/jobs/{id}", true, no, find, "github.permission", "read Actions"},
		{"re-run", "/acme", "POST /repos/{org}/{repo}/actions/jobs/{id}/rerun", false, no, rerun, "github.permission", "Actions: read and write"},
		{"suspended", "/acme", "GET /repos/{org}/{repo}/actions/jobs/{id}", false, refusal(403, "", "This installation has been suspended"), find, "github.suspended", "unsuspend"},
		{"token", "/acme", "GET /repos/{org}/{repo}/actions/jobs/{id}", true, refusal(401, "", "Bad credentials"), find, "github.token", "new personal access token"},
		{"down", "/acme", "GET /repos/{org}/{repo}/actions/jobs/{id}", false, &answer{status: 502}, find, "github.unreachable", "127.0.0.1:8080"},
		{"early", "/acme", "POST /repos/{org}/{repo}/actions/jobs/{id}/rerun", false, refusal(403, "", "The workflow run containing this job is already running"), rerun, "", ""},
	} {
		t.Run(tc.name, func(t *testing.T) {
			f := newFar(t)
			f.jobs = []map[string]any{{"id": 1, "run_id": 42, "run_attempt": 1, "status": "completed", "conclusion": "failure", "runner_name": "flint-9"}}
			f.refuse = func(route string, _ int) *answer {
				if route == tc.route {
					return tc.no
				}
				return nil
			}
			d := newDesk(t, f, func(c *Config) {
				c.Accounts[0].Mode, c.Accounts[0].URL = Webhooks, f.base+tc.scope
				if tc.token {
					c.Accounts[0].Token = secretPAT
				}
			})
			err := tc.do(d)
			if err == nil || code(err) != tc.code || !strings.Contains(fix(err), tc.fix) {
				t.Errorf("%v (%s), fix %q", err, code(err), fix(err))
			}
			if tc.code == "" && !errors.Is(err, flint.ErrConflict) {
				t.Errorf("got %v", err)
			}
		})
	}
}
