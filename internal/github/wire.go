package github

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"strconv"
	"strings"
	"sync"
	"time"
	"unicode"
)

const (
	// callTimeout bounds every request but the poll.
	callTimeout = 30 * time.Second
	// pollTimeout bounds a poll; GitHub answers an empty one after about 50 s.
	pollTimeout = 90 * time.Second
	// maxAnswer bounds an answer's body: a message holds at most 50 jobs, a JIT configuration is about 4 KiB.
	maxAnswer = 8 << 20
	// maxRefusal bounds what is read of the body of a refusal.
	maxRefusal = 64 << 10
)

// exchange is the last request and answer of a call. The library reports refusals as text; this keeps what they were.
type exchange struct {
	path    string        // of the request
	rest    bool          // it was one of the REST API
	status  int           // 0: there was no answer
	kind    string        // typeName of the refusal: GitHub.DistributedTask.WebApi.TaskAgentExistsException, …
	message string        // of the refusal
	retry   time.Duration // Retry-After, or until the rate limit is reset
	skew    time.Duration // the server's clock less ours, where the answer tells
}

type exchangeKey struct{}

// recorder is a RoundTripper that notes each exchange in the context's exchange, bounds the bodies of answers, and keeps to
// what GitHub says of its limits: before their end it answers 429 itself. The context is the only way through the libraries to
// the request of one particular call.
type recorder struct {
	next http.RoundTripper
	api  string // base of the REST API
	// How much may be asked as the App, with the credential, and of the scale set service; nil: nothing is known.
	app, rest, tenant *limits

	mu    sync.Mutex
	admin *http.Request // guarded by mu: the last one to the scale set service, which shows where it is and how to sign
}

// scaleSetsPath is the path of scale sets in their service.
const scaleSetsPath = "/_apis/runtime/runnerscalesets"

// session returns a request that deletes a message session, signed as the library signs now; nil before its first call.
func (r *recorder) session(ctx context.Context, set int, id string) *http.Request {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.admin == nil {
		return nil
	}
	req := r.admin.Clone(ctx)
	base, _, _ := strings.Cut(req.URL.Path, scaleSetsPath)
	req.Method, req.Body, req.ContentLength, req.GetBody = http.MethodDelete, nil, 0, nil
	req.URL.Path, req.URL.RawPath = fmt.Sprintf("%s%s/%d/sessions/%s", base, scaleSetsPath, set, id), ""
	req.URL.RawQuery = url.Values{"api-version": req.URL.Query()["api-version"]}.Encode()
	return req
}

// limits returns those that apply to a request, and whether it is one of the REST API.
func (r *recorder) limits(u *url.URL) (l *limits, rest bool) {
	path, ok := strings.CutPrefix(u.Scheme+"://"+u.Host+u.Path, r.api+"/")
	switch {
	case !ok:
		return r.tenant, false
	case strings.HasPrefix(path, "app/"), strings.HasSuffix(path, "/installation"):
		return r.app, true
	}
	return r.rest, true
}

// RoundTrip implements http.RoundTripper.
func (r *recorder) RoundTrip(req *http.Request) (*http.Response, error) {
	resp, err := r.roundTrip(req)
	if gone := req.Context().Err(); err == nil && gone != nil {
		// Nobody waits for it any more. The scale set library would hand on both the answer and the error, and net/http complain.
		resp.Body.Close()
		return nil, gone
	}
	return resp, err
}

func (r *recorder) roundTrip(req *http.Request) (*http.Response, error) {
	ex, _ := req.Context().Value(exchangeKey{}).(*exchange)
	if ex == nil {
		ex = &exchange{}
	}
	l, rest := r.limits(req.URL)
	*ex = exchange{path: req.URL.Path, rest: rest}
	if strings.Contains(req.URL.Path, scaleSetsPath) {
		r.mu.Lock()
		r.admin = req
		r.mu.Unlock()
	}
	if d := l.hold(ex.path, time.Now()); d > 0 {
		return ex.held(req, d), nil
	}
	resp, err := r.next.RoundTrip(req)
	if err != nil {
		return nil, err
	}
	ex.status = resp.StatusCode
	if resp.StatusCode < 300 {
		l.note(ex.path, ex.status, resp.Header, "", time.Now())
		resp.Body = &boundedBody{ReadCloser: resp.Body, left: maxAnswer, ex: ex}
		return resp, nil
	}
	body, err := io.ReadAll(io.LimitReader(resp.Body, maxRefusal))
	resp.Body.Close()
	if err != nil {
		ex.status = 0
		return nil, fmt.Errorf("read the answer %s: %w", resp.Status, err)
	}
	resp.Body, resp.ContentLength = io.NopCloser(bytes.NewReader(body)), int64(len(body))
	now := time.Now()
	ex.refusal(resp.Header, body, now)
	ex.retry = l.note(ex.path, ex.status, resp.Header, ex.message, now)
	return resp, nil
}

// held answers a request that GitHub does not want yet.
func (ex *exchange) held(req *http.Request, d time.Duration) *http.Response {
	if req.Body != nil {
		req.Body.Close()
	}
	ex.status, ex.retry = http.StatusTooManyRequests, d
	ex.message = "no request before " + time.Now().Add(d).Format(time.TimeOnly) + ", as GitHub has asked"
	return &http.Response{
		StatusCode: ex.status, Status: "429 Too Many Requests", Proto: "HTTP/1.1", ProtoMajor: 1, ProtoMinor: 1,
		Header: http.Header{"Retry-After": {strconv.Itoa(int(d/time.Second) + 1)}}, Body: http.NoBody, Request: req,
	}
}

// refusal notes what a refusal says of itself.
func (ex *exchange) refusal(h http.Header, body []byte, now time.Time) {
	var said struct {
		TypeName string `json:"typeName"`
		Message  string `json:"message"`
	}
	if json.Unmarshal(bytes.TrimPrefix(body, []byte("\xef\xbb\xbf")), &said) == nil {
		ex.kind, ex.message = clean(said.TypeName, 200), clean(said.Message, 300)
	} else if strings.HasPrefix(h.Get("Content-Type"), "text/plain") {
		ex.message = clean(string(body), 300)
	}
	if date, err := http.ParseTime(h.Get("Date")); err == nil {
		ex.skew = date.Sub(now)
	}
}

// clean makes text from the network fit for a log line: printable, and at most n bytes.
func clean(s string, n int) string {
	if len(s) > n {
		s = strings.ToValidUTF8(s[:n], "") + "…"
	}
	return strings.Map(func(r rune) rune {
		if unicode.IsPrint(r) {
			return r
		}
		return ' '
	}, s)
}

// boundedBody fails when more than left bytes are read. An answer that breaks off counts as none.
type boundedBody struct {
	io.ReadCloser
	left int64
	ex   *exchange
}

// Read implements io.Reader.
func (b *boundedBody) Read(p []byte) (int, error) {
	if int64(len(p)) > b.left+1 {
		p = p[:b.left+1]
	}
	n, err := b.ReadCloser.Read(p)
	if b.left -= int64(n); b.left < 0 {
		err = fmt.Errorf("the answer is longer than %d bytes", maxAnswer)
	}
	if err != nil && !errors.Is(err, io.EOF) {
		b.ex.status = 0
		b.Close() // the library does not, after an error
	}
	return n, err
}

// callError is a call that GitHub refused, or that did not get through.
type callError struct {
	verb string // what was to be done
	exchange
	err error // the cause where there was no refusal
}

// Error says what could not be done and what GitHub answered.
func (e *callError) Error() string {
	if e.status < 300 {
		return e.verb + ": " + e.err.Error()
	}
	s := fmt.Sprintf("%s: GitHub answered %d %s", e.verb, e.status, http.StatusText(e.status))
	if e.message != "" {
		s += ": " + e.message
	}
	return s
}

// Unwrap returns the cause.
func (e *callError) Unwrap() error { return e.err }

// is reports whether GitHub named this exception.
func (e *callError) is(exception string) bool { return strings.Contains(e.kind, exception) }

// transient reports whether the same call may succeed later without anybody doing anything.
func (e *callError) transient() bool {
	return e.status == 0 || e.status >= 500 || e.status == http.StatusTooManyRequests || e.retry > 0
}

// signedOut reports whether only signing in anew can help: a token or the installation is not known any more.
func (e *callError) signedOut() bool {
	return e.status == http.StatusUnauthorized || e.status == http.StatusNotFound && strings.HasSuffix(e.path, "/access_tokens")
}

// observe runs one call with a deadline and explains its error: a *callError, or the *flint.Fault it amounts to. The library
// trusts answers to have all their fields and panics when one has not; such an answer is an error here.
func observe(ctx context.Context, s *scope, verb string, timeout time.Duration, f func(context.Context) error) (err error) {
	outer := ctx
	ctx, cancel := context.WithTimeout(ctx, timeout)
	defer cancel()
	ex := &exchange{}
	defer func() {
		if p := recover(); p != nil {
			err = &callError{verb: verb, exchange: *ex, err: fmt.Errorf("the answer lacks a field: %v", p)}
		}
	}()
	err = f(context.WithValue(ctx, exchangeKey{}, ex))
	if err == nil {
		return nil
	}
	if outer.Err() != nil {
		return fmt.Errorf("%s: %w", verb, outer.Err())
	}
	cause := root(err)
	if ctx.Err() != nil {
		cause = fmt.Errorf("no answer within %s", timeout)
	}
	if ex.status == http.StatusNotFound && strings.HasSuffix(ex.path, "/access_tokens") {
		s.uninstalled()
	}
	return s.fault(&callError{verb: verb, exchange: *ex, err: cause})
}

// root returns the innermost cause that says something: the library's own layers quote URLs and bodies.
func root(err error) error {
	var op *net.OpError
	if errors.As(err, &op) {
		return op
	}
	for {
		next := errors.Unwrap(err)
		if next == nil {
			return errors.New(clean(err.Error(), 300))
		}
		err = next
	}
}
