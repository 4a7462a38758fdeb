package github

import (
	"crypto/rand"
	"crypto/rsa"
	"crypto/x509"
	"encoding/json"
	"encoding/pem"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/golang-jwt/jwt/v5"

	"flint"
)

// far is the far end: the part of GitHub that a coordinator talks to, strict about methods, versions and tokens. What a test
// wants to go wrong it puts into refuse.
type far struct {
	t    testing.TB
	base string

	mu       sync.Mutex
	refuse   func(route string, n int) *answer // n counts the calls of the route, from 1
	calls    map[string]int
	log      []string // what happened, in order: routes, and what tests add
	changed  chan struct{}
	sets     map[int]string
	nextSet  int
	session  string
	owner    string
	queue    []string // messages not acknowledged
	nextID   int
	stats    map[string]int
	capacity []int  // header of each poll
	token    string // of the queue
	agents   map[int]agent
	nextRun  int
	acquired []int64
	revoked  int           // generations of admin tokens that are not good any more
	mute     bool          // polls are never answered
	ahead    time.Duration // its clock, of ours

	farREST
}

type agent struct {
	name   string
	set    int
	busy   bool
	online bool
	labels []string
	home   string // path of its scope; empty: any
}

type answer struct {
	status int
	body   string
	header http.Header
	err    error
}

const (
	secretPAT   = "ghp_verysecret"
	secretInst  = "ghs_installationsecret"
	secretReg   = "REGISTRATIONSECRET"
	secretQueue = "queuesecret"
	secretJIT   = "aml0c2VjcmV0"
	queuePath   = "/tenant/queue/message"
	another     = "another" // the id of a session that is not ours
)

var testKey = sync.OnceValue(func() *rsa.PrivateKey {
	key, err := rsa.GenerateKey(rand.Reader, 2048)
	if err != nil {
		panic(err)
	}
	return key
})

func testPEM() flint.Secret {
	return flint.Secret(pem.EncodeToMemory(&pem.Block{Type: "RSA PRIVATE KEY", Bytes: x509.MarshalPKCS1PrivateKey(testKey())}))
}

func newFar(t testing.TB) *far {
	f := &far{
		t: t, base: "http://127.0.0.1:8080", calls: map[string]int{}, changed: make(chan struct{}), sets: map[int]string{}, nextSet: 7,
		stats: map[string]int{}, agents: map[int]agent{}, nextRun: 100, nextID: 1,
	}
	f.farREST = newFarREST(f)
	return f
}

// RoundTrip lets the far end be the transport, so that it works inside a synctest bubble.
func (f *far) RoundTrip(req *http.Request) (*http.Response, error) {
	if err := req.Context().Err(); err != nil {
		return nil, err
	}
	w := httptest.NewRecorder()
	err := f.serve(w, req)
	if err == nil {
		err = req.Context().Err()
	}
	if err != nil {
		return nil, err
	}
	resp := w.Result()
	resp.Request = req
	return resp, nil
}

func (f *far) note(what string) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.log = append(f.log, what)
}

func (f *far) count(route string) int {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.calls[route]
}

// polls returns the capacity header of each poll.
func (f *far) polls() []int {
	f.mu.Lock()
	defer f.mu.Unlock()
	return slices.Clone(f.capacity)
}

func (f *far) with(do func()) {
	f.mu.Lock()
	defer f.mu.Unlock()
	do()
	close(f.changed)
	f.changed = make(chan struct{})
}

// send queues a message of jobs.
func (f *far) send(jobs ...map[string]any) {
	b, err := json.Marshal(jobs)
	if err != nil {
		f.t.Fatal(err)
	}
	f.with(func() { f.queue = append(f.queue, string(b)) })
}

func job(kind, runner string, extra map[string]any) map[string]any {
	m := map[string]any{
		"messageType": kind, "runnerRequestId": 5, "repositoryName": "app", "ownerName": "acme", "jobId": "j1", "jobDisplayName": "build",
		"workflowRunId": 42, "runnerName": runner, "runnerAssignTime": "2026-11-21T12:00:00Z", "finishTime": "2026-11-21T12:01:00Z",
	}
	for k, v := range extra {
		m[k] = v
	}
	return m
}

func (f *far) serve(w http.ResponseWriter, r *http.Request) error {
	route := r.Method + " " + r.URL.Path
	for _, p := range []struct{ prefix, name string }{
		{queuePath + "/", "ack"},
		{queuePath, "poll"},
		{"/api/v3/app/installations/", "access_token"},
		{"/api/v3/actions/runner-registration", "register"},
		{"/tenant/_apis/runtime/runnergroups/", "groups"},
		{"/tenant/_apis/distributedtask/pools/0/agents", "agents"},
		{"/tenant/_apis/runtime/runnerscalesets", "sets"},
	} {
		if strings.HasPrefix(r.URL.Path, p.prefix) {
			route = r.Method + " " + p.name
			for _, sub := range []string{"sessions", "acquirejobs", "generatejitconfig"} {
				if p.name == "sets" && strings.Contains(r.URL.Path, "/"+sub) {
					route = r.Method + " " + sub
				}
			}
			break
		}
	}
	rest := ""
	if route == r.Method+" "+r.URL.Path && strings.HasPrefix(r.URL.Path, "/api/v3/") {
		route, rest = f.restRoute(r)
	}
	f.mu.Lock()
	f.calls[route]++
	f.log = append(f.log, route)
	var no *answer
	if f.refuse != nil {
		no = f.refuse(route, f.calls[route])
	}
	f.mu.Unlock()
	if no != nil {
		if no.err != nil {
			return no.err
		}
		for k, v := range no.header {
			w.Header()[k] = v
		}
		w.Header().Set("Content-Type", "application/json")
		w.WriteHeader(no.status)
		_, _ = io.WriteString(w, no.body)
		return nil
	}
	if rest != "" {
		f.rest.ServeHTTP(w, r)
	} else {
		f.route(w, r, route)
	}
	return nil
}

func (f *far) reply(w http.ResponseWriter, status int, v any) {
	w.Header().Set("Content-Type", "application/json")
	w.WriteHeader(status)
	if err := json.NewEncoder(w).Encode(v); err != nil {
		f.t.Error(err)
	}
}

func refusal(status int, kind, message string) *answer {
	b, _ := json.Marshal(map[string]string{"typeName": kind, "message": message})
	return &answer{status: status, body: string(b)}
}

func (f *far) expect(r *http.Request, authorization string) {
	if got := r.Header.Get("Authorization"); got != authorization {
		f.t.Errorf("%s %s: authorization %q, want %q", r.Method, r.URL, got, authorization)
	}
}

// revokeAdmin ends all admin tokens before their time. The caller holds mu.
func (f *far) revokeAdmin() { f.revoked++ }

// admin makes a token of the scale set service.
func (f *far) admin() string {
	f.mu.Lock()
	key := fmt.Sprint("k", f.revoked)
	f.mu.Unlock()
	s, err := jwt.NewWithClaims(jwt.SigningMethodHS256, jwt.RegisteredClaims{ExpiresAt: jwt.NewNumericDate(time.Now().Add(17 * time.Minute))}).
		SignedString([]byte(key))
	if err != nil {
		f.t.Fatal(err)
	}
	return s
}

func (f *far) adminSigned(r *http.Request) bool {
	f.mu.Lock()
	defer f.mu.Unlock()
	raw := strings.TrimPrefix(r.Header.Get("Authorization"), "Bearer ")
	if strings.HasSuffix(r.URL.Path, "/acquirejobs") {
		return true // with the queue's token
	}
	_, err := jwt.Parse(raw, func(*jwt.Token) (any, error) { return []byte(fmt.Sprint("k", f.revoked)), nil })
	return err == nil
}

func (f *far) route(w http.ResponseWriter, r *http.Request, route string) {
	if strings.HasPrefix(r.URL.Path, "/tenant/_apis/") {
		if v := r.URL.Query().Get("api-version"); v != "6.0-preview" {
			f.t.Errorf("%s %s: api-version %q", r.Method, r.URL, v)
		}
		if !f.adminSigned(r) {
			f.reply(w, 401, map[string]string{"message": "token is not valid"})
			return
		}
	}
	switch route {
	case "GET installation":
		if f.checkJWT(w, r) {
			f.installation(w, r)
		}
	case "POST access_token":
		if f.checkJWT(w, r) {
			f.accessToken(w, r)
		}
	case "POST registration-token":
		if !f.signedIn(w, r) {
			return
		}
		f.reply(w, 201, map[string]any{"token": secretReg, "expires_at": time.Now().Add(time.Hour)})
	case "POST register":
		f.expect(r, "RemoteAuth "+secretReg)
		f.reply(w, 200, map[string]any{"url": f.base + "/tenant/", "token": f.admin()})
	case "GET groups":
		f.groups(w, r)
	case "GET sets", "POST sets":
		f.scaleSets(w, r)
	case "POST sessions", "PATCH sessions", "DELETE sessions":
		f.sessions(w, r)
	case "GET poll":
		f.poll(w, r)
	case "DELETE ack":
		f.ack(w, r)
	case "POST acquirejobs":
		f.acquireJobs(w, r)
	case "POST generatejitconfig":
		f.jit(w, r)
	case "GET agents", "DELETE agents":
		f.agentsRoute(w, r)
	default:
		f.t.Errorf("unexpected request %s %s", r.Method, r.URL)
		w.WriteHeader(http.StatusMethodNotAllowed)
	}
}

// checkJWT refuses a signature of a wrong time where GitHub's clock differs from ours.
func (f *far) checkJWT(w http.ResponseWriter, r *http.Request) (ok bool) {
	raw := strings.TrimPrefix(r.Header.Get("Authorization"), "Bearer ")
	var claims jwt.RegisteredClaims
	_, err := jwt.ParseWithClaims(raw, &claims, func(*jwt.Token) (any, error) { return &testKey().PublicKey, nil },
		jwt.WithIssuer("Iv1.app"), jwt.WithIssuedAt(), jwt.WithExpirationRequired(),
		jwt.WithTimeFunc(func() time.Time { return time.Now().Add(f.ahead) }))
	if err != nil && f.ahead != 0 {
		w.Header().Set("Date", time.Now().Add(f.ahead).UTC().Format(http.TimeFormat))
		f.reply(w, 401, map[string]string{"message": "'Expiration time' claim ('exp') must be a numeric value representing the future time"})
		return false
	}
	if err != nil {
		f.t.Errorf("JWT: %v", err)
	} else if d := claims.ExpiresAt.Sub(claims.IssuedAt.Time); d > 10*time.Minute {
		f.t.Errorf("JWT lives %s", d)
	}
	return true
}

func (f *far) groups(w http.ResponseWriter, r *http.Request) {
	if name := r.URL.Query().Get("groupName"); name != "big & fast" {
		f.reply(w, 200, map[string]any{"count": 0, "value": []any{}})
		return
	}
	f.reply(w, 200, map[string]any{"count": 1, "value": []any{map[string]any{"id": 3, "name": "big & fast"}}})
}

func (f *far) scaleSets(w http.ResponseWriter, r *http.Request) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if r.Method == http.MethodPost {
		var in struct {
			Name          string
			RunnerGroupID int `json:"runnerGroupId"`
			Labels        []struct{ Name string }
			RunnerSetting struct{ DisableUpdate bool }
		}
		if err := json.NewDecoder(r.Body).Decode(&in); err != nil || len(in.Labels) != 1 || in.Labels[0].Name != in.Name || !in.RunnerSetting.DisableUpdate {
			f.t.Errorf("create scale set: %+v, %v", in, err)
		}
		f.nextSet++
		f.sets[f.nextSet] = in.Name
		f.reply(w, 200, map[string]any{"id": f.nextSet, "name": in.Name})
		return
	}
	if group := r.URL.Query().Get("runnerGroupId"); group != "1" && group != "3" {
		f.t.Errorf("scale sets of group %q", group)
	}
	for id, name := range f.sets {
		if name == r.URL.Query().Get("name") {
			f.reply(w, 200, map[string]any{"count": 1, "value": []any{map[string]any{"id": id, "name": name}}})
			return
		}
	}
	f.reply(w, 200, map[string]any{"count": 0, "value": []any{}})
}

// setOf returns the scale set a path names, answering 404 when it is gone. The caller holds mu.
func (f *far) setOf(w http.ResponseWriter, r *http.Request) int {
	parts := strings.Split(r.URL.Path, "/")
	id, _ := strconv.Atoi(parts[5])
	if f.sets[id] == "" {
		f.reply(w, 404, map[string]string{"typeName": "GitHub.Actions.Runtime.WebApi.RunnerScaleSetNotFoundException", "message": "no such set"})
		return 0
	}
	return id
}

func (f *far) sessions(w http.ResponseWriter, r *http.Request) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.setOf(w, r) == 0 {
		return
	}
	switch r.Method {
	case http.MethodPost:
		var in struct{ OwnerName string }
		if err := json.NewDecoder(r.Body).Decode(&in); err != nil || in.OwnerName == "" {
			f.t.Errorf("session owner %q, %v", in.OwnerName, err)
		}
		if f.session != "" {
			f.reply(w, 409, map[string]string{"typeName": "GitHub.Actions.Runtime.WebApi.RunnerScaleSetSessionConflictException", "message": "held"})
			return
		}
		f.owner = in.OwnerName
		f.session = fmt.Sprintf("00000000-0000-4000-8000-%012d", f.calls["POST sessions"])
	case http.MethodDelete:
		if f.session == another {
			f.reply(w, 404, map[string]string{"message": "no such session"})
			return
		}
		if !strings.HasSuffix(r.URL.Path, f.session) {
			f.t.Errorf("delete of session %s, not %s", r.URL.Path, f.session)
		}
		f.session = ""
		w.WriteHeader(204)
		return
	}
	f.token = fmt.Sprintf("%s%d", secretQueue, f.calls["PATCH sessions"]+f.calls["POST sessions"])
	f.reply(w, 200, map[string]any{
		"sessionId": f.session, "ownerName": f.owner, "messageQueueUrl": f.base + queuePath + "?sessionId=" + f.session,
		"messageQueueAccessToken": f.token, "statistics": f.stats,
	})
}

func (f *far) poll(w http.ResponseWriter, r *http.Request) {
	empty := time.After(50 * time.Second)
	first := true
	for {
		f.mu.Lock()
		if first {
			n, err := strconv.Atoi(r.Header.Get("X-ScaleSetMaxCapacity"))
			if err != nil {
				f.t.Errorf("capacity header: %v", err)
			}
			f.capacity = append(f.capacity, n)
			first = false
		}
		changed := f.changed
		if f.mute {
			f.mu.Unlock()
			<-r.Context().Done()
			return
		}
		switch {
		case r.Header.Get("Authorization") != "Bearer "+f.token:
			f.reply(w, 401, map[string]string{"message": "expired"})
			f.mu.Unlock()
			return
		case f.session == "" || r.URL.Query().Get("sessionId") != f.session:
			f.reply(w, 404, map[string]string{"message": "no such session"})
			f.mu.Unlock()
			return
		case len(f.queue) > 0:
			f.reply(w, 200, map[string]any{
				"messageId": f.nextID, "messageType": "RunnerScaleSetJobMessages", "body": f.queue[0], "statistics": f.stats,
			})
			f.mu.Unlock()
			return
		}
		f.mu.Unlock()
		select {
		case <-r.Context().Done():
			return
		case <-empty:
			w.WriteHeader(202)
			return
		case <-changed:
		}
	}
}

func (f *far) ack(w http.ResponseWriter, r *http.Request) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.expect(r, "Bearer "+f.token)
	if r.URL.Path != fmt.Sprintf("%s/%d", queuePath, f.nextID) || len(f.queue) == 0 {
		f.t.Errorf("acknowledged %s, message %d is due", r.URL.Path, f.nextID)
	}
	f.nextID++
	f.queue = f.queue[1:]
	w.WriteHeader(204)
}

func (f *far) acquireJobs(w http.ResponseWriter, r *http.Request) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.expect(r, "Bearer "+f.token)
	var ids []int64
	if err := json.NewDecoder(r.Body).Decode(&ids); err != nil {
		f.t.Error(err)
	}
	f.acquired = append(f.acquired, ids...)
	f.reply(w, 200, map[string]any{"count": len(ids), "value": ids})
}

func (f *far) jit(w http.ResponseWriter, r *http.Request) {
	f.mu.Lock()
	defer f.mu.Unlock()
	set := f.setOf(w, r)
	if set == 0 {
		return
	}
	var in struct{ Name, WorkFolder string }
	if err := json.NewDecoder(r.Body).Decode(&in); err != nil {
		f.t.Error(err)
	}
	for _, a := range f.agents {
		if a.name == in.Name {
			f.reply(w, 409, map[string]string{"typeName": "GitHub.DistributedTask.WebApi.TaskAgentExistsException", "message": "exists"})
			return
		}
	}
	f.nextRun++
	f.agents[f.nextRun] = agent{name: in.Name, set: set}
	f.reply(w, 200, map[string]any{"runner": map[string]any{"id": f.nextRun, "name": in.Name, "runnerScaleSetId": set}, "encodedJITConfig": secretJIT})
}

func (f *far) agentsRoute(w http.ResponseWriter, r *http.Request) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if r.Method == http.MethodGet {
		found := []any{}
		for id, a := range f.agents {
			if a.name == r.URL.Query().Get("agentName") {
				found = append(found, map[string]any{"id": id, "name": a.name, "runnerScaleSetId": a.set})
			}
		}
		f.reply(w, 200, map[string]any{"count": len(found), "value": found})
		return
	}
	id, _ := strconv.Atoi(r.URL.Path[strings.LastIndex(r.URL.Path, "/")+1:])
	a, ok := f.agents[id]
	switch {
	case !ok:
		f.reply(w, 404, map[string]string{"typeName": "GitHub.DistributedTask.WebApi.TaskAgentNotFoundException", "message": "none"})
	case a.busy:
		f.reply(w, 400, map[string]string{"typeName": "GitHub.DistributedTask.WebApi.TaskAgentJobStillRunningException", "message": "busy"})
	default:
		delete(f.agents, id)
		w.WriteHeader(204)
	}
}
