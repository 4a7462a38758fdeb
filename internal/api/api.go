// Package api lets the commands ask a running flint: HTTP with JSON over a unix socket that only flint's own user may open.
//
// It carries questions and answers and gives errors back as the faults they were. It must not know how an answer is found,
// must not listen on any network, and takes nothing that a guest could send.
package api

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/url"
	"os"
	"slices"
	"syscall"
	"time"

	"flint"
)

const (
	// maxQuery bounds a question, maxAnswer what a client reads.
	maxQuery  = 4 << 10
	maxAnswer = 16 << 20
	// answerTime bounds one question: behind it, GitHub may be asked.
	answerTime = 30 * time.Second
	// closeTime is what questions under way get when the server ends.
	closeTime = 2 * time.Second
)

// Backend answers.
type Backend interface {
	Explainer
	Operator
}

// Explainer answers questions.
type Explainer interface {
	// Explain says why a job is where it is. query is the URL of a job or run on GitHub; with an empty one, everything that
	// waits is explained. Its errors are faults.
	Explain(ctx context.Context, query string) ([]flint.Explanation, error)
}

// Server is the API's listening side. Make it with Listen.
type Server struct {
	listener net.Listener
	http     *http.Server
	log      *slog.Logger
}

// Listen makes the socket, mode 0600. A socket that nobody serves is replaced. Its errors are faults: api.busy, api.socket.
func Listen(ctx context.Context, path string, b Backend, log *slog.Logger) (*Server, error) {
	fault := func(err error) error {
		return &flint.Fault{
			Code: "api.socket", What: "make the API's socket " + path, Kind: flint.ErrPermission, Err: err,
			Fix: "set api.socket to a path of at most 107 bytes in a directory that flint may write to",
		}
	}
	var d net.Dialer
	if conn, err := d.DialContext(ctx, "unix", path); err == nil {
		_ = conn.Close()
		return nil, &flint.Fault{
			Code: "api.busy", What: "make the API's socket " + path, Kind: flint.ErrConflict, Err: errors.New("another flint serves it"),
			Fix: "stop the other flint, or set api.socket to something of its own",
		}
	}
	if info, err := os.Lstat(path); err == nil && info.Mode().Type() == os.ModeSocket {
		if err := os.Remove(path); err != nil {
			return nil, fault(err)
		}
	}
	l, err := (&net.ListenConfig{Control: private}).Listen(ctx, "unix", path)
	if err != nil {
		return nil, fault(err)
	}
	return &Server{listener: l, log: log, http: &http.Server{Handler: handler(b, log), ReadHeaderTimeout: 10 * time.Second}}, nil
}

// private makes a socket its user's alone before it has a name: bind(2) gives the file the mode of the socket.
func private(_, _ string, c syscall.RawConn) (err error) {
	cerr := c.Control(func(fd uintptr) { err = syscall.Fchmod(int(fd), 0o600) })
	return errors.Join(cerr, err)
}

// Serve answers until ctx ends and the questions under way have their answers, and removes the socket.
func (s *Server) Serve(ctx context.Context) error {
	ended := make(chan struct{})
	stop := context.AfterFunc(ctx, func() {
		defer close(ended)
		end, cancel := context.WithTimeout(context.WithoutCancel(ctx), closeTime)
		defer cancel()
		if err := s.http.Shutdown(end); err != nil {
			s.log.Debug("a question is cut off", "err", err)
			_ = s.http.Close()
		}
	})
	err := s.http.Serve(s.listener)
	if stop() {
		return fmt.Errorf("serve the API: %w", err)
	}
	<-ended
	return nil
}

func handler(b Backend, log *slog.Logger) http.Handler {
	mux := http.NewServeMux()
	handle(mux, log, "GET /v1/explain", func(ctx context.Context, query url.Values) (explained, error) {
		list, err := b.Explain(ctx, query.Get("query"))
		return explained{list}, err
	})
	handle(mux, log, "GET /v1/hosts", func(ctx context.Context, _ url.Values) (hosts, error) {
		list, err := b.Hosts(ctx)
		return hosts{list}, err
	})
	handle(mux, log, "POST /v1/host/drain", func(ctx context.Context, query url.Values) (Host, error) {
		return b.Drain(ctx, query.Get("host"))
	})
	handle(mux, log, "POST /v1/host/uncordon", func(ctx context.Context, query url.Values) (Host, error) {
		return b.Uncordon(ctx, query.Get("host"))
	})
	handle(mux, log, "POST /v1/config/reload", func(ctx context.Context, _ url.Values) (Reloaded, error) {
		return b.Reload(ctx)
	})
	return mux
}

// handle answers the questions of one route. What f returns is bounded by answerTime.
func handle[T any](mux *http.ServeMux, log *slog.Logger, route string, f func(context.Context, url.Values) (T, error)) {
	mux.HandleFunc(route, func(w http.ResponseWriter, r *http.Request) {
		ctx, cancel := context.WithTimeout(r.Context(), answerTime)
		defer cancel()
		query := r.URL.Query()
		for _, values := range query {
			if slices.ContainsFunc(values, func(v string) bool { return len(v) > maxQuery }) {
				answer(w, log, http.StatusBadRequest, failure{Code: "usage", Kind: "usage", What: "read the question", Error: "it is too long"})
				return
			}
		}
		got, err := f(ctx, query)
		if err != nil {
			f := asFailure(err)
			answer(w, log, f.status(), f)
			return
		}
		answer(w, log, http.StatusOK, got)
	})
}

type explained struct {
	Explanations []flint.Explanation `json:"explanations"`
}

func answer(w http.ResponseWriter, log *slog.Logger, status int, v any) {
	w.Header().Set("Content-Type", "application/json")
	w.WriteHeader(status)
	if err := json.NewEncoder(w).Encode(v); err != nil {
		log.Debug("answer is not taken", "err", err)
	}
}

// failure is an error as the API carries it.
type failure struct {
	Code  string `json:"code"`
	Kind  string `json:"kind,omitempty"`
	What  string `json:"what"`
	Error string `json:"error,omitempty"`
	Fix   string `json:"fix,omitempty"`
}

type kind struct {
	name   string
	err    error
	status int
}

func kinds() []kind {
	return []kind{
		{"usage", flint.ErrUsage, http.StatusBadRequest},
		{"config", flint.ErrConfig, http.StatusInternalServerError},
		{"not-found", flint.ErrNotFound, http.StatusNotFound},
		{"permission", flint.ErrPermission, http.StatusForbidden},
		{"conflict", flint.ErrConflict, http.StatusConflict},
		{"timeout", flint.ErrTimeout, http.StatusGatewayTimeout},
	}
}

func asFailure(err error) failure {
	f := failure{Code: "api.failed", What: "answer", Error: err.Error()}
	var fault *flint.Fault
	if errors.As(err, &fault) {
		f = failure{Code: fault.Code, What: fault.What, Fix: fault.Fix}
		if fault.Err != nil {
			f.Error = fault.Err.Error()
		}
	}
	for _, k := range kinds() {
		if errors.Is(err, k.err) {
			f.Kind = k.name
			break
		}
	}
	return f
}

func (f failure) status() int {
	for _, k := range kinds() {
		if k.name == f.Kind {
			return k.status
		}
	}
	return http.StatusInternalServerError
}

func (f failure) fault() error {
	out := &flint.Fault{Code: f.Code, What: f.What, Fix: f.Fix}
	if f.Error != "" {
		out.Err = errors.New(f.Error)
	}
	for _, k := range kinds() {
		if k.name == f.Kind {
			out.Kind = k.err
		}
	}
	return out
}

// Client asks a running flint. Make it with Connect.
type Client struct {
	path string
	http *http.Client
}

// Connect makes a client of the socket at path; it does not dial yet.
func Connect(path string) *Client {
	return &Client{path: path, http: &http.Client{
		Timeout: answerTime + closeTime,
		Transport: &http.Transport{DisableKeepAlives: true, DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
			var d net.Dialer
			return d.DialContext(ctx, "unix", path)
		}},
	}}
}

// Explain asks Explainer.Explain. Its errors are faults: those of the backend, and daemon.unreachable. So are those of the
// Client's other methods.
func (c *Client) Explain(ctx context.Context, query string) ([]flint.Explanation, error) {
	out, err := ask[explained](ctx, c, http.MethodGet, "/v1/explain", url.Values{"query": {query}})
	return out.Explanations, err
}

// ask does one exchange.
func ask[T any](ctx context.Context, c *Client, method, path string, query url.Values) (out T, err error) {
	req, err := http.NewRequestWithContext(ctx, method, "http://flint"+path+"?"+query.Encode(), nil)
	if err != nil {
		return out, fmt.Errorf("make request: %w", err)
	}
	resp, err := c.http.Do(req)
	if err != nil {
		return out, c.unreachable(err)
	}
	defer func() { _ = resp.Body.Close() }()
	body := json.NewDecoder(io.LimitReader(resp.Body, maxAnswer))
	if resp.StatusCode != http.StatusOK {
		var f failure
		if err := body.Decode(&f); err != nil {
			return out, fmt.Errorf("read the answer %s: %w", resp.Status, err)
		}
		return out, f.fault()
	}
	if err := body.Decode(&out); err != nil {
		return out, fmt.Errorf("read the answer: %w", err)
	}
	return out, nil
}

func (c *Client) unreachable(err error) error {
	if op := (*net.OpError)(nil); errors.As(err, &op) {
		err = op.Err
	}
	fault := &flint.Fault{
		Code: "daemon.unreachable", What: "ask flint at " + c.path, Kind: flint.ErrUnreachable, Err: err,
		Fix: "start it (flint serve), or name its configuration with --config",
	}
	if errors.Is(err, os.ErrPermission) {
		fault.Kind, fault.Fix = flint.ErrPermission, "run as the user that flint runs as: with sudo"
	}
	return fault
}
