package githubsim

import (
	"fmt"
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
				cmd.Dir, cmd.Env, cmd.WaitDelay = dir, []string{"PATH=" + os.Getenv("PATH"), "HOME=" + dir}, 5*time.Second
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
