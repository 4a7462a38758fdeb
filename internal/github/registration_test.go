package github

import (
	"context"
	"encoding/json"
	"errors"
	"reflect"
	"slices"
	"strings"
	"testing"

	"flint"
)

func labelled(c *Config) {
	webhooks(c)
	c.Pools = []flint.Pool{{Name: "flint", Labels: []string{"self-hosted", "linux", "big"}, Max: 4}}
}

func TestRegisterOverREST(t *testing.T) {
	for scope, change := range map[string]func(*Config){
		"/orgs/acme":      func(c *Config) {},
		"/repos/acme/app": func(c *Config) { c.Pools[0].Scope = c.Accounts[0].URL + "/app" },
		"/enterprises/e": func(c *Config) {
			c.Accounts[0].URL, c.Accounts[0].Token = strings.Replace(c.Accounts[0].URL, "acme", "enterprises/e", 1), secretPAT
		},
	} {
		t.Run(scope, func(t *testing.T) {
			d := newDesk(t, newFar(t), func(c *Config) { labelled(c); change(c) })
			reg, err := d.Register(t.Context(), one)
			if err != nil {
				t.Fatal(err)
			}
			want := agent{name: "flint-1", labels: []string{"self-hosted", "linux", "big"}, home: scope}
			if reg.GitHubID != 101 || string(reg.Credential) != secretJIT || !reflect.DeepEqual(d.far.agents[101], want) {
				t.Errorf("%+v, GitHub knows %+v", reg, d.far.agents)
			}
			status := func() flint.RunnerStatus {
				s, err := d.Status(t.Context(), "flint-1", 101)
				if err != nil {
					t.Error(err)
				}
				return s
			}
			if got := status(); got != (flint.RunnerStatus{}) {
				t.Errorf("at first: %+v", got)
			}
			want.online, want.busy = true, true
			d.far.agents[101] = want
			if got := status(); got != (flint.RunnerStatus{Online: true, Busy: true}) {
				t.Errorf("with a job: %+v", got)
			}
			if err := d.Remove(t.Context(), "flint-1", 101); !errors.Is(err, flint.ErrConflict) || code(err) != "github.busy" {
				t.Errorf("remove a busy one: %v", err)
			}
			want.busy = false
			d.far.agents[101] = want
			for range 2 {
				if err := d.Remove(t.Context(), "flint-1", 101); err != nil {
					t.Errorf("remove: %v", err)
				}
			}
			if _, err := d.Status(t.Context(), "flint-1", 101); !errors.Is(err, flint.ErrNotFound) {
				t.Errorf("status of none: %v", err)
			}
			if len(d.far.agents) != 0 || len(d.runners) != 0 {
				t.Errorf("left: %v, %v", d.far.agents, d.runners)
			}
		})
	}
}

func TestRegisterOverRESTInAGroup(t *testing.T) {
	group := func(name string) func(*Config) { return func(c *Config) { webhooks(c); c.Pools[0].Group = name } }
	d := newDesk(t, newFar(t), group("Big & Fast"))
	for _, id := range []string{"flint-1", "flint-2"} {
		if _, err := d.Register(t.Context(), flint.Runner{ID: id, Pool: "flint"}); err != nil {
			t.Error(err)
		}
	}
	if n := d.far.count("GET /orgs/{org}/actions/runner-groups"); n != 1 {
		t.Errorf("the groups are listed %d times", n)
	}
	d.far.group = map[string]any{"id": 8, "name": "big & fast"} // deleted and made anew
	three := flint.Runner{ID: "flint-3", Pool: "flint"}
	if _, err := d.Register(t.Context(), three); code(err) != "github.group" {
		t.Errorf("with the old group: %v", err)
	}
	if _, err := d.Register(t.Context(), three); err != nil {
		t.Errorf("with the new group: %v", err)
	}
	d = newDesk(t, newFar(t), group("nobody"))
	if _, err := d.Register(t.Context(), one); code(err) != "github.group" || !strings.Contains(err.Error(), "nobody") {
		t.Errorf("unknown group: %v", err)
	}
}

func TestRegisterOverRESTWhereANameIsTaken(t *testing.T) {
	for name, tc := range map[string]struct {
		there  agent
		prefix string
		code   string
	}{
		"by a stale one of ours":      {agent{name: "flint-1"}, "flint-", ""},
		"by a stale one that is busy": {agent{name: "flint-1", busy: true}, "flint-", "github.busy"},
		"by somebody else":            {agent{name: "flint-1"}, "other-", "github.runner-exists"},
	} {
		t.Run(name, func(t *testing.T) {
			d := newDesk(t, newFar(t), func(c *Config) { webhooks(c); c.Prefix = tc.prefix })
			d.far.agents[5] = tc.there
			reg, err := d.Register(t.Context(), one)
			if code(err) != tc.code || (err == nil) != (tc.code == "") || len(d.far.agents) != 1 || err == nil && reg.GitHubID != 101 {
				t.Errorf("%+v, %v, agents %v", reg, err, d.far.agents)
			}
			if n := d.far.count("POST /orgs/{org}/actions/runners/generate-jitconfig"); n > 2 {
				t.Errorf("tried %d times", n)
			}
		})
	}
}

func TestRegisterOverRESTLeavesNothingAfterAnUnclearAnswer(t *testing.T) {
	for name, no := range map[string]*answer{
		"lost":       {err: errors.New("connection reset")},
		"5xx":        {status: 500},
		"no runner":  {status: 201, body: `{"encoded_jit_config":"abc"}`},
		"no config":  {status: 201, body: `{"runner":{"id":4}}`},
		"two lines":  {status: 201, body: `{"runner":{"id":4},"encoded_jit_config":"abc\nrm -rf"}`},
		"null":       {status: 201, body: `null`},
		"huge":       {status: 201, body: `{"runner":{"id":4},"encoded_jit_config":"` + strings.Repeat("a", maxJIT+1) + `"}`},
		"no content": {status: 201},
		"html":       {status: 200, body: "<html>"},
	} {
		t.Run(name, func(t *testing.T) {
			d := newDesk(t, newFar(t), webhooks)
			d.far.refuse = func(route string, _ int) *answer {
				if !strings.HasSuffix(route, "/generate-jitconfig") {
					return nil
				}
				d.far.agents[6] = agent{name: "flint-1"} // GitHub did it all the same
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

func TestGuestsThatRegisterThemselves(t *testing.T) {
	d := newDesk(t, newFar(t), func(c *Config) {
		labelled(c)
		c.Accounts[0].SelfRegister = true
		c.Accounts[0].URL += "/"
		c.Pools[0].Group = "big & fast"
	})
	reg, err := d.Register(t.Context(), one)
	if err != nil || reg.GitHubID != 0 || reg.Runner != "flint-1" {
		t.Fatalf("%+v, %v", reg, err)
	}
	const want = `{"url":"http://127.0.0.1:8080/acme","token":"REGISTRATIONSECRET","name":"flint-1","labels":["self-hosted","linux","big"],` +
		`"group":"big \u0026 fast","ephemeral":true}`
	if string(reg.Credential) != want {
		t.Errorf("credential %s", string(reg.Credential))
	}
	if _, err := d.Status(t.Context(), "flint-1", 0); !errors.Is(err, flint.ErrNotFound) {
		t.Errorf("before it has registered itself: %v", err)
	}
	d.far.agents[9] = agent{name: "flint-1", online: true}
	d.far.agents[10] = agent{name: "flint-10"}
	if s, err := d.Status(t.Context(), "flint-1", 0); err != nil || !s.Online {
		t.Errorf("%+v, %v", s, err)
	}
	if err := d.Remove(t.Context(), "flint-1", 0); err != nil || len(d.far.agents) != 1 {
		t.Errorf("%v, left %v", err, d.far.agents)
	}
}

// TestRemoveAfterARestart: nothing is known of the runner but its name, and one of the scopes cannot be reached.
func TestRemoveAfterARestart(t *testing.T) {
	change := func(c *Config) {
		webhooks(c)
		c.Pools = append(c.Pools, flint.Pool{Name: "app", Scope: c.Accounts[0].URL + "/app"})
	}
	for _, gone := range []bool{false, true} {
		d := newDesk(t, newFar(t), change)
		d.far.agents[5] = agent{name: "flint-9", home: "/repos/acme/app"}
		d.far.agents[6] = agent{name: "flint-8", home: "/orgs/acme"}
		d.far.deaf = true
		if gone {
			delete(d.far.agents, 5)
		}
		d.far.refuse = func(route string, _ int) *answer {
			if route == "GET /orgs/{org}/actions/runners" {
				return &answer{status: 502}
			}
			return nil
		}
		err := d.Remove(t.Context(), "flint-9", 5)
		if gone != (err != nil) || len(d.far.agents) != 1 {
			t.Errorf("gone %v: %v, left %v", gone, err, d.far.agents)
		}
	}
}

func TestStatusOfAScaleSetsRunner(t *testing.T) {
	d := newDesk(t, newFar(t), nil)
	reg, err := d.Register(t.Context(), one)
	if err != nil {
		t.Fatal(err)
	}
	d.far.agents[int(reg.GitHubID)] = agent{name: "flint-1", online: true}
	if s, err := d.Status(t.Context(), "flint-1", reg.GitHubID); err != nil || s != (flint.RunnerStatus{Online: true}) {
		t.Errorf("%+v, %v", s, err)
	}
	if _, err := d.Status(t.Context(), "flint-2", reg.GitHubID); !errors.Is(err, flint.ErrNotFound) {
		t.Errorf("an id that is another's: %v", err)
	}
}

func TestPrune(t *testing.T) {
	d := newDesk(t, newFar(t), func(c *Config) {
		c.Accounts = append(c.Accounts, Account{Name: "hooks", URL: c.Accounts[0].URL + "/app", Token: secretPAT, Mode: Webhooks})
		c.Pools = append(c.Pools, flint.Pool{Name: "app", Account: "hooks"})
	})
	for id := range 250 {
		d.far.agents[1000+id] = agent{name: "theirs-" + string(rune('a'+id%26))}
	}
	stale := []string{}
	for id, a := range map[int]agent{
		5: {name: "flint-live"}, 6: {name: "flint-busy", busy: true}, 7: {name: "flint-1", home: "/orgs/acme"},
		2000: {name: "flint-2", home: "/orgs/acme", online: true}, 8: {name: "flint-3", home: "/repos/acme/app"}, 9: {name: "Flint-x"},
	} {
		d.far.agents[id] = a
		if a.home != "" {
			stale = append(stale, a.name)
		}
	}
	before := len(d.far.agents)
	removed, err := d.Prune(t.Context(), func(name string) bool { return name == "flint-live" })
	slices.Sort(removed)
	slices.Sort(stale)
	if err != nil || !slices.Equal(removed, stale) || len(d.far.agents) != before-3 {
		t.Errorf("removed %v, %v; %d of %d left", removed, err, len(d.far.agents), before)
	}
	d.cfg.Prefix = ""
	if _, err := d.Prune(t.Context(), func(string) bool { return false }); err == nil || len(d.far.agents) != before-3 {
		t.Errorf("without a prefix: %v, %d left", err, len(d.far.agents))
	}
}

func TestGroupServesPublic(t *testing.T) {
	d := newDesk(t, newFar(t), func(c *Config) {
		c.Pools = []flint.Pool{
			{Name: "common"}, {Name: "big", Group: "Big & fast"}, {Name: "lost", Group: "nobody"}, {Name: "own", Scope: c.Accounts[0].URL + "/app"},
		}
	})
	for pool, want := range map[string]string{"common": "false ", "big": "true ", "lost": "false github.group", "own": "true "} {
		public, err := d.GroupServesPublic(t.Context(), pool)
		if got := strings.Join([]string{map[bool]string{true: "true", false: "false"}[public], code(err)}, " "); got != want {
			t.Errorf("%s: %s, want %s", pool, got, want)
		}
	}
	if _, err := d.GroupServesPublic(t.Context(), "none"); !errors.Is(err, flint.ErrNotFound) {
		t.Errorf("no such pool: %v", err)
	}
}

// TestAccountsAreApart: what one account is refused does not touch another, and each signs with its own.
func TestAccountsAreApart(t *testing.T) {
	f := newFar(t)
	d := newDesk(t, f, func(c *Config) {
		c.Accounts = append(c.Accounts, Account{Name: "two", URL: c.Accounts[0].URL + "/app", Token: secretPAT, Mode: Webhooks})
		c.Pools = append(c.Pools, flint.Pool{Name: "app", Account: "two"})
	})
	f.refuse = func(route string, _ int) *answer {
		if route == "POST access_token" || route == "GET installation" {
			return refusal(403, "", "This installation has been suspended")
		}
		return nil
	}
	if _, err := d.Register(t.Context(), one); code(err) != "github.suspended" {
		t.Errorf("the suspended one: %v", err)
	}
	if _, err := d.Register(t.Context(), flint.Runner{ID: "flint-2", Pool: "app"}); err != nil {
		t.Errorf("the other: %v", err)
	}
}

func TestNewRefusesAccountsThatDoNotFit(t *testing.T) {
	for name, tc := range map[string]struct {
		change func(*Config)
		code   string
	}{
		"none":               {func(c *Config) { c.Accounts = nil }, "github.account"},
		"same name":          {func(c *Config) { c.Accounts = append(c.Accounts, c.Accounts[0]) }, "github.account"},
		"unknown":            {func(c *Config) { c.Pools[0].Account = "x" }, "github.account"},
		"another server":     {func(c *Config) { c.Pools[0].Scope = "https://github.com/acme" }, "github.account"},
		"self with sets":     {func(c *Config) { c.Accounts[0].SelfRegister = true }, "github.account"},
		"hook of an app":     {func(c *Config) { c.Accounts[0].HookID = 7 }, "github.account"},
		"same pool":          {func(c *Config) { c.Pools = append(c.Pools, c.Pools[0]) }, "github.pool"},
		"same scale set":     {func(c *Config) { c.Pools = append(c.Pools, flint.Pool{Name: "x", Labels: []string{"FLINT"}}) }, "github.pool"},
		"named: credentials": {func(c *Config) { c.Accounts[0].Name, c.Accounts[0].AppID = "acme", "" }, "github.app"},
	} {
		t.Run(name, func(t *testing.T) {
			cfg := newDesk(t, newFar(t), nil).cfg
			tc.change(&cfg)
			_, err := New(cfg)
			if code(err) != tc.code || fix(err) == "" || !errors.Is(err, flint.ErrConfig) {
				t.Errorf("got %v", err)
			}
			if key, named := map[string]string{"hook of an app": "github.webhook_hook_id", "self with sets": "github.registration"}[name]; named && !strings.Contains(fix(err), key) {
				t.Errorf("fix %q names no %s", fix(err), key)
			}
			if strings.HasPrefix(name, "named") && !strings.Contains(fix(err), `app_id of the GitHub account "acme"`) {
				t.Errorf("fix %q", fix(err))
			}
		})
	}
}

// FuzzJIT feeds answers to registrations through both ways: a bounded one-line credential, or an error and no panic.
func FuzzJIT(f *testing.F) {
	for _, s := range []string{
		`{"runner":{"id":4,"name":"flint-1"},"encoded_jit_config":"YWJj","encodedJITConfig":"YWJj"}`, `null`, `{`, `{"runner":null}`, `{"runner":{"id":-1}}`,
		`{"runner":{"id":1},"encoded_jit_config":"a b","encodedJITConfig":"a\u0000"}`,
	} {
		f.Add([]byte(s))
	}
	far := newFar(f)
	d := newDesk(f, far, func(c *Config) {
		c.Accounts = append(c.Accounts, Account{Name: "hooks", URL: c.Accounts[0].URL, Token: secretPAT, Mode: Webhooks})
		c.Pools = append(c.Pools, flint.Pool{Name: "hooks", Account: "hooks"})
	})
	if _, err := d.Register(f.Context(), one); err != nil {
		f.Fatal(err)
	}
	f.Fuzz(func(t *testing.T, body []byte) {
		far.with(func() {
			far.log = nil
			far.refuse = func(route string, _ int) *answer {
				if strings.HasSuffix(route, "jitconfig") {
					return &answer{status: map[bool]int{true: 200, false: 201}[route == "POST generatejitconfig"], body: string(body)}
				}
				return nil
			}
		})
		for _, pool := range []string{"flint", "hooks"} {
			reg, err := d.Register(context.Background(), flint.Runner{ID: "flint-2", Pool: pool})
			if s := string(reg.Credential); err == nil && (s == "" || len(s) > maxJIT || strings.ContainsAny(s, " \n\x00") || reg.GitHubID <= 0) {
				t.Errorf("%s: credential %q of %d", pool, s, reg.GitHubID)
			}
			if err != nil && strings.Contains(err.Error(), "\n") {
				t.Errorf("%s: error %q", pool, err)
			}
		}
	})
}

// FuzzRegistrationLine: whatever is configured and whatever GitHub answers, the line is one line of JSON that says the same.
func FuzzRegistrationLine(f *testing.F) {
	f.Add("AABBCC", "flint-1", "self-hosted", "default")
	f.Add("tok\nen", "n", "a,b", "gr\x00up")
	f.Add("", "", "", "")
	f.Fuzz(func(t *testing.T, token, name, label, group string) {
		line, err := registrationLine("https://github.com/acme/", token, name, flint.Pool{Name: "p", Labels: []string{label}, Group: group})
		if err != nil {
			return
		}
		var got ownRegistration
		if err := json.Unmarshal([]byte(string(line)), &got); err != nil || strings.ContainsAny(string(line), "\n\r\x00") {
			t.Fatalf("%q: %v", string(line), err)
		}
		if got.Token != token || got.URL != "https://github.com/acme" || !got.Ephemeral || token == "" || strings.ContainsAny(token, " \n") {
			t.Errorf("got %+v", got)
		}
	})
}
