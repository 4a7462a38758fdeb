package simrunner

import (
	"context"
	"crypto/rand"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"net/url"
	"strings"
	"sync"
	"time"

	"github.com/coder/websocket"
)

// runner is one life. Its fields are set on the way; the goroutines that keep the job do not write them.
type runner struct {
	Credential
	o       Options
	token   string
	broker  string
	session string
	request string // of the job it was offered
	runURL  string
	job     job
	result  string
}

// job is what the runner reads of the job request.
type job struct {
	ID   string `json:"jobId"`
	Plan struct {
		ID string `json:"planId"`
	} `json:"plan"`
	Resources struct {
		Endpoints []struct {
			Authorization struct {
				Parameters map[string]string `json:"parameters"`
			} `json:"authorization"`
			Data map[string]string `json:"data"`
		} `json:"endpoints"`
	} `json:"resources"`
	Steps []struct {
		ID     string        `json:"id"`
		Name   templateToken `json:"displayNameToken"`
		Inputs templateToken `json:"inputs"`
	} `json:"steps"`

	token, results, feed string
}

// templateToken is a value of the job request: a literal or a mapping; expressions are not evaluated.
type templateToken struct {
	Lit string `json:"lit"`
	Map []struct {
		Key   templateToken `json:"Key"`
		Value templateToken `json:"Value"`
	} `json:"map"`
}

func (t templateToken) get(key string) string {
	for _, p := range t.Map {
		if p.Key.Lit == key {
			return p.Value.Lit
		}
	}
	return ""
}

func decode(credential string, o Options) (*runner, error) {
	c, err := Decode(credential)
	return &runner{Credential: c, o: o}, err
}

// login trades an assertion for a token.
func (r *runner) login(ctx context.Context) error {
	assertion, err := r.Assertion(r.Key, rand.Text(), r.o.Now().Add(5*time.Minute))
	if err != nil {
		return fmt.Errorf("sign assertion: %w", err)
	}
	var out struct {
		AccessToken string `json:"access_token"`
	}
	a, _, err := r.call(ctx, request{method: http.MethodPost, url: r.TokenURL, out: &out, form: url.Values{
		"grant_type": {"client_credentials"}, "client_assertion": {assertion},
		"client_assertion_type": {"urn:ietf:params:oauth:client-assertion-type:jwt-bearer"},
	}})
	if err != nil {
		return fmt.Errorf("log in: %w", err)
	}
	if a.status == http.StatusBadRequest {
		return fmt.Errorf("%w: %w", ErrGone, &errStatus{"log in", a})
	}
	r.token = out.AccessToken
	return verdict("log in", http.StatusOK, a)
}

// online takes the runner through the front door to a session with the broker.
func (r *runner) online(ctx context.Context) error {
	if err := r.login(ctx); err != nil {
		return err
	}
	var old struct {
		Migration struct {
			BaseURL string `json:"brokerBaseUrl"`
		} `json:"brokerMigrationMessage"`
	}
	owner := map[string]any{"ownerName": "RUNNER"}
	if err := r.must(ctx, "open old session", http.StatusOK, request{
		method: http.MethodPost, url: r.Server + "_apis/distributedtask/pools/1/sessions", token: r.token, in: owner, out: &old,
	}); err != nil {
		return err
	}
	r.broker = old.Migration.BaseURL
	var session struct {
		ID string `json:"sessionId"`
	}
	if err := r.must(ctx, "open session", http.StatusOK, request{
		method: http.MethodPost, url: r.broker + "session", token: r.token, in: owner, out: &session,
	}); err != nil {
		return err
	}
	r.session = session.ID
	return nil
}

// poll asks once for a message. Its kind is empty when there was none.
func (r *runner) poll(ctx context.Context) (kind string, body map[string]any, err error) {
	var msg struct{ MessageType, Body string }
	a, _, err := r.call(ctx, request{
		method: http.MethodGet, token: r.token, out: &msg,
		url: r.broker + "message?sessionId=" + url.QueryEscape(r.session) + "&status=Online&runnerVersion=3.0.0&os=Linux&architecture=X64",
	})
	switch {
	case err != nil:
		return "", nil, fmt.Errorf("poll: %w", err)
	case a.status == http.StatusAccepted:
		return "", nil, nil
	case a.status == http.StatusForbidden && deprecated(a.body):
		return "", nil, fmt.Errorf("%w: %w", ErrDeprecated, &errStatus{"poll", a})
	case a.status != http.StatusOK:
		return "", nil, verdict("poll", http.StatusOK, a)
	}
	if err := json.Unmarshal([]byte(msg.Body), &body); err != nil {
		return "", nil, fmt.Errorf("decode message: %w", err)
	}
	return msg.MessageType, body, nil
}

// deprecated tells the broker's refusal of an old runner.
func deprecated(body []byte) bool {
	var e struct{ Source, ErrorKind string }
	return json.Unmarshal(body, &e) == nil && e.Source == "actions-broker-listener" && e.ErrorKind == "RunnerVersionTooOld"
}

// awaitJob polls until the runner is offered a job. A token that is no good any more is replaced, and a session that is gone
// opened anew, while there is a registration.
func (r *runner) awaitJob(ctx context.Context) error {
	for {
		kind, body, err := r.poll(ctx)
		var status *errStatus
		switch {
		case errors.Is(err, ErrGone):
			err = r.login(ctx)
		case errors.As(err, &status) && status.status == http.StatusNotFound:
			err = r.online(ctx)
		}
		if err != nil {
			return err
		}
		if kind != "RunnerJobRequest" {
			continue
		}
		r.request, _ = body["runner_request_id"].(string)
		r.runURL, _ = body["run_service_url"].(string)
		return nil
	}
}

func (r *runner) acknowledge(ctx context.Context) error {
	return r.must(ctx, "acknowledge job", http.StatusOK, request{
		method: http.MethodPost, url: r.broker + "acknowledge", token: r.token, in: map[string]any{"runnerRequestId": r.request},
	})
}

// acquire makes the job the runner's own. A job that went elsewhere meanwhile is forgotten, and the runner waits for another.
func (r *runner) acquire(ctx context.Context) error {
	for {
		a, _, err := r.call(ctx, request{
			method: http.MethodPost, url: r.runURL + "acquirejob", token: r.token, in: map[string]any{"jobMessageId": r.request}, out: &r.job,
		})
		if err != nil {
			return fmt.Errorf("acquire job: %w", err)
		}
		if a.status == http.StatusOK {
			break
		}
		if a.status != http.StatusConflict {
			return verdict("acquire job", http.StatusOK, a)
		}
		if err := r.awaitJob(ctx); err != nil {
			return err
		}
		if err := r.acknowledge(ctx); err != nil {
			return err
		}
	}
	if len(r.job.Resources.Endpoints) == 0 {
		return errors.New("acquire job: the request names no services")
	}
	e := r.job.Resources.Endpoints[0]
	r.job.token, r.job.results, r.job.feed = e.Authorization.Parameters["AccessToken"], e.Data["ResultsServiceUrl"], e.Data["FeedStreamUrl"]
	return nil
}

// work does the steps while it keeps the lease and listens for the job's cancellation.
func (r *runner) work(ctx context.Context) error {
	work, cancel := context.WithCancelCause(ctx)
	var keepers sync.WaitGroup
	keep, stopKeeping := context.WithCancel(ctx)
	keepers.Go(func() { r.keepLease(keep, cancel) })
	keepers.Go(func() { r.hearCancel(keep, cancel) })
	log := r.openLog(work)
	r.result = Succeeded
	for i, s := range r.job.Steps {
		st := Step{ID: s.ID, Name: s.Name.Lit, Script: s.Inputs.get("script")}
		r.tellStep(work, i, stepRunning, 0)
		log.line(work, st, "run "+st.Name)
		err := r.o.Work(work, st)
		if err != nil {
			log.line(work, st, "##[error]"+err.Error())
			r.result = Failed
		}
		r.tellStep(work, i, stepDone, conclusionNumber(err))
		if err != nil {
			break
		}
	}
	log.close(work)
	stopKeeping()
	keepers.Wait()
	cause := context.Cause(work)
	cancel(nil)
	if ctx.Err() != nil {
		return fmt.Errorf("do job: %w", ctx.Err())
	}
	if errors.Is(cause, errCancelled) {
		r.result = Canceled
	} else if cause != nil {
		return cause
	}
	if r.o.Conclusion != "" {
		r.result = r.o.Conclusion
	}
	return nil
}

// errCancelled ends the steps of a job its owner does not want any more.
var errCancelled = errors.New("the job is cancelled")

// keepLease renews until ctx is over.
func (r *runner) keepLease(ctx context.Context, lose context.CancelCauseFunc) {
	tick := time.NewTicker(r.o.Renew)
	defer tick.Stop()
	for {
		select {
		case <-tick.C:
		case <-ctx.Done():
			return
		}
		err := r.must(ctx, "renew job", http.StatusOK, request{
			method: http.MethodPost, url: r.runURL + "renewjob", token: r.job.token, in: map[string]any{"planId": r.job.Plan.ID, "jobId": r.job.ID},
		})
		if err != nil && ctx.Err() == nil {
			lose(err)
			return
		}
	}
}

// hearCancel polls until ctx is over or the job is cancelled.
func (r *runner) hearCancel(ctx context.Context, cancel context.CancelCauseFunc) {
	for ctx.Err() == nil {
		kind, body, err := r.poll(ctx)
		if err != nil {
			// Whether the job is lost is for the run service to say.
			return
		}
		if kind == "JobCancellation" && body["jobId"] == r.job.ID {
			cancel(errCancelled)
			return
		}
	}
}

// complete reports the conclusion. A job that is over already, because the answer to an earlier try was lost, is none to
// complain of.
func (r *runner) complete(ctx context.Context) error {
	a, again, err := r.call(ctx, request{
		method: http.MethodPost, url: r.runURL + "completejob", token: r.job.token,
		in: map[string]any{"planId": r.job.Plan.ID, "jobId": r.job.ID, "conclusion": r.result, "outputs": map[string]any{}},
	})
	if err != nil {
		return fmt.Errorf("complete job: %w", err)
	}
	if again && a.status == http.StatusNotFound {
		return nil
	}
	return verdict("complete job", http.StatusOK, a)
}

// Statuses and conclusions of steps are the protocol's numbers.
const (
	stepRunning       = 1
	stepDone          = 3
	stepSucceeded     = 2
	stepFailed        = 3
	firstNumber       = 2 // the first is the runner's own set-up
	receiver          = "twirp/results.services.receiver.Receiver/"
	stepUpdateService = "twirp/github.actions.results.api.v1.WorkflowStepUpdateService/WorkflowStepsUpdate"
)

func conclusionNumber(err error) int {
	if err != nil {
		return stepFailed
	}
	return stepSucceeded
}

// results calls the results service. What it says matters to no job.
func (r *runner) results(ctx context.Context, method string, more map[string]any, out any) {
	in := map[string]any{"workflow_job_run_backend_id": r.job.ID, "workflow_run_backend_id": r.job.Plan.ID}
	for k, v := range more {
		in[k] = v
	}
	_, _ = r.once(ctx, request{method: http.MethodPost, url: r.job.results + method, token: r.job.token, in: in, out: out})
}

func (r *runner) tellStep(ctx context.Context, i, status, conclusion int) {
	if r.o.Quiet {
		return
	}
	s := r.job.Steps[i]
	r.results(ctx, stepUpdateService, map[string]any{"change_order": i + 1, "steps": []any{map[string]any{
		"external_id": s.ID, "number": i + firstNumber, "name": s.Name.Lit, "status": status, "conclusion": conclusion,
	}}}, nil)
}

// jobLog is the live log and what is uploaded at the end.
type jobLog struct {
	r     *runner
	conn  *websocket.Conn
	whole strings.Builder
	lines map[string]int
}

func (r *runner) openLog(ctx context.Context) *jobLog {
	l := &jobLog{r: r, lines: map[string]int{}}
	if r.o.Quiet || r.job.feed == "" {
		return l
	}
	address := "ws" + strings.TrimPrefix(r.job.feed, "http")
	conn, resp, err := websocket.Dial(ctx, address, &websocket.DialOptions{
		HTTPClient: r.o.Client, HTTPHeader: http.Header{"Authorization": {"Bearer " + r.job.token}},
	})
	if resp != nil && resp.Body != nil {
		_ = resp.Body.Close()
	}
	if err == nil { // a job runs as well without its live log
		l.conn = conn
	}
	return l
}

// line adds a line to the log of a step.
func (l *jobLog) line(ctx context.Context, s Step, text string) {
	if l.r.o.Quiet {
		return
	}
	l.lines[s.ID]++
	l.whole.WriteString(text + "\n")
	if l.conn == nil {
		return
	}
	b, err := json.Marshal(map[string]any{"stepId": s.ID, "startLine": l.lines[s.ID], "value": []string{text}, "count": 1})
	if err == nil {
		_ = l.conn.Write(ctx, websocket.MessageText, b)
	}
}

// close ends the live log and uploads the whole.
func (l *jobLog) close(ctx context.Context) {
	if l.conn != nil {
		_ = l.conn.Close(websocket.StatusNormalClosure, "")
	}
	if l.r.o.Quiet {
		return
	}
	var out struct {
		URL string `json:"logs_url"`
	}
	l.r.results(ctx, receiver+"GetJobLogsSignedBlobURL", nil, &out)
	if out.URL != "" {
		_, _ = l.r.once(ctx, request{method: http.MethodPut, url: out.URL + "&comp=appendblock&seal=true", raw: []byte(l.whole.String())})
	}
}
