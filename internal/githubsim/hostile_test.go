package githubsim

import (
	"fmt"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"
	"time"

	"github.com/actions/scaleset"
	"github.com/coder/websocket"
	"github.com/google/go-github/v79/github"
)

func TestTokensOpenOnlyTheirOwnDoor(t *testing.T) {
	r := newRig(t, Config{Poll: time.Second})
	c, set, m := r.session("flint")
	for range 2 {
		submit(t, r, oneJob)
	}
	message(t, m, 2)
	x, _ := r.jit(c, set.ID, "one")
	y, _ := r.jit(c, set.ID, "two")
	for _, z := range []*fakeRunner{x, y} {
		z.online()
		z.acquire()
	}
	for name, tc := range map[string]struct {
		status       int
		method, path string
		token, body  string
	}{
		"no token":                  {401, "POST", "/run/completejob", "", `{"jobId":"` + x.job.JobID + `","conclusion":"succeeded"}`},
		"runner's token":            {401, "POST", "/run/completejob", x.token, `{"jobId":"` + x.job.JobID + `","conclusion":"succeeded"}`},
		"another job":               {403, "POST", "/run/completejob", x.job.token(), `{"jobId":"` + y.job.JobID + `","conclusion":"succeeded"}`},
		"renew another":             {403, "POST", "/run/renewjob", x.job.token(), `{"jobId":"` + y.job.JobID + `"}`},
		"log of another":            {403, "POST", "/results/twirp/results.services.receiver.Receiver/GetJobLogsSignedBlobURL", x.job.token(), `{"workflow_job_run_backend_id":"` + y.job.JobID + `"}`},
		"steps of another":          {403, "POST", "/results/twirp/github.actions.results.api.v1.WorkflowStepUpdateService/WorkflowStepsUpdate", x.job.token(), `{"workflow_job_run_backend_id":"` + y.job.JobID + `","steps":[]}`},
		"runner at the coordinator": {401, "GET", "/tenant/_apis/distributedtask/pools/0/agents", x.token, ""},
		"job at the coordinator":    {401, "POST", scaleSetsPath, x.job.token(), `{"name":"evil"}`},
		"job token at the broker":   {401, "GET", "/broker/message?sessionId=" + x.session, x.job.token(), ""},
		"session of another":        {404, "GET", "/broker/message?sessionId=" + y.session, x.token, ""},
		"request of another":        {409, "POST", "/run/acquirejob", x.token, `{"jobMessageId":"` + newUUID() + `"}`},
		"blob without signature":    {403, "PUT", "/blobs/" + newUUID(), "", "x"},
		"queue without token":       {401, "GET", fmt.Sprintf("/queue/%d/%s", set.ID, m.Session().SessionID), x.token, ""},
		"rest without token":        {401, "GET", "/api/v3/orgs/acme/actions/runners", x.token, ""},
		"app without JWT":           {401, "POST", "/api/v3/app/installations/2002/access_tokens", x.token, ""},
		"unknown conclusion":        {400, "POST", "/run/completejob", x.job.token(), `{"jobId":"` + x.job.JobID + `","conclusion":"fine"}`},
		"not json":                  {400, "POST", "/run/completejob", x.job.token(), `{`},
		"two values":                {400, "POST", "/run/completejob", x.job.token(), `{}{}`},
		"too large":                 {413, "POST", "/run/completejob", x.job.token(), `{"x":"` + strings.Repeat("x", maxJSON) + `"}`},
		"no such route":             {404, "GET", "/nothing//here", "", ""},
		"feed without token":        {401, "GET", "/feed", "", ""},
	} {
		if got := r.post(tc.method, tc.path, tc.token, tc.body); got != tc.status {
			t.Errorf("%s: status %d, want %d", name, got, tc.status)
		}
	}
	if status := x.login(x.assertion(y.key, time.Now().Add(time.Minute))); status != 400 {
		t.Errorf("an assertion with another's key: %d", status)
	}
	if status := x.login(x.assertion(x.key, time.Now().Add(-time.Hour))); status != 400 {
		t.Errorf("an expired assertion: %d", status)
	}
	for _, j := range r.Inventory().ScaleSets {
		if j.Running != 2 {
			t.Errorf("after all that: %+v, want both jobs running", j)
		}
	}
}

// No route of the REST API opens to what guests have: nothing, their runner's token, their job's.
func TestGuestsAreKeptOutOfEveryRESTRoute(t *testing.T) {
	r := newRig(t, Config{Poll: time.Second, Enterprise: "anvils", Hooks: []Hook{{URL: "http://127.0.0.1:1/"}}})
	c, set, m := r.session("flint")
	submit(t, r, oneJob)
	message(t, m, 1)
	x, _ := r.jit(c, set.ID, "one")
	x.online()
	x.acquire()
	token := must[*github.RegistrationToken](t)(r.installed().Actions.CreateOrganizationRegistrationToken(t.Context(), "acme")).GetToken()
	fill := strings.NewReplacer("{owner}", "acme", "{repo}", "widget", "{enterprise}", "anvils", "{id}", "1", "{delivery}", "1", "{attempt}", "1", "{tag}", "v1")
	open := map[string]bool{ // what anybody may ask who has no token at all
		"GET /rate_limit": true, "GET /repos/actions/runner/releases": true, "GET /repos/actions/runner/releases/latest": true,
		"GET /repos/actions/runner/releases/tags/{tag}": true,
	}
	// What a registration token, which a guest may be given, opens: trading it in, and going again.
	registrar := map[string]bool{
		"POST /actions/runner-registration": true, "DELETE /orgs/{owner}/actions/runners/{id}": true, "GET /orgs/{owner}/actions/runners": true,
		"GET /orgs/{owner}/actions/runners/{id}": true, "GET /orgs/{owner}/actions/runner-groups": true, "GET /orgs/{owner}/actions/runner-groups/{id}": true,
		"GET /orgs/{owner}/actions/runner-groups/{id}/runners": true,
	}
	routes := 0
	try := func(method, path string, _ http.HandlerFunc) {
		routes++
		for auth, allowed := range map[string]bool{
			"": open[method+" "+path], "Bearer " + x.token: false, "Bearer " + x.job.token(): false, "Basic eDp5": false,
			"RemoteAuth " + token: registrar[method+" "+path] || open[method+" "+path], "RemoteAuth x": false,
		} {
			req := httptest.NewRequestWithContext(t.Context(), method, apiPath+fill.Replace(path), strings.NewReader("{}"))
			if auth != "" {
				req.Header.Set("Authorization", auth)
			}
			w := httptest.NewRecorder()
			r.http.Config.Handler.ServeHTTP(w, req)
			if refused := w.Code == 401 || w.Code == 403; refused == allowed {
				t.Errorf("%s %s with %.12q: %d %s", method, path, auth, w.Code, w.Body)
			}
			if w.Header().Get("X-RateLimit-Remaining") == "" && !(path == "/rate_limit" && w.Code != 200) {
				t.Errorf("%s %s with %.12q: no rate limit in the answer: %v", method, path, auth, w.Header())
			}
		}
	}
	r.routeApp(try)
	r.routeRunners(try)
	r.routeGroups(try)
	r.routeRuns(try)
	r.routeDeliveries(try)
	if got := r.Runners(); routes < 50 || len(got) != 1 || !got[0].Busy {
		t.Errorf("after %d routes: %+v", routes, got)
	}
}

func TestWrongAppIsRefused(t *testing.T) {
	r := newRig(t, Config{})
	other, err := New(Config{URL: "http://x", Owner: "o", Repo: "r"})
	if err != nil {
		t.Fatal(err)
	}
	defer other.Close()
	for name, cfg := range map[string]scaleset.ClientWithGitHubAppConfig{
		"key":          {GitHubConfigURL: r.cfg.URL + "/acme", GitHubAppAuth: scaleset.GitHubAppAuth{ClientID: "1001", InstallationID: 2002, PrivateKey: string(other.App().PrivateKeyPEM)}},
		"app":          {GitHubConfigURL: r.cfg.URL + "/acme", GitHubAppAuth: scaleset.GitHubAppAuth{ClientID: "7", InstallationID: 2002, PrivateKey: string(r.App().PrivateKeyPEM)}},
		"installation": {GitHubConfigURL: r.cfg.URL + "/acme", GitHubAppAuth: scaleset.GitHubAppAuth{ClientID: "1001", InstallationID: 7, PrivateKey: string(r.App().PrivateKeyPEM)}},
		"organisation": {GitHubConfigURL: r.cfg.URL + "/other", GitHubAppAuth: scaleset.GitHubAppAuth{ClientID: "1001", InstallationID: 2002, PrivateKey: string(r.App().PrivateKeyPEM)}},
	} {
		c, err := scaleset.NewClientWithGitHubApp(cfg, scaleset.WithRetryMax(0))
		if err != nil {
			t.Fatal(err)
		}
		if _, err := c.GetRunnerScaleSet(t.Context(), 1, "x"); err == nil {
			t.Errorf("a client with a wrong %s gets in", name)
		}
	}
}

func TestFeedIsBounded(t *testing.T) {
	r := newRig(t, Config{Poll: time.Second})
	c, set, m := r.session("flint")
	submit(t, r, oneJob)
	message(t, m, 1)
	x, _ := r.jit(c, set.ID, "one")
	x.online()
	x.acquire()
	for name, msg := range map[string]string{
		"too large": `{"stepId":"s","value":["` + strings.Repeat("x", maxFeedMessage) + `"]}`, "not json": "hello", "no step": `{"value":["x"]}`,
	} {
		conn, err := x.feed()
		if err != nil {
			t.Fatal(err)
		}
		// The write may fail too, when the server has closed already.
		_ = conn.Write(t.Context(), websocket.MessageText, []byte(msg))
		if _, _, err := conn.Read(t.Context()); err == nil {
			t.Errorf("%s: the live log went on", name)
		}
		_ = conn.CloseNow()
	}
	conn, err := x.feed()
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = conn.CloseNow() }()
	for range 2 { // the second is a repetition after a reconnect
		if err := conn.Write(t.Context(), websocket.MessageText, []byte(`{"stepId":"`+x.job.Steps[0].ID+`","startLine":1,"value":["`+strings.Repeat("y", 2*maxLine)+`","end"]}`)); err != nil {
			t.Fatal(err)
		}
	}
	if err := conn.Write(t.Context(), websocket.MessageText, []byte(`{"stepId":"`+x.job.Steps[0].ID+`","startLine":3,"value":["last"]}`)); err != nil {
		t.Fatal(err)
	}
	r.until(func(e Event) bool { return e.Line == "last" })
	if got := r.lines("a"); got != strings.Repeat("y", maxLine)+"\nend\nlast\n" {
		t.Errorf("the log has %d bytes", len(got))
	}
}

func TestCloseEndsPollsAndFeeds(t *testing.T) {
	r := newRig(t, Config{Poll: time.Hour})
	c, set, m := r.session("flint")
	run := submit(t, r, oneJob)
	message(t, m, 1)
	x, _ := r.jit(c, set.ID, "one")
	x.online()
	x.acquire()
	conn, err := x.feed()
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = conn.CloseNow() }()
	polled := make(chan error, 1)
	go func() { // received below
		_, err := r.hub.nextRunnerMessage(t.Context(), x.clientID, x.session)
		polled <- err
	}()
	r.Close()
	if err := <-polled; err == nil {
		t.Error("the poll ended without error")
	}
	if status := x.call("GET", x.broker+"message?sessionId="+x.session, x.token, nil, nil); status != 503 {
		t.Errorf("a later poll: status %d", status)
	}
	if _, _, err := conn.Read(t.Context()); err == nil {
		t.Error("the live log goes on")
	}
	if _, err := run.Wait(t.Context()); err == nil {
		t.Error("Wait returned without error")
	}
	if _, err := r.Submit(mustParse(t, oneJob), Trigger{}); err == nil {
		t.Error("a closed server takes runs")
	}
}

// TestTokensAreBounded: a guest that asks for tokens without end gets them, and the table does not grow.
func TestTokensAreBounded(t *testing.T) {
	r := newRig(t, Config{Poll: time.Second})
	c, set, m := r.session("flint")
	submit(t, r, oneJob)
	message(t, m, 1)
	x, _ := r.jit(c, set.ID, "one")
	x.online()
	x.acquire()
	known := func() int {
		r.creds.mu.Lock()
		defer r.creds.mu.Unlock()
		return len(r.creds.known)
	}
	var request string
	r.hub.read(func() { request = r.hub.runners[0].job.request })
	before := known()
	var url struct {
		URL string `json:"logs_url"`
	}
	first := ""
	for i := range 50 {
		x.want(200, x.login(x.assertion(x.key, time.Now().Add(time.Minute))), "log in")
		x.want(200, x.call("POST", x.job.runURL+"acquirejob", x.token, map[string]any{"jobMessageId": request}, &x.job), "acquire the job again")
		x.want(200, x.twirp("results.services.receiver.Receiver/GetJobLogsSignedBlobURL", map[string]any{}, &url), "sign an address")
		if i == 0 {
			first = url.URL
		}
	}
	if grown := known() - before; grown > credRunner.live()+credJob.live()+credUpload.live() {
		t.Errorf("%d tokens more", grown)
	}
	x.want(201, x.call("PUT", url.URL, "", "log", nil), "upload to the newest address")
	x.want(403, x.call("PUT", first, "", "log", nil), "upload to an old address")
	x.want(200, x.renew(), "renew with the newest token")
}

func TestFeedsOfAJobAreBounded(t *testing.T) {
	r := newRig(t, Config{Poll: time.Second})
	c, set, m := r.session("flint")
	submit(t, r, oneJob)
	message(t, m, 1)
	x, _ := r.jit(c, set.ID, "one")
	x.online()
	x.acquire()
	var open []*websocket.Conn
	for range maxFeeds {
		conn, err := x.feed()
		if err != nil {
			t.Fatal(err)
		}
		defer func() { _ = conn.CloseNow() }()
		open = append(open, conn)
	}
	if status := r.post("GET", "/feed", x.job.token(), ""); status != 429 {
		t.Errorf("one more live log: status %d", status)
	}
	step := x.job.Steps[0].ID
	for i, conn := range open { // the others were not harmed
		if err := conn.Write(t.Context(), websocket.MessageText, fmt.Appendf(nil, `{"stepId":%q,"value":["line %d"]}`, step, i)); err != nil {
			t.Fatal(err)
		}
		r.until(func(e Event) bool { return e.Line == fmt.Sprintf("line %d", i) })
	}
}

func TestFeedThatEndsMakesRoom(t *testing.T) {
	var f feeds
	var ends []func()
	for range maxFeeds {
		_, end, err := f.begin(t.Context(), "a")
		if err != nil {
			t.Fatal(err)
		}
		ends = append(ends, end)
	}
	if _, _, err := f.begin(t.Context(), "a"); err == nil {
		t.Fatal("one too many was let in")
	}
	_, end, err := f.begin(t.Context(), "b")
	if err != nil {
		t.Errorf("another job's: %v", err)
	}
	end()
	ends[0]()
	if _, ends[0], err = f.begin(t.Context(), "a"); err != nil {
		t.Errorf("after one had ended: %v", err)
	}
	for _, end := range ends {
		end()
	}
	if len(f.jobs) != 0 || len(f.cancel) != 0 {
		t.Errorf("left: %v, %d", f.jobs, len(f.cancel))
	}
	f.close()
	if _, _, err := f.begin(t.Context(), "a"); err == nil {
		t.Error("it is closed and lets one in")
	}
}
