package github

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"net/netip"
	"net/url"
	"strings"
	"sync"
	"time"

	gh "github.com/google/go-github/v79/github"

	"flint"
)

// scope is an organisation, repository or enterprise of a GitHub server, and how we sign in to it.
type scope struct {
	account *account
	url     string // as configured
	host    string // of the URL
	name    string // acme, or acme/app: for messages
	api     string // base of the REST API, without a slash at the end
	path    string // of the scope in the REST API: /orgs/acme, /repos/acme/app

	mu           sync.Mutex
	installation int64     // guarded by mu; 0: not known yet
	control      *service  // guarded by mu: for registrations and clean-up; the pollers have their own
	groups       []group   // guarded by mu: the runner groups, as they were at grouped
	grouped      time.Time // guarded by mu
}

// newScope checks the URL of a scope. Plain http is for servers on this machine or a private network (a simulator): anywhere
// else it would send the App's tokens in the clear.
func newScope(raw string, a *account) (*scope, error) {
	bad := func(err error) error {
		return &flint.Fault{
			Code: "github.url", What: fmt.Sprintf("use %q as a GitHub organisation or repository", raw), Kind: flint.ErrConfig, Err: err,
			Fix: "set the URL as the browser shows it: https://github.com/acme or https://github.com/acme/app",
		}
	}
	u, err := url.Parse(strings.TrimRight(raw, "/"))
	if err != nil {
		return nil, bad(err)
	}
	if u.Host == "" || u.User != nil || u.RawQuery != "" || u.Fragment != "" {
		return nil, bad(errors.New("it is not a plain URL with a host"))
	}
	if u.Scheme != "https" && (u.Scheme != "http" || !private(u.Hostname())) {
		return nil, bad(errors.New("it does not start with https://"))
	}
	s := &scope{account: a, url: raw, host: u.Host, name: strings.Trim(u.Path, "/"), api: apiBase(u), installation: a.InstallationID}
	parts := strings.Split(s.name, "/")
	switch {
	case s.name == "" || len(parts) > 2 || parts[0] == "" || parts[len(parts)-1] == "":
		return nil, bad(errors.New("its path is neither an organisation nor a repository"))
	case len(parts) == 2 && strings.EqualFold(parts[0], "enterprises"):
		if a.Token == "" {
			return nil, bad(errors.New("a GitHub App cannot serve a whole enterprise; a token can"))
		}
		s.path = "/enterprises/" + parts[1]
	case len(parts) == 2:
		s.path = "/repos/" + s.name
	default:
		s.path = "/orgs/" + s.name
	}
	return s, nil
}

// private reports whether a host is this machine or on a private network.
func private(host string) bool {
	if host == "localhost" {
		return true
	}
	a, err := netip.ParseAddr(host)
	return err == nil && (a.IsLoopback() || a.IsPrivate() || a.IsLinkLocalUnicast())
}

// apiBase returns the REST API of the server of u: github.com and *.ghe.com have a host for it, others a path.
func apiBase(u *url.URL) string {
	host := strings.ToLower(u.Host)
	switch {
	case host == "github.com" || host == "www.github.com":
		return "https://api.github.com"
	case strings.HasSuffix(host, ".ghe.com"):
		return u.Scheme + "://api." + host
	default:
		return u.Scheme + "://" + u.Host + "/api/v3"
	}
}

// organisation reports whether the scope has runner groups of its own: only a repository has none.
func (s *scope) organisation() bool { return !strings.HasPrefix(s.path, "/repos/") }

// covers reports whether a repository belongs to the scope. Of an enterprise that is not known.
func (s *scope) covers(repository string) bool {
	owner, _, _ := strings.Cut(repository, "/")
	return strings.EqualFold(s.name, repository) || strings.EqualFold(s.path, "/orgs/"+owner)
}

// credential returns what calls for this scope are signed with.
func (s *scope) credential(ctx context.Context) (*credential, error) {
	id := int64(0)
	if s.account.Token == "" {
		var err error
		if id, err = s.installationID(ctx); err != nil {
			return nil, err
		}
	}
	return s.account.credential(id)
}

// service makes a client of the scale set API, signed in to this scope.
func (s *scope) service(ctx context.Context) (*service, error) {
	cred, err := s.credential(ctx)
	if err != nil {
		return nil, err
	}
	return newService(s, cred)
}

// controlService returns the client for registrations and clean-up. It is apart from the pollers', which are locked for as
// long as a poll takes.
func (s *scope) controlService(ctx context.Context) (*service, error) {
	s.mu.Lock()
	svc := s.control
	s.mu.Unlock()
	if svc != nil {
		return svc, nil
	}
	fresh, err := s.service(ctx)
	if err != nil {
		return nil, err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.control == nil {
		s.control = fresh
	}
	return s.control, nil
}

// forget makes the next controlService sign in anew, if svc is the present one.
func (s *scope) forget(svc *service) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.control == svc {
		s.control = nil
	}
}

// installationID returns the configured installation of the App, or asks GitHub which one serves this scope.
func (s *scope) installationID(ctx context.Context) (int64, error) {
	s.mu.Lock()
	id := s.installation
	s.mu.Unlock()
	if id != 0 {
		return id, nil
	}
	verb := "look up the App's installation for " + s.name
	var answer gh.Installation
	if _, err := s.askAsApp(ctx, verb, request{method: http.MethodGet, path: s.path + "/installation", into: &answer}); err != nil {
		return 0, err
	}
	if id = answer.GetID(); id <= 0 {
		return 0, fmt.Errorf("%s: the answer has no id", verb)
	}
	s.mu.Lock()
	s.installation = id
	s.mu.Unlock()
	return id, nil
}

// uninstalled forgets an installation that GitHub does not know any more: the App may have been installed anew.
func (s *scope) uninstalled() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.installation = s.account.InstallationID
}
