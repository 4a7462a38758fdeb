package github

import (
	"context"
	"crypto/rsa"
	"errors"
	"fmt"
	"net/http"
	"net/url"
	"strings"
	"sync"
	"time"

	"github.com/golang-jwt/jwt/v5"
	gh "github.com/google/go-github/v79/github"

	"flint"
)

// Mode is how an account learns of jobs.
type Mode int

// The modes.
const (
	ScaleSets Mode = iota // by a message session per pool; no inbound port
	Webhooks              // from a webhook receiver; runners are registered over REST
)

// Account is one way to sign in to GitHub, and where it serves.
type Account struct {
	Name           string       // "" is one too; no two have the same
	URL            string       // of the organisation, repository or enterprise; for pools without a Scope of their own
	AppID          string       // client id or app id of the GitHub App
	InstallationID int64        // of the App; 0: looked up for each scope
	PrivateKey     flint.Secret // of the App, PEM
	Token          flint.Secret // a personal access token instead of the App
	Mode           Mode
	// SelfRegister gives guests a registration token, with which their runner registers itself, for servers that have no JIT
	// configurations. Needs Webhooks.
	SelfRegister bool
	HookID       int64 // with Token: the hook whose deliveries are looked at; 0: none are
}

// account is an Account at work.
type account struct {
	Account
	transport http.RoundTripper
	base      *scope // of the URL
	app       *limits
	asApp     *gh.Client // for calls of the App itself

	mu      sync.Mutex
	signed  map[int64]*credential // guarded by mu; by installation, 0 for the token
	visible map[string]visibility // guarded by mu; of repositories
	resume  string                // guarded by mu: the repository where the last survey of open jobs ended
}

func newAccount(a Account, transport http.RoundTripper) (*account, error) {
	out := &account{
		Account: a, transport: transport, app: &limits{}, signed: map[int64]*credential{}, visible: map[string]visibility{},
	}
	if err := out.check(); err != nil {
		return nil, err
	}
	var err error
	if out.base, err = newScope(a.URL, out); err != nil {
		return nil, err
	}
	out.asApp, err = newREST(out.base.api, &recorder{next: transport, api: out.base.api, app: out.app})
	return out, err
}

// check refuses what can be seen to be wrong without asking GitHub.
func (a *account) check() error {
	bad := func(code, what, why, fix string) error {
		return &flint.Fault{Code: code, What: what, Kind: flint.ErrConfig, Err: errors.New(why), Fix: fix}
	}
	switch {
	case a.Token == "" && a.AppID == "":
		return bad("github.app", "sign in to GitHub", "neither a GitHub App nor a token is configured",
			"set "+a.setting("app_id")+" and "+a.setting("private_key_file"))
	case a.SelfRegister && a.Mode != Webhooks:
		return bad("github.account", "use runners that register themselves", "scale sets have none",
			"leave out "+a.setting("registration")+", or set "+a.setting("mode")+" to webhooks")
	case a.HookID != 0 && a.Token == "":
		return bad("github.account", "look at the deliveries of one hook", "a GitHub App has its own",
			"leave out "+a.setting("webhook_hook_id"))
	case a.Token == "":
		if _, err := parseKey(a.PrivateKey); err != nil {
			return bad("github.key", "read the private key of the GitHub App", err.Error(),
				"set "+a.setting("private_key_file")+" to the .pem file that GitHub offered when the key was generated")
		}
	}
	return nil
}

// setting names a setting of this account for a person.
func (a *account) setting(key string) string {
	if a.Name == "" {
		return "github." + key
	}
	return fmt.Sprintf("%s of the GitHub account %q", key, a.Name)
}

// credential is what the account's calls are signed with: the token of one installation of the App, or the personal one.
type credential struct {
	account      *account
	installation int64 // 0: a personal access token
	rest, tenant *limits
	client       *gh.Client

	gate    chan struct{} // held to read or write what follows, and while a token is fetched
	token   flint.Secret
	renewAt time.Time // by our clock
}

const (
	// renewBefore is how long before its end a token is replaced: longer than any call takes, and than clocks differ.
	renewBefore = 5 * time.Minute
	// tokenLife bounds what is believed of a token's life; GitHub's is an hour.
	tokenLife = time.Hour
)

// credential returns the credential of an installation, the same for the same installation.
func (a *account) credential(installation int64) (*credential, error) {
	a.mu.Lock()
	defer a.mu.Unlock()
	if c := a.signed[installation]; c != nil {
		return c, nil
	}
	c := &credential{account: a, installation: installation, rest: &limits{}, tenant: &limits{}, gate: make(chan struct{}, 1)}
	if installation == 0 {
		c.token = a.Token
	}
	var err error
	if c.client, err = newREST(a.base.api, c.recorder()); err != nil {
		return nil, err
	}
	a.signed[installation] = c
	return c, nil
}

func (c *credential) recorder() *recorder {
	a := c.account
	return &recorder{next: a.transport, api: a.base.api, app: a.app, rest: c.rest, tenant: c.tenant}
}

// bearer returns a token that is good for some minutes. s is for whom it is wanted, for messages.
func (c *credential) bearer(ctx context.Context, s *scope) (flint.Secret, error) {
	select {
	case c.gate <- struct{}{}:
	case <-ctx.Done():
		return "", fmt.Errorf("sign in to GitHub: %w", ctx.Err())
	}
	defer func() { <-c.gate }()
	if c.installation == 0 || c.token != "" && time.Now().Before(c.renewAt) {
		return c.token, nil
	}
	c.token = ""
	var answer gh.InstallationToken
	resp, err := s.askAsApp(ctx, "get a token of the App's installation on "+s.name, request{
		method: http.MethodPost, path: fmt.Sprintf("/app/installations/%d/access_tokens", c.installation), into: &answer,
	})
	if err != nil {
		return "", err
	}
	if answer.GetToken() == "" {
		return "", errors.New("get a token of the App's installation: the answer has none")
	}
	// Its end is by GitHub's clock: what is certain is how long it lives.
	now := time.Now()
	issued, err := http.ParseTime(resp.Header.Get("Date"))
	if err != nil {
		issued = now
	}
	life := min(answer.GetExpiresAt().Sub(issued), tokenLife)
	c.token, c.renewAt = flint.Secret(answer.GetToken()), now.Add(max(0, life-renewBefore))
	return c.token, nil
}

// drop forgets a token that GitHub has refused, and reports whether there can be another one.
func (c *credential) drop(ctx context.Context, token flint.Secret) bool {
	if c.installation == 0 {
		return false
	}
	select {
	case c.gate <- struct{}{}:
	case <-ctx.Done():
		return false
	}
	defer func() { <-c.gate }()
	if c.token == token {
		c.token = ""
	}
	return true
}

// jwt signs what proves that we are the App. GitHub wants at most ten minutes; the minute back is for clocks that differ.
func (a *account) jwt(now time.Time) (flint.Secret, error) {
	key, err := parseKey(a.PrivateKey)
	if err != nil {
		return "", err
	}
	issued := now.Add(-time.Minute)
	signed, err := jwt.NewWithClaims(jwt.SigningMethodRS256, jwt.RegisteredClaims{
		Issuer:    a.AppID,
		IssuedAt:  jwt.NewNumericDate(issued),
		ExpiresAt: jwt.NewNumericDate(issued.Add(9 * time.Minute)),
	}).SignedString(key)
	return flint.Secret(signed), err
}

func parseKey(pem flint.Secret) (*rsa.PrivateKey, error) {
	key, err := jwt.ParseRSAPrivateKeyFromPEM([]byte(string(pem)))
	if err != nil {
		return nil, fmt.Errorf("parse RSA private key: %w", err)
	}
	return key, nil
}

// sameServer reports whether a host of a URL is this account's server, by its pages or its API.
func (a *account) sameServer(host string) bool {
	api, err := url.Parse(a.base.api)
	return err == nil && (strings.EqualFold(host, a.base.host) || strings.EqualFold(host, api.Host) ||
		api.Host == "api.github.com" && strings.EqualFold(strings.TrimPrefix(host, "www."), "github.com"))
}
