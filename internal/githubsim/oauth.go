package githubsim

import (
	"crypto/rsa"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"math/big"
	"net/http"
	"strconv"
	"time"

	"github.com/golang-jwt/jwt/v5"
)

// The runner's credentials: the JIT configuration it is given, and the OAuth exchange by which it trades an assertion
// signed with its key for a token.

const (
	runnerTokenLife = time.Hour
	clockSkew       = 5 * time.Minute // the most a runner's clock may be off
)

func (s *Server) routeOAuth(mux *http.ServeMux) {
	mux.HandleFunc("POST /oauth2/token", s.serveToken)
}

func (s *Server) tokenURL() string { return s.cfg.URL + "/oauth2/token" }

// encodeJIT renders the JIT configuration: base64 of a JSON object of three files, each base64 of JSON itself.
func (s *Server) encodeJIT(x *runner, key *rsa.PrivateKey, workFolder string) (string, error) {
	if workFolder == "" {
		workFolder = "_work"
	}
	var g group
	s.hub.read(func() { g = *x.group })
	b64 := func(n *big.Int) string { return base64.StdEncoding.EncodeToString(n.Bytes()) }
	files := map[string]any{
		".runner": map[string]string{
			"AgentId": strconv.FormatInt(x.id, 10), "AgentName": x.name, "DisableUpdate": "True", "Ephemeral": "True",
			"PoolId": strconv.FormatInt(g.id, 10), "PoolName": g.name, "GitHubUrl": s.cfg.URL + "/" + x.domain, "WorkFolder": workFolder,
			"ServerUrl": s.cfg.URL + "/tenant/", "ServerUrlV2": s.cfg.URL + "/broker/", "UseV2Flow": "True",
		},
		".credentials": map[string]any{
			"Scheme": "OAuth",
			"Data":   map[string]string{"ClientId": x.clientID, "AuthorizationUrl": s.tokenURL(), "RequireFipsCryptography": "True"},
		},
		".credentials_rsaparams": map[string]string{
			"d": b64(key.D), "dp": b64(key.Precomputed.Dp), "dq": b64(key.Precomputed.Dq), "inverseQ": b64(key.Precomputed.Qinv),
			"exponent": b64(big.NewInt(int64(key.E))), "modulus": b64(key.N), "p": b64(key.Primes[0]), "q": b64(key.Primes[1]),
		},
	}
	encoded := map[string][]byte{}
	for name, content := range files {
		b, err := json.Marshal(content)
		if err != nil {
			return "", fmt.Errorf("encode %s: %w", name, err)
		}
		encoded[name] = b
	}
	b, err := json.Marshal(encoded)
	if err != nil {
		return "", fmt.Errorf("encode JIT configuration: %w", err)
	}
	return base64.StdEncoding.EncodeToString(b), nil
}

var errUnknownClient = errors.New("no runner has this client id")

// serveToken answers a client assertion with an access token.
func (s *Server) serveToken(w http.ResponseWriter, r *http.Request) {
	r.Body = http.MaxBytesReader(w, r.Body, maxForm)
	refuse := func(why string) {
		writeJSON(w, http.StatusBadRequest, map[string]any{"error": "invalid_client", "error_description": why})
	}
	if err := r.ParseForm(); err != nil {
		refuse("the form cannot be read")
		return
	}
	var claims jwt.RegisteredClaims
	_, err := jwt.ParseWithClaims(r.PostForm.Get("client_assertion"), &claims, func(*jwt.Token) (any, error) {
		key := s.hub.clientKey(claims.Subject)
		if key == nil {
			return nil, errUnknownClient
		}
		return key, nil
	}, jwt.WithValidMethods([]string{"PS256", "RS256"}), jwt.WithExpirationRequired(), jwt.WithLeeway(clockSkew), jwt.WithAudience(s.tokenURL()))
	if errors.Is(err, errUnknownClient) {
		// Every runner asks once more after its job, when its registration is gone: nothing to report.
		refuse(errUnknownClient.Error())
		return
	}
	if err != nil {
		s.cfg.Log.Warn("refuse runner", "why", clip(err.Error(), maxName))
		refuse(err.Error())
		return
	}
	writeJSON(w, http.StatusOK, map[string]any{
		"access_token": s.creds.issue(credRunner, claims.Subject, runnerTokenLife),
		"expires_in":   int(runnerTokenLife.Seconds()), "token_type": "access_token",
	})
}

// asRunner lets a request through that carries a registered runner's token, and says which runner's by its client id.
func (s *Server) asRunner(next func(w http.ResponseWriter, r *http.Request, clientID string)) http.HandlerFunc {
	return func(w http.ResponseWriter, r *http.Request) {
		clientID, ok := s.creds.check(credRunner, bearer(r, "Bearer"))
		if !ok || s.hub.clientKey(clientID) == nil {
			writeError(w, errUnauthorized())
			return
		}
		next(w, r, clientID)
	}
}
