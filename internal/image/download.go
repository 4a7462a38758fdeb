package image

import (
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"hash"
	"io"
	"net/http"
	"net/url"
	"os"
	"path/filepath"
	"sync"
	"time"

	"github.com/google/go-containerregistry/pkg/authn"
	"github.com/google/go-containerregistry/pkg/name"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/remote/transport"
	"golang.org/x/sync/errgroup"

	"flint"
	"flint/internal/inuse"
)

const (
	// atOnce is how many blobs of an image are downloaded at the same time.
	atOnce = 3
	// maxFails bounds the tries of one blob that bring less than enough of it.
	maxFails = 5
	enough   = 1 << 20
	// longestSilence is how long a registry may send nothing.
	longestSilence = time.Minute
	// firstPause is how long is waited before a failed download is tried again, at first.
	firstPause = time.Second
)

// digestError says that what was downloaded is not what was promised.
type digestError struct{ want, got string }

// Error implements error.
func (e *digestError) Error() string { return fmt.Sprintf("%s has the digest %s", e.want, e.got) }

// download fetches blobs of a repository to where a layout in dir has them: verified, and going on where an earlier call was
// interrupted.
func (s *Store) download(ctx context.Context, repo name.Repository, blobs []v1.Descriptor, dir string, w Want) error {
	login, err := authn.Resolve(ctx, logins(), repo)
	if err != nil {
		return err
	}
	trip, err := transport.NewWithContext(ctx, repo.Registry, login, s.transport(), []string{repo.Scope(transport.PullScope)})
	if err != nil {
		return err
	}
	d := &downloader{client: &http.Client{Transport: trip}, repo: repo, dir: dir, pause: s.pause, spare: s.spare, progress: w.Progress, step: "pull image " + w.Ref}
	seen := map[v1.Hash]bool{} // an image may have a layer twice
	tasks, ctx := errgroup.WithContext(ctx)
	tasks.SetLimit(atOnce)
	for _, b := range blobs {
		if b.Digest.Algorithm != "sha256" || len(b.Digest.Hex) != 64 {
			return errors.Join(fmt.Errorf("digest %q is not one of sha256", b.Digest), tasks.Wait())
		}
		if seen[b.Digest] {
			continue
		}
		seen[b.Digest] = true
		d.total += b.Size
	}
	for _, b := range blobs {
		if seen[b.Digest] {
			seen[b.Digest] = false
			tasks.Go(func() error { return d.blob(ctx, b) })
		}
	}
	return tasks.Wait()
}

// downloader fetches the blobs of one image.
type downloader struct {
	client   *http.Client
	repo     name.Repository
	dir      string
	pause    time.Duration
	spare    spare
	progress flint.Progress
	step     string
	total    int64

	mu   sync.Mutex
	have int64     // guarded by mu: of total
	said time.Time // guarded by mu
}

// got says how much there is, now and then.
func (d *downloader) got(n int64) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.have += n
	if now := time.Now(); now.Sub(d.said) >= 100*time.Millisecond {
		d.said = now
		d.progress.Report(flint.Milestone{Step: d.step, Line: fmt.Sprintf("%s of %s", flint.Bytes(d.have), flint.Bytes(d.total))})
	}
}

// blob fetches one blob, trying again while that brings it forward.
func (d *downloader) blob(ctx context.Context, b v1.Descriptor) error {
	path := blobPath(d.dir, b.Digest)
	if info, err := os.Stat(path); err == nil && info.Size() == b.Size {
		d.got(b.Size)
		return nil // it has this name since it was verified
	}
	if err := os.MkdirAll(filepath.Dir(path), 0o700); err != nil {
		return err
	}
	f, err := os.OpenFile(path+".part", os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		return err
	}
	defer f.Close()
	sum := sha256.New()
	begun, err := io.Copy(sum, reading(func(p []byte) (int, error) {
		if ctx.Err() != nil {
			return 0, context.Cause(ctx)
		}
		return f.Read(p)
	}))
	if err != nil {
		return fmt.Errorf("read what was downloaded: %w", err)
	}
	d.got(begun)
	err = d.whole(ctx, b, f, sum, begun)
	var bad *digestError
	if errors.As(err, &bad) && begun > 0 { // it is the earlier part that may be bad
		d.got(-b.Size)
		sum.Reset()
		if err = f.Truncate(0); err == nil {
			err = d.whole(ctx, b, f, sum, 0)
		}
	}
	if errors.As(err, &bad) {
		return errors.Join(err, os.Remove(f.Name()))
	}
	if err == nil {
		err = f.Sync()
	}
	if err != nil {
		return fmt.Errorf("download %s: %w", b.Digest, err)
	}
	return os.Rename(f.Name(), path)
}

// whole fetches what is missing from have on, and verifies all.
func (d *downloader) whole(ctx context.Context, b v1.Descriptor, f *os.File, sum hash.Hash, have int64) error {
	have, err := d.rest(ctx, b, f, sum, have)
	if err != nil {
		return err
	}
	if got := "sha256:" + hexSum(sum); have != b.Size || got != b.Digest.String() {
		return &digestError{b.Digest.String(), got}
	}
	return nil
}

// rest fetches what is missing from have on. It returns how much there is then.
func (d *downloader) rest(ctx context.Context, b v1.Descriptor, f *os.File, sum hash.Hash, have int64) (int64, error) {
	pause, fails := d.pause, 0
	for have < b.Size {
		n, from, err := d.more(ctx, b, f, sum, have)
		if from != have { // the registry began anew
			d.got(from - have)
		}
		gained := from + n - have
		have = from + n
		if err == nil && have >= b.Size {
			break
		}
		if err == nil {
			err = io.ErrUnexpectedEOF
		}
		if gained >= enough {
			pause, fails = d.pause, 0
		}
		if fails++; fails >= maxFails || ctx.Err() != nil || final(err) {
			return have, err
		}
		select {
		case <-ctx.Done():
			return have, context.Cause(ctx)
		case <-time.After(pause):
		}
		pause *= 2
	}
	return have, nil
}

// more asks for a blob from have on and appends what comes. A registry that does not serve parts begins anew, and from is 0.
func (d *downloader) more(ctx context.Context, b v1.Descriptor, f *os.File, sum hash.Hash, have int64) (n, from int64, err error) {
	at := url.URL{Scheme: d.repo.Scheme(), Host: d.repo.RegistryStr(), Path: "/v2/" + d.repo.RepositoryStr() + "/blobs/" + b.Digest.String()}
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, at.String(), nil)
	if err != nil {
		return 0, have, err
	}
	if have > 0 {
		req.Header.Set("Range", fmt.Sprintf("bytes=%d-%d", have, b.Size-1))
	}
	resp, err := d.client.Do(req)
	if u := (*url.Error)(nil); errors.As(err, &u) {
		err = u.Err // without its address, which a registry may have signed
	}
	if err != nil {
		return 0, have, causeOf(ctx, err)
	}
	defer resp.Body.Close()
	if err := transport.CheckError(resp, http.StatusOK, http.StatusPartialContent); err != nil {
		return 0, have, err
	}
	begins := fmt.Sprintf("bytes %d-", have)
	if r := resp.Header.Get("Content-Range"); resp.StatusCode != http.StatusPartialContent || len(r) < len(begins) || r[:len(begins)] != begins {
		have = 0
		sum.Reset()
		if resp.StatusCode == http.StatusPartialContent {
			return 0, have, errors.Join(fmt.Errorf("the registry sent the part %.64q of a blob", r), f.Truncate(0))
		}
		if err := f.Truncate(0); err != nil {
			return 0, have, err
		}
	}
	if _, err := f.Seek(have, io.SeekStart); err != nil {
		return 0, have, err
	}
	body := reading(func(p []byte) (int, error) {
		n, err := resp.Body.Read(p)
		d.got(int64(n))
		return n, err
	})
	// One byte more than there may be tells that there is too much.
	n, err = io.Copy(io.MultiWriter(&guard{File: f, spare: d.spare}, sum), io.LimitReader(body, b.Size-have+1))
	return n, have, causeOf(ctx, err)
}

// reading is a reader that is a function.
type reading func([]byte) (int, error)

// Read implements io.Reader.
func (r reading) Read(p []byte) (int, error) { return r(p) }

// causeOf says why a context ended, where that is why there is an error.
func causeOf(ctx context.Context, err error) error {
	if err != nil && ctx.Err() != nil {
		return context.Cause(ctx)
	}
	return err
}

// final reports whether trying again is of no use: the registry said no, or this machine did.
func final(err error) bool {
	var t *transport.Error
	if errors.As(err, &t) {
		return t.StatusCode < http.StatusInternalServerError && t.StatusCode != http.StatusTooManyRequests && t.StatusCode != http.StatusRequestTimeout
	}
	var path *os.PathError
	var redirect *redirectError
	return errors.As(err, &path) || errors.As(err, &redirect)
}

// holdDownload makes the directory of a download and keeps it from a GC until release.
func (s *Store) holdDownload(dir string) (release func(), err error) {
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, fmt.Errorf("make download directory: %w", err)
	}
	f, err := inuse.Hold(dir)
	if err != nil {
		return nil, fmt.Errorf("hold download directory: %w", err)
	}
	s.used(dir)
	return func() { f.Close() }, nil
}

// dropDownload removes a download that is of no use any more.
func (s *Store) dropDownload(dir string) {
	if err := os.RemoveAll(dir); err != nil {
		s.log.Warn("remove what was downloaded", "err", err)
	}
}
