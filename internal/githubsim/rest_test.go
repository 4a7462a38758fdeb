package githubsim

import (
	"errors"
	"fmt"
	"net/http"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/actions/scaleset"
	"github.com/golang-jwt/jwt/v5"
	"github.com/google/go-cmp/cmp"
	"github.com/google/go-github/v79/github"
)

// The REST side is held to a client that knows nothing of us: go-github.

// api returns a client with a token.
func (r *rig) api(token string) *github.Client {
	r.t.Helper()
	c, err := github.NewClient(nil).WithAuthToken(token).WithEnterpriseURLs(r.cfg.URL, r.cfg.URL)
	if err != nil {
		r.t.Fatal(err)
	}
	return c
}

// appJWT signs what the App proves itself with.
func (r *rig) appJWT(issuer string, life time.Duration) string {
	r.t.Helper()
	key, err := jwt.ParseRSAPrivateKeyFromPEM([]byte(r.App().PrivateKeyPEM))
	if err != nil {
		r.t.Fatal(err)
	}
	now := time.Now().Add(-10 * time.Second)
	s, err := jwt.NewWithClaims(jwt.SigningMethodRS256, jwt.RegisteredClaims{
		Issuer: issuer, IssuedAt: jwt.NewNumericDate(now), ExpiresAt: jwt.NewNumericDate(now.Add(life)),
	}).SignedString(key)
	if err != nil {
		r.t.Fatal(err)
	}
	return s
}

func (r *rig) asApp() *github.Client { return r.api(r.appJWT(strconv.Itoa(appID), 9*time.Minute)) }

// installed returns a client of the App's installation.
func (r *rig) installed() *github.Client {
	r.t.Helper()
	token, _, err := r.asApp().Apps.CreateInstallationToken(r.t.Context(), r.App().InstallationID, nil)
	if err != nil {
		r.t.Fatal(err)
	}
	return r.api(token.GetToken())
}

// refused checks the status of a refusal, and what its message holds.
func refused(t *testing.T, what string, err error, status int, message string) {
	t.Helper()
	var e *github.ErrorResponse
	if !errors.As(err, &e) || e.Response.StatusCode != status || !strings.Contains(e.Message, message) {
		t.Errorf("%s: %v, want %d %q", what, err, status, message)
	}
}

func must[T any](t *testing.T) func(v T, _ *github.Response, err error) T {
	t.Helper()
	return func(v T, _ *github.Response, err error) T {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
		return v
	}
}

func TestAppAndInstallation(t *testing.T) {
	r := newRig(t, Config{Repos: []Repository{{Name: "widget"}, {Name: "open", Public: true}}, Permissions: map[string]string{"actions": "read"}})
	ctx, app := t.Context(), r.asApp()
	if a := must[*github.App](t)(app.Apps.Get(ctx, "")); a.GetID() != r.App().ID || a.GetPermissions().GetActions() != "read" {
		t.Errorf("app: %+v", a)
	}
	for name, find := range map[string]func() (*github.Installation, *github.Response, error){
		"org": func() (*github.Installation, *github.Response, error) {
			return app.Apps.FindOrganizationInstallation(ctx, "Acme")
		},
		"repo": func() (*github.Installation, *github.Response, error) {
			return app.Apps.FindRepositoryInstallation(ctx, "acme", "open")
		},
		"user": func() (*github.Installation, *github.Response, error) {
			return app.Apps.FindUserInstallation(ctx, "acme")
		},
		"id": func() (*github.Installation, *github.Response, error) {
			return app.Apps.GetInstallation(ctx, r.App().InstallationID)
		},
	} {
		if i := must[*github.Installation](t)(find()); i.GetID() != r.App().InstallationID || i.GetAccount().GetLogin() != "acme" {
			t.Errorf("installation by %s: %+v", name, i)
		}
	}
	_, _, err := app.Apps.FindOrganizationInstallation(ctx, "other")
	refused(t, "another organisation", err, 404, "Not Found")
	if a := must[*github.App](t)(r.api(r.appJWT(r.App().ClientID, 9*time.Minute)).Apps.Get(ctx, "")); a.GetID() != r.App().ID {
		t.Errorf("by client id: %+v", a)
	}
	_, _, err = r.api(r.appJWT("7", time.Minute)).Apps.Get(ctx, "")
	refused(t, "another App", err, 401, "Integration not found")
	_, _, err = r.api(r.appJWT(strconv.Itoa(appID), time.Hour)).Apps.Get(ctx, "")
	refused(t, "a long life", err, 401, "too far in the future")
	_, _, err = r.api(r.appJWT(strconv.Itoa(appID), time.Second)).Apps.Get(ctx, "")
	refused(t, "one that is over", err, 401, "'exp'")

	c := r.installed()
	repos := must[*github.ListRepositories](t)(c.Apps.ListRepos(ctx, nil))
	if repos.GetTotalCount() != 2 || !repos.Repositories[0].GetPrivate() || repos.Repositories[1].GetPrivate() || repos.Repositories[1].GetFullName() != "acme/open" {
		t.Errorf("repositories: %+v", repos)
	}
	if got := must[*github.Repository](t)(c.Repositories.Get(ctx, "acme", "open")); got.GetVisibility() != "public" || got.GetID() != repos.Repositories[1].GetID() {
		t.Errorf("repository: %+v", got)
	}
	_, _, err = c.Repositories.Get(ctx, "acme", "none")
	refused(t, "no repository", err, 404, "Not Found")
	_, err = c.Actions.CancelWorkflowRunByID(ctx, "acme", "widget", 1)
	refused(t, "without the permission", err, 403, "Resource not accessible by integration")
	if _, err = r.api("wrong").Actions.RemoveOrganizationRunner(ctx, "acme", 1); err == nil {
		t.Error("a wrong token is let in")
	}
	r.Suspend(true)
	_, _, err = c.Repositories.Get(ctx, "acme", "open")
	refused(t, "suspended", err, 403, "This installation has been suspended")
	_, _, err = app.Apps.CreateInstallationToken(ctx, r.App().InstallationID, nil)
	refused(t, "token while suspended", err, 403, "This installation has been suspended")
	if i := must[*github.Installation](t)(app.Apps.GetInstallation(ctx, r.App().InstallationID)); i.SuspendedAt == nil {
		t.Error("the installation does not look suspended")
	}
	r.Suspend(false)
	r.Permit("metadata", "")
	_, _, err = c.Repositories.Get(ctx, "acme", "open")
	refused(t, "permission taken away", err, 403, "not accessible")
}

func TestPersonalTokenAndRateLimit(t *testing.T) {
	r := newRig(t, Config{Token: "ghp_secret", RateLimit: 5})
	ctx, c := t.Context(), r.api("ghp_secret")
	for i := range 5 {
		_, resp, err := c.Actions.ListOrganizationRunners(ctx, "acme", nil)
		if err != nil || resp.Rate.Limit != 5 || resp.Rate.Remaining != 4-i || resp.Rate.Reset.Before(time.Now()) {
			t.Fatalf("request %d: %v, %+v", i, err, resp.Rate)
		}
	}
	var limited *github.RateLimitError
	if _, _, err := r.api("ghp_secret").Actions.ListOrganizationRunners(ctx, "acme", nil); !errors.As(err, &limited) {
		t.Errorf("the sixth: %v", err)
	}
	if rate := must[*github.RateLimits](t)(c.RateLimit.Get(ctx)); rate.GetCore().Remaining != 0 || rate.GetCore().Limit != 5 {
		t.Errorf("rate limit: %+v", rate)
	}
	if _, _, err := r.installed().Actions.ListOrganizationRunners(ctx, "acme", nil); err != nil {
		t.Errorf("another caller is limited too: %v", err)
	}
}

func TestRunnersByREST(t *testing.T) {
	r := newRig(t, Config{Enterprise: "anvils"})
	ctx, c := t.Context(), r.installed()
	jit := func(name string) *github.GenerateJITConfigRequest {
		return &github.GenerateJITConfigRequest{Name: name, RunnerGroupID: 1, Labels: []string{"self-hosted", "big"}}
	}
	got := must[*github.JITRunnerConfig](t)(c.Actions.GenerateOrgJITConfig(ctx, "acme", jit("one")))
	if got.GetRunner().GetName() != "one" || len(got.GetRunner().Labels) != 2 || decodeJIT(t, got.GetEncodedJITConfig()).name != "one" {
		t.Errorf("JIT: %+v", got)
	}
	_, _, err := c.Actions.GenerateOrgJITConfig(ctx, "acme", jit("ONE"))
	refused(t, "a name that exists", err, 409, "Already exists")
	for what, bad := range map[string]*github.GenerateJITConfigRequest{
		"no labels":   {Name: "x", RunnerGroupID: 1},
		"many labels": {Name: "x", RunnerGroupID: 1, Labels: make([]string, 101)},
		"a comma":     {Name: "x", RunnerGroupID: 1, Labels: []string{"a,b"}},
		"no name":     {RunnerGroupID: 1, Labels: []string{"a"}},
		"a long name": {Name: strings.Repeat("x", 65), RunnerGroupID: 1, Labels: []string{"a"}},
	} {
		_, _, err := c.Actions.GenerateOrgJITConfig(ctx, "acme", bad)
		refused(t, what, err, 422, "Validation Failed")
	}
	_, _, err = c.Actions.GenerateOrgJITConfig(ctx, "acme", &github.GenerateJITConfigRequest{Name: "x", RunnerGroupID: 77, Labels: []string{"a"}})
	refused(t, "no group", err, 404, "no such runner group")
	must[*github.JITRunnerConfig](t)(c.Actions.GenerateRepoJITConfig(ctx, "acme", "widget", jit("two")))
	must[*github.JITRunnerConfig](t)(c.Enterprise.GenerateEnterpriseJITConfig(ctx, "anvils", jit("three")))
	for i := range 4 {
		must[*github.JITRunnerConfig](t)(c.Actions.GenerateOrgJITConfig(ctx, "acme", jit(fmt.Sprintf("more-%d", i))))
	}
	var names []string
	opts := &github.ListRunnersOptions{ListOptions: github.ListOptions{PerPage: 2}}
	for {
		list, resp, err := c.Actions.ListOrganizationRunners(ctx, "acme", opts)
		if err != nil || list.TotalCount != 5 {
			t.Fatalf("list: %+v, %v", list, err)
		}
		for _, x := range list.Runners {
			names = append(names, x.GetName()+" "+x.GetStatus())
		}
		if opts.Page = resp.NextPage; opts.Page == 0 {
			break
		}
	}
	if d := cmp.Diff([]string{"one offline", "more-0 offline", "more-1 offline", "more-2 offline", "more-3 offline"}, names); d != "" {
		t.Errorf("paged (-want +got):\n%s", d)
	}
	name := "more-2"
	if list := must[*github.Runners](t)(c.Actions.ListOrganizationRunners(ctx, "acme", &github.ListRunnersOptions{Name: &name})); list.TotalCount != 1 || list.Runners[0].GetName() != name {
		t.Errorf("by name: %+v", list)
	}
	if list := must[*github.Runners](t)(c.Actions.ListRunners(ctx, "acme", "widget", nil)); list.TotalCount != 1 || list.Runners[0].GetName() != "two" {
		t.Errorf("the repository's: %+v", list)
	}
	if list := must[*github.Runners](t)(c.Enterprise.ListRunners(ctx, "anvils", nil)); list.TotalCount != 1 || list.Runners[0].GetName() != "three" {
		t.Errorf("the enterprise's: %+v", list)
	}
	id := got.GetRunner().GetID()
	if x := must[*github.Runner](t)(c.Actions.GetOrganizationRunner(ctx, "acme", id)); x.GetName() != "one" || x.GetBusy() {
		t.Errorf("by id: %+v", x)
	}
	_, err = c.Actions.RemoveRunner(ctx, "acme", "widget", id)
	refused(t, "remove from elsewhere", err, 404, "no such runner")
	if _, err = c.Actions.RemoveOrganizationRunner(ctx, "acme", id); err != nil {
		t.Error(err)
	}
	_, err = c.Actions.RemoveOrganizationRunner(ctx, "acme", id)
	refused(t, "remove again", err, 404, "no such runner")
	r.Permit("administration", "read")
	_, _, err = c.Actions.CreateRegistrationToken(ctx, "acme", "widget")
	refused(t, "a token without the permission", err, 403, "Resource not accessible by integration")
	if tok := must[*github.RemoveToken](t)(c.Actions.CreateOrganizationRemoveToken(ctx, "acme")); tok.GetToken() == "" || tok.GetExpiresAt().Before(time.Now()) {
		t.Errorf("remove token: %+v", tok)
	}
}

func TestRunnerOfRESTRunsAJobByItsLabels(t *testing.T) {
	r := newRig(t, Config{Poll: 10 * time.Second})
	ctx, c := t.Context(), r.installed()
	register := func(name string, labels ...string) *fakeRunner {
		jit := must[*github.JITRunnerConfig](t)(c.Actions.GenerateOrgJITConfig(ctx, "acme", &github.GenerateJITConfigRequest{Name: name, RunnerGroupID: 1, Labels: labels}))
		return decodeJIT(t, jit.GetEncodedJITConfig())
	}
	small := register("small", "self-hosted")
	small.online()
	run := submit(t, r, "on: push\njobs:\n  a: { name: hello, runs-on: [self-hosted, BIG], steps: [{run: x, name: s}] }\n")
	list := must[*github.Jobs](t)(c.Actions.ListWorkflowJobs(ctx, "acme", "widget", run.ID(), nil))
	if list.GetTotalCount() != 1 || list.Jobs[0].GetStatus() != "queued" || list.Jobs[0].RunnerID != nil || list.Jobs[0].GetName() != "hello" {
		t.Fatalf("jobs: %+v", list)
	}
	big := register("big", "self-hosted", "big", "other")
	big.online()
	big.acquire()
	job := must[*github.WorkflowJob](t)(c.Actions.GetWorkflowJobByID(ctx, "acme", "widget", list.Jobs[0].GetID()))
	if job.GetStatus() != "in_progress" || job.GetRunnerName() != "big" || job.GetRunnerGroupName() != "Default" || job.GetRunID() != run.ID() || job.GetRunAttempt() != 1 {
		t.Errorf("job: %+v", job)
	}
	if x := must[*github.Runner](t)(c.Actions.GetOrganizationRunner(ctx, "acme", job.GetRunnerID())); !x.GetBusy() || x.GetStatus() != "online" {
		t.Errorf("runner: %+v", x)
	}
	_, err := c.Actions.RemoveOrganizationRunner(ctx, "acme", job.GetRunnerID())
	refused(t, "remove a busy one", err, 422, "running a job")
	runs := must[*github.WorkflowRuns](t)(c.Actions.ListRepositoryWorkflowRuns(ctx, "acme", "widget", &github.ListWorkflowRunsOptions{Status: "in_progress"}))
	if runs.GetTotalCount() != 1 || runs.WorkflowRuns[0].GetID() != run.ID() || runs.WorkflowRuns[0].GetHeadBranch() != "main" {
		t.Errorf("runs: %+v", runs)
	}
	if runs := must[*github.WorkflowRuns](t)(c.Actions.ListRepositoryWorkflowRuns(ctx, "acme", "widget", &github.ListWorkflowRunsOptions{Status: "queued"})); runs.GetTotalCount() != 0 {
		t.Errorf("queued runs: %+v", runs)
	}
	big.want(200, big.complete("succeeded"), "complete")
	r.waitRun(run, Success)
	if got := r.Runners(); len(got) != 1 || got[0].Name != "small" || got[0].ScaleSet != "" {
		t.Errorf("left: %+v", got)
	}
	if w := must[*github.WorkflowRun](t)(c.Actions.GetWorkflowRunByID(ctx, "acme", "widget", run.ID())); w.GetConclusion() != "success" || w.GetStatus() != "completed" {
		t.Errorf("run: %+v", w)
	}
	_, err = c.Actions.CancelWorkflowRunByID(ctx, "acme", "widget", run.ID())
	refused(t, "cancel what is over", err, 409, "completed")
	_, _, err = c.Actions.GetWorkflowJobByID(ctx, "acme", "widget", 999_999)
	refused(t, "no job", err, 404, "Not Found")
}

// A runner that goes before it begins a job of its labels leaves it to the next.
func TestLabelledJobGoesBack(t *testing.T) {
	r := newRig(t, Config{Poll: 10 * time.Second})
	ctx, c := t.Context(), r.installed()
	run := submit(t, r, oneJob)
	for i, name := range []string{"one", "two"} {
		jit := must[*github.JITRunnerConfig](t)(c.Actions.GenerateOrgJITConfig(ctx, "acme", &github.GenerateJITConfigRequest{Name: name, RunnerGroupID: 1, Labels: []string{"flint"}}))
		x := decodeJIT(t, jit.GetEncodedJITConfig())
		x.online()
		if i == 0 {
			x.poll()
			if _, err := c.Actions.RemoveOrganizationRunner(ctx, "acme", jit.GetRunner().GetID()); err != nil {
				t.Fatal(err)
			}
			if got := run.Jobs()[0]; got.Status != "queued" {
				t.Fatalf("job: %+v", got)
			}
			continue
		}
		x.acquire()
		x.want(200, x.complete("succeeded"), "complete")
	}
	r.waitRun(run, Success)
}

func TestRerunAndCancel(t *testing.T) {
	r := newRig(t, Config{Poll: 10 * time.Second})
	ctx, c := t.Context(), r.installed()
	next := func(name, conclusion string) {
		t.Helper()
		jit := must[*github.JITRunnerConfig](t)(c.Actions.GenerateRepoJITConfig(ctx, "acme", "widget", &github.GenerateJITConfigRequest{Name: name, RunnerGroupID: 1, Labels: []string{"flint"}}))
		x := decodeJIT(t, jit.GetEncodedJITConfig())
		x.online()
		x.acquire()
		x.want(200, x.complete(conclusion), "complete")
	}
	run := submit(t, r, "on: push\njobs:\n  a: { runs-on: flint, steps: [{run: x}] }\n  b: { runs-on: flint, needs: a, steps: [{run: x}] }\n  c: { runs-on: flint, needs: b, steps: [{run: x}] }\n")
	jobs := func(opts *github.ListWorkflowJobsOptions) (ids map[string]int64, all []string) {
		ids = map[string]int64{}
		for _, j := range must[*github.Jobs](t)(c.Actions.ListWorkflowJobs(ctx, "acme", "widget", run.ID(), opts)).Jobs {
			ids[j.GetName()] = j.GetID()
			all = append(all, fmt.Sprintf("%s %d %s%s %s", j.GetName(), j.GetRunAttempt(), j.GetStatus(), j.GetConclusion(), j.GetRunnerName()))
		}
		return ids, all
	}
	next("ra", "succeeded")
	ids, _ := jobs(nil)
	_, err := c.Actions.RerunJobByID(ctx, "acme", "widget", ids["a"])
	refused(t, "rerun in a run that runs", err, 403, "already running")
	next("rb", "failed")
	r.waitRun(run, Failure)
	ids, all := jobs(nil)
	if d := cmp.Diff([]string{"a 1 completedsuccess ra", "b 1 completedfailure rb", "c 1 completedskipped "}, all); d != "" {
		t.Errorf("first attempt (-want +got):\n%s", d)
	}
	if _, err := c.Actions.RerunJobByID(ctx, "acme", "widget", ids["b"]); err != nil {
		t.Fatal(err)
	}
	next("rb2", "succeeded")
	next("rc", "succeeded")
	r.waitRun(run, Success)
	if _, all = jobs(nil); !slices.Equal(all, []string{"a 2 completedsuccess ra", "b 2 completedsuccess rb2", "c 2 completedsuccess rc"}) {
		t.Errorf("second attempt: %q", all)
	}
	if _, all = jobs(&github.ListWorkflowJobsOptions{Filter: "all"}); len(all) != 6 {
		t.Errorf("all attempts: %q", all)
	}
	if list := must[*github.Jobs](t)(c.Actions.ListWorkflowJobsAttempt(ctx, "acme", "widget", run.ID(), 1, nil)); list.GetTotalCount() != 3 || list.Jobs[1].GetConclusion() != "failure" {
		t.Errorf("attempt 1: %+v", list)
	}
	if w := must[*github.WorkflowRun](t)(c.Actions.GetWorkflowRunByID(ctx, "acme", "widget", run.ID())); w.GetRunAttempt() != 2 {
		t.Errorf("run: %+v", w)
	}
	_, err = c.Actions.RerunJobByID(ctx, "acme", "widget", ids["b"])
	refused(t, "rerun of an earlier attempt", err, 403, "earlier attempt")
	second := submit(t, r, oneJob)
	var accepted *github.AcceptedError
	if _, err := c.Actions.CancelWorkflowRunByID(ctx, "acme", "widget", second.ID()); err != nil && !errors.As(err, &accepted) {
		t.Fatal(err)
	}
	r.waitRun(second, Cancelled)
}

func TestRunnerGroupsKeepPublicRepositoriesOut(t *testing.T) {
	r := newRig(t, Config{Poll: 100 * time.Millisecond, Repos: []Repository{{Name: "widget"}, {Name: "open", Public: true}}})
	ctx, c := t.Context(), r.installed()
	wf := mustParse(t, oneJob)
	public, err := r.Submit(wf, Trigger{Event: "push", Repo: "open"})
	if err != nil {
		t.Fatal(err)
	}
	client, set, m := r.session("flint") // in the default group
	if _, err := m.GetMessage(ctx, 0, 0); err != nil {
		t.Fatal(err)
	}
	private := submit(t, r, oneJob)
	msg := message(t, m, 2)
	if msg == nil || len(msg.JobAssignedMessages) != 1 || msg.JobAssignedMessages[0].RepositoryName != "widget" {
		t.Fatalf("the scale set got %+v", msg)
	}
	x, _ := r.jit(client, set.ID, "private")
	x.online()
	x.acquire()
	x.want(200, x.complete("succeeded"), "complete")
	r.waitRun(private, Success)
	jit := must[*github.JITRunnerConfig](t)(c.Actions.GenerateOrgJITConfig(ctx, "acme", &github.GenerateJITConfigRequest{Name: "default", RunnerGroupID: 1, Labels: []string{"flint"}}))
	decodeJIT(t, jit.GetEncodedJITConfig()).online()
	if got := public.Jobs()[0].Status; got != "queued" {
		t.Fatalf("the public repository's job is %s", got)
	}
	groups := must[*github.RunnerGroups](t)(c.Actions.ListOrganizationRunnerGroups(ctx, "acme", nil))
	if groups.TotalCount != 1 || groups.RunnerGroups[0].GetAllowsPublicRepositories() || !groups.RunnerGroups[0].GetDefault() {
		t.Errorf("groups: %+v", groups)
	}
	yes := true
	g := must[*github.RunnerGroup](t)(c.Actions.CreateOrganizationRunnerGroup(ctx, "acme", github.CreateRunnerGroupRequest{
		Name: github.Ptr("open"), Visibility: github.Ptr("selected"), AllowsPublicRepositories: &yes, SelectedRepositoryIDs: []int64{firstRepository + 1},
	}))
	if got := must[*github.RunnerGroup](t)(c.Actions.GetOrganizationRunnerGroup(ctx, "acme", g.GetID())); !got.GetAllowsPublicRepositories() || got.GetVisibility() != "selected" {
		t.Errorf("group: %+v", got)
	}
	_, _, err = c.Actions.CreateOrganizationRunnerGroup(ctx, "acme", github.CreateRunnerGroupRequest{Name: github.Ptr("OPEN")})
	refused(t, "a second of the name", err, 409, "Already exists")
	jit = must[*github.JITRunnerConfig](t)(c.Actions.GenerateOrgJITConfig(ctx, "acme", &github.GenerateJITConfigRequest{Name: "allowed", RunnerGroupID: g.GetID(), Labels: []string{"flint"}}))
	x = decodeJIT(t, jit.GetEncodedJITConfig())
	x.online()
	other := submit(t, r, oneJob) // private, and not among the selected: the runner must not take it
	x.acquire()
	if got := public.Jobs()[0]; got.Status != "in_progress" || got.Runner != "allowed" {
		t.Errorf("the public repository's job: %+v", got)
	}
	x.want(200, x.complete("succeeded"), "complete")
	r.waitRun(public, Success)
	other.ForceCancel()
	if _, _, err := c.Actions.UpdateOrganizationRunnerGroup(ctx, "acme", g.GetID(), github.UpdateRunnerGroupRequest{Name: github.Ptr("o"), Visibility: github.Ptr("all"), AllowsPublicRepositories: &yes}); err != nil {
		t.Error(err)
	}
	if _, err := c.Actions.DeleteOrganizationRunnerGroup(ctx, "acme", g.GetID()); err != nil {
		t.Error(err)
	}
	_, err = c.Actions.DeleteOrganizationRunnerGroup(ctx, "acme", groupID)
	refused(t, "delete the default group", err, 422, "default")
}

func TestScaleSetsOfARepositoryServeItAlone(t *testing.T) {
	r := newRig(t, Config{Poll: 50 * time.Millisecond, Repos: []Repository{{Name: "widget"}, {Name: "open", Public: true}}, Token: "pat"})
	ctx := t.Context()
	c, err := scaleset.NewClientWithPersonalAccessToken(scaleset.NewClientWithPersonalAccessTokenConfig{
		GitHubConfigURL: r.cfg.URL + "/acme/open", PersonalAccessToken: "pat",
	}, scaleset.WithRetryMax(1))
	if err != nil {
		t.Fatal(err)
	}
	set := r.scaleSet(c, "flint")
	if other := r.scaleSet(r.client(), "flint"); other.ID == set.ID { // the organisation's may have the same name
		t.Errorf("one scale set in two places: %+v", other)
	}
	m, err := c.MessageSessionClient(ctx, set.ID, "test")
	if err != nil {
		t.Fatal(err)
	}
	submit(t, r, oneJob)
	if _, err := r.Submit(mustParse(t, oneJob), Trigger{Repo: "open"}); err != nil {
		t.Fatal(err)
	}
	if msg := message(t, m, 5); msg == nil || len(msg.JobAssignedMessages) != 1 || msg.JobAssignedMessages[0].RepositoryName != "open" {
		t.Errorf("the repository's scale set got %+v", msg)
	}
	token := must[*github.RegistrationToken](t)(r.api("pat").Actions.CreateRegistrationToken(ctx, "acme", "open")).GetToken()
	for path, want := range map[string]int{"/acme": 404, "/acme/widget": 404, "/acme/open": 200} {
		req, err := http.NewRequestWithContext(ctx, "POST", r.cfg.URL+"/api/v3/actions/runner-registration", strings.NewReader(`{"url":"`+r.cfg.URL+path+`"}`))
		if err != nil {
			t.Fatal(err)
		}
		req.Header.Set("Authorization", "RemoteAuth "+token)
		resp, err := http.DefaultClient.Do(req)
		if err != nil {
			t.Fatal(err)
		}
		_ = resp.Body.Close()
		if resp.StatusCode != want || resp.Header.Get("X-RateLimit-Remaining") == "" {
			t.Errorf("acme/open's token for %s: %s %v, want %d", path, resp.Status, resp.Header, want)
		}
	}
}

func TestReleasesOfTheRunner(t *testing.T) {
	r := newRig(t, Config{})
	c := r.installed()
	if v := must[*github.RepositoryRelease](t)(c.Repositories.GetLatestRelease(t.Context(), "actions", "runner")); v.GetTagName() == "" || time.Since(v.GetPublishedAt().Time) > 6*24*time.Hour {
		t.Errorf("newest: %+v", v)
	}
	old := time.Date(2026, 1, 2, 3, 4, 5, 0, time.UTC)
	r.ReleaseRunner("2.999.0", old)
	if v := must[*github.RepositoryRelease](t)(c.Repositories.GetLatestRelease(t.Context(), "actions", "runner")); v.GetTagName() != "v2.999.0" || !v.GetPublishedAt().Equal(github.Timestamp{Time: old}) {
		t.Errorf("newest: %+v", v)
	}
	if l := must[[]*github.RepositoryRelease](t)(c.Repositories.ListReleases(t.Context(), "actions", "runner", nil)); len(l) != 1 {
		t.Errorf("all: %+v", l)
	}
}
