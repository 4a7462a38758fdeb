package githubsim

import (
	"errors"
	"net/http"
	"net/url"
	"strconv"
	"strings"
	"time"

	"github.com/golang-jwt/jwt/v5"
)

// The REST API, as a GitHub Enterprise Server has it under /api/v3: clients take any host but github.com for one.

const (
	installationTokenLife = time.Hour
	registrationTokenLife = time.Hour
)

func (s *Server) routeREST(mux *http.ServeMux) {
	const api = "/api/v3"
	owner, repo := "/orgs/{owner}", "/repos/{owner}/{repo}"
	for _, scope := range []string{owner, repo} {
		mux.HandleFunc("GET "+api+scope+"/installation", s.asApp(s.serveInstallation))
		mux.HandleFunc("POST "+api+scope+"/actions/runners/registration-token", s.asInstallation(s.serveRegistrationToken))
		mux.HandleFunc("GET "+api+scope+"/actions/runners", s.asInstallation(s.serveListRunners))
		mux.HandleFunc("DELETE "+api+scope+"/actions/runners/{id}", s.asInstallation(s.serveDeleteRunner))
	}
	mux.HandleFunc("POST "+api+"/app/installations/{id}/access_tokens", s.asApp(s.serveAccessToken))
	mux.HandleFunc("POST "+api+"/actions/runner-registration", s.serveRunnerRegistration)
}

// asApp lets a request through that carries a JWT signed with the App's key.
func (s *Server) asApp(next http.HandlerFunc) http.HandlerFunc {
	return func(w http.ResponseWriter, r *http.Request) {
		if err := s.checkAppJWT(bearer(r, "Bearer")); err != nil {
			s.cfg.Log.Warn("refuse App", "err", err)
			writeError(w, &apiError{http.StatusUnauthorized, "UnauthorizedException", "the JSON web token is not valid: " + err.Error()})
			return
		}
		if !s.inScope(r) {
			writeError(w, errNotFound("not installed there"))
			return
		}
		next(w, r)
	}
}

func (s *Server) checkAppJWT(raw string) error {
	var claims jwt.RegisteredClaims
	_, err := jwt.ParseWithClaims(raw, &claims, func(*jwt.Token) (any, error) { return s.appKey, nil },
		jwt.WithValidMethods([]string{"RS256"}), jwt.WithExpirationRequired(), jwt.WithIssuedAt(), jwt.WithIssuer(strconv.FormatInt(s.app.ID, 10)))
	if err != nil {
		return err
	}
	if claims.IssuedAt == nil || claims.ExpiresAt.Sub(claims.IssuedAt.Time) > 10*time.Minute {
		return errors.New("it lives for more than 10 minutes")
	}
	return nil
}

// asInstallation lets a request through that carries an installation's access token.
func (s *Server) asInstallation(next http.HandlerFunc) http.HandlerFunc {
	return func(w http.ResponseWriter, r *http.Request) {
		if _, ok := s.creds.check(credInstallation, bearer(r, "Bearer", "token")); !ok {
			writeError(w, errUnauthorized())
			return
		}
		if !s.inScope(r) {
			writeError(w, errNotFound("Not Found"))
			return
		}
		next(w, r)
	}
}

// inScope reports whether the request's owner and repository, as far as its path has them, are ours.
func (s *Server) inScope(r *http.Request) bool {
	owner, repo := r.PathValue("owner"), r.PathValue("repo")
	return (owner == "" || strings.EqualFold(owner, s.cfg.Owner)) && (repo == "" || strings.EqualFold(repo, s.cfg.Repo))
}

// isScope reports whether a path is the organisation's or the repository's.
func (s *Server) isScope(path string) bool {
	return strings.EqualFold(path, s.cfg.Owner) || strings.EqualFold(path, s.cfg.Owner+"/"+s.cfg.Repo)
}

func (s *Server) serveInstallation(w http.ResponseWriter, _ *http.Request) {
	writeJSON(w, http.StatusOK, map[string]any{
		"id": s.app.InstallationID, "app_id": s.app.ID, "target_type": "Organization",
		"account":     map[string]any{"login": s.cfg.Owner},
		"permissions": map[string]any{"organization_self_hosted_runners": "write", "administration": "write", "actions": "write", "metadata": "read"},
	})
}

func (s *Server) serveAccessToken(w http.ResponseWriter, r *http.Request) {
	if r.PathValue("id") != strconv.FormatInt(s.app.InstallationID, 10) {
		writeError(w, errNotFound("no such installation"))
		return
	}
	writeJSON(w, http.StatusCreated, map[string]any{
		"token": s.creds.issue(credInstallation, "", installationTokenLife), "expires_at": time.Now().Add(installationTokenLife).UTC().Format(time.RFC3339),
	})
}

func (s *Server) serveRegistrationToken(w http.ResponseWriter, _ *http.Request) {
	writeJSON(w, http.StatusCreated, map[string]any{
		"token": s.creds.issue(credRegistration, "", registrationTokenLife), "expires_at": time.Now().Add(registrationTokenLife).UTC().Format(time.RFC3339),
	})
}

// serveRunnerRegistration trades a registration token for the address of the scale set API and a token for it.
func (s *Server) serveRunnerRegistration(w http.ResponseWriter, r *http.Request) {
	if _, ok := s.creds.check(credRegistration, bearer(r, "RemoteAuth")); !ok {
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
	if err != nil || !s.isScope(strings.Trim(scope.Path, "/")) {
		writeError(w, errNotFound("no such organization or repository: "+clip(in.URL, 200)))
		return
	}
	now := time.Now()
	admin, err := jwt.NewWithClaims(jwt.SigningMethodHS256, jwt.RegisteredClaims{
		Subject: adminSubject, IssuedAt: jwt.NewNumericDate(now), ExpiresAt: jwt.NewNumericDate(now.Add(adminTokenLife)),
	}).SignedString(s.signer)
	if err != nil {
		writeError(w, err)
		return
	}
	writeJSON(w, http.StatusOK, map[string]any{"url": s.cfg.URL + "/tenant/", "token": admin, "token_schema": "OAuthAccessToken", "use_v2_flow": true})
}

const adminSubject = "scale-set-admin"

// asAdmin lets a request through that carries the token of runner-registration.
func (s *Server) asAdmin(next http.HandlerFunc) http.HandlerFunc {
	return func(w http.ResponseWriter, r *http.Request) {
		_, err := jwt.Parse(bearer(r, "Bearer"), func(*jwt.Token) (any, error) { return s.signer, nil },
			jwt.WithValidMethods([]string{"HS256"}), jwt.WithExpirationRequired(), jwt.WithSubject(adminSubject))
		if err != nil {
			writeError(w, errUnauthorized())
			return
		}
		next(w, r)
	}
}

func (s *Server) serveListRunners(w http.ResponseWriter, r *http.Request) {
	q := r.URL.Query()
	perPage, page := atoi(q.Get("per_page"), 30), atoi(q.Get("page"), 1)
	perPage, page = min(max(perPage, 1), 100), max(page, 1)
	var all []map[string]any
	for _, x := range s.Runners() {
		if name := q.Get("name"); name != "" && name != x.Name {
			continue
		}
		status := "offline"
		if x.Online {
			status = "online"
		}
		all = append(all, map[string]any{
			"id": x.ID, "name": x.Name, "os": "Linux", "status": status, "busy": x.Busy, "ephemeral": true,
			"labels": []any{map[string]any{"name": x.ScaleSet, "type": "custom"}},
		})
	}
	from := min(len(all), (page-1)*perPage)
	to := min(len(all), from+perPage)
	writeJSON(w, http.StatusOK, map[string]any{"total_count": len(all), "runners": append([]map[string]any{}, all[from:to]...)})
}

func (s *Server) serveDeleteRunner(w http.ResponseWriter, r *http.Request) {
	if err := s.hub.removeRunner(int64(atoi(r.PathValue("id"), 0))); err != nil {
		writeError(w, err)
		return
	}
	w.WriteHeader(http.StatusNoContent)
}

// atoi reads a number, or returns def.
func atoi(s string, def int) int {
	n, err := strconv.ParseInt(s, 10, 32)
	if err != nil {
		return def
	}
	return int(n)
}
