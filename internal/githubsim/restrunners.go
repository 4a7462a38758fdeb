package githubsim

import (
	"crypto/rsa"
	"encoding/base64"
	"encoding/xml"
	"errors"
	"math/big"
	"net/http"
	"net/url"
	"strings"
	"time"
)

// Self-hosted runners: listed, registered with a JIT configuration or by themselves, removed.

func (s *Server) routeRunners(route router) {
	for _, scope := range []string{inOrg, inRepo, inEnterprise} {
		runners := scope + "/actions/runners"
		route("POST", runners+"/registration-token", s.may(runnerPermission, "write", s.serveRegistrationToken))
		route("POST", runners+"/remove-token", s.may(runnerPermission, "write", s.serveRegistrationToken))
		route("POST", runners+"/generate-jitconfig", s.may(runnerPermission, "write", s.serveRunnerJIT))
		route("GET", runners, s.may(runnerPermission, "read", s.serveListRunners))
		route("GET", runners+"/{id}", s.may(runnerPermission, "read", s.serveGetRunner))
		route("DELETE", runners+"/{id}", s.may(runnerPermission, remove, s.serveDeleteRunner))
	}
	route("POST", "/actions/runners/register", s.metered(s.serveRegisterRunner))
}

// serveRegistrationToken serves removal tokens too: there is no telling them apart.
func (s *Server) serveRegistrationToken(w http.ResponseWriter, r *http.Request) {
	writeJSON(w, http.StatusCreated, map[string]any{
		"token": s.creds.issue(credRegistration, domainIn(r), registrationTokenLife), "expires_at": stamp(time.Now().Add(registrationTokenLife)),
	})
}

func (s *Server) serveListRunners(w http.ResponseWriter, r *http.Request) {
	name, domain := r.URL.Query().Get("name"), domainIn(r)
	var all []map[string]any
	s.hub.read(func() {
		for _, x := range s.hub.runners {
			if x.domain == domain && (name == "" || name == x.name) {
				all = append(all, x.view())
			}
		}
	})
	s.page(w, r, "runners", all)
}

func (s *Server) serveGetRunner(w http.ResponseWriter, r *http.Request) {
	err := errNotFound("Not Found")
	var v any
	s.hub.read(func() {
		x := s.hub.findRunner(func(x *runner) bool { return x.id == pathID(r) && x.domain == domainIn(r) })
		if x != nil {
			v, err = x.view(), nil
		}
	})
	answer(w, http.StatusOK, v, err)
}

func (s *Server) serveDeleteRunner(w http.ResponseWriter, r *http.Request) {
	answer(w, http.StatusNoContent, nil, s.hub.removeRunner(domainIn(r), pathID(r)))
}

const (
	maxLabels = 100 // GitHub's limit for a JIT configuration
	maxLabel  = 256
)

func errUnprocessable(msg string) error {
	return &apiError{http.StatusUnprocessableEntity, "ValidationException", msg}
}

func checkLabels(labels []string) error {
	if len(labels) < 1 || len(labels) > maxLabels {
		return errUnprocessable("Validation Failed: labels: want 1 to 100 items")
	}
	for _, l := range labels {
		if l == "" || len(l) > maxLabel || l != clip(l, maxLabel) || strings.Contains(l, ",") {
			return errUnprocessable("Validation Failed: labels: a label has 1 to 256 characters and no comma")
		}
	}
	return nil
}

// serveRunnerJIT registers an ephemeral runner without a scale set.
func (s *Server) serveRunnerJIT(w http.ResponseWriter, r *http.Request) {
	var in struct {
		Name       string   `json:"name"`
		Group      int64    `json:"runner_group_id"`
		Labels     []string `json:"labels"`
		WorkFolder string   `json:"work_folder"`
	}
	err := readJSON(w, r, &in)
	if err == nil {
		err = checkLabels(in.Labels)
	}
	if err != nil {
		writeError(w, err)
		return
	}
	key, err := s.keys.key()
	if err != nil {
		writeError(w, err)
		return
	}
	x, err := s.hub.register(registration{
		domain: domainIn(r), group: in.Group, labels: in.Labels, name: in.Name, key: &key.PublicKey, ephemeral: true,
	})
	if err != nil {
		writeError(w, asREST(err))
		return
	}
	jit, err := s.encodeJIT(x, key, in.WorkFolder)
	var view any
	s.hub.read(func() { view = x.view() })
	if err != nil {
		_ = s.hub.removeRunner(x.domain, x.id) // it was made a moment ago and has no job
	}
	answer(w, http.StatusCreated, map[string]any{"runner": view, "encoded_jit_config": jit}, err)
}

// asREST gives an error of the hub the status and the words the REST API has for it.
func asREST(err error) error {
	var e *apiError
	if !errors.As(err, &e) {
		return err
	}
	switch e.status {
	case http.StatusBadRequest:
		return errUnprocessable("Validation Failed: " + e.message)
	case http.StatusConflict:
		return &apiError{e.status, e.typeName, "Already exists - " + e.message}
	}
	return err
}

// selfRegistered is a runner that registers itself: it has made its key and names its labels.
type selfRegistered struct {
	Name      string `json:"name"`
	Ephemeral bool   `json:"ephemeral"`
	Labels    []struct {
		Name string `json:"name"`
	} `json:"labels"`
}

func (s *Server) selfRegister(domain string, group int64, in selfRegistered, modulus, exponent string) (*runner, error) {
	key, err := publicKey(modulus, exponent)
	if err != nil {
		return nil, err
	}
	var labels []string
	for _, l := range in.Labels {
		labels = append(labels, l.Name)
	}
	if err := checkLabels(labels); err != nil {
		return nil, err
	}
	return s.hub.register(registration{domain: domain, group: group, labels: labels, name: in.Name, key: key, ephemeral: in.Ephemeral})
}

// publicKey reads a public key of sensible size.
func publicKey(modulus, exponent string) (*rsa.PublicKey, error) {
	n, err1 := base64.StdEncoding.DecodeString(modulus)
	e, err2 := base64.StdEncoding.DecodeString(exponent)
	if err := errors.Join(err1, err2); err != nil {
		return nil, errUnprocessable("read public key: " + err.Error())
	}
	key := &rsa.PublicKey{N: new(big.Int).SetBytes(n)}
	if exp := new(big.Int).SetBytes(e); exp.BitLen() <= 31 {
		key.E = int(exp.Int64())
	}
	if bits := key.N.BitLen(); bits < 2048 || bits > 4096 || key.E < 3 || key.E%2 == 0 || key.N.Bit(0) == 0 {
		return nil, errUnprocessable("read public key: want RSA of 2048 to 4096 bits")
	}
	return key, nil
}

// serveRegisterRunner registers a runner that brings its key, as github.com does.
func (s *Server) serveRegisterRunner(w http.ResponseWriter, r *http.Request, who caller, bound string) {
	var in struct {
		selfRegistered
		URL   string `json:"url"`
		Group int64  `json:"group_id"`
		Key   string `json:"public_key"`
	}
	if who != runnerAdmin {
		writeError(w, errUnauthorized())
		return
	}
	if err := readJSON(w, r, &in); err != nil {
		writeError(w, err)
		return
	}
	var key struct{ Modulus, Exponent string }
	if err := xml.Unmarshal([]byte(in.Key), &key); err != nil {
		writeError(w, errUnprocessable("read public key: "+err.Error()))
		return
	}
	if u, err := url.Parse(in.URL); err != nil || !strings.EqualFold(strings.Trim(u.Path, "/"), bound) {
		writeError(w, errNotFound("Not Found"))
		return
	}
	x, err := s.selfRegister(bound, in.Group, in.selfRegistered, key.Modulus, key.Exponent)
	if err != nil {
		writeError(w, asREST(err))
		return
	}
	writeJSON(w, http.StatusCreated, map[string]any{"id": x.id, "name": x.name, "authorization": map[string]any{
		"authorization_url": s.tokenURL(), "client_id": x.clientID, "server_url": s.cfg.URL + "/broker/",
	}})
}

// servePools lists the runner groups in the words of the old API, where runners that register themselves look for one.
func (s *Server) servePools(w http.ResponseWriter, r *http.Request) {
	pools := []any{}
	s.hub.read(func() {
		for _, g := range s.hub.groupsOf(domainIn(r)) {
			pools = append(pools, map[string]any{"id": g.id, "name": g.name, "isHosted": false, "isInternal": g.id == groupID, "size": 0})
		}
	})
	writeJSON(w, http.StatusOK, map[string]any{"count": len(pools), "value": pools})
}

// serveAddAgent registers a runner that brings its key, as servers do that know no better way.
func (s *Server) serveAddAgent(w http.ResponseWriter, r *http.Request) {
	var in struct {
		selfRegistered
		Authorization struct {
			PublicKey struct {
				Modulus  string `json:"modulus"`
				Exponent string `json:"exponent"`
			} `json:"publicKey"`
		} `json:"authorization"`
	}
	if err := readJSON(w, r, &in); err != nil {
		writeError(w, err)
		return
	}
	k := in.Authorization.PublicKey
	x, err := s.selfRegister(domainIn(r), int64(atoi(r.PathValue("pool"), 0)), in.selfRegistered, k.Modulus, k.Exponent)
	if err != nil {
		writeError(w, err)
		return
	}
	view := agentView(x.id, x.name, 0)
	view["authorization"] = map[string]any{"authorizationUrl": s.tokenURL(), "clientId": x.clientID, "publicKey": k}
	view["ephemeral"], view["enabled"], view["createdOn"] = x.ephemeral, true, timestamp(x.created)
	writeJSON(w, http.StatusOK, view)
}
