package github

import (
	"context"
	"crypto/rand"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"net/http/httptest"
	"net/url"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"flint"
)

var one = flint.Runner{ID: "flint-1", Pool: "flint"}

func TestRegisterAndRemove(t *testing.T) {
	d := newDesk(t, newFar(t), nil)
	reg, err := d.Register(t.Context(), one)
	if err != nil {
		t.Fatal(err)
	}
	if reg.Runner != "flint-1" || reg.GitHubID != 101 || string(reg.Credential) != secretJIT {
		t.Errorf("registration %+v", reg)
	}
	if d.far.agents[101].name != "flint-1" {
		t.Errorf("GitHub knows %v", d.far.agents)
	}
	for range 2 {
		if err := d.Remove(t.Context(), "flint-1", reg.GitHubID); err != nil {
			t.Errorf("remove: %v", err)
		}
	}
	if err := d.Remove(t.Context(), "never-was", 0); err != nil {
		t.Errorf("remove what never was: %v", err)
	}
	if len(d.far.agents) != 0 || len(d.runners) != 0 {
		t.Errorf("left: %v, %v", d.far.agents, d.runners)
	}
	if n := d.far.count("POST access_token"); n != 1 {
		t.Errorf("signed in %d times", n)
	}
}

func TestRemoveByName(t *testing.T) {
	d := newDesk(t, newFar(t), nil)
	d.far.agents[5] = agent{name: "flint-9", set: 8}
	if err := d.Remove(t.Context(), "flint-9", 0); err != nil || len(d.far.agents) != 0 {
		t.Errorf("%v, left %v", err, d.far.agents)
	}
}

func TestRemoveBusyRunner(t *testing.T) {
	d := newDesk(t, newFar(t), nil)
	d.far.agents[5] = agent{name: "flint-9", busy: true}
	err := d.Remove(t.Context(), "flint-9", 5)
	var fault *flint.Fault
	if !errors.Is(err, flint.ErrConflict) || !errors.As(err, &fault) || fault.Code != "github.busy" {
		t.Errorf("got %v", err)
	}
}

func TestRegisterWhereANameIsTaken(t *testing.T) {
	t.Run("by a stale one of ours", func(t *testing.T) {
		d := newDesk(t, newFar(t), nil)
		d.far.sets[8], d.far.agents[5] = "flint", agent{name: "flint-1", set: 8}
		reg, err := d.Register(t.Context(), one)
		if err != nil || reg.GitHubID != 101 || len(d.far.agents) != 1 {
			t.Errorf("%+v, %v, agents %v", reg, err, d.far.agents)
		}
	})
	t.Run("by a stale one that is busy", func(t *testing.T) {
		d := newDesk(t, newFar(t), nil)
		d.far.sets[8], d.far.agents[5] = "flint", agent{name: "flint-1", set: 8, busy: true}
		if _, err := d.Register(t.Context(), one); !errors.Is(err, flint.ErrConflict) || len(d.far.agents) != 1 {
			t.Errorf("%v, agents %v", err, d.far.agents)
		}
	})
	t.Run("by somebody else", func(t *testing.T) {
		d := newDesk(t, newFar(t), nil)
		d.far.sets[8], d.far.agents[5] = "flint", agent{name: "flint-1", set: 2}
		_, err := d.Register(t.Context(), one)
		var fault *flint.Fault
		if !errors.As(err, &fault) || fault.Code != "github.runner-exists" || len(d.far.agents) != 1 {
			t.Errorf("%v, agents %v", err, d.far.agents)
		}
	})
}

func TestRegisterLeavesNothingAfterAnUnclearAnswer(t *testing.T) {
	for name, no := range map[string]*answer{
		"lost":       {err: errors.New("connection reset")},
		"5xx":        {status: 500},
		"no runner":  {status: 200, body: `{"encodedJITConfig":"abc"}`},
		"no config":  {status: 200, body: `{"runner":{"id":4}}`},
		"null":       {status: 200, body: `null`},
		"huge":       {status: 200, body: `{"runner":{"id":4},"encodedJITConfig":"` + strings.Repeat("a", maxJIT+1) + `"}`},
		"no content": {status: 200},
	} {
		t.Run(name, func(t *testing.T) {
			d := newDesk(t, newFar(t), nil)
			d.far.refuse = func(route string, _ int) *answer {
				if route != "POST generatejitconfig" {
					return nil
				}
				d.far.agents[6] = agent{name: "flint-1", set: 8} // GitHub did it all the same
				return no
			}
			if _, err := d.Register(t.Context(), one); err == nil {
				t.Fatal("no error")
			}
			if len(d.far.agents) != 0 {
				t.Errorf("left at GitHub: %v", d.far.agents)
			}
		})
	}
}

func TestRegisterForAnUnknownPool(t *testing.T) {
	d := newDesk(t, newFar(t), nil)
	if _, err := d.Register(t.Context(), flint.Runner{ID: "x", Pool: "y"}); !errors.Is(err, flint.ErrNotFound) {
		t.Errorf("got %v", err)
	}
}

// TestRegisterWhilePolling shows that a poll does not keep a registration waiting.
func TestRegisterWhilePolling(t *testing.T) {
	bubble(t, nil, func(t *testing.T, d *desk, _ func()) {
		settle(time.Second)
		before := time.Now()
		if _, err := d.Register(t.Context(), one); err != nil {
			t.Fatal(err)
		}
		if took := time.Since(before); took > 0 {
			t.Errorf("registration waited %s", took)
		}
	})
}

func TestCallsEndWithTheirContext(t *testing.T) {
	testKey()
	synctest.Test(t, func(t *testing.T) {
		f := newFar(t)
		d := newDesk(t, f, func(c *Config) {
			c.Transport = roundTrip(func(r *http.Request) (*http.Response, error) {
				<-r.Context().Done() // a GitHub that never answers
				return nil, r.Context().Err()
			})
		})
		ctx, cancel := context.WithTimeout(t.Context(), 3*time.Second)
		defer cancel()
		if _, err := d.Register(ctx, one); !errors.Is(err, context.DeadlineExceeded) {
			t.Errorf("got %v", err)
		}
		before := time.Now()
		_, err := d.Register(t.Context(), one)
		var fault *flint.Fault
		if !errors.As(err, &fault) || fault.Code != "github.unreachable" || !strings.Contains(err.Error(), "no answer within 30s") {
			t.Errorf("got %v", err)
		}
		if took := time.Since(before); took != callTimeout {
			t.Errorf("gave up after %s", took)
		}
	})
}

type roundTrip func(*http.Request) (*http.Response, error)

func (f roundTrip) RoundTrip(r *http.Request) (*http.Response, error) { return f(r) }

func TestFaultsNameTheSetting(t *testing.T) {
	old := http.Header{"Date": {time.Now().Add(-7 * time.Minute).UTC().Format(http.TimeFormat)}}
	for _, tc := range []struct {
		name, route string
		no          answer
		token       bool
		code, fix   string
		kind        error
	}{
		{"wrong key", "GET installation", *refusal(401, "", "A JSON web token could not be decoded"), false, "github.app", "github.app_id", flint.ErrConfig},
		{"clock", "GET installation", answer{status: 401, header: old}, false, "github.app", "clock", flint.ErrConfig},
		{"not installed", "GET installation", *refusal(404, "", "Not Found"), false, "github.installation", "install the GitHub App", flint.ErrConfig},
		{"no such app", "POST access_token", *refusal(404, "", "Integration not found"), false, "github.app", "github.app_id", flint.ErrConfig},
		{"suspended", "POST access_token", *refusal(403, "", "This installation has been suspended"), false, "github.suspended", "unsuspend", flint.ErrPermission},
		{"no permission", "POST registration-token", *refusal(403, "", "Resource not accessible by integration"), false, "github.permission", "Self-hosted runners", flint.ErrPermission},
		{"wrong organisation", "POST registration-token", *refusal(404, "", "Not Found"), false, "github.permission", "check the URL", flint.ErrPermission},
		{"bad token", "POST registration-token", *refusal(401, "", "Bad credentials"), true, "github.token", "new personal access token", flint.ErrConfig},
		{"rate", "POST registration-token", *refusal(429, "", ""), false, "github.rate", "wait", nil},
		{"down", "POST registration-token", answer{status: 500}, false, "github.unreachable", "127.0.0.1:8080", nil},
	} {
		t.Run(tc.name, func(t *testing.T) {
			f := newFar(t)
			f.refuse = func(route string, _ int) *answer {
				if route == tc.route {
					return &tc.no
				}
				return nil
			}
			d := newDesk(t, f, func(c *Config) {
				if tc.token {
					c.Accounts[0].Token = secretPAT
				}
			})
			_, err := d.Register(t.Context(), one)
			var fault *flint.Fault
			if !errors.As(err, &fault) {
				t.Fatalf("no fault: %v", err)
			}
			if fault.Code != tc.code || !strings.Contains(fault.Fix, tc.fix) || (tc.kind != nil && !errors.Is(err, tc.kind)) {
				t.Errorf("got %s, %q, fix %q", fault.Code, err, fault.Fix)
			}
			for _, secret := range []string{secretPAT, secretInst, secretReg, "eyJ"} {
				if strings.Contains(err.Error()+fault.Fix, secret) {
					t.Errorf("the error holds a secret: %v", err)
				}
			}
		})
	}
}

func TestNewRefusesWhatCannotWork(t *testing.T) {
	for name, tc := range map[string]struct {
		change func(*Config)
		code   string
	}{
		"no credentials": {func(c *Config) { c.Accounts[0].AppID = "" }, "github.app"},
		"no key":         {func(c *Config) { c.Accounts[0].PrivateKey = "" }, "github.key"},
		"not a key": {func(c *Config) {
			c.Accounts[0].PrivateKey = "-----BEGIN RSA PRIVATE KEY-----\nAAAA\n-----END RSA PRIVATE KEY-----\n"
		}, "github.key"},
		"no directory":        {func(c *Config) { c.StateDir = "/nonexistent" }, "github.state"},
		"no organisation":     {func(c *Config) { c.Accounts[0].URL = "https://github.com/" }, "github.url"},
		"too deep":            {func(c *Config) { c.Accounts[0].URL = "https://github.com/a/b/c" }, "github.url"},
		"empty repository":    {func(c *Config) { c.Accounts[0].URL = "https://github.com/a//b" }, "github.url"},
		"plain http":          {func(c *Config) { c.Accounts[0].URL = "http://github.com/acme" }, "github.url"},
		"password":            {func(c *Config) { c.Accounts[0].URL = "https://u:p@github.com/acme" }, "github.url"},
		"no scheme":           {func(c *Config) { c.Accounts[0].URL = "github.com/acme" }, "github.url"},
		"control character":   {func(c *Config) { c.Accounts[0].URL = "https://github.com/\x7f" }, "github.url"},
		"enterprise with app": {func(c *Config) { c.Accounts[0].URL = "https://github.com/enterprises/acme" }, "github.url"},
	} {
		t.Run(name, func(t *testing.T) {
			cfg := newDesk(t, newFar(t), nil).cfg
			tc.change(&cfg)
			_, err := New(cfg)
			var fault *flint.Fault
			if !errors.As(err, &fault) || fault.Code != tc.code || fault.Fix == "" || !errors.Is(err, flint.ErrConfig) {
				t.Errorf("got %v", err)
			}
		})
	}
}

func TestAPIBase(t *testing.T) {
	for in, want := range map[string]string{
		"https://github.com/acme":            "https://api.github.com",
		"https://www.github.com/acme":        "https://api.github.com",
		"https://acme.ghe.com/acme":          "https://api.acme.ghe.com",
		"https://git.example.org/acme/app":   "https://git.example.org/api/v3",
		"http://127.0.0.1:8080/acme":         "http://127.0.0.1:8080/api/v3",
		"https://git.example.org:8443/acme/": "https://git.example.org:8443/api/v3",
	} {
		u, err := url.Parse(in)
		if err != nil {
			t.Fatal(err)
		}
		if got := apiBase(u); got != want {
			t.Errorf("%s: %s, want %s", in, got, want)
		}
	}
}

// TestOverTCP runs the loop over real connections, where a cancelled poll breaks one off.
func TestOverTCP(t *testing.T) {
	f := newFar(t)
	server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if err := f.serve(w, r); err != nil {
			t.Error(err)
		}
	}))
	defer server.Close()
	f.base = server.URL
	f.stats = map[string]int{"totalAssignedJobs": 2}
	d := newDesk(t, f, func(c *Config) { c.Accounts[0].URL, c.Transport = server.URL+"/acme", nil })
	stop := d.start(t)
	wait := func(what string, ok func() bool) {
		t.Helper()
		deadline := time.After(time.Minute)
		for !ok() {
			f.mu.Lock()
			changed := f.changed
			f.mu.Unlock()
			select {
			case <-deadline:
				t.Fatalf("timed out: %s", what)
			case <-changed:
			case <-d.Changed():
			case <-time.After(10 * time.Millisecond):
			}
		}
	}
	wait("demand", func() bool { return len(d.Demand()) == 1 && d.Demand()[0].Assigned == 2 })
	wait("first poll", func() bool { return f.count("GET poll") == 1 })
	d.Capacity("flint", 2)
	wait("second poll", func() bool { return f.count("GET poll") >= 2 })
	f.send(job("JobStarted", "flint-1", nil))
	wait("acknowledgement", func() bool { return f.count("DELETE ack") == 1 })
	stop()
	if f.session != "" {
		t.Error("the session is left over")
	}
}

// FuzzMessage feeds the body of a poll through the library and our conversion: whatever GitHub sends is a bounded message or an
// error, never a panic.
func FuzzMessage(f *testing.F) {
	good, err := json.Marshal(map[string]any{
		"messageId": 1, "messageType": "RunnerScaleSetJobMessages", "statistics": map[string]int{"totalAssignedJobs": 1},
		"body": `[{"messageType":"JobStarted","runnerName":"flint-1","jobDisplayName":"b\u0000\u001b[31m"},{"messageType":"JobAvailable","runnerRequestId":4},null]`,
	})
	if err != nil {
		f.Fatal(err)
	}
	f.Add(good)
	f.Add([]byte("\xef\xbb\xbf" + string(good)))
	f.Add([]byte(`{"messageType":"RunnerScaleSetJobMessages","body":"[[]]","statistics":null}`))
	f.Add([]byte(`{"messageType":"RunnerScaleSetJobMessages","body":"[{\"messageType\":\"JobCompleted\",\"finishTime\":\"99999-01-01T00:00:00Z\"}]"}`))
	f.Add([]byte(`null`))
	far := newFar(f)
	d := newDesk(f, far, nil)
	svc, err := d.scopes[0].service(f.Context())
	if err != nil {
		f.Fatal(err)
	}
	set, err := svc.scaleSet(f.Context(), d.pollers()[0].pool)
	if err != nil {
		f.Fatal(err)
	}
	session, _, err := svc.open(f.Context(), set, "fuzz")
	if err != nil {
		f.Fatal(err)
	}
	f.Fuzz(func(t *testing.T, body []byte) {
		far.mu.Lock()
		far.log = nil
		far.refuse = func(string, int) *answer { return &answer{status: 200, body: string(body)} }
		far.mu.Unlock()
		m, err := session.next(context.Background(), 0, 1)
		if err != nil {
			if len(err.Error()) > 2000 {
				t.Errorf("error of %d bytes", len(err.Error()))
			}
			return
		}
		if m.digest() == "" || m.stats != nil && (m.stats.assigned < 0 || m.stats.available < 0) {
			t.Errorf("message %+v", m)
		}
		for _, e := range m.events {
			for _, s := range []string{e.Runner, e.Conclusion, e.Job.Name, e.Job.Repository, e.Job.ID} {
				if len(s) > 4*maxText || strings.ContainsAny(s, "\x00\x1b\n") {
					t.Errorf("text from the network: %q", s)
				}
			}
		}
	})
}

func TestCleanIsBounded(t *testing.T) {
	b := make([]byte, 4096)
	if _, err := rand.Read(b); err != nil {
		t.Fatal(err)
	}
	if s := clean(string(b), 100); len(s) > 400 || strings.ContainsAny(s, "\n\x00\x1b") {
		t.Errorf("%d bytes: %q", len(s), s)
	}
	if s := clean("a\nb\x1b[0m", 100); s != "a b [0m" {
		t.Errorf("got %q", s)
	}
}

// TestRemoveAfterTheJobAsksItsOwnScopeOnly: the trouble of one account must not keep the runners of another.
func TestRemoveAfterTheJobAsksItsOwnScopeOnly(t *testing.T) {
	change := func(c *Config) {
		c.Accounts = append(c.Accounts, Account{Name: "two", URL: c.Accounts[0].URL + "/app", Token: secretPAT, Mode: Webhooks})
		c.Pools = append([]flint.Pool{{Name: "app", Account: "two"}}, c.Pools...)
	}
	bubble(t, change, func(t *testing.T, d *desk, _ func()) {
		reg, err := d.Register(t.Context(), one)
		if err != nil {
			t.Fatal(err)
		}
		settle(time.Second)
		d.far.send(job("JobStarted", one.ID, nil), job("JobCompleted", one.ID, map[string]any{"result": "succeeded"}))
		settle(time.Second)
		if len(d.events) != 2 {
			t.Fatalf("events %v", d.events)
		}
		d.far.with(func() {
			delete(d.far.agents, int(reg.GitHubID)) // GitHub forgets a runner after its job
			d.far.refuse = func(route string, _ int) *answer {
				if strings.Contains(route, "/repos/") {
					return &answer{status: 502}
				}
				return nil
			}
		})
		if err := d.Remove(t.Context(), one.ID, reg.GitHubID); err != nil || len(d.runners) != 0 {
			t.Errorf("%v, remembered %v", err, d.runners)
		}
	})
}

func TestPruneGivesAScopeUpThatRefuses(t *testing.T) {
	d := newDesk(t, newFar(t), nil)
	for id := range 50 {
		d.far.agents[1000+id] = agent{name: fmt.Sprintf("flint-%d", id), home: "/orgs/acme"}
	}
	asked := 0
	d.far.refuse = func(route string, _ int) *answer {
		if strings.HasPrefix(route, "DELETE ") {
			asked++
			return &answer{status: 502}
		}
		return nil
	}
	if removed, err := d.Prune(t.Context(), func(string) bool { return false }); err == nil || len(removed) != 0 || asked != maxRefusals {
		t.Errorf("removed %v, %v, after %d refusals", removed, err, asked)
	}
}
