package github

import (
	"net/http"
	"strconv"
	"strings"
	"sync"
	"time"
)

const (
	// secondaryPause is what GitHub asks for after a secondary limit that names no time, doubled each time up to secondaryMax.
	secondaryPause = time.Minute
	secondaryMax   = 15 * time.Minute
	// holdMax bounds how long an answer can silence us: GitHub's windows are an hour.
	holdMax = time.Hour
)

// window is GitHub's primary limit for one kind of request.
type window struct {
	limit, remaining int
	reset            time.Time // by our clock; zero: nothing is known
}

// limits is what GitHub has said of how much one credential may still ask. A nil *limits knows and learns nothing.
type limits struct {
	mu        sync.Mutex
	until     time.Time // no request before: GitHub asked for a pause
	secondary int       // refusals in a row that named no time
	core      window
	register  window // registration tokens and JIT configurations are counted apart
}

// registers reports whether a request counts as a registration.
func registers(path string) bool {
	return strings.HasSuffix(path, "/registration-token") || strings.HasSuffix(path, "/generate-jitconfig")
}

func (l *limits) window(path string) *window {
	if registers(path) {
		return &l.register
	}
	return &l.core
}

// hold returns how long a request must wait.
func (l *limits) hold(path string, now time.Time) time.Duration {
	if l == nil {
		return 0
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	d := l.until.Sub(now)
	if w := l.window(path); w.remaining <= 0 && w.limit > 0 {
		d = max(d, w.reset.Sub(now))
	}
	return max(0, d)
}

// note learns from an answer. It returns how long GitHub wants to be left alone, or 0.
func (l *limits) note(path string, status int, h http.Header, message string, now time.Time) time.Duration {
	server := now
	if date, err := http.ParseTime(h.Get("Date")); err == nil {
		server = date
	}
	var w window
	limit, err1 := strconv.Atoi(h.Get("X-RateLimit-Limit"))
	remaining, err2 := strconv.Atoi(h.Get("X-RateLimit-Remaining"))
	reset, err3 := strconv.ParseInt(h.Get("X-RateLimit-Reset"), 10, 64)
	if err2 == nil && err3 == nil {
		if err1 != nil {
			limit = max(1, remaining)
		}
		left := max(0, min(time.Unix(reset, 0).Sub(server), holdMax))
		w = window{limit: max(1, limit), remaining: max(0, remaining), reset: now.Add(left)}
	}
	refused := status == http.StatusTooManyRequests || status == http.StatusForbidden
	var pause time.Duration
	if s, err := strconv.Atoi(h.Get("Retry-After")); err == nil && s > 0 && status >= 300 {
		pause = min(time.Duration(min(s, 86400))*time.Second, holdMax)
	}
	if l == nil {
		return l.plain(w, refused, pause, now)
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	if w.limit > 0 {
		*l.window(path) = w
	}
	switch {
	case pause > 0:
		l.until = now.Add(pause)
	case refused && strings.Contains(strings.ToLower(message), "secondary rate limit"):
		pause = min(secondaryPause<<min(l.secondary, 8), secondaryMax)
		l.secondary++
		l.until = now.Add(pause)
	default:
		if status < 300 {
			l.secondary = 0
		}
		pause = l.plain(w, refused, 0, now)
	}
	return pause
}

// plain is the pause an answer wants by its headers alone.
func (*limits) plain(w window, refused bool, pause time.Duration, now time.Time) time.Duration {
	if pause == 0 && refused && w.limit > 0 && w.remaining == 0 {
		pause = max(time.Second, w.reset.Sub(now))
	}
	return pause
}

// scarce reports whether so little is left of the primary limit that only registrations and removals should use it, and until
// when: the last tenth is theirs.
func (l *limits) scarce(now time.Time) (time.Time, bool) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.until.After(now) {
		return l.until, true
	}
	w := l.core
	return w.reset, w.limit > 0 && w.reset.After(now) && w.remaining <= w.limit/10
}
