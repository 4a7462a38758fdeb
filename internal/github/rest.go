package github

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"net/url"
	"strconv"
	"time"

	gh "github.com/google/go-github/v79/github"
)

const (
	// perPage is the largest page GitHub gives.
	perPage = 100
	// maxPages bounds a list: a runner group holds at most 10,000 runners.
	maxPages = 120
)

// request is one request of the REST API.
type request struct {
	method string
	path   string // below the API's base, from the slash on; its parts are escaped
	query  url.Values
	body   any // sent as JSON; nil: nothing
	into   any // filled from the answer; nil: nothing is read
}

// newREST makes a client of the REST API. It never follows a redirect to another server, does not retry, and leaves rate limits
// to the recorder.
func newREST(api string, r *recorder) (*gh.Client, error) {
	base, err := url.Parse(api + "/")
	if err != nil {
		return nil, fmt.Errorf("parse the URL of GitHub's API: %w", err)
	}
	c := gh.NewClient(&http.Client{Transport: r, CheckRedirect: func(req *http.Request, via []*http.Request) error {
		if len(via) > 5 || req.URL.Scheme != base.Scheme || req.URL.Host != base.Host {
			return errors.New("the answer leads elsewhere")
		}
		return nil
	}})
	c.BaseURL, c.UserAgent, c.DisableRateLimitCheck = base, "flint", true
	return c, nil
}

// ask makes one request with the credential of the scope. A token that is refused is replaced once. See observe for its errors.
func (s *scope) ask(ctx context.Context, verb string, q request) (*gh.Response, error) {
	cred, err := s.credential(ctx)
	if err != nil {
		return nil, err
	}
	for again := false; ; again = true {
		token, err := cred.bearer(ctx, s)
		if err != nil {
			return nil, err
		}
		resp, err := s.send(ctx, cred.client, string(token), verb, q)
		if status(err) == http.StatusUnauthorized && !again && cred.drop(ctx, token) {
			continue
		}
		return resp, err
	}
}

// clockSlack is how far our clock may be from GitHub's before a refused signature is blamed on it.
const clockSlack = time.Minute

// askAsApp makes one request as the App itself. Where our clock is wrong, the signature is made again by GitHub's.
func (s *scope) askAsApp(ctx context.Context, verb string, q request) (*gh.Response, error) {
	resp, err := s.signed(ctx, time.Now(), verb, q)
	var e *callError
	if errors.As(err, &e) && e.status == http.StatusUnauthorized && e.skew.Abs() > clockSlack {
		resp, err = s.signed(ctx, time.Now().Add(e.skew), verb, q)
	}
	return resp, err
}

// signed asks with a signature of that time.
func (s *scope) signed(ctx context.Context, now time.Time, verb string, q request) (*gh.Response, error) {
	token, err := s.account.jwt(now)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", verb, err)
	}
	return s.send(ctx, s.account.asApp, string(token), verb, q)
}

func (s *scope) send(ctx context.Context, c *gh.Client, token, verb string, q request) (resp *gh.Response, err error) {
	err = observe(ctx, s, verb, callTimeout, func(ctx context.Context) error {
		path := q.path[1:]
		if len(q.query) > 0 {
			path += "?" + q.query.Encode()
		}
		req, err := c.NewRequest(q.method, path, q.body)
		if err != nil {
			return err
		}
		req.Header.Set("Authorization", "Bearer "+token) // of the request, so that a redirect elsewhere does not carry it
		resp, err = c.Do(ctx, req, q.into)
		var accepted *gh.AcceptedError
		if errors.As(err, &accepted) {
			return nil
		}
		return err
	})
	return resp, err
}

// pages asks for page after page until each says that it has enough, or there is no more.
// Whether there is more it is told.
func pages[T any](ctx context.Context, s *scope, verb string, q request, each func(page *T, more bool) (enough bool)) error {
	query := url.Values{"per_page": {strconv.Itoa(perPage)}}
	for k, v := range q.query {
		query[k] = v
	}
	q.query = query
	for page := 1; page <= maxPages; {
		query.Set("page", strconv.Itoa(page))
		into := new(T)
		q.into = into
		resp, err := s.ask(ctx, verb, q)
		if err != nil {
			return err
		}
		more := resp.NextPage > page
		if each(into, more) || !more {
			return nil
		}
		page = resp.NextPage
	}
	return fmt.Errorf("%s: the list has more than %d pages", verb, maxPages)
}
