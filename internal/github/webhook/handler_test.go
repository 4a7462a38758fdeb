package webhook

import (
	"bytes"
	"fmt"
	"log/slog"
	"maps"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"
	"time"

	"flint"
)

var linuxLabels = []string{"self-hosted", "linux"}

func TestAnswers(t *testing.T) {
	r := open(t, t.TempDir(), &host{}, Account{Name: "acme", Secret: secret, Pools: []flint.Pool{linux()}})
	good := jobHook("queued", 1, linuxLabels)
	raw := func(body string) hook { return hook{guid: "g", body: []byte(body)} }
	with := func(h hook, k, v string) hook { h.header = map[string]string{k: v}; return h }
	many := make([]string, 101)
	for i := range many {
		many[i] = fmt.Sprint("l", i)
	}
	for _, c := range []struct {
		name string
		hook hook
		want int
	}{
		{"wrong secret", hook{guid: "g", body: good.body, secret: "other"}, 401},
		{"empty secret", with(good, "X-Hub-Signature-256", "sha256="+strings.Repeat("0", 64)), 401},
		{"no signature", with(good, "X-Hub-Signature-256", ""), 401},
		{"short signature", with(good, "X-Hub-Signature-256", "sha256=00"), 401},
		{"old signature", with(good, "X-Hub-Signature-256", "sha1=00"), 401},
		{"no digits", with(good, "X-Hub-Signature-256", "sha256="+strings.Repeat("z", 64)), 401},
		{"no id", with(good, "X-GitHub-Delivery", ""), 400},
		{"long id", with(good, "X-GitHub-Delivery", strings.Repeat("a", 129)), 400},
		{"no event", with(good, "X-GitHub-Event", ""), 400},
		{"form", with(good, "Content-Type", "application/x-www-form-urlencoded"), 400},
		{"ping", hook{guid: "p", event: "ping", body: []byte(`{"zen":"x"}`)}, 200},
		{"another event", hook{guid: "e", event: "push", body: []byte(`{}`)}, 202},
		{"empty", raw(""), 400},
		{"no JSON", raw("payload"), 400},
		{"cut off", raw(string(good.body[:len(good.body)-1])), 400},
		{"an array", raw("[]"), 400},
		{"no action", raw("{}"), 400},
		{"no job", raw(`{"action":"queued"}`), 400},
		{"an id that is text", raw(`{"action":"queued","workflow_job":{"id":"1"}}`), 400},
		{"no repository", raw(`{"action":"queued","workflow_job":{"id":1}}`), 400},
		{"a path for a repository", jobHook("queued", 1, linuxLabels, in("acme/app/..")), 400},
		{"too many labels", jobHook("queued", 1, many), 400},
		{"a long label", jobHook("queued", 1, []string{strings.Repeat("a", 257)}), 400},
		{"unknown action", jobHook("reopened", 1, linuxLabels), 202},
		{"another organisation", jobHook("queued", 1, linuxLabels, in("other/app")), 202},
		{"GitHub's own machine", jobHook("queued", 1, []string{"ubuntu-latest"}), 202},
		{"too large", raw(strings.Repeat(" ", maxBody+1)), 413},
	} {
		t.Run(c.name, func(t *testing.T) {
			if w := send(r, c.hook); w.Code != c.want {
				t.Errorf("answer %d %s, want %d", w.Code, w.Body, c.want)
			}
		})
	}
	chunked := httptest.NewRequest(http.MethodPost, "/webhook", struct{ *bytes.Reader }{bytes.NewReader(make([]byte, maxBody+1))})
	chunked.ContentLength = -1
	chunked.Header.Set("X-Hub-Signature-256", sign(secret, nil))
	for _, c := range []struct {
		req  *http.Request
		want int
	}{{chunked, 413}, {httptest.NewRequest(http.MethodGet, "/webhook", nil), 405}} {
		w := httptest.NewRecorder()
		r.answer(w, c.req)
		if w.Code != c.want {
			t.Errorf("%s answered %d, want %d", c.req.Method, w.Code, c.want)
		}
	}
	if got := assigned(r); got["linux"] != 0 || len(r.Unmatched()) != 0 {
		t.Errorf("demand %v, unmatched %v; nothing was to be taken", got, r.Unmatched())
	}
	want := Counts{Foreign: 4, BadSignature: 6, Malformed: 15, TooLarge: 2}
	if got := r.Counts(); got != want {
		t.Errorf("counts %+v, want %+v", got, want)
	}
	if n := r.bodies.Load(); n != 0 {
		t.Errorf("%d bytes of bodies are still accounted for", n)
	}
}

func TestRateIsBounded(t *testing.T) {
	r := open(t, t.TempDir(), &host{}, Account{Secret: secret, Pools: []flint.Pool{linux()}})
	r.limiter.SetBurst(3)
	r.limiter.SetLimit(0)
	for range 3 {
		send(r, hook{guid: "p", event: "ping"})
	}
	w := send(r, jobHook("queued", 1, linuxLabels))
	if w.Code != http.StatusTooManyRequests || w.Header().Get("Retry-After") == "" || r.Counts().Limited != 1 {
		t.Errorf("answer %d, headers %v, counts %+v", w.Code, w.Header(), r.Counts())
	}
}

func TestTakenOnceAndKept(t *testing.T) {
	dir, h := t.TempDir(), &host{}
	account := Account{Secret: secret, Pools: []flint.Pool{linux()}}
	r := open(t, dir, h, account)
	for range 3 {
		mustTake(t, r, jobHook("queued", 1, linuxLabels))
	}
	select {
	case <-r.Changed():
	default:
		t.Error("no signal")
	}
	mustTake(t, r, jobHook("queued", 2, linuxLabels))
	want := Counts{Accepted: 2, Duplicates: 2}
	if got := r.Counts(); got != want {
		t.Errorf("counts %+v, want %+v", got, want)
	}
	if err := r.Close(); err != nil {
		t.Fatal(err)
	}
	if w := send(r, jobHook("queued", 3, linuxLabels)); w.Code != http.StatusServiceUnavailable {
		t.Errorf("a closed ledger answers %d", w.Code)
	}
	for range 2 { // the ledger is rewritten at each start
		r = open(t, dir, h, account)
		if got := assigned(r); got["linux"] != 2 {
			t.Errorf("demand %v after a restart", got)
		}
		mustTake(t, r, jobHook("queued", 2, linuxLabels))
		if c := r.Counts(); c.Duplicates != 1 {
			t.Errorf("delivery ids are forgotten: %+v", c)
		}
		r.Close()
	}
}

func TestFullLedgerRefuses(t *testing.T) {
	r := open(t, t.TempDir(), &host{}, Account{Secret: secret, Pools: []flint.Pool{linux()}})
	r.ledger.limit = 1
	mustTake(t, r, jobHook("queued", 1, linuxLabels))
	if w := send(r, jobHook("queued", 2, linuxLabels)); w.Code != http.StatusServiceUnavailable || r.Counts().Refused != 1 {
		t.Errorf("answer %d, counts %+v", w.Code, r.Counts())
	}
	mustTake(t, r, jobHook("completed", 1, linuxLabels, ended("cancelled")))
	mustTake(t, r, jobHook("queued", 2, linuxLabels)) // GitHub sent it again, and now there is room
}

func TestSecretTellsTheAccount(t *testing.T) {
	p, other, third := linux(), linux(), linux()
	other.Name, other.Scope = "other", "https://github.com/other"
	third.Name, third.Scope = "third", "https://ghes.example/acme"
	r := open(t, t.TempDir(), &host{},
		Account{Name: "a", Secret: secret, Pools: []flint.Pool{p}},
		Account{Name: "b", Secret: secret, Pools: []flint.Pool{other}}, // the same App
		Account{Name: "c", Secret: "ghes", Pools: []flint.Pool{third}})
	mustTake(t, r, jobHook("queued", 1, linuxLabels))
	mustTake(t, r, jobHook("queued", 2, linuxLabels, in("Other/App")))
	ghes := jobHook("queued", 1, linuxLabels) // another server's job 1
	ghes.guid, ghes.secret = "ghes", "ghes"
	mustTake(t, r, ghes)
	forged := jobHook("completed", 2, linuxLabels, in("other/app"))
	forged.secret = "ghes" // who may speak for acme on one server may not end other's job on another
	mustTake(t, r, forged)
	want := map[string]int{"linux": 1, "other": 1, "third": 1}
	if got := assigned(r); !maps.Equal(got, want) {
		t.Errorf("demand %v, want %v", got, want)
	}
	if c := r.Counts(); c.Foreign != 1 {
		t.Errorf("counts %+v", c)
	}
}

func TestNoSecretIsRefused(t *testing.T) {
	_, err := Open(Config{Accounts: []Account{{Name: "a"}}, Dir: t.TempDir(), Log: quiet(), Events: (&host{}).note, Runner: (&host{}).runner})
	if f := fault(err); f != "webhook.secret" {
		t.Errorf("error %v, code %q", err, f)
	}
}

func FuzzHandler(f *testing.F) {
	f.Add(jobHook("queued", 1, linuxLabels).body)
	f.Add(jobHook("completed", 1, linuxLabels, on("flint-1"), ended("success")).body)
	f.Add([]byte(`{"action":"queued","workflow_job":{"id":9223372036854775807,"labels":[null,""]},"repository":{"full_name":"acme/\u0000"}}`))
	r := open(f, f.TempDir(), &host{runners: map[string]string{"flint-1": "linux"}}, Account{Secret: secret, Pools: []flint.Pool{linux()}})
	r.limiter.SetLimit(1e9)
	r.limiter.SetBurst(1 << 30)
	f.Fuzz(func(t *testing.T, body []byte) {
		h := hook{guid: fmt.Sprint(time.Now().UnixNano()), body: body}
		w := send(r, h)
		switch w.Code {
		case 202, 400, 413:
		default:
			t.Errorf("answer %d %s", w.Code, w.Body)
		}
		for _, u := range r.Unmatched() {
			if len(u.Labels) > maxLabels || len(u.Name) > maxText+3 || clean(u.Reason.Text) == "" || u.Repository != clean(u.Repository) {
				t.Errorf("out of bounds: %+v", u)
			}
		}
		r.Demand()
	})
}

// TestOverHTTP sends through a real server and a real connection, which the handler's deadline must not spoil.
func TestOverHTTP(t *testing.T) {
	r := open(t, t.TempDir(), &host{}, Account{Secret: secret, Pools: []flint.Pool{linux()}})
	srv := httptest.NewServer(http.HandlerFunc(r.answer))
	defer srv.Close()
	for i := range int64(20) {
		req := jobHook("queued", i+1, linuxLabels, bulky).request()
		out, err := http.NewRequestWithContext(t.Context(), http.MethodPost, srv.URL, req.Body)
		if err != nil {
			t.Fatal(err)
		}
		out.Header = req.Header
		resp, err := srv.Client().Do(out)
		if err != nil {
			t.Fatal(err)
		}
		resp.Body.Close()
		if resp.StatusCode != http.StatusAccepted {
			t.Errorf("answer %s", resp.Status)
		}
	}
	if got := assigned(r); got["linux"] != 20 {
		t.Errorf("demand %v", got)
	}
}

func TestJobsOfPoolsThatHearAnotherWay(t *testing.T) {
	h := &host{runners: map[string]string{}}
	r, err := Open(Config{
		Accounts: []Account{{Name: "acme", Secret: secret, Pools: []flint.Pool{linux()}}}, Elsewhere: []flint.Pool{pool("set", "set")},
		Dir: t.TempDir(), Log: slog.New(slog.NewTextHandler(t.Output(), nil)), Events: h.note, Runner: h.runner,
	})
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	for i, labels := range [][]string{{"SET"}, linuxLabels, {"set", "linux"}} {
		if w := send(r, jobHook("queued", int64(i+1), labels)); w.Code != 202 {
			t.Errorf("job %d: %d", i+1, w.Code)
		}
	}
	if n := r.OpenJobs(); n != 2 {
		t.Errorf("%d jobs are open, want those of the pool and of nobody", n)
	}
	if u := r.Unmatched(); len(u) != 1 || u[0].ID != "3" {
		t.Errorf("unmatched: %+v", u)
	}
}
