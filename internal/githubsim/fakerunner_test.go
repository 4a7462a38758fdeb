package githubsim

import (
	"bytes"
	"context"
	"crypto/rsa"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"strings"
	"testing"
	"time"

	"github.com/coder/websocket"

	"flint/internal/githubsim/simrunner"
)

// fakeRunner speaks the runner's side of the protocol, one call at a time, so that a test can stop anywhere.
type fakeRunner struct {
	t        *testing.T
	name     string
	server   string
	tokenURL string
	clientID string
	key      *rsa.PrivateKey
	token    string
	broker   string
	session  string
	job      fakeJob
}

// fakeJob is what the runner reads of the job request.
type fakeJob struct {
	JobID          string `json:"jobId"`
	JobDisplayName string `json:"jobDisplayName"`
	Plan           struct {
		PlanID string `json:"planId"`
	} `json:"plan"`
	Resources struct {
		Endpoints []struct {
			Authorization struct {
				Parameters map[string]string `json:"parameters"`
			} `json:"authorization"`
			Data map[string]string `json:"data"`
		} `json:"endpoints"`
	} `json:"resources"`
	Variables map[string]struct {
		Value string `json:"value"`
	} `json:"variables"`
	Steps []struct {
		ID        string `json:"id"`
		Condition string `json:"condition"`
		Name      token  `json:"displayNameToken"`
	} `json:"steps"`
	runURL string
}

func (j *fakeJob) token() string {
	return j.Resources.Endpoints[0].Authorization.Parameters["AccessToken"]
}

// decodeJIT makes a runner of a JIT configuration.
func decodeJIT(t *testing.T, jit string) *fakeRunner {
	t.Helper()
	c, err := simrunner.Decode(jit)
	if err != nil {
		t.Fatal(err)
	}
	return &fakeRunner{t: t, name: c.Name, server: c.Server, tokenURL: c.TokenURL, clientID: c.ClientID, key: c.Key}
}

// call sends JSON and decodes the answer into out unless it is nil. It returns the status.
func (x *fakeRunner) call(method, url, token string, in, out any) int {
	x.t.Helper()
	var body io.Reader
	if in != nil {
		b, err := json.Marshal(in)
		if err != nil {
			x.t.Fatal(err)
		}
		body = bytes.NewReader(b)
	}
	req, err := http.NewRequestWithContext(x.t.Context(), method, url, body)
	if err != nil {
		x.t.Fatal(err)
	}
	req.Header.Set("Authorization", "bearer "+token)
	resp, err := http.DefaultClient.Do(req)
	if err != nil {
		x.t.Fatal(err)
	}
	defer func() { _ = resp.Body.Close() }()
	if out != nil && resp.StatusCode == http.StatusOK {
		if err := json.NewDecoder(resp.Body).Decode(out); err != nil {
			x.t.Fatalf("%s %s: %v", method, url, err)
		}
	}
	return resp.StatusCode
}

func (x *fakeRunner) want(status, got int, what string) {
	x.t.Helper()
	if got != status {
		x.t.Fatalf("%s: status %d, want %d", what, got, status)
	}
}

// assertion signs a client assertion.
func (x *fakeRunner) assertion(key *rsa.PrivateKey, expires time.Time) string {
	x.t.Helper()
	s, err := simrunner.Credential{TokenURL: x.tokenURL, ClientID: x.clientID}.Assertion(key, newUUID(), expires)
	if err != nil {
		x.t.Fatal(err)
	}
	return s
}

// login trades an assertion for a token; it returns the status.
func (x *fakeRunner) login(assertion string) int {
	x.t.Helper()
	resp, err := http.PostForm(x.tokenURL, url.Values{
		"grant_type": {"client_credentials"}, "client_assertion_type": {"urn:ietf:params:oauth:client-assertion-type:jwt-bearer"}, "client_assertion": {assertion},
	})
	if err != nil {
		x.t.Fatal(err)
	}
	defer func() { _ = resp.Body.Close() }()
	var out struct {
		AccessToken string `json:"access_token"`
	}
	if err := json.NewDecoder(resp.Body).Decode(&out); err != nil {
		x.t.Fatal(err)
	}
	x.token = out.AccessToken
	return resp.StatusCode
}

// online takes the runner through the front door to a session with the broker.
func (x *fakeRunner) online() {
	x.t.Helper()
	x.want(200, x.login(x.assertion(x.key, time.Now().Add(5*time.Minute))), "log in")
	x.want(200, x.call("GET", x.server+"_apis/connectionData", x.token, nil, nil), "get connection data")
	var old struct {
		Migration struct {
			BaseURL string `json:"brokerBaseUrl"`
		} `json:"brokerMigrationMessage"`
	}
	x.want(200, x.call("POST", x.server+"_apis/distributedtask/pools/1/sessions", x.token, map[string]any{"ownerName": "RUNNER"}, &old), "open V1 session")
	x.broker = old.Migration.BaseURL
	var session struct {
		ID string `json:"sessionId"`
	}
	x.want(200, x.call("POST", x.broker+"/session", x.token, map[string]any{"ownerName": "RUNNER"}, &session), "open session")
	x.session = session.ID
}

// poll asks for a message once; the type is empty when there was none.
func (x *fakeRunner) poll() (kind string, body map[string]any) {
	x.t.Helper()
	var msg struct{ MessageType, Body string }
	if status := x.call("GET", x.broker+"message?status=Online&sessionId="+x.session, x.token, nil, &msg); status != 200 {
		x.want(202, status, "poll")
		return "", nil
	}
	if err := json.Unmarshal([]byte(msg.Body), &body); err != nil {
		x.t.Fatal(err)
	}
	return msg.MessageType, body
}

// acquire waits for a job and begins it.
func (x *fakeRunner) acquire() {
	x.t.Helper()
	for {
		kind, body := x.poll()
		if kind == "" {
			continue
		}
		if kind != "RunnerJobRequest" {
			x.t.Fatalf("got a %s, want a job", kind)
		}
		request := body["runner_request_id"].(string)
		x.want(200, x.call("POST", x.broker+"acknowledge", x.token, map[string]any{"runnerRequestId": request}, nil), "acknowledge")
		runURL := body["run_service_url"].(string)
		x.want(200, x.call("POST", runURL+"acquirejob", x.token, map[string]any{"jobMessageId": request}, &x.job), "acquire job")
		x.job.runURL = runURL
		return
	}
}

func (x *fakeRunner) renew() int {
	x.t.Helper()
	return x.call("POST", x.job.runURL+"renewjob", x.job.token(), map[string]any{"planId": x.job.Plan.PlanID, "jobId": x.job.JobID}, nil)
}

// twirp calls the results service.
func (x *fakeRunner) twirp(method string, in map[string]any, out any) int {
	x.t.Helper()
	full := map[string]any{"workflow_job_run_backend_id": x.job.JobID, "workflow_run_backend_id": x.job.Plan.PlanID}
	for k, v := range in {
		full[k] = v
	}
	return x.call("POST", x.job.Variables["system.github.results_endpoint"].Value+"twirp/"+method, x.job.token(), full, out)
}

// steps reports every step as it ended: enum numbers of the protocol.
func (x *fakeRunner) steps(status, conclusion int) {
	x.t.Helper()
	var steps []any
	for i, st := range x.job.Steps {
		steps = append(steps, map[string]any{"external_id": st.ID, "number": i + 2, "name": *st.Name.Lit, "status": status, "conclusion": conclusion})
	}
	x.want(200, x.twirp("github.actions.results.api.v1.WorkflowStepUpdateService/WorkflowStepsUpdate", map[string]any{"change_order": 1, "steps": steps}, nil), "update steps")
}

// upload sends a log by the address the results service signs.
func (x *fakeRunner) upload(method string, in map[string]any, content string) {
	x.t.Helper()
	var out struct {
		URL string `json:"logs_url"`
	}
	x.want(200, x.twirp("results.services.receiver.Receiver/"+method, in, &out), method)
	req, err := http.NewRequestWithContext(x.t.Context(), "PUT", out.URL+"&comp=appendblock&seal=true", strings.NewReader(content))
	if err != nil {
		x.t.Fatal(err)
	}
	resp, err := http.DefaultClient.Do(req)
	if err != nil {
		x.t.Fatal(err)
	}
	_ = resp.Body.Close()
	x.want(201, resp.StatusCode, "put log")
}

// feed opens the live log.
func (x *fakeRunner) feed() (*websocket.Conn, error) {
	u := strings.Replace(x.job.Resources.Endpoints[0].Data["FeedStreamUrl"], "http://", "ws://", 1)
	conn, resp, err := websocket.Dial(x.t.Context(), u, &websocket.DialOptions{HTTPHeader: http.Header{"Authorization": {"Bearer " + x.job.token()}}})
	if resp != nil && resp.Body != nil {
		_ = resp.Body.Close()
	}
	return conn, err
}

func (x *fakeRunner) complete(conclusion string) int {
	x.t.Helper()
	return x.call("POST", x.job.runURL+"completejob", x.job.token(), map[string]any{
		"planId": x.job.Plan.PlanID, "jobId": x.job.JobID, "conclusion": conclusion,
		"outputs": map[string]any{"made": map[string]any{"value": "by " + x.name}},
	}, nil)
}

// wholeJob does one job as a runner does, each step failing or not, and goes.
func (x *fakeRunner) wholeJob(conclusion string) {
	x.t.Helper()
	x.online()
	x.acquire()
	x.want(200, x.renew(), "renew")
	x.steps(1, 0)
	conn, err := x.feed()
	if err != nil {
		x.t.Fatal(err)
	}
	defer func() { _ = conn.CloseNow() }()
	var all strings.Builder
	for _, st := range x.job.Steps {
		b, err := json.Marshal(map[string]any{"StepID": st.ID, "Value": []string{"live " + *st.Name.Lit, "\x1b[31mred\x1b[0m\x1b[2J"}, "StartLine": 1, "Count": 2})
		if err != nil {
			x.t.Fatal(err)
		}
		if err := conn.Write(x.t.Context(), websocket.MessageText, b); err != nil {
			x.t.Fatal(err)
		}
		x.upload("GetStepLogsSignedBlobURL", map[string]any{"step_backend_id": st.ID}, "live\nred\n")
		fmt.Fprintf(&all, "whole %s\n", *st.Name.Lit)
	}
	x.steps(3, map[string]int{"succeeded": 2, "failed": 3}[conclusion])
	x.upload("GetJobLogsSignedBlobURL", nil, all.String())
	x.want(200, x.complete(conclusion), "complete")
	// The registration is gone with the job.
	x.want(401, x.call("DELETE", x.broker+"session", x.token, nil, nil), "end session")
}

// runFake is how a fleet starts fake runners.
func runFake(t *testing.T, conclusion string) func(context.Context, string, string) {
	return func(_ context.Context, _, jit string) { decodeJIT(t, jit).wholeJob(conclusion) }
}
