package githubsim

import (
	"context"
	"encoding/json"
	"fmt"
	"log/slog"
	"net/http"
	"net/url"
	"slices"
	"strings"
	"sync"
	"time"

	"flint"
)

// Webhooks: what happens to jobs is posted to whoever is configured. Like GitHub, a delivery is tried once and never again
// unless somebody asks for it by the deliveries API.

// Hook is a receiver of webhooks.
type Hook struct {
	URL    string       // http or https
	Secret flint.Secret // of the signature; none when empty
	Events []string     // those it is told of; workflow_job when empty
	Scope  string       // "" for the App's own hook, of which there is one; else "acme" or "acme/widget"
}

const (
	hookTimeout   = 10 * time.Second    // GitHub's patience with a receiver
	deliveryKept  = 3 * 24 * time.Hour  // how long GitHub keeps deliveries
	maxDeliveries = 10_000              // those kept at most
	maxHooks      = 20                  // GitHub's limit per scope
	maxReply      = 4 << 10             // bytes of a receiver's answer kept
	hookAgent     = "GitHub-Hookshot/0" // the real one has part of a commit's hash there
)

// fate is what becomes of one delivery. The zero value is an ordinary one.
type fate struct {
	lost  bool          // never sent; recorded as one the receiver did not answer
	never bool          // neither sent nor recorded
	again bool          // sent twice
	delay time.Duration // sent that much later, after those that come behind it
}

// delivery is one attempt to tell a hook of an event. All but the outcome is set when it is made.
type delivery struct {
	id         int64
	hook       *hook
	guid       string // the same when it is delivered again
	event      string
	action     string
	repository int64
	redelivery bool
	body       []byte

	// the outcome, guarded by the lock of hooks
	at       time.Time
	took     time.Duration
	code     int // 0 when there was no answer
	status   string
	request  http.Header
	response http.Header
	reply    string
}

type hook struct {
	Hook
	id     int64
	queue  []*delivery   // guarded by the lock of hooks
	wake   chan struct{} // holds one when the queue is not empty
	cancel context.CancelFunc
}

// hooks sends deliveries, those of one hook in order, and keeps them. Each hook has one goroutine; close waits for all.
type hooks struct {
	log     *slog.Logger
	now     func() time.Time
	client  *http.Client
	senders sync.WaitGroup

	mu     sync.Mutex
	closed bool
	list   []*hook
	kept   []*delivery          // the oldest first
	later  map[*time.Timer]bool // of delayed deliveries
	fate   func(event string) fate
}

func newHooks(log *slog.Logger, transport http.RoundTripper) *hooks {
	if transport == nil {
		transport = &http.Transport{MaxIdleConnsPerHost: 2, IdleConnTimeout: time.Minute}
	}
	return &hooks{
		log: log, now: time.Now, later: map[*time.Timer]bool{},
		client: &http.Client{
			Timeout:       hookTimeout,
			Transport:     transport,
			CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse },
		},
	}
}

// close stops sending and waits for the senders. What was not sent stays so.
func (k *hooks) close() {
	k.mu.Lock()
	k.closed = true
	for t := range k.later {
		t.Stop()
	}
	for _, h := range k.list {
		h.cancel()
	}
	k.mu.Unlock()
	k.senders.Wait()
	k.client.CloseIdleConnections()
}

// add starts to serve a hook.
func (k *hooks) add(id int64, spec Hook) error {
	u, err := url.Parse(spec.URL)
	if err != nil {
		return fmt.Errorf("read webhook URL: %w", err)
	}
	if u.Host == "" || (u.Scheme != "http" && u.Scheme != "https") {
		return fmt.Errorf("read webhook URL %q: want http://host/path or https", spec.URL)
	}
	if len(spec.Events) == 0 {
		spec.Events = []string{"workflow_job"}
	}
	k.mu.Lock()
	defer k.mu.Unlock()
	same := 0
	for _, o := range k.list {
		if strings.EqualFold(o.Scope, spec.Scope) {
			same++
		}
	}
	switch {
	case k.closed:
		return errClosed()
	case spec.Scope == "" && same > 0:
		return fmt.Errorf("add webhook %s: an App has one", spec.URL)
	case same >= maxHooks:
		return fmt.Errorf("add webhook %s: the scope has %d already", spec.URL, maxHooks)
	}
	ctx, cancel := context.WithCancel(context.Background()) // close ends it
	h := &hook{Hook: spec, id: id, wake: make(chan struct{}, 1), cancel: cancel}
	k.list = append(k.list, h)
	k.senders.Go(func() { k.serve(ctx, h) })
	return nil
}

// tells reports whether a hook is told of an event of a repository.
func (h *hook) tells(event, repository string) bool {
	owner, _, _ := strings.Cut(repository, "/")
	return (slices.Contains(h.Events, event) || slices.Contains(h.Events, "*")) &&
		(h.Scope == "" || strings.EqualFold(h.Scope, owner) || strings.EqualFold(h.Scope, repository))
}

// wanted returns the hooks that are told of an event of a repository ("acme/widget").
func (k *hooks) wanted(event, repository string) []*hook {
	k.mu.Lock()
	defer k.mu.Unlock()
	var list []*hook
	for _, h := range k.list {
		if h.tells(event, repository) {
			list = append(list, h)
		}
	}
	return list
}

// post queues a delivery, as its fate has it.
func (k *hooks) post(d *delivery) {
	k.mu.Lock()
	defer k.mu.Unlock()
	if k.closed {
		return
	}
	var f fate
	if k.fate != nil {
		f = k.fate(d.event)
	}
	switch {
	case f.never:
	case f.lost:
		k.lose(d)
	case f.delay > 0:
		k.postponed(d, f)
	default:
		k.enqueue(d, f.again)
	}
}

// postponed queues a delivery after its delay. The caller holds the lock.
func (k *hooks) postponed(d *delivery, f fate) {
	var t *time.Timer
	t = time.AfterFunc(f.delay, func() {
		k.mu.Lock()
		defer k.mu.Unlock()
		delete(k.later, t)
		k.enqueue(d, f.again)
	})
	k.later[t] = true
}

// enqueue hands a delivery to its hook's sender. The caller holds the lock.
func (k *hooks) enqueue(d *delivery, again bool) {
	if k.closed {
		return
	}
	if len(d.hook.queue) >= maxDeliveries {
		k.log.Warn("lose webhook: its receiver is too slow", "event", d.event, "guid", d.guid)
		k.lose(d)
		return
	}
	d.hook.queue = append(d.hook.queue, d)
	if again {
		d.hook.queue = append(d.hook.queue, d)
	}
	select {
	case d.hook.wake <- struct{}{}:
	default:
	}
}

// lose records a delivery that is not sent. The caller holds the lock.
func (k *hooks) lose(d *delivery) {
	d.at, d.status, d.request = k.now(), unanswered, d.header()
	k.keep(d)
}

// keep records what became of a delivery, and forgets those too old. The caller holds the lock.
func (k *hooks) keep(d *delivery) {
	if !slices.Contains(k.kept[max(0, len(k.kept)-8):], d) { // one sent twice is one
		k.kept = append(k.kept, d)
	}
	old := 0
	for old < len(k.kept) && (len(k.kept)-old > maxDeliveries || k.now().Sub(k.kept[old].at) > deliveryKept) {
		old++
	}
	k.kept = slices.Delete(k.kept, 0, old)
}

// serve sends what comes into one hook's queue, until ctx is over.
func (k *hooks) serve(ctx context.Context, h *hook) {
	for {
		select {
		case <-h.wake:
		case <-ctx.Done():
			return
		}
		for ctx.Err() == nil {
			k.mu.Lock()
			if len(h.queue) == 0 {
				k.mu.Unlock()
				break
			}
			d := h.queue[0]
			h.queue = h.queue[1:]
			k.mu.Unlock()
			k.send(ctx, d)
		}
	}
}

// setFate has f decide what becomes of every later delivery; nil makes all ordinary ones. f is called under the hub's lock:
// it must neither block nor call the Server.
func (k *hooks) setFate(f func(event string) fate) {
	k.mu.Lock()
	defer k.mu.Unlock()
	k.fate = f
}

// post tells the hooks that want it of an event: more is what this event has that others have not. The caller holds the lock.
func (h *hub) post(event, action string, repo *repository, more func() map[string]any) {
	to := h.hooks.wanted(event, h.cfg.Owner+"/"+repo.name)
	if len(to) == 0 {
		return
	}
	v := more()
	v["action"], v["repository"] = action, h.repositoryView(repo)
	v["organization"] = map[string]any{"login": h.cfg.Owner, "id": ownerID}
	v["sender"] = map[string]any{"login": h.cfg.Owner, "id": ownerID, "type": "User"}
	for _, hook := range to {
		delete(v, "installation")
		if hook.Scope == "" {
			v["installation"] = map[string]any{"id": installationID, "node_id": nodeID("I", installationID)}
		}
		body, err := json.Marshal(v)
		if err != nil {
			h.cfg.Log.Error("encode webhook", "event", event, "err", err)
			return
		}
		h.hooks.post(&delivery{id: h.id(), hook: hook, guid: newUUID(), event: event, action: action, repository: repo.id, body: body})
	}
}

// postJob tells the hooks what became of a job. The caller holds the lock.
func (h *hub) postJob(action string, j *job) {
	h.post("workflow_job", action, j.run.repo, func() map[string]any { return map[string]any{"workflow_job": h.jobView(j)} })
}
