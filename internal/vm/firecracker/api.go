package firecracker

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"strings"
	"time"

	"flint"
)

const (
	maxAnswer   = 64 << 10         // bytes of an answer's body
	callTimeout = 30 * time.Second // for one call; starting a big guest takes longest
)

// apiError is Firecracker's refusal of a request.
type apiError struct {
	Call    string // method and path
	Status  int    // of HTTP
	Message string // its fault_message: untrusted, printable, bounded
}

// Error returns the refusal in Firecracker's words.
func (e *apiError) Error() string {
	return fmt.Sprintf("%s: Firecracker answers %d: %s", e.Call, e.Status, e.Message)
}

// api is a client of one Firecracker process. Its requests go over one connection, one after the other.
type api struct{ http http.Client }

// newAPI returns a client that connects by dial.
func newAPI(dial func(ctx context.Context) (net.Conn, error)) *api {
	return &api{http.Client{Timeout: callTimeout, Transport: &http.Transport{
		DialContext:     func(ctx context.Context, _, _ string) (net.Conn, error) { return dial(ctx) },
		MaxConnsPerHost: 1, DisableCompression: true, MaxResponseHeaderBytes: 16 << 10,
	}}}
}

func (a *api) close() { a.http.CloseIdleConnections() }

// call makes one request. in and out are JSON, or nil.
func (a *api) call(ctx context.Context, method, path string, in, out any) error {
	var body io.Reader
	if in != nil {
		b, err := json.Marshal(in)
		if err != nil {
			return fmt.Errorf("encode %s %s: %w", method, path, err)
		}
		body = bytes.NewReader(b)
	}
	req, err := http.NewRequestWithContext(ctx, method, "http://localhost"+path, body)
	if err != nil {
		return fmt.Errorf("make request %s %s: %w", method, path, err)
	}
	req.Header.Set("Accept", "application/json")
	if in != nil {
		req.Header.Set("Content-Type", "application/json")
	}
	resp, err := a.http.Do(req)
	if err != nil {
		return fmt.Errorf("%s %s: %w", method, path, err)
	}
	defer resp.Body.Close()
	answer, err := io.ReadAll(io.LimitReader(resp.Body, maxAnswer+1))
	switch {
	case err != nil:
		return fmt.Errorf("read answer to %s %s: %w", method, path, err)
	case len(answer) > maxAnswer:
		return fmt.Errorf("read answer to %s %s: longer than %d bytes", method, path, maxAnswer)
	case resp.StatusCode < 200 || resp.StatusCode > 299:
		return &apiError{Call: method + " " + path, Status: resp.StatusCode, Message: faultMessage(answer)}
	case out == nil:
		return nil
	}
	if err := json.Unmarshal(answer, out); err != nil {
		return fmt.Errorf("read answer to %s %s: %w", method, path, err)
	}
	return nil
}

func (a *api) put(ctx context.Context, path string, in any) error {
	return a.call(ctx, http.MethodPut, path, in, nil)
}

// version asks the running process, which may be of another release than the file was when New looked.
func (a *api) version(ctx context.Context) (flint.Version, error) {
	var answer struct {
		Version string `json:"firecracker_version"`
	}
	if err := a.call(ctx, http.MethodGet, "/version", nil, &answer); err != nil {
		return flint.Version{}, err
	}
	v, ok := flint.FindVersion(answer.Version)
	if !ok {
		return flint.Version{}, errors.New("GET /version: Firecracker does not say its version")
	}
	return v, nil
}

// faultMessage takes Firecracker's words out of an answer.
func faultMessage(answer []byte) string {
	var fault struct {
		Message string `json:"fault_message"`
	}
	if err := json.Unmarshal(answer, &fault); err != nil || fault.Message == "" {
		fault.Message = string(answer)
	}
	return printable(fault.Message, 1000)
}

// printable keeps at most limit bytes of s, on one line of printable ASCII.
func printable(s string, limit int) string {
	s = strings.Map(func(r rune) rune {
		switch {
		case r == '\n' || r == '\t':
			return ' '
		case r < ' ' || r > '~':
			return -1
		}
		return r
	}, s[:min(len(s), limit)])
	return strings.TrimSpace(s)
}
