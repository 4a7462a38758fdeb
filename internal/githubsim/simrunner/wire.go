package simrunner

import (
	"bytes"
	"context"
	"crypto/rsa"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math/big"
	"net/http"
	"net/url"
	"strings"
	"time"

	"github.com/golang-jwt/jwt/v5"
)

// Credential is what a JIT configuration holds.
type Credential struct {
	Name     string // of the runner
	Server   string // base address of the old services, with a slash at the end
	TokenURL string // where assertions are traded for tokens
	ClientID string
	Key      *rsa.PrivateKey
}

// Decode reads an encoded JIT configuration.
func Decode(encoded string) (Credential, error) {
	raw, err := base64.StdEncoding.DecodeString(encoded)
	if err != nil {
		return Credential{}, fmt.Errorf("decode JIT configuration: %w", err)
	}
	var files map[string][]byte
	if err := json.Unmarshal(raw, &files); err != nil {
		return Credential{}, fmt.Errorf("decode JIT configuration: %w", err)
	}
	var settings struct{ AgentName, ServerURL string }
	var creds struct {
		Data struct{ ClientID, AuthorizationURL string }
	}
	var params struct{ D, Exponent, Modulus, P, Q []byte }
	for name, into := range map[string]any{".runner": &settings, ".credentials": &creds, ".credentials_rsaparams": &params} {
		if err := json.Unmarshal(files[name], into); err != nil {
			return Credential{}, fmt.Errorf("decode %s of the JIT configuration: %w", name, err)
		}
	}
	n := func(b []byte) *big.Int { return new(big.Int).SetBytes(b) }
	if e := n(params.Exponent); !e.IsInt64() || e.Int64() < 3 || e.Int64() > 1<<31-1 || len(params.P) == 0 || len(params.Q) == 0 {
		return Credential{}, errors.New("decode JIT configuration: it holds no RSA key")
	}
	key := &rsa.PrivateKey{
		PublicKey: rsa.PublicKey{N: n(params.Modulus), E: int(n(params.Exponent).Int64())}, D: n(params.D), Primes: []*big.Int{n(params.P), n(params.Q)},
	}
	key.Precompute()
	return Credential{
		Name: settings.AgentName, Server: settings.ServerURL, TokenURL: creds.Data.AuthorizationURL, ClientID: creds.Data.ClientID, Key: key,
	}, nil
}

// Assertion signs what the runner proves itself with when it asks for a token.
func (c Credential) Assertion(key *rsa.PrivateKey, id string, expires time.Time) (string, error) {
	return jwt.NewWithClaims(jwt.SigningMethodPS256, jwt.RegisteredClaims{
		Subject: c.ClientID, Issuer: c.ClientID, ID: id, Audience: jwt.ClaimStrings{c.TokenURL}, ExpiresAt: jwt.NewNumericDate(expires),
	}).SignedString(key)
}

// request is one call. Form, when it is set, is sent instead of in; raw instead of both.
type request struct {
	method, url, token string
	in                 any
	form               url.Values
	raw                []byte
	out                any // what a 200 is decoded into, unless nil
}

// answer is what the server said.
type answer struct {
	status int
	body   []byte
}

const maxAnswer = 4 << 20 // bytes of one answer

// once sends a request a single time.
func (r *runner) once(ctx context.Context, q request) (answer, error) {
	body, kind := q.raw, "application/octet-stream"
	if q.form != nil {
		body, kind = []byte(q.form.Encode()), "application/x-www-form-urlencoded"
	} else if q.in != nil {
		var err error
		if body, err = json.Marshal(q.in); err != nil {
			return answer{}, fmt.Errorf("encode request: %w", err)
		}
		kind = "application/json"
	}
	req, err := http.NewRequestWithContext(ctx, q.method, q.url, bytes.NewReader(body))
	if err != nil {
		return answer{}, fmt.Errorf("make request: %w", err)
	}
	req.Header.Set("Content-Type", kind)
	if q.token != "" {
		req.Header.Set("Authorization", "Bearer "+q.token)
	}
	resp, err := r.o.Client.Do(req)
	if err != nil {
		return answer{}, err
	}
	defer func() { _ = resp.Body.Close() }()
	a := answer{status: resp.StatusCode}
	if a.body, err = io.ReadAll(io.LimitReader(resp.Body, maxAnswer)); err != nil {
		return answer{}, fmt.Errorf("read answer: %w", err)
	}
	if q.out != nil && a.status == http.StatusOK {
		if err := json.Unmarshal(a.body, q.out); err != nil {
			return answer{}, fmt.Errorf("decode answer: %w", err)
		}
	}
	return a, nil
}

// errPatience says that the server could not be reached for longer than the runner waits.
var errPatience = errors.New("the server did not answer in time")

const (
	firstPause = 50 * time.Millisecond
	longPause  = 5 * time.Second
)

// call sends a request until there is an answer that means something: 5xx, 429 and broken connections do not. A call that
// was answered at the second time or later may have taken effect at the first: again says so.
func (r *runner) call(ctx context.Context, q request) (a answer, again bool, err error) {
	deadline := time.Now().Add(r.o.Patience)
	for pause := firstPause; ; pause = min(2*pause, longPause) {
		a, err = r.once(ctx, q)
		if err == nil && a.status < 500 && a.status != http.StatusTooManyRequests {
			return a, again, nil
		}
		if ctx.Err() != nil {
			return a, again, fmt.Errorf("ask server: %w", ctx.Err())
		}
		if !time.Now().Add(pause).Before(deadline) {
			return a, again, fmt.Errorf("%w: %s %s: status %d, %w", errPatience, q.method, path(q.url), a.status, errors.Join(err))
		}
		again = true
		t := time.NewTimer(pause)
		select {
		case <-t.C:
		case <-ctx.Done():
			t.Stop()
			return a, again, fmt.Errorf("ask server: %w", ctx.Err())
		}
	}
}

// path is an address without what may be secret in it.
func path(address string) string {
	address, _, _ = strings.Cut(address, "?")
	return address
}

// errStatus is an answer nobody expected.
type errStatus struct {
	what string
	answer
}

func (e *errStatus) Error() string {
	return fmt.Sprintf("%s: status %d: %s", e.what, e.status, strings.TrimSpace(string(e.body[:min(len(e.body), 300)])))
}

// must is call where one status is right.
func (r *runner) must(ctx context.Context, what string, want int, q request) error {
	a, _, err := r.call(ctx, q)
	if err != nil {
		return fmt.Errorf("%s: %w", what, err)
	}
	return verdict(what, want, a)
}

// verdict turns an answer that is not the right one into an error.
func verdict(what string, want int, a answer) error {
	if a.status == want {
		return nil
	}
	err := error(&errStatus{what, a})
	switch a.status {
	case http.StatusUnauthorized:
		return fmt.Errorf("%w: %w", ErrGone, err)
	case http.StatusConflict:
		return fmt.Errorf("%w: %w", ErrConflict, err)
	}
	return err
}
