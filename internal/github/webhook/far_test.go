package webhook

import (
	"bytes"
	"context"
	"crypto/hmac"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"io"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"flint"
)

const secret = "It's a Secret to Everybody"

// gitHub is the far end: it sends signed webhooks, lists deliveries and answers for jobs.
type gitHub struct {
	mu          sync.Mutex
	deliveries  []Delivery // newest first
	since       []time.Time
	redelivered []int64
	listErr     error // of Deliveries
	redeliver   func(id int64) error
	open        []flint.JobStatus
	openErr     error
	opened      int // calls of Open
	repos       []string
	jobs        map[int64]flint.JobStatus
	asked       []int64
}

func (g *gitHub) Deliveries(_ context.Context, since time.Time) ([]Delivery, error) {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.since = append(g.since, since)
	var out []Delivery
	for _, d := range g.deliveries {
		if !d.At.Before(since) {
			out = append(out, d)
		}
	}
	return out, g.listErr
}

func (g *gitHub) Redeliver(_ context.Context, id int64) error {
	g.mu.Lock()
	g.redelivered = append(g.redelivered, id)
	f := g.redeliver
	g.mu.Unlock()
	if f != nil {
		return f(id)
	}
	return nil
}

func (g *gitHub) Open(_ context.Context, repositories []string, _ int) ([]flint.JobStatus, error) {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.opened++
	g.repos = repositories
	return slices.Clone(g.open), g.openErr
}

func (g *gitHub) Job(_ context.Context, repository string, id int64) (flint.JobStatus, error) {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.asked = append(g.asked, id)
	j, ok := g.jobs[id]
	if !ok {
		return flint.JobStatus{}, fmt.Errorf("look up job %d of %s: %w", id, repository, flint.ErrNotFound)
	}
	return j, nil
}

func (g *gitHub) sent() int {
	g.mu.Lock()
	defer g.mu.Unlock()
	return len(g.redelivered)
}

func (g *gitHub) with(f func()) {
	g.mu.Lock()
	defer g.mu.Unlock()
	f()
}

// host is the side that knows runners and takes events.
type host struct {
	mu      sync.Mutex
	runners map[string]string // name → pool
	ending  map[string]bool
	events  []flint.JobEvent
	refuse  error
}

func (h *host) runner(name string) (string, bool) {
	h.mu.Lock()
	defer h.mu.Unlock()
	p, ok := h.runners[name]
	return p, ok
}

func (h *host) over(name string) bool {
	h.mu.Lock()
	defer h.mu.Unlock()
	return h.ending[name]
}

func (h *host) set(name, pool string) {
	h.mu.Lock()
	defer h.mu.Unlock()
	if pool == "" {
		delete(h.runners, name)
		return
	}
	h.runners[name] = pool
}

func (h *host) note(_ context.Context, ev flint.JobEvent) error {
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.refuse != nil {
		return h.refuse
	}
	h.events = append(h.events, ev)
	return nil
}

func (h *host) heard() []string {
	h.mu.Lock()
	defer h.mu.Unlock()
	var out []string
	for _, e := range h.events {
		out = append(out, strings.TrimSpace(fmt.Sprintf("%d %s %s %s %s", e.Kind, e.Pool, e.Runner, e.Job.ID, e.Conclusion)))
	}
	return out
}

func pool(name string, labels ...string) flint.Pool {
	return flint.Pool{Name: name, Labels: labels, Scope: "https://github.com/acme", Max: 10}
}

func linux() flint.Pool { return pool("linux", "self-hosted", "linux") }

func open(t testing.TB, dir string, h *host, accounts ...Account) *Receiver {
	t.Helper()
	if h.runners == nil {
		h.runners = map[string]string{}
	}
	r, err := Open(Config{
		Accounts: accounts, Dir: dir, Log: slog.New(slog.NewTextHandler(t.Output(), nil)), Events: h.note, Runner: h.runner, Over: h.over,
	})
	if err != nil {
		t.Fatal(err)
	}
	r.jitter = func() float64 { return 0 }
	t.Cleanup(func() { r.Close() })
	return r
}

// hook is one delivery on its way.
type hook struct {
	guid, event, secret string
	body                []byte
	header              map[string]string
}

func sign(secret string, body []byte) string {
	mac := hmac.New(sha256.New, []byte(secret))
	mac.Write(body)
	return "sha256=" + hex.EncodeToString(mac.Sum(nil))
}

func (h hook) request() *http.Request {
	req := httptest.NewRequest(http.MethodPost, "/webhook", bytes.NewReader(h.body))
	req.Header.Set("Content-Type", "application/json")
	req.Header.Set("X-GitHub-Delivery", h.guid)
	event := h.event
	if event == "" {
		event = "workflow_job"
	}
	req.Header.Set("X-GitHub-Event", event)
	key := h.secret
	if key == "" {
		key = secret
	}
	req.Header.Set("X-Hub-Signature-256", sign(key, h.body))
	for k, v := range h.header {
		if v == "" {
			req.Header.Del(k)
		} else {
			req.Header.Set(k, v)
		}
	}
	return req
}

func send(r *Receiver, h hook) *httptest.ResponseRecorder {
	w := httptest.NewRecorder()
	r.answer(w, h.request())
	return w
}

// jobHook makes the webhook that a job's state sends.
func jobHook(action string, id int64, labels []string, more ...func(map[string]any)) hook {
	now := time.Now().UTC().Format(time.RFC3339)
	job := map[string]any{
		"id": id, "run_id": id * 10, "run_attempt": 1, "name": "build", "status": action, "labels": labels, "conclusion": nil,
		"html_url": "https://github.com/acme/app/actions/runs/1/job/" + strconv.FormatInt(id, 10), "created_at": now,
		"started_at": now, "completed_at": nil, "runner_id": nil, "runner_name": nil, "steps": []any{},
	}
	p := map[string]any{
		"action": action, "workflow_job": job,
		"repository":   map[string]any{"full_name": "acme/app", "private": true},
		"organization": map[string]any{"login": "acme"}, "installation": map[string]any{"id": 1},
	}
	for _, f := range more {
		f(p)
	}
	b, err := json.Marshal(p)
	if err != nil {
		panic(err)
	}
	return hook{guid: fmt.Sprintf("%s-%d", action, id), body: b}
}

func on(runner string) func(map[string]any) {
	return func(p map[string]any) { p["workflow_job"].(map[string]any)["runner_name"] = runner }
}

func ended(conclusion string) func(map[string]any) {
	return func(p map[string]any) { p["workflow_job"].(map[string]any)["conclusion"] = conclusion }
}

func in(repository string) func(map[string]any) {
	return func(p map[string]any) { p["repository"].(map[string]any)["full_name"] = repository }
}

func mustTake(t testing.TB, r *Receiver, h hook) {
	t.Helper()
	if w := send(r, h); w.Code != http.StatusAccepted {
		body, _ := io.ReadAll(w.Result().Body)
		t.Fatalf("delivery %s: %d %s", h.guid, w.Code, body)
	}
}

// assigned is the demand by pool.
func assigned(r *Receiver) map[string]int {
	out := map[string]int{}
	for _, d := range r.Demand() {
		out[d.Pool] = d.Assigned
	}
	return out
}

func status(id int64, state string, labels ...string) flint.JobStatus {
	return flint.JobStatus{
		Job:   flint.Job{ID: strconv.FormatInt(id, 10), Name: "build", Repository: "acme/app", RunID: 10 * id},
		State: state, Labels: labels, Queued: time.Now().UTC().Truncate(time.Second),
	}
}
