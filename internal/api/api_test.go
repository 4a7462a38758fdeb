package api_test

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"flint"
	"flint/internal/api"
)

type explain func(string) ([]flint.Explanation, error)

type backend struct {
	api.Operator
	explain explain
}

func (b backend) Explain(_ context.Context, query string) ([]flint.Explanation, error) {
	return b.explain(query)
}

func serve(t *testing.T, e explain) (path string, stop func() error) {
	t.Helper()
	return serveBackend(t, backend{explain: e})
}

func serveBackend(t *testing.T, b api.Backend) (path string, stop func() error) {
	t.Helper()
	path = filepath.Join(t.TempDir(), "api.sock")
	s, err := api.Listen(t.Context(), path, b, slog.New(slog.DiscardHandler))
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() { done <- s.Serve(ctx) }()
	t.Cleanup(cancel)
	return path, func() error { cancel(); return <-done }
}

func TestQuestionAndAnswer(t *testing.T) {
	want := flint.Explanation{Job: &flint.JobStatus{Job: flint.Job{Name: "build"}, Labels: []string{"big"}}, Reason: flint.Because("pool.max", "no room")}
	path, stop := serve(t, func(q string) ([]flint.Explanation, error) {
		if q != "https://github.com/acme/app/actions/runs/1?x=ü" {
			return nil, fmt.Errorf("the question arrived as %q", q)
		}
		return []flint.Explanation{want}, nil
	})
	got, err := api.Connect(path).Explain(t.Context(), "https://github.com/acme/app/actions/runs/1?x=ü")
	if err != nil || len(got) != 1 || got[0].Reason != want.Reason || got[0].Job.Name != "build" {
		t.Fatalf("answer is %+v, %v", got, err)
	}
	info, err := os.Stat(path)
	if err != nil || info.Mode().Perm() != 0o600 {
		t.Errorf("the socket's mode is %v, %v", info.Mode(), err)
	}
	if err := stop(); err != nil {
		t.Fatal(err)
	}
	if _, err := os.Stat(path); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("the socket is left: %v", err)
	}
}

func TestFaultsArriveAsTheyWere(t *testing.T) {
	sent := &flint.Fault{Code: "github.rate", What: "look up job", Fix: "wait", Kind: flint.ErrNotFound, Err: errors.New("limit")}
	path, _ := serve(t, func(q string) ([]flint.Explanation, error) {
		if q == "fault" {
			return nil, fmt.Errorf("explain: %w", sent)
		}
		return nil, errors.New("plain")
	})
	_, err := api.Connect(path).Explain(t.Context(), "fault")
	var got *flint.Fault
	if !errors.As(err, &got) || got.Code != sent.Code || got.Error() != sent.Error() || got.Fix != sent.Fix || !errors.Is(err, flint.ErrNotFound) {
		t.Errorf("fault arrives as %#v", err)
	}
	if _, err = api.Connect(path).Explain(t.Context(), "other"); err == nil || !strings.Contains(err.Error(), "plain") {
		t.Errorf("error arrives as %v", err)
	}
	if _, err = api.Connect(path).Explain(t.Context(), strings.Repeat("x", 5000)); err == nil || !strings.Contains(err.Error(), "too long") {
		t.Errorf("a long question gives %v", err)
	}
}

func TestNobodyThere(t *testing.T) {
	_, err := api.Connect(filepath.Join(t.TempDir(), "none")).Explain(t.Context(), "")
	var fault *flint.Fault
	if !errors.Is(err, flint.ErrUnreachable) || !errors.As(err, &fault) || fault.Fix == "" {
		t.Errorf("error is %v", err)
	}
}

func TestSocketsThatAreTakenOrStale(t *testing.T) {
	path, _ := serve(t, func(string) ([]flint.Explanation, error) { return nil, nil })
	if _, err := api.Listen(t.Context(), path, nil, nil); !errors.Is(err, flint.ErrConflict) {
		t.Errorf("a second server gets %v", err)
	}
	stale := filepath.Join(t.TempDir(), "stale")
	l, err := net.ListenUnix("unix", &net.UnixAddr{Name: stale, Net: "unix"})
	if err != nil {
		t.Fatal(err)
	}
	l.SetUnlinkOnClose(false)
	if err := l.Close(); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	s, err := api.Listen(ctx, stale, nil, slog.New(slog.DiscardHandler))
	if err != nil {
		t.Fatalf("a stale socket gives %v", err)
	}
	cancel()
	if err := s.Serve(ctx); err != nil {
		t.Error(err)
	}
	file := filepath.Join(t.TempDir(), "file")
	if err := os.WriteFile(file, []byte("mine"), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := api.Listen(t.Context(), file, nil, nil); err == nil {
		t.Error("somebody's file is taken for a socket")
	}
}
