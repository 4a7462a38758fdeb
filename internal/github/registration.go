package github

import (
	"context"
	"encoding/json"
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
)

const (
	// maxJIT bounds a JIT configuration; GitHub's have about 4 KiB.
	maxJIT = 64 << 10
	// maxToken bounds a registration token; GitHub's have 29 characters.
	maxToken = 1 << 10
	// workFolder is where jobs have their workspace, below the runner's directory.
	workFolder = "_work"
	// groupsFor is how long the list of runner groups is believed.
	groupsFor = 10 * time.Minute
)

// registered checks what GitHub gave for a runner. A JIT configuration is bounded and, as all base64 is, one printable line.
func registered(name string, id int64, encoded string) (flint.Registration, error) {
	switch {
	case id <= 0:
		return flint.Registration{}, errors.New("the answer names no runner")
	case encoded == "" || len(encoded) > maxJIT:
		return flint.Registration{}, fmt.Errorf("the JIT configuration has %d bytes", len(encoded))
	case !oneLine(encoded):
		return flint.Registration{}, errors.New("the JIT configuration is not base64")
	}
	return flint.Registration{Runner: name, GitHubID: id, Credential: flint.Secret(encoded)}, nil
}

// oneLine reports whether s is printable ASCII without spaces, so that a guest reads it as one word of one line.
func oneLine(s string) bool {
	return !strings.ContainsFunc(s, func(r rune) bool { return r <= ' ' || r > '~' })
}

// labels are those the pool's runners are registered with.
func labels(p flint.Pool) []string {
	if len(p.Labels) == 0 {
		return []string{p.Name}
	}
	return p.Labels
}

// registerREST makes a runner of a pool whose jobs webhooks bring.
func (c *Client) registerREST(ctx context.Context, p *served, name string) (flint.Registration, error) {
	g, err := p.scope.group(ctx, p.Group)
	if err != nil {
		return flint.Registration{}, err
	}
	reg, err := p.scope.jitREST(ctx, p.Pool, g, name)
	if refused(err) == http.StatusConflict {
		if err := c.removeStaleREST(ctx, p.scope, name); err != nil {
			return flint.Registration{}, err
		}
		reg, err = p.scope.jitREST(ctx, p.Pool, g, name)
	}
	if err != nil && unclear(err) {
		c.undo(ctx, name, func(ctx context.Context) error { return c.removeStaleREST(ctx, p.scope, name) })
	}
	return reg, err
}

// removeStaleREST removes the registration that has the name we want, if it is ours.
func (c *Client) removeStaleREST(ctx context.Context, s *scope, name string) error {
	r, err := s.lookUp(ctx, name, 0)
	if err != nil || r == nil {
		return err
	}
	if c.cfg.Prefix == "" || !strings.HasPrefix(name, c.cfg.Prefix) {
		return existsFault(name)
	}
	c.cfg.Log.Warn("remove stale registration", "runner", name, "github_id", r.GetID())
	_, err = s.removeREST(ctx, name, r.GetID())
	return err
}

// jitREST registers a runner by the REST API.
func (s *scope) jitREST(ctx context.Context, pool flint.Pool, g group, name string) (flint.Registration, error) {
	verb := "register runner " + name
	var answer gh.JITRunnerConfig
	_, err := s.ask(ctx, verb, request{
		method: http.MethodPost, path: s.path + "/actions/runners/generate-jitconfig", into: &answer,
		body: gh.GenerateJITConfigRequest{Name: name, RunnerGroupID: g.id, Labels: labels(pool), WorkFolder: gh.Ptr(workFolder)},
	})
	switch {
	case refused(err) == http.StatusNotFound: // only the group can be missing: that the scope is there was seen with it
		s.forgetGroups()
		if g.name != "" {
			return flint.Registration{}, s.groupFault(g.name, err)
		}
		f := &flint.Fault{What: "talk to GitHub for " + s.name, Code: "github.permission", Kind: flint.ErrPermission, Err: err}
		f.Fix = s.permissionFix(&callError{}) + "; on a server without JIT configurations, set " + s.account.setting("registration") + " to token"
		return flint.Registration{}, f
	case err != nil:
		return flint.Registration{}, err
	}
	reg, err := registered(name, answer.GetRunner().GetID(), answer.GetEncodedJITConfig())
	if err != nil {
		return flint.Registration{}, fmt.Errorf("%s: %w", verb, err)
	}
	return reg, nil
}

// ownRegistration is the line with which a guest's runner registers itself.
type ownRegistration struct {
	URL       string   `json:"url"`
	Token     string   `json:"token"`
	Name      string   `json:"name"`
	Labels    []string `json:"labels"`
	Group     string   `json:"group,omitempty"` // empty: the default one
	Ephemeral bool     `json:"ephemeral"`
}

// selfRegistration gets what a guest registers itself with. GitHub knows no runner of that name before it has.
func (s *scope) selfRegistration(ctx context.Context, pool flint.Pool, name string) (flint.Registration, error) {
	verb := "get a registration token for runner " + name
	var answer gh.RegistrationToken
	_, err := s.ask(ctx, verb, request{method: http.MethodPost, path: s.path + "/actions/runners/registration-token", into: &answer})
	if err != nil {
		return flint.Registration{}, err
	}
	credential, err := registrationLine(s.url, answer.GetToken(), name, pool)
	if err != nil {
		return flint.Registration{}, fmt.Errorf("%s: %w", verb, err)
	}
	return flint.Registration{Runner: name, Credential: credential}, nil
}

func registrationLine(url, token, name string, pool flint.Pool) (flint.Secret, error) {
	if token == "" || len(token) > maxToken || !oneLine(token) {
		return "", fmt.Errorf("the answer has no usable token, but %d bytes", len(token))
	}
	line := ownRegistration{URL: strings.TrimRight(url, "/"), Token: token, Name: name, Labels: labels(pool), Ephemeral: true}
	if !isDefault(pool.Group) {
		line.Group = pool.Group
	}
	b, err := json.Marshal(line)
	return flint.Secret(b), err
}

// lookUp returns a registration, by its id or, where that is 0, by its name; nil where there is none.
func (s *scope) lookUp(ctx context.Context, name string, id int64) (*gh.Runner, error) {
	if id != 0 {
		var r gh.Runner
		_, err := s.ask(ctx, "look up runner "+name, request{
			method: http.MethodGet, path: s.path + "/actions/runners/" + strconv.FormatInt(id, 10), into: &r,
		})
		if refused(err) == http.StatusNotFound || err == nil && r.GetName() != name {
			return nil, nil
		}
		return &r, err
	}
	var found *gh.Runner
	err := pages(ctx, s, "look up runner "+name, request{
		method: http.MethodGet, path: s.path + "/actions/runners", query: url.Values{"name": {name}},
	}, func(page *gh.Runners, _ bool) bool {
		for _, r := range page.Runners {
			if r.GetName() == name { // servers that do not know the filter list all
				found = r
			}
		}
		return found != nil
	})
	return found, err
}

// runners lists the registrations of the scope whose names have a prefix. What it found before an error it returns with it.
func (s *scope) runners(ctx context.Context, prefix string) ([]*gh.Runner, error) {
	var found []*gh.Runner
	err := pages(ctx, s, "list the runners of "+s.name, request{method: http.MethodGet, path: s.path + "/actions/runners"},
		func(page *gh.Runners, _ bool) bool {
			for _, r := range page.Runners {
				if r.GetID() > 0 && strings.HasPrefix(r.GetName(), prefix) {
					found = append(found, r)
				}
			}
			return false
		})
	return found, err
}

// removeREST deletes a registration by its id or, where that is 0, by its name. Found is whether there was one.
func (s *scope) removeREST(ctx context.Context, name string, id int64) (found bool, err error) {
	if id == 0 {
		r, err := s.lookUp(ctx, name, 0)
		if err != nil || r == nil {
			return false, err
		}
		id = r.GetID()
	}
	_, err = s.ask(ctx, "remove runner "+name, request{
		method: http.MethodDelete, path: s.path + "/actions/runners/" + strconv.FormatInt(id, 10),
	})
	switch refused(err) {
	case http.StatusNotFound:
		return false, nil
	case http.StatusUnprocessableEntity:
		return false, busyFault(name, err)
	}
	return err == nil, err
}

// group is a runner group. The default one has no name here: every scope has it.
type group struct {
	id     int64
	name   string
	public bool // it serves public repositories
	common bool // it is the default one
}

func isDefault(name string) bool { return name == "" || strings.EqualFold(name, "default") }

// group finds a runner group. That of a repository is always the default one.
func (s *scope) group(ctx context.Context, name string) (group, error) {
	if isDefault(name) {
		return group{id: defaultGroup}, nil
	}
	if !s.organisation() {
		return group{}, s.groupFault(name, errors.New("a repository has no runner groups"))
	}
	g, err := s.listed(ctx, func(g group) bool { return strings.EqualFold(g.name, name) })
	if errors.Is(err, flint.ErrNotFound) {
		err = s.groupFault(name, errors.New("GitHub lists no group of this name"))
	}
	return g, err
}

// GroupServesPublic reports whether the runner group of a pool serves public repositories. The runners of a repository always
// serve it.
func (c *Client) GroupServesPublic(ctx context.Context, pool string) (bool, error) {
	p := c.served(pool)
	if p == nil {
		return false, fmt.Errorf("look at the runner group of pool %s: %w", pool, flint.ErrNotFound)
	}
	if !p.scope.organisation() {
		return true, nil
	}
	g, err := p.scope.listed(ctx, func(g group) bool {
		return strings.EqualFold(g.name, p.Group) || isDefault(p.Group) && g.common
	})
	if errors.Is(err, flint.ErrNotFound) {
		err = p.scope.groupFault(p.Group, errors.New("GitHub lists no group of this name"))
	}
	return g.public, err
}

// listed returns the first runner group of the scope that is. The list is kept for a while; a group that is not in it is looked
// for anew.
func (s *scope) listed(ctx context.Context, is func(group) bool) (group, error) {
	s.mu.Lock()
	known, at := s.groups, s.grouped
	s.mu.Unlock()
	if i := slices.IndexFunc(known, is); i >= 0 && time.Since(at) < groupsFor {
		return known[i], nil
	}
	var groups []group
	err := pages(ctx, s, "list the runner groups of "+s.name, request{method: http.MethodGet, path: s.path + "/actions/runner-groups"},
		func(page *gh.RunnerGroups, _ bool) bool {
			for _, g := range page.RunnerGroups {
				groups = append(groups, group{
					id: g.GetID(), name: g.GetName(), public: g.GetAllowsPublicRepositories(), common: g.GetDefault(),
				})
			}
			return false
		})
	if err != nil {
		return group{}, err
	}
	s.mu.Lock()
	s.groups, s.grouped = groups, time.Now()
	s.mu.Unlock()
	i := slices.IndexFunc(groups, is)
	if i < 0 {
		return group{}, flint.ErrNotFound
	}
	return groups[i], nil
}

func (s *scope) forgetGroups() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.groups = nil
}
