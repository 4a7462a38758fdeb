package github

import (
	"context"
	"crypto/rsa"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/netip"
	"net/url"
	"strings"
	"sync"
	"time"

	"github.com/golang-jwt/jwt/v5"

	"flint"
)

// scope is an organisation, repository or enterprise of a GitHub server, and how we sign in to it.
type scope struct {
	cfg  *Config
	url  string // as configured
	name string // acme, or acme/app: for messages
	api  string // base of the REST API, without a slash at the end
	path string // of the scope in the REST API: /orgs/acme, /repos/acme/app

	mu           sync.Mutex
	installation int64    // guarded by mu; 0: not known yet
	control      *service // guarded by mu: for registrations and clean-up; the pollers have their own
}

// newScope checks the URL of a scope. Plain http is for servers on this machine or a private network (a simulator): anywhere
// else it would send the App's tokens in the clear.
func newScope(raw string, cfg *Config) (*scope, error) {
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
	s := &scope{cfg: cfg, url: raw, name: strings.Trim(u.Path, "/"), api: apiBase(u), installation: cfg.InstallationID}
	parts := strings.Split(s.name, "/")
	switch {
	case s.name == "" || len(parts) > 2 || parts[0] == "" || parts[len(parts)-1] == "":
		return nil, bad(errors.New("its path is neither an organisation nor a repository"))
	case len(parts) == 2 && strings.EqualFold(parts[0], "enterprises"):
		if cfg.Token == "" {
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

// service makes a client of the scale set API, signed in to this scope.
func (s *scope) service(ctx context.Context) (*service, error) {
	id := int64(0)
	if s.cfg.Token == "" {
		var err error
		if id, err = s.installationID(ctx); err != nil {
			return nil, err
		}
	}
	return newService(s, id)
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
	err := observe(ctx, s, verb, callTimeout, func(ctx context.Context) error {
		token, err := s.appToken(time.Now())
		if err != nil {
			return err
		}
		req, err := http.NewRequestWithContext(ctx, http.MethodGet, s.api+s.path+"/installation", nil)
		if err != nil {
			return err
		}
		req.Header.Set("Authorization", "Bearer "+token)
		req.Header.Set("Accept", "application/vnd.github+json")
		req.Header.Set("User-Agent", "flint")
		resp, err := (&http.Client{Transport: &recorder{next: s.cfg.Transport}}).Do(req)
		if err != nil {
			return err
		}
		defer resp.Body.Close()
		if resp.StatusCode != http.StatusOK {
			return errors.New(resp.Status)
		}
		body, err := io.ReadAll(resp.Body)
		if err != nil {
			return err
		}
		var answer struct {
			ID int64 `json:"id"`
		}
		if err := json.Unmarshal(body, &answer); err != nil {
			return err
		}
		if answer.ID <= 0 {
			return errors.New("the answer has no id")
		}
		id = answer.ID
		return nil
	})
	if err != nil {
		return 0, err
	}
	s.mu.Lock()
	s.installation = id
	s.mu.Unlock()
	return id, nil
}

// appToken signs the JWT that proves we are the App. GitHub wants at most ten minutes; the minute back is for clocks that
// differ.
func (s *scope) appToken(now time.Time) (string, error) {
	key, err := parseKey(s.cfg.PrivateKey)
	if err != nil {
		return "", err
	}
	issued := now.Add(-time.Minute)
	return jwt.NewWithClaims(jwt.SigningMethodRS256, jwt.RegisteredClaims{
		Issuer:    s.cfg.AppID,
		IssuedAt:  jwt.NewNumericDate(issued),
		ExpiresAt: jwt.NewNumericDate(issued.Add(9 * time.Minute)),
	}).SignedString(key)
}

func parseKey(pem flint.Secret) (*rsa.PrivateKey, error) {
	key, err := jwt.ParseRSAPrivateKeyFromPEM([]byte(string(pem)))
	if err != nil {
		return nil, fmt.Errorf("parse RSA private key: %w", err)
	}
	return key, nil
}
