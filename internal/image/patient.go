package image

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"time"

	"github.com/google/go-containerregistry/pkg/v1/remote"
)

// patient gives up a request to a registry when nothing comes for so long, neither an answer nor more of one. The library
// waits for ever.
type patient struct {
	inner   http.RoundTripper
	silence time.Duration
}

// transport is the way to registries.
func (s *Store) transport() http.RoundTripper {
	return patient{wary{remote.DefaultTransport}, s.silence}
}

// RoundTrip implements http.RoundTripper.
func (p patient) RoundTrip(req *http.Request) (*http.Response, error) {
	ctx, cancel := context.WithCancelCause(req.Context())
	quiet := time.AfterFunc(p.silence, func() { cancel(fmt.Errorf("nothing came for %s", p.silence)) })
	resp, err := p.inner.RoundTrip(req.WithContext(ctx))
	quiet.Stop()
	if err != nil {
		err = causeOf(ctx, err)
		cancel(nil)
		return nil, err
	}
	resp.Body = &patientBody{
		ReadCloser: resp.Body, quiet: quiet, silence: p.silence,
		cause: func(err error) error { return causeOf(ctx, err) }, end: func() { cancel(nil) },
	}
	return resp, nil
}

// patientBody is an answer of which more has to come in time. While nobody reads it may be quiet.
type patientBody struct {
	io.ReadCloser
	quiet   *time.Timer
	silence time.Duration
	cause   func(error) error
	end     func() // of the request
}

// Read implements io.Reader.
func (b *patientBody) Read(p []byte) (int, error) {
	b.quiet.Reset(b.silence)
	defer b.quiet.Stop()
	n, err := b.ReadCloser.Read(p)
	if err != nil && !errors.Is(err, io.EOF) {
		err = b.cause(err)
	}
	return n, err
}

// Close implements io.Closer.
func (b *patientBody) Close() error {
	defer b.end()
	return b.ReadCloser.Close()
}
