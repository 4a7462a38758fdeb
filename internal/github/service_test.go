package github

import (
	"context"
	"errors"
	"io"
	"net/http"
	"strings"
	"testing"
	"testing/iotest"
	"testing/synctest"
)

// The library does not close the body of an answer that breaks off.
func TestAnswerThatBreaksOffLeavesNoGoroutine(t *testing.T) {
	synctest.Test(t, func(t *testing.T) { // which fails when one is left
		c := libraryClient(roundTrip(func(r *http.Request) (*http.Response, error) {
			return &http.Response{StatusCode: http.StatusOK, Body: io.NopCloser(iotest.ErrReader(io.ErrUnexpectedEOF)), Request: r}, nil
		}))
		if c.HTTPClient.Timeout == 0 {
			t.Error("the library puts in a time-out of its own")
		}
		resp, err := c.HTTPClient.Get("http://github.example/")
		if err != nil {
			t.Fatal(err)
		}
		if _, err := io.ReadAll(resp.Body); !errors.Is(err, io.ErrUnexpectedEOF) {
			t.Errorf("read: %v", err)
		}
	})
}

type closeNote struct {
	io.Reader
	closed *bool
}

func (c closeNote) Close() error { *c.closed = true; return nil }

// The library would return it together with an error, which net/http writes to the standard logger.
func TestAnswerNobodyWaitsForIsAnError(t *testing.T) {
	ctx, cancel := context.WithCancel(t.Context())
	closed := false
	r := &recorder{api: "http://github.example/api/v3", next: roundTrip(func(r *http.Request) (*http.Response, error) {
		cancel()
		return &http.Response{StatusCode: http.StatusOK, Body: closeNote{strings.NewReader("{}"), &closed}, Request: r}, nil
	})}
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://github.example/queue", nil)
	if err != nil {
		t.Fatal(err)
	}
	if resp, err := r.RoundTrip(req); resp != nil || !errors.Is(err, context.Canceled) || !closed {
		t.Errorf("%v, %v; closed: %t", resp, err, closed)
	}
}
