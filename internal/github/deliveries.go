package github

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"net/url"
	"slices"
	"strconv"
	"strings"
	"time"

	gh "github.com/google/go-github/v79/github"

	"flint"
	"flint/internal/github/webhook"
)

// API returns what a webhook receiver may ask of an account; nil where there is no account of that name.
func (c *Client) API(account string) webhook.API {
	a := c.account(account)
	if a == nil {
		return nil
	}
	var scopes []*scope
	for _, s := range c.places() {
		if s.account == a {
			scopes = append(scopes, s)
		}
	}
	return &accountAPI{client: c, account: a, scopes: scopes}
}

// accountAPI is a webhook.API.
type accountAPI struct {
	client  *Client
	account *account
	scopes  []*scope // of the account's pools
}

// maxDeliveryPages bounds one look at the deliveries. An App that many organisations have installed has more in three days
// than is worth reading: what is missing then, the survey of open jobs finds.
const maxDeliveryPages = 200

// hook returns the path of the hook's deliveries, and how to ask.
func (a *account) hook() (path string, ask func(context.Context, string, request) (*gh.Response, error), err error) {
	switch {
	case a.Token == "":
		return "/app/hook/deliveries", a.base.askAsApp, nil
	case a.HookID != 0 && !strings.HasPrefix(a.base.path, "/enterprises/"):
		return a.base.path + "/hooks/" + strconv.FormatInt(a.HookID, 10) + "/deliveries", a.base.ask, nil
	}
	return "", nil, &flint.Fault{
		Code: "github.hook", What: "look at the webhooks that did not arrive", Kind: flint.ErrConfig,
		Err: fmt.Errorf("%w: a token sees them of one hook of an organisation or repository only", errors.ErrUnsupported),
		Fix: "set " + a.setting("webhook_hook_id") + " to the id in the address of the hook's page, or use a GitHub App",
	}
}

// Deliveries implements webhook.API. Of an account with a token and no HookID it is errors.ErrUnsupported, fault github.hook.
func (p *accountAPI) Deliveries(ctx context.Context, since time.Time) ([]webhook.Delivery, error) {
	path, ask, err := p.account.hook()
	if err != nil {
		return nil, err
	}
	var found []webhook.Delivery
	query := url.Values{"per_page": {strconv.Itoa(perPage)}}
	for range maxDeliveryPages {
		var page []*gh.HookDelivery
		resp, err := ask(ctx, "list the deliveries of webhooks", request{method: http.MethodGet, path: path, query: query, into: &page})
		if err != nil {
			return found, err
		}
		for _, d := range page {
			at := d.GetDeliveredAt().Time
			if at.Before(since) {
				return found, nil
			}
			found = append(found, webhook.Delivery{
				ID: d.GetID(), GUID: clean(d.GetGUID(), 100), Event: clean(d.GetEvent(), 100), Action: clean(d.GetAction(), 100),
				At: at, Redelivery: d.GetRedelivery(), Status: d.GetStatusCode(),
			})
		}
		if resp.Cursor == "" || resp.Cursor == query.Get("cursor") || len(page) == 0 {
			return found, nil
		}
		query.Set("cursor", resp.Cursor)
	}
	p.client.cfg.Log.Warn("not all deliveries of webhooks are looked at", "account", p.account.Name, "looked_at", len(found))
	return found, nil
}

// Redeliver implements webhook.API. A delivery that GitHub does not know any more is flint.ErrNotFound.
func (p *accountAPI) Redeliver(ctx context.Context, id int64) error {
	path, ask, err := p.account.hook()
	if err != nil {
		return err
	}
	verb := fmt.Sprintf("ask for delivery %d again", id)
	_, err = ask(ctx, verb, request{method: http.MethodPost, path: path + "/" + strconv.FormatInt(id, 10) + "/attempts"})
	if refused(err) == http.StatusNotFound {
		return fmt.Errorf("%s: %w", verb, flint.ErrNotFound)
	}
	return err
}

// Job implements webhook.API.
func (p *accountAPI) Job(ctx context.Context, repository string, id int64) (flint.JobStatus, error) {
	if _, _, ok := repositoryParts(repository); !ok || id <= 0 {
		return flint.JobStatus{}, fmt.Errorf("look up job %d of %q: %w", id, clean(repository, 200), flint.ErrNotFound)
	}
	s := p.scopeFor(repository)
	j, err := s.job(ctx, repository, id)
	if refused(err) == http.StatusNotFound {
		err = fmt.Errorf("look up job %d of %s: %w", id, repository, flint.ErrNotFound)
	}
	return j, err
}

func (p *accountAPI) scopeFor(repository string) *scope {
	if i := slices.IndexFunc(p.scopes, func(s *scope) bool { return s.covers(repository) }); i >= 0 {
		return p.scopes[i]
	}
	return p.account.base
}

// Open implements webhook.API. When the budget ends before all repositories are seen, the next call goes on where this one
// ended. It keeps the last tenth of the rate limit for registrations: fault github.rate.
func (p *accountAPI) Open(ctx context.Context, repositories []string, budget int) ([]flint.JobStatus, error) {
	v := &survey{api: p, left: budget, seen: map[int64]bool{}}
	err := v.run(ctx, repositories)
	if errors.Is(err, errBudget) {
		err = nil
	}
	return v.found, err
}

// errBudget ends a survey. It never leaves this file.
var errBudget = errors.New("the budget is spent")

// survey is one look for open jobs.
type survey struct {
	api   *accountAPI
	left  int // requests
	seen  map[int64]bool
	found []flint.JobStatus
}

// place is a repository, and the scope it is asked about with.
type place struct {
	name  string
	scope *scope
}

func (v *survey) run(ctx context.Context, repositories []string) error {
	places, err := v.places(ctx, repositories)
	if err != nil && len(places) == 0 {
		return err
	}
	a := v.api.account
	a.mu.Lock()
	start := max(0, slices.IndexFunc(places, func(p place) bool { return p.name == a.resume }))
	a.mu.Unlock()
	for i := range places {
		at := places[(start+i)%len(places)]
		if err := v.repository(ctx, at); err != nil {
			resume := at.name
			if i == 0 { // it alone is more than the budget: the others must have their turn
				resume = places[(start+1)%len(places)].name
			}
			a.mu.Lock()
			a.resume = resume
			a.mu.Unlock()
			return err
		}
	}
	return err
}

// places returns the repositories to look at. What it found before an error it returns with it.
func (v *survey) places(ctx context.Context, repositories []string) ([]place, error) {
	var places []place
	for _, r := range repositories {
		if _, _, ok := repositoryParts(r); ok {
			places = append(places, place{r, v.api.scopeFor(r)})
		}
	}
	if repositories != nil {
		return places, nil
	}
	scopes := v.api.scopes
	if len(scopes) == 0 {
		scopes = []*scope{v.api.account.base}
	}
	listed := map[*credential]bool{}
	for _, s := range scopes {
		if !s.organisation() {
			places = append(places, place{s.name, s})
			continue
		}
		cred, err := s.credential(ctx)
		if err != nil {
			return places, err
		}
		if s.account.Token == "" && listed[cred] {
			continue
		}
		listed[cred] = true
		if err := v.list(ctx, s, &places); err != nil {
			return places, err
		}
	}
	slices.SortFunc(places, func(a, b place) int { return strings.Compare(a.name, b.name) })
	return slices.CompactFunc(places, func(a, b place) bool { return a.name == b.name }), nil
}

// list adds the repositories of an organisation that the credential sees.
func (v *survey) list(ctx context.Context, s *scope, places *[]place) error {
	add := func(repositories []*gh.Repository) {
		for _, r := range repositories {
			if _, _, ok := repositoryParts(r.GetFullName()); !ok || r.GetArchived() || r.GetDisabled() || !s.covers(r.GetFullName()) {
				continue
			}
			s.account.sees(r.GetFullName(), r)
			*places = append(*places, place{r.GetFullName(), s})
		}
	}
	verb := "list the repositories of " + s.name
	if s.account.Token == "" {
		return surveyPages(ctx, v, s, verb, request{method: http.MethodGet, path: "/installation/repositories"},
			func(page *gh.ListRepositories) { add(page.Repositories) })
	}
	if strings.HasPrefix(s.path, "/enterprises/") {
		return &flint.Fault{
			Code: "github.hook", What: verb, Kind: flint.ErrConfig,
			Err: fmt.Errorf("%w: GitHub lists no repositories of an enterprise", errors.ErrUnsupported),
			Fix: "configure the enterprise's organisations, if webhooks that were lost are to be made up for",
		}
	}
	return surveyPages(ctx, v, s, verb, request{method: http.MethodGet, path: s.path + "/repos"},
		func(page *[]*gh.Repository) { add(*page) })
}

// repository looks at the runs of one repository: a run in progress may have jobs that are queued.
func (v *survey) repository(ctx context.Context, at place) error {
	base := "/repos/" + at.name + "/actions/runs"
	var runs []*gh.WorkflowRun
	for _, state := range []string{"queued", "in_progress"} {
		err := surveyPages(ctx, v, at.scope, "list the runs of "+at.name, request{
			method: http.MethodGet, path: base, query: url.Values{"status": {state}},
		}, func(page *gh.WorkflowRuns) { runs = append(runs, page.WorkflowRuns...) })
		if refused(err) == http.StatusNotFound { // gone since it was listed
			return nil
		}
		if err != nil {
			return err
		}
	}
	for _, run := range runs {
		if run.GetID() <= 0 || v.seen[run.GetID()] {
			continue
		}
		v.seen[run.GetID()] = true
		public := isPublic(run.GetRepository())
		err := surveyPages(ctx, v, at.scope, fmt.Sprintf("list the jobs of run %d of %s", run.GetID(), at.name), request{
			method: http.MethodGet, path: base + "/" + strconv.FormatInt(run.GetID(), 10) + "/jobs", query: url.Values{"filter": {"latest"}},
		}, func(page *gh.Jobs) {
			for _, j := range page.Jobs {
				if s := j.GetStatus(); s == "queued" || s == "in_progress" {
					v.found = append(v.found, at.scope.convert(j, at.name, public))
				}
			}
		})
		if err != nil && refused(err) != http.StatusNotFound {
			return err
		}
	}
	return nil
}

// surveyPages is pages within the survey's budget and what the rate limit has to spare.
func surveyPages[T any](ctx context.Context, v *survey, s *scope, verb string, q request, each func(*T)) error {
	if err := v.spend(ctx, s); err != nil {
		return err
	}
	var spent error
	err := pages(ctx, s, verb, q, func(page *T, more bool) bool {
		each(page)
		if more {
			spent = v.spend(ctx, s)
		}
		return spent != nil
	})
	return errors.Join(err, spent)
}

// spend takes one request from the budget.
func (v *survey) spend(ctx context.Context, s *scope) error {
	cred, err := s.credential(ctx)
	if err != nil {
		return err
	}
	if until, scarce := cred.rest.scarce(time.Now()); scarce {
		return &flint.Fault{
			Code: "github.rate", What: "look for open jobs of " + s.name,
			Err: errors.New("GitHub's rate limit leaves no room for it"),
			Fix: "wait until " + until.Format(time.TimeOnly) + "; webhooks and registrations go on, and an App that nothing else uses has room",
		}
	}
	if v.left <= 0 {
		return errBudget
	}
	v.left--
	return nil
}
