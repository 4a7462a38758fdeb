package webhook

import (
	"errors"
	"slices"
	"strings"
	"sync"
	"time"

	"flint"
)

// beliefTime is how long the ledger is believed while GitHub cannot be asked and sends nothing. Then lost webhooks could have
// made it wrong for three polls.
const beliefTime = 15 * time.Minute

// account is what is known of the way to one account.
type account struct {
	cfg    Account
	scopes []scope // of its pools

	// For the goroutine of its sweeps only:
	swept  time.Time        // up to when lost webhooks were looked for, by the machine's clock of then
	looked time.Time        // when this process did so last
	failed map[string]*lost // by GUID

	// For the goroutine of its polls only:
	unlisted bool // open jobs cannot be listed, which was said

	mu    sync.Mutex // guards what follows
	heard time.Time  // when a webhook came, or GitHub last answered us
	poll  trouble
	sweep trouble
}

// trouble is what keeps one way of asking from working; zero when it works.
type trouble struct {
	since time.Time
	err   error
	said  string // what was logged of it last
}

// scope returns the one of the account's scopes that covers a repository.
func (a *account) scope(repository, enterprise string) (scope, bool) {
	i := slices.IndexFunc(a.scopes, func(s scope) bool { return s.covers(repository, enterprise) })
	if i < 0 {
		return scope{}, false
	}
	return a.scopes[i], true
}

// repositories returns what to ask about when all scopes are repositories; nil when that is everything the account sees.
func (a *account) repositories() []string {
	var out []string
	for _, s := range a.scopes {
		if s.repo == "" {
			return nil
		}
		if name := s.owner + "/" + s.repo; !slices.Contains(out, name) {
			out = append(out, name)
		}
	}
	return out
}

func (a *account) hear(now time.Time) {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.heard = now
}

// believed reports whether the ledger is fit to act on for this account's pools.
func (a *account) believed(now time.Time) bool {
	a.mu.Lock()
	defer a.mu.Unlock()
	return a.cfg.API == nil || !a.heard.IsZero() && !a.doubtful(now)
}

// doubtful reports whether nobody has vouched for the ledger for too long. The caller holds a.mu.
func (a *account) doubtful(now time.Time) bool {
	return (a.poll.err != nil || a.sweep.err != nil) && now.Sub(a.heard) > beliefTime
}

// explain says for a pool of the account why its demand may be incomplete.
func (a *account) explain(pool string, now time.Time) flint.Reason {
	a.mu.Lock()
	defer a.mu.Unlock()
	t, code, what := a.poll, "webhook.poll", "open jobs cannot be asked for"
	if t.err == nil {
		t, code, what = a.sweep, "webhook.deliveries", "lost webhooks are not found"
	}
	if t.err == nil {
		return flint.Reason{}
	}
	text := clean(t.err.Error())
	var f *flint.Fault
	if errors.As(t.err, &f) {
		code = f.Code
		if f.Fix != "" {
			text += "; " + f.Fix
		}
	}
	then := "; webhooks that arrive still count"
	switch {
	case a.heard.IsZero():
		then = "; nothing is done for the pool until GitHub is heard"
	case a.doubtful(now):
		then = "; what was known at " + a.heard.Format(time.TimeOnly) + " is not believed any more"
	}
	return flint.Because(code, "pool %s: %s since %s: %s%s", pool, what, t.since.Format(time.TimeOnly), strings.TrimSuffix(text, "."), then)
}

// note takes down how asking went. It returns true when that is news.
func (a *account) note(t *trouble, now time.Time, err error) bool {
	a.mu.Lock()
	defer a.mu.Unlock()
	if err == nil {
		a.heard = now
		ended := t.err != nil
		*t = trouble{}
		return ended
	}
	if t.err == nil {
		t.since = now
	}
	t.err = err
	fresh := t.said != err.Error()
	t.said = err.Error()
	return fresh
}
