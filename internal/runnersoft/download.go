package runnersoft

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"flint"
)

// fetchTries is how often a download is taken up again without getting further than ever before.
const fetchTries = 5

// passing is an error after which the same may go well.
type passing struct{ error }

func (p passing) Unwrap() error { return p.error }

// download fetches the archive of a release and returns its file, whose digest is verified. It goes on where an earlier
// download ended, also one of another process. The store is locked.
func (s *Store) download(ctx context.Context, r release, p flint.Progress) (*os.File, error) {
	step := "fetch " + r.name()
	done := p.Step(step)
	f, err := s.fetchVerified(ctx, r, func(have int64) {
		p.Report(flint.Milestone{Step: step, Line: fmt.Sprintf("%s of %s", flint.Bytes(have), flint.Bytes(r.size))})
	})
	done(flint.Bytes(r.size).String(), err)
	return f, err
}

func (s *Store) fetchVerified(ctx context.Context, r release, progress func(have int64)) (*os.File, error) {
	path := s.path(partPrefix + r.sha256)
	if err := s.dropParts(path); err != nil {
		return nil, s.fault("fetch "+r.name(), err)
	}
	f, err := os.OpenFile(path, os.O_CREATE|os.O_RDWR, 0o600)
	if err != nil {
		return nil, s.fault("fetch "+r.name(), err)
	}
	info, err := f.Stat()
	for {
		if err == nil {
			err = s.fetchAll(ctx, r, f, progress)
		}
		if errors.Is(err, unix.ENOSPC) || errors.Is(err, unix.EDQUOT) {
			err = errors.Join(err, os.Remove(path)) // others need the room
		}
		if err != nil {
			return nil, s.fault("fetch "+r.name(), errors.Join(err, f.Close()))
		}
		got, err := digestOf(ctx, f)
		if err != nil {
			return nil, s.fault("fetch "+r.name(), errors.Join(err, f.Close()))
		}
		if got == r.sha256 {
			return f, nil
		}
		if info.Size() == 0 {
			err = digestFault("fetch "+r.name(), got, r.sha256, "do not use it; try again, and see what lies between this machine and GitHub that changes files")
			return nil, errors.Join(err, f.Close(), os.Remove(path))
		}
		// What was there before may be what is wrong.
		if err = f.Truncate(0); err == nil {
			info, err = f.Stat()
		}
		if err != nil {
			return nil, s.fault("fetch "+r.name(), errors.Join(err, f.Close()))
		}
	}
}

func digestFault(what, got, want, fix string) error {
	return &flint.Fault{
		Code: "runner.digest", What: what, Fix: fix,
		Err: fmt.Errorf("its SHA-256 is %s and should be %s", got, want),
	}
}

// dropParts removes downloads of other releases.
func (s *Store) dropParts(keep string) error {
	parts, err := filepath.Glob(s.path(partPrefix + "*"))
	for _, p := range parts {
		if p != keep && err == nil {
			err = ignoreMissing(os.Remove(p))
		}
	}
	return err
}

// fetchAll fetches what f does not have yet, and takes up again what breaks off.
func (s *Store) fetchAll(ctx context.Context, r release, f *os.File, progress func(have int64)) error {
	pause, furthest := s.pause, int64(0)
	for tries := 1; ; tries++ {
		have, err := f.Seek(0, io.SeekEnd)
		if err != nil {
			return err
		}
		if have > r.size {
			if have, err = 0, f.Truncate(0); err != nil {
				return err
			}
		}
		if furthest = max(furthest, have); have == r.size {
			return nil
		}
		n, err := s.fetch(ctx, r, f, have, progress)
		if err == nil {
			continue
		}
		if n > furthest {
			tries, pause, furthest = 0, s.pause, n
		}
		var p passing
		if ctx.Err() != nil || tries >= fetchTries || !errors.As(err, &p) {
			return err
		}
		s.cfg.Log.Debug("download broke off", "software", r.version, "err", err)
		select {
		case <-time.After(pause):
		case <-ctx.Done():
			return ctx.Err()
		}
		pause *= 2
	}
}

// fetch makes one request for what comes behind the first have bytes, and returns how many are there then.
func (s *Store) fetch(ctx context.Context, r release, f *os.File, have int64, progress func(int64)) (n int64, err error) {
	what := "fetch " + r.name()
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	silence := time.AfterFunc(s.idle, func() { cancel(fmt.Errorf("nothing came for %s", s.idle)) })
	defer silence.Stop()
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, r.url, nil)
	if err != nil {
		return 0, err
	}
	req.Header.Set("User-Agent", "flint")
	req.Header.Set("Accept-Encoding", "identity")
	if have > 0 {
		req.Header.Set("Range", fmt.Sprintf("bytes=%d-", have))
	}
	resp, err := s.http.Do(req)
	if err != nil {
		return 0, passing{s.unreachable(what, errors.Join(err, context.Cause(ctx)))}
	}
	defer resp.Body.Close()
	switch {
	case resp.StatusCode == http.StatusPartialContent && strings.HasPrefix(resp.Header.Get("Content-Range"), fmt.Sprintf("bytes %d-", have)):
	case resp.StatusCode == http.StatusOK:
		have = 0 // the whole of it, whatever was asked for
		if err := f.Truncate(0); err != nil {
			return 0, err
		}
	case resp.StatusCode == http.StatusPartialContent, resp.StatusCode == http.StatusRequestedRangeNotSatisfiable:
		return 0, passing{errors.Join(s.unreachable(what, errors.New("the server sends another part than was asked for")), f.Truncate(0))}
	case resp.StatusCode >= http.StatusInternalServerError:
		return 0, passing{s.refused(what, r.version, resp)}
	default:
		return 0, s.refused(what, r.version, resp)
	}
	if _, err := f.Seek(have, io.SeekStart); err != nil {
		return 0, err
	}
	to := &counted{f: f, have: have, size: r.size, progress: progress, silence: silence, idle: s.idle}
	_, err = io.Copy(to, io.LimitReader(resp.Body, r.size-have+1))
	n = to.have
	switch {
	case to.failed != nil:
		return n, to.failed
	case err != nil:
		return n, passing{s.unreachable(what, errors.Join(err, context.Cause(ctx)))}
	case n > r.size:
		return n, s.unusable(what, errors.Join(fmt.Errorf("it has more than the %d bytes that were announced", r.size), f.Truncate(0)))
	case n < r.size:
		return n, passing{s.unreachable(what, fmt.Errorf("it broke off after %s", flint.Bytes(n)))}
	}
	return n, nil
}

// counted writes a download, and tells each twentieth of it.
type counted struct {
	f          *os.File
	have, size int64
	progress   func(int64)
	silence    *time.Timer
	idle       time.Duration
	failed     error // of the file, not of the network
}

func (c *counted) Write(b []byte) (int, error) {
	const parts = 20
	c.silence.Reset(c.idle)
	n, err := c.f.Write(b)
	before := c.have * parts / c.size
	c.have += int64(n)
	if c.have*parts/c.size > before && c.have <= c.size {
		c.progress(c.have)
	}
	c.failed = err
	return n, err
}

// digestOf returns the SHA-256 of a file as hexadecimal digits, and leaves it at its start.
func digestOf(ctx context.Context, f *os.File) (string, error) {
	if _, err := f.Seek(0, io.SeekStart); err != nil {
		return "", err
	}
	sum := sha256.New()
	if _, err := io.Copy(sum, reader{ctx, f}); err != nil {
		return "", err
	}
	_, err := f.Seek(0, io.SeekStart)
	return hex.EncodeToString(sum.Sum(nil)), err
}

// reader ends with its context.
type reader struct {
	ctx context.Context
	r   io.Reader
}

func (r reader) Read(b []byte) (int, error) {
	if err := r.ctx.Err(); err != nil {
		return 0, err
	}
	return r.r.Read(b)
}
