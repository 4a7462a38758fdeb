package githubsim

import (
	"encoding/json"
	"fmt"
	"maps"
	"net/http"
	"net/url"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/golang-jwt/jwt/v5"
)

// The App and its installation, what it may do, the repositories it sees, and how often it may ask.

func (s *Server) routeApp(route router) {
	route("GET", "/app", s.asApp(s.serveApp))
	route("GET", "/app/installations", s.asApp(s.serveInstallations))
	route("GET", "/app/installations/{id}", s.asApp(s.serveInstallation))
	route("POST", "/app/installations/{id}/access_tokens", s.asApp(s.serveAccessToken))
	for _, scope := range []string{inOrg, inRepo, inEnterprise, "/users/{owner}"} {
		route("GET", scope+"/installation", s.asApp(s.serveInstallation))
	}
	route("GET", "/installation/repositories", s.may("metadata", "read", s.serveRepositories))
	route("GET", inOrg+"/repos", s.may("metadata", "read", s.serveRepositories))
	route("GET", inRepo, s.may("metadata", "read", s.serveRepository))
	route("GET", "/rate_limit", s.serveRateLimit)
	for _, path := range []string{"/releases/latest", "/releases", "/releases/tags/{tag}"} {
		route("GET", "/repos/actions/runner"+path, s.metered(s.serveReleases))
	}
	route("POST", "/actions/runner-registration", s.metered(s.serveRunnerRegistration))
}

// policy is what the App may do, and what GitHub last released.
type policy struct {
	mu          sync.Mutex
	suspended   time.Time // zero when it is not
	permissions map[string]string
	version     string
	released    time.Time
}

// grantable are the permissions the App has unless they are taken away.
func grantable() map[string]string {
	return map[string]string{
		"organization_self_hosted_runners": "write", "enterprise_self_hosted_runners": "write", "administration": "write", "actions": "write",
		"metadata": "read", "organization_hooks": "write", "repository_hooks": "write",
	}
}

func newPolicy(cfg Config) *policy {
	p := &policy{permissions: grantable(), version: cfg.RunnerVersion, released: cfg.RunnerReleased}
	for name, level := range cfg.Permissions {
		p.permissions[name] = level
	}
	return p
}

func (p *policy) isSuspended() bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	return !p.suspended.IsZero()
}

// grants reports whether a permission is had at a level.
func (p *policy) grants(permission, level string) bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	got := p.permissions[permission]
	return got == level || got == "write"
}

// Suspend suspends the App's installation, or ends that.
func (s *Server) Suspend(suspended bool) {
	s.policy.mu.Lock()
	defer s.policy.mu.Unlock()
	s.policy.suspended = time.Time{}
	if suspended {
		s.policy.suspended = time.Now()
	}
}

// Permit sets one of the App's permissions from now on: "write", "read", or "" for none.
func (s *Server) Permit(permission, level string) {
	s.policy.mu.Lock()
	defer s.policy.mu.Unlock()
	s.policy.permissions[permission] = level
}

// ReleaseRunner publishes a version of the runner's software, which is the newest from now on.
func (s *Server) ReleaseRunner(version string, published time.Time) {
	s.policy.mu.Lock()
	defer s.policy.mu.Unlock()
	s.policy.version, s.policy.released = version, published
}

func (s *Server) serveApp(w http.ResponseWriter, _ *http.Request) {
	writeJSON(w, http.StatusOK, map[string]any{
		"id": s.app.ID, "client_id": s.app.ClientID, "slug": "flint", "name": "flint", "owner": s.hub.ownerView(),
		"permissions": s.policy.granted(), "events": []string{"workflow_job"}, "installations_count": 1,
	})
}

// granted are the permissions there are.
func (p *policy) granted() map[string]string {
	p.mu.Lock()
	defer p.mu.Unlock()
	all := maps.Clone(p.permissions)
	maps.DeleteFunc(all, func(_, level string) bool { return level == "" })
	return all
}

func (s *Server) installationView() map[string]any {
	s.policy.mu.Lock()
	suspended := s.policy.suspended
	s.policy.mu.Unlock()
	return map[string]any{
		"id": s.app.InstallationID, "app_id": s.app.ID, "app_slug": "flint", "target_type": "Organization", "target_id": ownerID,
		"account": s.hub.ownerView(), "repository_selection": "all", "permissions": s.policy.granted(), "events": []string{"workflow_job"},
		"suspended_at": stamp(suspended),
	}
}

func (s *Server) serveInstallations(w http.ResponseWriter, r *http.Request) {
	s.page(w, r, "", []map[string]any{s.installationView()})
}

// isInstallation reports whether the installation a path names, if any, is ours.
func (s *Server) isInstallation(r *http.Request) bool {
	id := r.PathValue("id")
	return id == "" || id == strconv.FormatInt(s.app.InstallationID, 10)
}

func (s *Server) serveInstallation(w http.ResponseWriter, r *http.Request) {
	if !s.isInstallation(r) {
		writeError(w, errNotFound("Not Found"))
		return
	}
	writeJSON(w, http.StatusOK, s.installationView())
}

func (s *Server) serveAccessToken(w http.ResponseWriter, r *http.Request) {
	switch {
	case !s.isInstallation(r):
		writeError(w, errNotFound("Not Found"))
	case s.policy.isSuspended():
		writeError(w, errSuspended())
	default:
		writeJSON(w, http.StatusCreated, map[string]any{
			"token": s.creds.issue(credInstallation, "", installationTokenLife), "expires_at": stamp(time.Now().Add(installationTokenLife)),
			"permissions": s.policy.granted(), "repository_selection": "all",
		})
	}
}

func (s *Server) serveRepositories(w http.ResponseWriter, r *http.Request) {
	all := make([]map[string]any, 0, len(s.hub.repos))
	for _, repo := range s.hub.repos {
		all = append(all, s.hub.repositoryView(repo))
	}
	key := "repositories"
	if r.PathValue("owner") != "" {
		key = "" // GET /orgs/{org}/repos answers with a bare list
	}
	s.page(w, r, key, all)
}

func (s *Server) serveRepository(w http.ResponseWriter, r *http.Request) {
	writeJSON(w, http.StatusOK, s.hub.repositoryView(s.hub.repository(r.PathValue("repo"))))
}

// serveReleases serves the newest release of actions/runner, which is the only one here.
func (s *Server) serveReleases(w http.ResponseWriter, r *http.Request, who caller, _ string) {
	s.policy.mu.Lock()
	version, published := s.policy.version, s.policy.released
	s.policy.mu.Unlock()
	name := "actions-runner-linux-x64-" + version + ".tar.gz"
	release := map[string]any{
		"id": 1, "tag_name": "v" + version, "name": "v" + version, "draft": false, "prerelease": false,
		"created_at": stamp(published), "published_at": stamp(published),
		"html_url": "https://github.com/actions/runner/releases/tag/v" + version,
		"assets": []any{map[string]any{
			"id": 1, "name": name, "content_type": "application/x-gzip", "state": "uploaded", "created_at": stamp(published),
			"browser_download_url": "https://github.com/actions/runner/releases/download/v" + version + "/" + name,
		}},
	}
	switch tag := r.PathValue("tag"); {
	case who == theApp:
		writeError(w, errUnauthorized())
	case strings.HasSuffix(r.URL.Path, "/releases"):
		s.page(w, r, "", []map[string]any{release})
	case tag != "" && tag != "v"+version:
		writeError(w, errNotFound("Not Found"))
	default:
		writeJSON(w, http.StatusOK, release)
	}
}

// adminClaims are those of the token runner-registration hands out. It is good for one domain.
type adminClaims struct {
	jwt.RegisteredClaims
	Domain string `json:"domain"`
}

const adminSubject = "scale-set-admin"

// serveRunnerRegistration trades a registration token for the address of the scale set API, where runners register
// themselves too, and a token for it.
func (s *Server) serveRunnerRegistration(w http.ResponseWriter, r *http.Request, who caller, bound string) {
	if who != registrar {
		writeError(w, errUnauthorized())
		return
	}
	var in struct {
		URL string `json:"url"`
	}
	if err := readJSON(w, r, &in); err != nil {
		writeError(w, err)
		return
	}
	scope, err := url.Parse(in.URL)
	domain, ok := "", false
	if err == nil {
		domain, ok = s.hub.domain(strings.Trim(scope.Path, "/"))
	}
	if err != nil || !ok || domain != bound {
		writeError(w, errNotFound("no such organization or repository, or not the token's: "+clip(in.URL, 200)))
		return
	}
	now := time.Now()
	admin, err := jwt.NewWithClaims(jwt.SigningMethodHS256, adminClaims{Domain: domain, RegisteredClaims: jwt.RegisteredClaims{
		ID: newUUID(), Subject: adminSubject, IssuedAt: jwt.NewNumericDate(now), ExpiresAt: jwt.NewNumericDate(now.Add(adminTokenLife)),
	}}).SignedString(s.signer)
	// Runner software registers itself by the REST API on github.com, and the old way on a server that has jobs acquired.
	answer(w, http.StatusOK, map[string]any{
		"url": s.cfg.URL + "/tenant/", "token": admin, "token_schema": "OAuthAccessToken", "use_v2_flow": !s.cfg.Acquire,
	}, err)
}

// adminDomainOf returns the domain of a live token of runner-registration.
func (s *Server) adminDomainOf(token string) (domain string, ok bool) {
	var claims adminClaims
	_, err := jwt.ParseWithClaims(token, &claims, func(*jwt.Token) (any, error) { return s.signer, nil },
		jwt.WithValidMethods([]string{"HS256"}), jwt.WithExpirationRequired(), jwt.WithSubject(adminSubject))
	return claims.Domain, err == nil
}

// asAdmin lets a request through that carries the token of runner-registration; domainIn says for which domain.
func (s *Server) asAdmin(next http.HandlerFunc) http.HandlerFunc {
	return func(w http.ResponseWriter, r *http.Request) {
		domain, ok := s.adminDomainOf(bearer(r, "Bearer"))
		if !ok {
			writeError(w, errUnauthorized())
			return
		}
		r.SetPathValue(domainValue, domain)
		next(w, r)
	}
}

// rates is how many REST requests each caller has left in its hour.
type rates struct {
	limit int
	mu    sync.Mutex
	used  map[caller]*rate
}

type rate struct {
	used  int
	reset time.Time
}

func newRates(limit int) *rates { return &rates{limit: limit, used: map[caller]*rate{}} }

const anonymousLimit = 60 // GitHub's, an hour

// now returns a caller's hour as it is. The caller holds the lock.
func (a *rates) now(who caller) (x *rate, limit int) {
	limit = a.limit
	if who == credentialless {
		limit = min(anonymousLimit, limit)
	}
	x = a.used[who]
	if x == nil || !time.Now().Before(x.reset) {
		x = &rate{reset: time.Now().Add(time.Hour)}
		a.used[who] = x
	}
	return x, limit
}

// take counts a request, and writes into the headers what is left. It is not ok when nothing was.
func (a *rates) take(h http.Header, who caller) (ok bool) {
	a.mu.Lock()
	defer a.mu.Unlock()
	x, limit := a.now(who)
	if ok = x.used < limit; ok {
		x.used++
	}
	x.show(h, limit)
	return ok
}

func (x *rate) view(limit int) map[string]any {
	return map[string]any{"limit": limit, "remaining": limit - x.used, "used": x.used, "reset": x.reset.Unix(), "resource": "core"}
}

// show writes into the headers what is left.
func (x *rate) show(h http.Header, limit int) {
	for name, v := range x.view(limit) {
		h.Set("X-RateLimit-"+strings.ToUpper(name[:1])+name[1:], fmt.Sprint(v))
	}
}

// serveRateLimit says what is left; asking costs nothing.
func (s *Server) serveRateLimit(w http.ResponseWriter, r *http.Request) {
	who, _, err := s.whoCalls(r)
	if err != nil {
		writeError(w, err)
		return
	}
	s.rates.mu.Lock()
	x, limit := s.rates.now(who)
	core := x.view(limit)
	x.show(w.Header(), limit)
	s.rates.mu.Unlock()
	b, err := json.Marshal(core)
	answer(w, http.StatusOK, map[string]any{"resources": map[string]any{"core": json.RawMessage(b)}, "rate": json.RawMessage(b)}, err)
}
