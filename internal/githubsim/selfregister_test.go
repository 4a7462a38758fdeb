package githubsim

import (
	"encoding/json"
	"fmt"
	"net/http/httptest"
	"os"
	"os/exec"
	"runtime"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-github/v79/github"
)

// The real program registers itself with a token and runs a job, both ways there are: as on github.com, and as on a server
// that knows pools and agents only.
func TestRealRunnerRegistersItself(t *testing.T) {
	program := actRunnerProgram(t)
	for _, acquire := range []bool{false, true} {
		t.Run(fmt.Sprintf("acquire=%v", acquire), func(t *testing.T) {
			r := newRig(t, Config{Acquire: acquire})
			ctx, c := t.Context(), r.installed()
			token := must[*github.RegistrationToken](t)(c.Actions.CreateOrganizationRegistrationToken(ctx, "acme")).GetToken()
			dir := t.TempDir()
			command := func(args ...string) *exec.Cmd {
				cmd := exec.CommandContext(ctx, program, args...)
				cmd.Dir, cmd.Env, cmd.WaitDelay = dir, []string{"PATH=" + os.Getenv("PATH"), "HOME=" + dir}, time.Minute
				return cmd
			}
			configure := func(url, token, name string) (string, error) {
				out, err := command("configure", "--url", url, "--token", token, "--ephemeral", "--unattended", "--name", name,
					"--labels", "flint,big", "--runnergroup", groupName).CombinedOutput()
				return string(out), err
			}
			for what, try := range map[string][2]string{"a wrong token": {r.cfg.URL + "/acme", "wrong"}, "another scope": {r.cfg.URL + "/acme/widget", token}} {
				if out, err := configure(try[0], try[1], "bad"); err == nil {
					t.Errorf("%s: accepted: %s", what, out)
				}
			}
			if out, err := configure(r.cfg.URL+"/acme", token, "self"); err != nil {
				t.Fatalf("configure: %v\n%s", err, out)
			}
			got := r.Runners()
			if len(got) != 1 || got[0].Name != "self" || !slices.Equal(got[0].Labels, []string{"self-hosted", runtime.GOOS, runtime.GOARCH, "flint", "big"}) {
				t.Fatalf("registered: %+v", got)
			}
			run := submit(t, r, "on: push\njobs:\n  a: { runs-on: [self-hosted, big], steps: [{run: 'echo by $((40 + 2))'}] }\n")
			if out, err := command("run", "--terminal=false").CombinedOutput(); err != nil {
				t.Errorf("run: %v\n%s", err, out)
			}
			r.waitRun(run, Success)
			if log := r.lines("a"); !strings.Contains(log, "by 42") {
				t.Errorf("log:\n%s", log)
			}
			if left := r.Runners(); len(left) != 0 {
				t.Errorf("registrations left: %+v", left)
			}
			if out, err := configure(r.cfg.URL+"/acme", token, "goes"); err != nil {
				t.Fatalf("configure: %v\n%s", err, out)
			}
			token = must[*github.RemoveToken](t)(c.Actions.CreateOrganizationRemoveToken(ctx, "acme")).GetToken()
			if out, err := command("remove", "--url", r.cfg.URL+"/acme", "--token", token, "--unattended").CombinedOutput(); err != nil {
				t.Errorf("remove: %v\n%s", err, out)
			}
			if left := r.Runners(); len(left) != 0 {
				t.Errorf("registrations left after it removed itself: %+v", left)
			}
		})
	}
}

// What registers itself is hostile: a key that is none, or too small or too large a one, is refused.
func TestKeysOfRunnersThatRegisterThemselves(t *testing.T) {
	r := newRig(t, Config{Token: "pat"})
	domain := "acme"
	for name, key := range map[string][2]string{
		"none": {"", ""}, "not base64": {"!", "AQAB"}, "small": {"AQID", "AQAB"}, "even exponent": {strings.Repeat("////", 86), "AQAA"},
		"huge": {strings.Repeat("////", 1000), "AQAB"}, "huge exponent": {strings.Repeat("////", 86), strings.Repeat("////", 86)},
	} {
		in := selfRegistered{Name: "x", Labels: []struct {
			Name string `json:"name"`
		}{{"a"}}}
		if _, err := r.selfRegister(domain, groupID, in, key[0], key[1]); err == nil {
			t.Errorf("%s: accepted", name)
		}
	}
	for path, token := range map[string]string{
		"/api/v3/actions/runners/register":             "pat",
		"/tenant/_apis/distributedtask/pools/1/agents": "pat",
	} {
		if status := r.post("POST", path, token, `{}`); status != 401 {
			t.Errorf("%s without the right token: %d", path, status)
		}
	}
}

// A runner that registers itself may send anything: it is registered as it should be, or refused.
func FuzzSelfRegistration(f *testing.F) {
	modulus := strings.Repeat("////", 86)
	f.Add(true, `{"url":"http://sim/acme","group_id":1,"name":"a","ephemeral":true,"labels":[{"name":"x","type":"user"}],"public_key":"<RSAKeyValue><Modulus>`+modulus+`</Modulus><Exponent>AQAB</Exponent></RSAKeyValue>"}`)
	f.Add(false, `{"name":"b","labels":[{"name":"x"}],"authorization":{"publicKey":{"modulus":"`+modulus+`","exponent":"AQAB"}}}`)
	f.Add(true, `{"url":"::","public_key":"<a>"}`)
	s, err := New(Config{URL: "http://sim", Owner: "acme", Repo: "widget", RateLimit: 1 << 30})
	if err != nil {
		f.Fatal(err)
	}
	f.Cleanup(s.Close)
	h := s.Handler()
	call := func(t *testing.T, path, auth, body string) *httptest.ResponseRecorder {
		req := httptest.NewRequestWithContext(t.Context(), "POST", path, strings.NewReader(body))
		req.Header.Set("Authorization", auth)
		w := httptest.NewRecorder()
		h.ServeHTTP(w, req)
		return w
	}
	f.Fuzz(func(t *testing.T, byREST bool, body string) {
		var admin struct{ Token string }
		token := s.creds.issue(credRegistration, "acme", time.Minute)
		w := call(t, "/api/v3/actions/runner-registration", "RemoteAuth "+token, `{"url":"http://sim/acme"}`)
		if err := json.Unmarshal(w.Body.Bytes(), &admin); err != nil || admin.Token == "" {
			t.Fatalf("%d %s", w.Code, w.Body)
		}
		path := "/tenant/_apis/distributedtask/pools/1/agents"
		if byREST {
			path = "/api/v3/actions/runners/register"
		}
		w = call(t, path, "Bearer "+admin.Token, body)
		if w.Code >= 500 {
			t.Fatalf("%d %s", w.Code, w.Body)
		}
		for _, x := range s.Runners() {
			if len(x.Labels) < 1 || len(x.Labels) > maxLabels || x.Name == "" || len(x.Name) > 64 {
				t.Errorf("registered: %+v", x)
			}
			if err := s.hub.removeRunner("acme", x.ID); err != nil {
				t.Error(err)
			}
		}
	})
}
