package github

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"net/url"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"time"

	gh "github.com/google/go-github/v79/github"

	"flint"
)

const (
	// maxQuery bounds what Find reads, maxTries the credentials it asks with.
	maxQuery = 2048
	maxTries = 20
	// maxLabels bounds the labels of one job; GitHub allows no more for a runner.
	maxLabels = 100
)

// query is what a person names a job or a run by.
type query struct {
	host              string // of the URL; empty where there is none
	repository        string
	job, run, attempt int64
	id                int64 // a job's, or a run's: nobody said which
}

// namePart is what GitHub takes as the name of an owner or a repository.
var namePart = regexp.MustCompile(`^[A-Za-z0-9._-]{1,100}$`)

// repositoryParts splits owner/name. What is not a name is not put into a path.
func repositoryParts(repository string) (owner, name string, ok bool) {
	owner, name, ok = strings.Cut(repository, "/")
	for _, part := range []string{owner, name} {
		ok = ok && namePart.MatchString(part) && part != "." && part != ".."
	}
	return owner, name, ok
}

// parseQuery reads the URL of a job or a run, as the browser or the API has it, or a repository and an id: acme/app 123,
// acme/app#123, acme/app/123.
func parseQuery(raw string) (query, error) {
	bad := &flint.Fault{
		Code: "github.query", What: fmt.Sprintf("read %q as a job", clean(raw, 200)), Kind: flint.ErrUsage,
		Err: errors.New("it is neither the address of a job or a run, nor a repository with an id"),
		Fix: "copy the address of the job's page: https://github.com/acme/app/actions/runs/123/job/456",
	}
	raw = strings.TrimSpace(raw)
	if raw == "" || len(raw) > maxQuery {
		return query{}, bad
	}
	var q query
	path := raw
	if first, _, _ := strings.Cut(raw, "/"); strings.Contains(raw, "://") || strings.Contains(first, ".") && strings.Count(raw, "/") > 3 {
		if !strings.Contains(raw, "://") {
			raw = "https://" + raw
		}
		u, err := url.Parse(raw)
		if err != nil || u.Host == "" || u.Scheme != "https" && u.Scheme != "http" {
			return query{}, bad
		}
		q.host, path = strings.ToLower(u.Host), u.Path
		path = strings.TrimPrefix(strings.TrimPrefix(path, "/api/v3"), "/repos")
	} else if fields := strings.FieldsFunc(raw, func(r rune) bool { return r == ' ' || r == '#' || r == '\t' }); len(fields) == 2 {
		path = fields[0] + "/" + fields[1]
	}
	parts := strings.Split(strings.Trim(path, "/"), "/")
	if len(parts) < 3 {
		return query{}, bad
	}
	q.repository = parts[0] + "/" + parts[1]
	if _, _, ok := repositoryParts(q.repository); !ok || !q.target(parts[2:]) {
		return query{}, bad
	}
	return q, nil
}

// target reads what stands behind the repository. What follows a run or a job that it does not know is a part of its page.
func (q *query) target(parts []string) bool {
	number := func(i int) int64 {
		if i >= len(parts) || len(parts[i]) > 18 || strings.Trim(parts[i], "0123456789") != "" {
			return 0
		}
		n, _ := strconv.ParseInt(parts[i], 10, 64)
		return n
	}
	if len(parts) == 1 {
		q.id = number(0)
		return q.id > 0
	}
	if parts[0] != "actions" { // /runs/1 is the page of a check, which has its job's id
		q.job = number(1)
		return parts[0] == "runs" && q.job > 0
	}
	if parts = parts[1:]; parts[0] == "jobs" {
		q.job = number(1)
		return q.job > 0
	}
	if parts[0] != "runs" {
		return false
	}
	q.run = number(1)
	for i := 2; i+1 < len(parts); i++ {
		switch parts[i] {
		case "attempts":
			q.attempt = number(i + 1)
		case "job", "jobs":
			q.job = number(i + 1)
		}
	}
	return q.run > 0
}

// Find returns the jobs that a person names by the address of a job or a run, in the browser's form or the API's, or by
// "owner/repo id". It asks with each account of that server, those that serve the repository first. Its faults are
// github.query (flint.ErrUsage), github.job (flint.ErrNotFound), and those of asking.
func (c *Client) Find(ctx context.Context, what string) ([]flint.JobStatus, error) {
	q, err := parseQuery(what)
	if err != nil {
		return nil, err
	}
	var hard error
	why := errors.New("no configured account is on that server")
	tried := map[*credential]bool{}
	for _, s := range c.candidates(q) {
		cred, err := s.credential(ctx)
		if err == nil {
			if tried[cred] || len(tried) >= maxTries {
				continue
			}
			tried[cred] = true
			var found []flint.JobStatus
			if found, err = s.find(ctx, q); err == nil {
				return found, nil
			}
		}
		why = errors.New("no configured account sees it")
		unseen := refused(err) == http.StatusNotFound
		if st := status(err); !s.covers(q.repository) && st >= http.StatusUnauthorized && st <= http.StatusNotFound {
			unseen = true
		}
		if hard == nil && !unseen {
			hard = err
		}
	}
	if hard != nil {
		return nil, hard
	}
	return nil, &flint.Fault{
		Code: "github.job", What: "find the job " + clean(what, 200), Kind: flint.ErrNotFound, Err: why,
		Fix: "check the address; if it is right, an account that serves " + q.repository + " is missing from the configuration",
	}
}

// candidates returns the scopes to ask, the likely ones first.
func (c *Client) candidates(q query) []*scope {
	var first, then []*scope
	scopes := c.places()
	for _, a := range c.accounts {
		if !slices.Contains(scopes, a.base) {
			scopes = append(scopes, a.base)
		}
	}
	for _, s := range scopes {
		switch {
		case q.host != "" && !s.account.sameServer(q.host):
		case s.covers(q.repository):
			first = append(first, s)
		default:
			then = append(then, s)
		}
	}
	return append(first, then...)
}

// find asks for what q names.
func (s *scope) find(ctx context.Context, q query) ([]flint.JobStatus, error) {
	if id := max(q.job, q.id); id > 0 {
		j, err := s.job(ctx, q.repository, id)
		if err == nil {
			return []flint.JobStatus{j}, nil
		}
		if q.id == 0 || refused(err) != http.StatusNotFound {
			return nil, err
		}
	}
	return s.runJobs(ctx, q.repository, max(q.run, q.id), q.attempt)
}

// job asks for one job.
func (s *scope) job(ctx context.Context, repository string, id int64) (flint.JobStatus, error) {
	var j gh.WorkflowJob
	_, err := s.ask(ctx, fmt.Sprintf("look up job %d of %s", id, repository), request{
		method: http.MethodGet, path: "/repos/" + repository + "/actions/jobs/" + strconv.FormatInt(id, 10), into: &j,
	})
	if err != nil {
		return flint.JobStatus{}, err
	}
	public, err := s.public(ctx, repository)
	if err != nil {
		return flint.JobStatus{}, err
	}
	return s.convert(&j, repository, public), nil
}

// runJobs asks for the jobs of one attempt of a run; 0: the newest attempt of each.
func (s *scope) runJobs(ctx context.Context, repository string, run, attempt int64) ([]flint.JobStatus, error) {
	path := "/repos/" + repository + "/actions/runs/" + strconv.FormatInt(run, 10)
	if attempt > 0 {
		path += "/attempts/" + strconv.FormatInt(attempt, 10)
	}
	public, err := s.public(ctx, repository)
	if err != nil {
		return nil, err
	}
	var jobs []flint.JobStatus
	err = pages(ctx, s, fmt.Sprintf("list the jobs of run %d of %s", run, repository), request{method: http.MethodGet, path: path + "/jobs"},
		func(page *gh.Jobs, _ bool) bool {
			for _, j := range page.Jobs {
				jobs = append(jobs, s.convert(j, repository, public))
			}
			return false
		})
	return jobs, err
}

// convert takes over what is used of a job, bounded and fit for a log line.
func (s *scope) convert(j *gh.WorkflowJob, repository string, public bool) flint.JobStatus {
	out := flint.JobStatus{
		Job: flint.Job{
			ID: strconv.FormatInt(j.GetID(), 10), Name: clean(j.GetName(), maxText), Repository: repository, RunID: j.GetRunID(),
		},
		State: clean(j.GetStatus(), 64), Conclusion: clean(j.GetConclusion(), 64), Runner: clean(j.GetRunnerName(), maxText),
		Public: public, Queued: j.GetCreatedAt().Time, Account: s.account.Name, URL: clean(j.GetHTMLURL(), maxQuery), Labels: []string{},
	}
	if j == nil {
		return out
	}
	for _, l := range j.Labels[:min(len(j.Labels), maxLabels)] {
		out.Labels = append(out.Labels, clean(l, maxText))
	}
	return out
}

const (
	// visibleFor is how long it is believed that a repository is public or not; maxVisible bounds how many are remembered.
	visibleFor = time.Hour
	maxVisible = 10_000
)

type visibility struct {
	public bool
	until  time.Time
}

// public reports whether a repository is public.
func (s *scope) public(ctx context.Context, repository string) (bool, error) {
	a := s.account
	a.mu.Lock()
	v, ok := a.visible[strings.ToLower(repository)]
	a.mu.Unlock()
	if ok && time.Now().Before(v.until) {
		return v.public, nil
	}
	var r gh.Repository
	if _, err := s.ask(ctx, "look up repository "+repository, request{method: http.MethodGet, path: "/repos/" + repository, into: &r}); err != nil {
		return false, err
	}
	a.sees(repository, &r)
	return isPublic(&r), nil
}

// isPublic is true only where GitHub says so: a repository of which nothing is said is taken for a private one.
func isPublic(r *gh.Repository) bool {
	return r != nil && r.Private != nil && !r.GetPrivate() && r.GetVisibility() != "internal"
}

func (a *account) sees(repository string, r *gh.Repository) {
	a.mu.Lock()
	defer a.mu.Unlock()
	if len(a.visible) >= maxVisible {
		clear(a.visible)
	}
	a.visible[strings.ToLower(repository)] = visibility{public: isPublic(r), until: time.Now().Add(visibleFor)}
}

// Rerun asks GitHub to run a job again that our runner lost. The job is found by the runner's name: what was said of it at the
// start may have been another's. It is done once: only a first attempt is run again, fault github.rerun otherwise. It returns
// flint.ErrConflict while GitHub has not given the job up, flint.ErrNotFound where the run has no job of that runner, and nil
// without doing anything where the job succeeded after all.
func (c *Client) Rerun(ctx context.Context, job flint.Job, runner string) error {
	if _, _, ok := repositoryParts(job.Repository); !ok || job.RunID <= 0 || runner == "" {
		return fmt.Errorf("run the job of runner %s again: %w: the job's repository or run is not known", runner, flint.ErrNotFound)
	}
	for _, s := range c.homes(runner) {
		if !s.covers(job.Repository) && !strings.HasPrefix(s.path, "/enterprises/") {
			continue
		}
		lost, err := s.lostJob(ctx, job, runner, 0)
		if err != nil && refused(err) != http.StatusNotFound {
			return err
		}
		if lost == nil {
			continue
		}
		first := lost
		if lost.GetRunAttempt() > 1 {
			// When another job was run again, the new attempt has this one again, as it was.
			if first, err = s.lostJob(ctx, job, runner, 1); err != nil && refused(err) != http.StatusNotFound {
				return err
			}
		}
		return s.rerun(ctx, job.Repository, lost, first != nil)
	}
	return fmt.Errorf("run the job of runner %s again: %w: run %d of %s has none of it", runner, flint.ErrNotFound, job.RunID, job.Repository)
}

// lostJob returns the job that a runner had in an attempt of a run, the newest where attempt is 0; nil where it had none.
func (s *scope) lostJob(ctx context.Context, job flint.Job, runner string, attempt int) (lost *gh.WorkflowJob, err error) {
	q := request{method: http.MethodGet, path: "/repos/" + job.Repository + "/actions/runs/" + strconv.FormatInt(job.RunID, 10)}
	if attempt > 0 {
		q.path += "/attempts/" + strconv.Itoa(attempt) + "/jobs"
	} else {
		q.path, q.query = q.path+"/jobs", url.Values{"filter": {"latest"}}
	}
	err = pages(ctx, s, fmt.Sprintf("list the jobs of run %d of %s", job.RunID, job.Repository), q, func(page *gh.Jobs, _ bool) bool {
		for _, j := range page.Jobs {
			if j.GetRunnerName() == runner && j.GetID() > 0 {
				lost = j
			}
		}
		return lost != nil
	})
	return lost, err
}

// rerun runs a job again. first says that it has not been run again before.
func (s *scope) rerun(ctx context.Context, repository string, lost *gh.WorkflowJob, first bool) error {
	verb := fmt.Sprintf("run job %s of %s again", clean(lost.GetName(), maxText), repository)
	switch {
	case !first:
		return &flint.Fault{
			Code: "github.rerun", What: verb, Err: fmt.Errorf("it was attempt %d", lost.GetRunAttempt()),
			Fix: "run it again on GitHub's page; flint does so once only, lest a job that kills its VM does it for ever",
		}
	case lost.GetStatus() != "completed":
		return fmt.Errorf("%s: %w: GitHub has not given it up yet", verb, flint.ErrConflict)
	case lost.GetConclusion() == "success":
		return nil
	}
	_, err := s.ask(ctx, verb, request{
		method: http.MethodPost, path: "/repos/" + repository + "/actions/jobs/" + strconv.FormatInt(lost.GetID(), 10) + "/rerun",
	})
	var e *callError
	if errors.As(err, &e) && e.status == http.StatusForbidden && strings.Contains(e.message, "already running") {
		return fmt.Errorf("%s: %w: its run has not ended yet", verb, flint.ErrConflict)
	}
	return err
}

// LatestRunner returns the newest release of the runner software that an account's server has, and when it was published. It
// returns flint.ErrNotFound where none has any: GHES knows only the repositories it holds.
func (c *Client) LatestRunner(ctx context.Context) (version string, published time.Time, err error) {
	var errs []error
	for _, a := range c.accounts {
		var r gh.RepositoryRelease
		at := a.base
		scopes := c.places()
		if i := slices.IndexFunc(scopes, func(s *scope) bool { return s.account == a }); i >= 0 {
			at = scopes[i] // where the App is surely installed
		}
		_, err := at.ask(ctx, "look up the newest runner software", request{
			method: http.MethodGet, path: "/repos/actions/runner/releases/latest", into: &r,
		})
		version := strings.TrimPrefix(r.GetTagName(), "v")
		_, numbered := flint.ParseVersion(version)
		switch {
		case refused(err) == http.StatusNotFound:
		case err != nil:
			errs = append(errs, err)
		case !numbered || r.GetPublishedAt().IsZero():
			errs = append(errs, fmt.Errorf("look up the newest runner software: the answer is no release: %q", clean(r.GetTagName(), 100)))
		default:
			return version, r.GetPublishedAt().Time, nil
		}
	}
	if err := errors.Join(errs...); err != nil {
		return "", time.Time{}, err
	}
	return "", time.Time{}, fmt.Errorf("look up the newest runner software: %w", flint.ErrNotFound)
}
