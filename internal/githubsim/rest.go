package githubsim

import (
	"crypto/subtle"
	"errors"
	"fmt"
	"net/http"
	"net/url"
	"strconv"
	"strings"
	"time"

	"github.com/golang-jwt/jwt/v5"
)

// The REST API, as a GitHub Enterprise Server has it: clients take any host but github.com for one. Here is who may call
// what; the calls themselves are in the files rest*.go.

const apiPath = "/api/v3"

const (
	installationTokenLife = time.Hour
	registrationTokenLife = time.Hour
)

// The places things are registered at, as routes.
const (
	inOrg        = "/orgs/{owner}"
	inRepo       = "/repos/{owner}/{repo}"
	inEnterprise = "/enterprises/{enterprise}"
)

func (s *Server) routeREST(mux *http.ServeMux) {
	route := func(method, path string, h http.HandlerFunc) { mux.HandleFunc(method+" "+apiPath+path, h) }
	s.routeApp(route)
	s.routeRunners(route)
	s.routeGroups(route)
	s.routeRuns(route)
	s.routeDeliveries(route)
}

type router func(method, path string, h http.HandlerFunc)

// caller is who sends a request.
type caller int

const (
	nobody         caller = iota // or one whose credentials are worthless
	theApp                       // by a JWT signed with its key
	installation                 // by an access token
	person                       // by a personal access token
	runnerAdmin                  // by the token of runner-registration: the runner software that registers itself
	registrar                    // by a registration or removal token
	credentialless               // by none
)

func (c caller) String() string {
	return [...]string{"nobody", "app", "installation", "person", "runner admin", "registrar", "anonymous"}[c]
}

// whoCalls says who sends a request, and for which domain when the credentials are bound to one.
func (s *Server) whoCalls(r *http.Request) (who caller, domain string, err error) {
	if r.Header.Get("Authorization") == "" {
		return credentialless, "", nil
	}
	if d, ok := s.creds.check(credRegistration, bearer(r, "RemoteAuth")); ok {
		return registrar, d, nil
	}
	token := bearer(r, "Bearer", "token")
	if _, password, ok := r.BasicAuth(); ok {
		token = password
	}
	if t := string(s.cfg.Token); t != "" && subtle.ConstantTimeCompare([]byte(t), []byte(token)) == 1 {
		return person, "", nil
	}
	if _, ok := s.creds.check(credInstallation, token); ok {
		return installation, "", nil
	}
	if d, ok := s.adminDomainOf(token); ok {
		return runnerAdmin, d, nil
	}
	if strings.Count(token, ".") != 2 {
		return nobody, "", errUnauthorized()
	}
	if err := s.checkAppJWT(token); err != nil {
		s.cfg.Log.Warn("refuse App", "err", err)
		return nobody, "", &apiError{http.StatusUnauthorized, "UnauthorizedException", jwtMessage(err)}
	}
	return theApp, "", nil
}

// jwtMessage explains a JWT that is refused in GitHub's words, where there are any.
func jwtMessage(err error) string {
	switch {
	case errors.Is(err, jwt.ErrTokenExpired):
		return "'Expiration time' claim ('exp') must be a numeric value representing the future time at which the assertion expires"
	case errors.Is(err, errLongLife):
		return "'Expiration time' claim ('exp') is too far in the future"
	case errors.Is(err, jwt.ErrTokenUsedBeforeIssued):
		return "'Issued at' claim ('iat') must be an Integer representing the time that the assertion was issued"
	case errors.Is(err, jwt.ErrTokenSignatureInvalid):
		return "A JSON web token could not be decoded"
	case errors.Is(err, jwt.ErrTokenInvalidIssuer):
		return "Integration not found"
	}
	return "the JSON web token is not valid: " + err.Error()
}

var errLongLife = errors.New("it lives for more than 10 minutes")

func (s *Server) checkAppJWT(raw string) error {
	var claims jwt.RegisteredClaims
	_, err := jwt.ParseWithClaims(raw, &claims, func(*jwt.Token) (any, error) { return s.appKey, nil },
		jwt.WithValidMethods([]string{"RS256"}), jwt.WithExpirationRequired(), jwt.WithIssuedAt())
	switch {
	case err != nil:
		return err
	case claims.Issuer != strconv.FormatInt(s.app.ID, 10) && claims.Issuer != s.app.ClientID:
		return jwt.ErrTokenInvalidIssuer
	case claims.IssuedAt == nil || claims.ExpiresAt.Sub(claims.IssuedAt.Time) > 10*time.Minute:
		return errLongLife
	}
	return nil
}

// metered lets a request through that the caller's rate limit has room for, and says what is left of it.
func (s *Server) metered(next func(http.ResponseWriter, *http.Request, caller, string)) http.HandlerFunc {
	return func(w http.ResponseWriter, r *http.Request) {
		who, domain, err := s.whoCalls(r)
		if !s.rates.take(w.Header(), who) {
			writeError(w, &apiError{http.StatusForbidden, "RateLimitedException", "API rate limit exceeded for " + who.String() + "."})
			return
		}
		if err != nil {
			writeError(w, err)
			return
		}
		next(w, r, who, domain)
	}
}

// asApp lets a request through that carries a JWT signed with the App's key.
func (s *Server) asApp(next http.HandlerFunc) http.HandlerFunc {
	return s.metered(func(w http.ResponseWriter, r *http.Request, who caller, _ string) {
		if who != theApp {
			writeError(w, &apiError{http.StatusUnauthorized, "UnauthorizedException", "A JSON web token could not be decoded"})
			return
		}
		if _, ok := s.domainOf(r); !ok {
			writeError(w, errNotFound("Not Found"))
			return
		}
		next(w, r)
	})
}

// runnerPermission stands for the permission over self-hosted runners, which depends on the scope.
const runnerPermission = "runners"

// remove is a level that runners may have too, which otherwise is as good as write.
const remove = "remove"

// may lets a request through whose caller has a permission at a level: read, write or remove.
func (s *Server) may(permission, level string, next http.HandlerFunc) http.HandlerFunc {
	return s.metered(func(w http.ResponseWriter, r *http.Request, who caller, bound string) {
		domain, ok := s.domainOf(r)
		if err := s.permit(who, bound, domain, permission, level); err != nil {
			writeError(w, err)
			return
		}
		if !ok {
			writeError(w, errNotFound("Not Found"))
			return
		}
		r.SetPathValue(domainValue, domain)
		next(w, r)
	})
}

// domainValue is the path value under which the domain a request is about is kept once it was admitted.
const domainValue = "domain"

func domainIn(r *http.Request) string { return r.PathValue(domainValue) }

func (s *Server) permit(who caller, bound, domain, permission, level string) error {
	by := "integration"
	switch who {
	case installation:
		if s.policy.isSuspended() {
			return errSuspended()
		}
	case person:
		by = "personal access token"
	case runnerAdmin, registrar:
		// What the runner software does while it registers itself, and when it goes.
		if permission == runnerPermission && bound == domain && level != "write" {
			return nil
		}
		return errUnauthorized()
	case credentialless:
		return &apiError{http.StatusUnauthorized, "UnauthorizedException", "Requires authentication"}
	default:
		return errUnauthorized()
	}
	if permission == runnerPermission {
		permission = permissionOver(domain)
	}
	if level == remove {
		level = "write"
	}
	if !s.policy.grants(permission, level) {
		return errForbidden("Resource not accessible by " + by)
	}
	return nil
}

// permissionOver names the permission over the runners of a domain.
func permissionOver(domain string) string {
	switch {
	case strings.HasPrefix(domain, enterprisePrefix):
		return "enterprise_self_hosted_runners"
	case strings.Contains(domain, "/"):
		return "administration"
	}
	return "organization_self_hosted_runners"
}

func errSuspended() error { return errForbidden("This installation has been suspended") }

// domainOf returns the domain a request's path is about: "" when about none. It is not ok when there is no such one.
func (s *Server) domainOf(r *http.Request) (domain string, ok bool) {
	owner, repo, enterprise := r.PathValue("owner"), r.PathValue("repo"), r.PathValue("enterprise")
	switch {
	case enterprise != "":
		return s.hub.domain(enterprisePrefix + enterprise)
	case repo != "":
		return s.hub.domain(owner + "/" + repo)
	case owner != "":
		return s.hub.domain(owner)
	}
	return "", true
}

// page answers with the part of a list the request asks for, under a key unless it is empty.
func (s *Server) page(w http.ResponseWriter, r *http.Request, key string, all []map[string]any) {
	q := r.URL.Query()
	perPage, page := min(max(atoi(q.Get("per_page"), 30), 1), 100), max(atoi(q.Get("page"), 1), 1)
	last := max(1, (len(all)+perPage-1)/perPage)
	from := min(len(all), (min(page, last+1)-1)*perPage)
	part := append([]map[string]any{}, all[from:min(len(all), from+perPage)]...)
	var links []string
	link := func(n int, rel string) {
		q.Set("page", strconv.Itoa(n))
		links = append(links, s.link(r, q, rel))
	}
	if page < last {
		link(page+1, "next")
		link(last, "last")
	}
	if page > 1 {
		link(page-1, "prev")
		link(1, "first")
	}
	if len(links) > 0 {
		w.Header().Set("Link", strings.Join(links, ", "))
	}
	if key == "" {
		writeJSON(w, http.StatusOK, part)
		return
	}
	writeJSON(w, http.StatusOK, map[string]any{"total_count": len(all), key: part})
}

func (s *Server) link(r *http.Request, q url.Values, rel string) string {
	return fmt.Sprintf("<%s%s?%s>; rel=%q", s.cfg.URL, r.URL.Path, q.Encode(), rel)
}

// atoi reads a number, or returns def.
func atoi(s string, def int) int {
	n, err := strconv.ParseInt(s, 10, 32)
	if err != nil {
		return def
	}
	return int(n)
}

// answer writes v, or the error.
func answer(w http.ResponseWriter, status int, v any, err error) {
	switch {
	case err != nil:
		writeError(w, err)
	case v == nil:
		w.WriteHeader(status)
	default:
		writeJSON(w, status, v)
	}
}
