package githubsim

import (
	"bytes"
	"crypto/sha256"
	"fmt"
	"maps"
	"math"
	"net/http"
	"strconv"
	"strings"
	"time"
)

// Misbehaviour between the client and the services.

// routeOf tells the kind of a request by its path.
func routeOf(path string) Routes {
	switch {
	case strings.HasPrefix(path, "/api/v3/"):
		if strings.Contains(path, "/hook/deliveries") || strings.Contains(path, "/hooks/") && strings.Contains(path, "/deliveries") {
			return RouteDeliveries
		}
		return RouteREST
	case strings.HasPrefix(path, "/tenant/_apis/runtime/"), strings.HasPrefix(path, "/tenant/_apis/distributedtask/pools/0/agents"):
		return RouteScaleSets
	case strings.HasPrefix(path, "/queue/"):
		return RouteQueue
	case strings.HasPrefix(path, "/oauth2/"), strings.HasPrefix(path, "/tenant/"), strings.HasPrefix(path, "/broker/"), strings.HasPrefix(path, "/run/"):
		return RouteRunners
	}
	return 0
}

// misbehave serves a request, or does to it what the faults have for it.
func (s *Server) misbehave(next http.Handler, w http.ResponseWriter, r *http.Request) {
	m, route := s.hub.faults, routeOf(r.URL.Path)
	if (route == 0 || route == RouteRunners) && s.cutOff(r) {
		panic(http.ErrAbortHandler)
	}
	set := m.settings()
	hit, down := route&set.Routes != 0, set.Outage
	switch {
	case !hit:
		next.ServeHTTP(w, r)
		return
	case down:
		m.count(outage)
		writeUnicorn(w, http.StatusServiceUnavailable)
		return
	case route == RouteDeliveries && m.strikes(failDeliveries):
		writeUnicorn(w, http.StatusBadGateway)
		return
	case !s.keepTokens(route, w, r):
		return
	}
	if m.strikes(slowAnswers) {
		t := time.NewTimer(m.time(slowBy))
		defer t.Stop()
		select {
		case <-t.C:
		case <-r.Context().Done():
			return
		}
	}
	switch {
	case m.strikes(limitRequests):
		w.Header().Set("Retry-After", strconv.Itoa(wholeSeconds(m.time(retryAfter))))
		writeError(w, &apiError{http.StatusTooManyRequests, "TooManyRequestsException", "You have exceeded a secondary rate limit. Please wait before you try again."})
	case route == RouteREST && m.strikes(forbidRequests):
		reset := time.Now().Add(m.time(retryAfter))
		w.Header().Set("X-RateLimit-Limit", "5000")
		w.Header().Set("X-RateLimit-Remaining", "0")
		w.Header().Set("X-RateLimit-Reset", strconv.FormatInt(int64(math.Ceil(float64(reset.UnixMilli())/1000)), 10))
		writeError(w, &apiError{http.StatusForbidden, "", fmt.Sprintf("API rate limit exceeded for installation ID %d.", s.app.InstallationID)})
	case m.strikes(failRequests):
		statuses := [...]int{http.StatusInternalServerError, http.StatusBadGateway, http.StatusServiceUnavailable}
		writeUnicorn(w, statuses[m.counted()[failRequests]%len(statuses)])
	case m.strikes(loseAnswers):
		next.ServeHTTP(newRecorder(w), r)
		writeUnicorn(w, http.StatusBadGateway)
	case m.strikes(cutAnswers):
		rec := newRecorder(w)
		next.ServeHTTP(rec, r)
		rec.half()
	default:
		next.ServeHTTP(w, r)
	}
}

func wholeSeconds(d time.Duration) int { return max(1, int(math.Ceil(d.Seconds()))) }

// writeUnicorn answers with a page for people, as whatever stands before the services does when they fail.
func writeUnicorn(w http.ResponseWriter, status int) {
	w.Header().Set("Content-Type", "text/html; charset=utf-8")
	w.WriteHeader(status)
	_, _ = fmt.Fprintf(w, "<!DOCTYPE html>\n<title>%d</title>\n<p>%s</p>\n", status, http.StatusText(status)) // a client that has gone is not our error
}

// keepTokens ends the token of a request, when it is to end early. It reports whether the request goes on.
func (s *Server) keepTokens(route Routes, w http.ResponseWriter, r *http.Request) bool {
	m, token := s.hub.faults, bearer(r, "Bearer")
	switch route {
	case RouteQueue:
		if m.strikes(expireQueueTokens) {
			s.creds.revoke(token) // the service refuses it by itself
		}
	case RouteScaleSets:
		if m.strikes(expireAdminTokens) {
			m.revoke(token)
		}
		if m.isRevoked(token) {
			writeError(w, errUnauthorized())
			return false
		}
	}
	return true
}

// revoke ends an admin token, which is a JWT nobody keeps, before its time.
func (m *faults) revoke(token string) {
	m.mu.Lock()
	defer m.mu.Unlock()
	now := time.Now()
	maps.DeleteFunc(m.revoked, func(_ digest, until time.Time) bool { return now.After(until) })
	m.revoked[digest(sha256.Sum256([]byte(token)))] = now.Add(adminTokenLife)
}

func (m *faults) isRevoked(token string) bool {
	m.mu.Lock()
	defer m.mu.Unlock()
	_, ok := m.revoked[digest(sha256.Sum256([]byte(token)))]
	return ok
}

// revoke ends a token.
func (c *credentials) revoke(token string) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if d := digest(sha256.Sum256([]byte(token))); c.known[d].kind != 0 {
		c.forget(d)
	}
}

// recorder keeps an answer that is not to arrive, or only in part.
type recorder struct {
	to     http.ResponseWriter
	header http.Header
	status int
	body   bytes.Buffer
}

func newRecorder(w http.ResponseWriter) *recorder {
	return &recorder{to: w, header: http.Header{}, status: http.StatusOK}
}

// Header implements http.ResponseWriter.
func (r *recorder) Header() http.Header { return r.header }

// WriteHeader implements http.ResponseWriter.
func (r *recorder) WriteHeader(status int) { r.status = status }

// Write implements http.ResponseWriter.
func (r *recorder) Write(p []byte) (int, error) { return r.body.Write(p) }

// Unwrap lets the services set deadlines.
func (r *recorder) Unwrap() http.ResponseWriter { return r.to }

// half sends the first half of the answer and breaks the connection.
func (r *recorder) half() {
	if n := r.body.Len(); n > 1 {
		maps.Copy(r.to.Header(), r.header)
		r.to.Header().Set("Content-Length", strconv.Itoa(n))
		r.to.WriteHeader(r.status)
		_, _ = r.to.Write(r.body.Bytes()[:n/2]) // it is about to break anyway
		_ = http.NewResponseController(r.to).Flush()
	}
	panic(http.ErrAbortHandler)
}
