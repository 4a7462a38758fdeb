package githubsim

import (
	"context"
	"errors"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"slices"
	"sync"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-github/v79/github"

	"flint"
)

// receiver is where webhooks go: it checks them as a third-party library does, and keeps what came.
type receiver struct {
	t      *testing.T
	url    string
	secret []byte

	mu      sync.Mutex
	status  int // what it answers; 202 when zero
	got     []received
	changed chan struct{}
}

type received struct {
	guid, kind string
	header     http.Header
	job        *github.WorkflowJobEvent
}

func newReceiver(t *testing.T, secret string) *receiver {
	t.Helper()
	x := &receiver{t: t, secret: []byte(secret), changed: make(chan struct{})}
	server := httptest.NewServer(http.HandlerFunc(x.serve))
	t.Cleanup(server.Close)
	x.url = server.URL + "/webhook"
	return x
}

func (x *receiver) serve(w http.ResponseWriter, r *http.Request) {
	body, err := github.ValidatePayload(r, x.secret)
	if err != nil {
		x.t.Errorf("validate: %v", err)
		return
	}
	event, err := github.ParseWebHook(github.WebHookType(r), body)
	if err != nil {
		x.t.Errorf("parse: %v", err)
		return
	}
	got := received{guid: github.DeliveryID(r), kind: github.WebHookType(r), header: r.Header}
	got.job, _ = event.(*github.WorkflowJobEvent)
	x.mu.Lock()
	defer x.mu.Unlock()
	x.got = append(x.got, got)
	close(x.changed)
	x.changed = make(chan struct{})
	if x.status == 0 {
		x.status = http.StatusAccepted
	}
	w.WriteHeader(x.status)
}

func (x *receiver) answers(status int) {
	x.mu.Lock()
	defer x.mu.Unlock()
	x.status = status
}

// jobs waits until n workflow_job webhooks have come, and returns them.
func (x *receiver) jobs(n int) []received {
	x.t.Helper()
	deadline := time.After(5 * time.Minute)
	for {
		x.mu.Lock()
		got := slices.DeleteFunc(slices.Clone(x.got), func(g received) bool { return g.job == nil })
		changed := x.changed
		x.mu.Unlock()
		if len(got) >= n {
			return got
		}
		select {
		case <-changed:
		case <-deadline:
			x.t.Fatalf("%d webhooks came, want %d: %+v", len(got), n, got)
		}
	}
}

func (x *receiver) actions(n int) []string {
	x.t.Helper()
	var list []string
	for _, g := range x.jobs(n) {
		list = append(list, g.job.GetWorkflowJob().GetName()+" "+g.job.GetAction()+" "+g.job.GetWorkflowJob().GetConclusion())
	}
	return list
}

func TestWebhooksTellOfAJob(t *testing.T) {
	x := newReceiver(t, "shh")
	r := newRig(t, Config{Poll: 10 * time.Second, Hooks: []Hook{{URL: x.url, Secret: "shh"}}, Reviewed: []string{"prod"}})
	ctx, c := t.Context(), r.installed()
	run := submit(t, r, "name: CI\non: push\njobs:\n  a: { runs-on: [self-hosted, flint], environment: Prod, steps: [{run: x, name: s}] }\n  b: { runs-on: flint, needs: a, if: failure(), steps: [{run: x}] }\n")
	if got := run.Jobs()[0]; got.Status != "waiting" {
		t.Fatalf("a job that needs a review: %+v", got)
	}
	if w := must[*github.WorkflowRun](t)(c.Actions.GetWorkflowRunByID(ctx, "acme", "widget", run.ID())); w.GetStatus() != "waiting" {
		t.Errorf("run: %+v", w)
	}
	if err := r.Approve(run); err != nil {
		t.Fatal(err)
	}
	if err := r.Approve(run); !errors.Is(err, flint.ErrNotFound) {
		t.Errorf("approving again: %v", err)
	}
	jit := must[*github.JITRunnerConfig](t)(c.Actions.GenerateOrgJITConfig(ctx, "acme", &github.GenerateJITConfigRequest{Name: "one", RunnerGroupID: 1, Labels: []string{"self-hosted", "flint"}}))
	y := decodeJIT(t, jit.GetEncodedJITConfig())
	y.online()
	y.acquire()
	y.steps(3, 2)
	y.want(200, y.complete("succeeded"), "complete")
	r.waitRun(run, Success)
	if d := cmp.Diff([]string{"a waiting ", "a queued ", "a in_progress ", "a completed success", "b completed skipped"}, x.actions(5)); d != "" {
		t.Fatalf("actions (-want +got):\n%s", d)
	}
	all := x.jobs(5)
	queued, running, done := all[1].job, all[2].job, all[3].job
	if j := queued.GetWorkflowJob(); j.RunnerID != nil || j.GetStatus() != "queued" || len(j.Steps) != 0 || j.StartedAt == nil || j.CompletedAt != nil {
		t.Errorf("queued: %+v", j)
	}
	if j := running.GetWorkflowJob(); j.GetRunnerName() != "one" || j.GetRunnerID() == 0 || j.GetRunnerGroupName() != "Default" || j.GetStatus() != "in_progress" {
		t.Errorf("in progress: %+v", j)
	}
	j := done.GetWorkflowJob()
	if !slices.Equal(j.Labels, []string{"self-hosted", "flint"}) || j.GetRunID() != run.ID() || j.GetRunAttempt() != 1 || j.GetHeadBranch() != "main" ||
		j.GetWorkflowName() != "CI" || len(j.Steps) != 1 || j.Steps[0].GetConclusion() != "success" || j.CompletedAt == nil {
		t.Errorf("completed: %+v", j)
	}
	if done.GetRepo().GetFullName() != "acme/widget" || !done.GetRepo().GetPrivate() || done.GetOrg().GetLogin() != "acme" || done.GetInstallation().GetID() != r.App().InstallationID {
		t.Errorf("around it: %+v", done)
	}
	if rest := must[*github.WorkflowJob](t)(c.Actions.GetWorkflowJobByID(ctx, "acme", "widget", j.GetID())); rest.GetName() != "a" || rest.GetConclusion() != "success" {
		t.Errorf("the job by its id: %+v", rest)
	}
	if h := all[0].header; h.Get("User-Agent") != hookAgent || h.Get("X-GitHub-Hook-ID") == "" || h.Get("X-GitHub-Hook-Installation-Target-Type") != "integration" {
		t.Errorf("headers: %v", h)
	}
	late := submit(t, r, "on: push\njobs:\n  never: { runs-on: elsewhere, steps: [{run: x}] }\n")
	late.Cancel()
	if got := x.actions(7)[5:]; !slices.Equal(got, []string{"never queued ", "never completed cancelled"}) {
		t.Errorf("cancelled before it was assigned: %q", got)
	}
}

// deliveries lists all, by pages of two.
func deliveries(t *testing.T, list func(*github.ListCursorOptions) ([]*github.HookDelivery, *github.Response, error)) []*github.HookDelivery {
	t.Helper()
	var all []*github.HookDelivery
	opts := &github.ListCursorOptions{PerPage: 2}
	for {
		part, resp, err := list(opts)
		if err != nil {
			t.Fatal(err)
		}
		all = append(all, part...)
		if opts.Cursor = resp.Cursor; opts.Cursor == "" {
			return all
		}
	}
}

func TestDeliveriesFailAreListedAndSentAgain(t *testing.T) {
	x := newReceiver(t, "shh")
	r := newRig(t, Config{Hooks: []Hook{{URL: x.url, Secret: "shh"}}})
	ctx, app := t.Context(), r.asApp()
	x.answers(http.StatusInternalServerError)
	submit(t, r, oneJob)
	submit(t, r, oneJob)
	first := x.jobs(2)[0]
	list := func(o *github.ListCursorOptions) ([]*github.HookDelivery, *github.Response, error) {
		return app.Apps.ListHookDeliveries(ctx, o)
	}
	all := untilDeliveries(t, 3, list) // with the ping
	if all[0].GetID() < all[1].GetID() || all[1].GetGUID() != first.guid || all[1].GetStatusCode() != 500 || all[1].GetEvent() != "workflow_job" ||
		all[1].GetAction() != "queued" || all[1].GetRedelivery() || all[2].GetEvent() != "ping" {
		t.Fatalf("deliveries: %v", all)
	}
	if len(x.jobs(2)) != 2 {
		t.Error("a delivery was tried again by itself")
	}
	whole := must[*github.HookDelivery](t)(app.Apps.GetHookDelivery(ctx, all[1].GetID()))
	if whole.GetRequest().RawPayload == nil || whole.GetResponse() == nil || whole.GetRequest().Headers["X-GitHub-Delivery"] != first.guid {
		t.Errorf("delivery: %+v", whole)
	}
	x.answers(0)
	var accepted *github.AcceptedError
	if _, _, err := app.Apps.RedeliverHookDelivery(ctx, all[1].GetID()); err != nil && !errors.As(err, &accepted) {
		t.Fatal(err)
	}
	if again := x.jobs(3)[2]; again.guid != first.guid || again.job.GetWorkflowJob().GetID() != first.job.GetWorkflowJob().GetID() {
		t.Errorf("delivered again: %+v, was %+v", again, first)
	}
	all = untilDeliveries(t, 4, list)
	if all[0].GetGUID() != first.guid || !all[0].GetRedelivery() || all[0].GetStatusCode() != 202 {
		t.Errorf("deliveries: %v", all)
	}
	_, _, err := app.Apps.RedeliverHookDelivery(ctx, 1<<40)
	refused(t, "redeliver what is not there", err, 404, "Not Found")
	_, _, err = app.Apps.ListHookDeliveries(ctx, &github.ListCursorOptions{Cursor: "12"})
	refused(t, "a cursor made up", err, 422, "cursor")
	_, _, err = r.installed().Apps.ListHookDeliveries(ctx, nil)
	refused(t, "the installation's token", err, 401, "JSON web token")
}

// untilDeliveries waits until n deliveries are over: a delivery is listed a moment after it came.
func untilDeliveries(t *testing.T, n int, list func(*github.ListCursorOptions) ([]*github.HookDelivery, *github.Response, error)) []*github.HookDelivery {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 5*time.Minute)
	defer cancel()
	for {
		if all := deliveries(t, list); len(all) >= n {
			return all
		}
		select {
		case <-ctx.Done():
			t.Fatalf("%d deliveries did not come", n)
		case <-time.After(5 * time.Millisecond):
		}
	}
}

func TestHooksOfOrganisationAndRepository(t *testing.T) {
	org, repo := newReceiver(t, ""), newReceiver(t, "r")
	r := newRig(t, Config{Token: "pat", Repos: []Repository{{Name: "widget"}, {Name: "open", Public: true}}, Hooks: []Hook{
		{URL: org.url, Scope: "acme"}, {URL: repo.url, Secret: "r", Scope: "Acme/Open"},
	}})
	ctx, c := t.Context(), r.api("pat")
	if _, err := r.Submit(mustParse(t, oneJob), Trigger{Repo: "open"}); err != nil {
		t.Fatal(err)
	}
	submit(t, r, oneJob)
	if _, err := r.Submit(mustParse(t, oneJob), Trigger{Repo: "none"}); asFault[*flint.Fault](t, err).Code != "workflow.repository" {
		t.Errorf("a run of no repository: %v", err)
	}
	both, one := org.jobs(2), repo.jobs(1)
	if len(one) != 1 || one[0].job.GetRepo().GetName() != "open" || one[0].job.Installation != nil || both[0].header.Get("X-Hub-Signature-256") != "" {
		t.Errorf("the repository's hook got %+v, the organisation's %+v", one, both)
	}
	hooks := must[[]*github.Hook](t)(c.Organizations.ListHooks(ctx, "acme", nil))
	if len(hooks) != 1 {
		t.Fatalf("hooks: %v", hooks)
	}
	all := untilDeliveries(t, 3, func(o *github.ListCursorOptions) ([]*github.HookDelivery, *github.Response, error) {
		return c.Organizations.ListHookDeliveries(ctx, "acme", hooks[0].GetID(), o)
	})
	var accepted *github.AcceptedError
	if _, _, err := c.Organizations.RedeliverHookDelivery(ctx, "acme", hooks[0].GetID(), all[0].GetID()); err != nil && !errors.As(err, &accepted) {
		t.Error(err)
	}
	if got := org.jobs(3); got[2].guid != got[1].guid {
		t.Errorf("delivered again under another guid: %+v", got)
	}
	rh := must[[]*github.Hook](t)(c.Repositories.ListHooks(ctx, "acme", "open", nil))
	if _, err := c.Repositories.PingHook(ctx, "acme", "open", rh[0].GetID()); err != nil {
		t.Error(err)
	}
	untilDeliveries(t, 3, func(o *github.ListCursorOptions) ([]*github.HookDelivery, *github.Response, error) {
		return c.Repositories.ListHookDeliveries(ctx, "acme", "open", rh[0].GetID(), o)
	})
	_, _, err := c.Organizations.ListHookDeliveries(ctx, "acme", rh[0].GetID(), nil)
	refused(t, "the repository's hook as the organisation's", err, 404, "Not Found")
	r.Permit("organization_hooks", "")
	_, _, err = c.Organizations.ListHookDeliveries(ctx, "acme", hooks[0].GetID(), nil)
	refused(t, "without the permission", err, 403, "Resource not accessible by personal access token")
}

func TestFatesOfDeliveries(t *testing.T) {
	x := newReceiver(t, "")
	r := newRig(t, Config{Hooks: []Hook{{URL: x.url}}})
	fates := map[string]fate{"lost": {lost: true}, "never": {never: true}, "again": {again: true}, "late": {delay: 300 * time.Millisecond}, "plain": {}}
	for _, name := range []string{"lost", "never", "late", "again", "plain"} {
		r.hub.hooks.setFate(func(string) fate { return fates[name] })
		submit(t, r, "on: push\njobs:\n  "+name+": { runs-on: flint, steps: [{run: x}] }\n")
	}
	if d := cmp.Diff([]string{"again queued ", "again queued ", "plain queued ", "late queued "}, x.actions(4)); d != "" {
		t.Errorf("what came (-want +got):\n%s", d)
	}
	if all := x.jobs(4); all[0].guid != all[1].guid {
		t.Error("a duplicate has another guid")
	}
	// The ping, and all but the one that never was.
	app := r.asApp()
	all := untilDeliveries(t, 5, func(o *github.ListCursorOptions) ([]*github.HookDelivery, *github.Response, error) {
		return app.Apps.ListHookDeliveries(t.Context(), o)
	})
	if n := slices.IndexFunc(all, func(d *github.HookDelivery) bool { return d.GetStatusCode() == 0 }); len(all) != 5 || n != 3 {
		t.Errorf("deliveries: %v", all)
	}
}

// A receiver that does not answer is not waited for at the end.
func TestCloseEndsADeliveryThatHangs(t *testing.T) {
	came, release := make(chan struct{}), make(chan struct{})
	hang := httptest.NewServer(http.HandlerFunc(func(http.ResponseWriter, *http.Request) {
		close(came)
		<-release
	}))
	defer hang.Close()
	defer close(release)
	r := newRig(t, Config{Hooks: []Hook{{URL: hang.URL}}})
	<-came
	r.Close()
	if _, err := r.AddHook(Hook{URL: hang.URL, Scope: "acme"}); err == nil {
		t.Error("a hook is added to a server that is closed")
	}
}

// What nobody answers in time is recorded as such; what is old, or too much, is forgotten.
func TestDeliveriesAreBounded(t *testing.T) {
	release := make(chan struct{})
	hang := httptest.NewServer(http.HandlerFunc(func(http.ResponseWriter, *http.Request) { <-release }))
	defer hang.Close()
	defer close(release)
	k := newHooks(slog.New(slog.DiscardHandler), nil)
	defer k.close()
	if k.client.Timeout != 10*time.Second {
		t.Errorf("a receiver has %s", k.client.Timeout)
	}
	k.client.Timeout = 20 * time.Millisecond
	d := &delivery{id: 1, hook: &hook{Hook: Hook{URL: hang.URL}}, event: "workflow_job", body: []byte("{}")}
	k.send(t.Context(), d)
	if len(k.kept) != 1 || d.code != 0 || d.status != unanswered || d.request == nil {
		t.Errorf("a delivery nobody answered: %+v", d)
	}
	at := time.Now()
	k.now = func() time.Time { return at.Add(deliveryKept + time.Minute) }
	for range maxDeliveries + 10 {
		k.lose(&delivery{hook: d.hook})
		if k.kept[0] == d {
			t.Fatal("an old delivery is kept")
		}
	}
	if len(k.kept) != maxDeliveries {
		t.Errorf("%d are kept", len(k.kept))
	}
}

func TestHooksThatMakeNoSense(t *testing.T) {
	for name, hooks := range map[string][]Hook{
		"no URL": {{}}, "no scheme": {{URL: "localhost:80"}}, "ftp": {{URL: "ftp://h/"}}, "two of the App": {{URL: "http://127.0.0.1:1/"}, {URL: "http://127.0.0.1:1/"}},
		"another's": {{URL: "http://127.0.0.1:1/", Scope: "other"}}, "an enterprise's": {{URL: "http://127.0.0.1:1/", Scope: "enterprises/anvils"}},
	} {
		if _, err := New(Config{URL: "http://sim", Owner: "acme", Repo: "widget", Enterprise: "anvils", Hooks: hooks}); err == nil {
			t.Errorf("%s: accepted", name)
		}
	}
}
