package runnersoft

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"regexp"
	"strconv"
	"strings"
	"time"

	"flint"
)

const (
	maxAnswer  = 4 * flint.MiB // of the API; a release's is some 30 KiB
	maxArchive = 2 * flint.GiB // of a release; some 200 MiB
	askTimeout = 30 * time.Second
	maxHops    = 10
)

// release is what GitHub says of the runner for one architecture.
type release struct {
	version   string
	published time.Time
	url       string
	size      int64
	sha256    string // 64 hexadecimal digits
}

func (r release) name() string { return "runner software " + r.version }

// answer is what is read of GitHub's answer.
type answer struct {
	Tag       string    `json:"tag_name"`
	Published time.Time `json:"published_at"`
	Body      string    `json:"body"`
	Assets    []struct {
		Name   string `json:"name"`
		Size   int64  `json:"size"`
		Digest string `json:"digest"` // "sha256:…"; releases from before June 2025 have none
		URL    string `json:"browser_download_url"`
	} `json:"assets"`
}

var digestForm = regexp.MustCompile(`^[0-9a-f]{64}$`)

// bodyDigest finds the digest that the notes of a release have between two comments for each platform.
func bodyDigest(body, arch string) string {
	_, rest, found := strings.Cut(body, "<!-- BEGIN SHA linux-"+arch+" -->")
	digest, _, ended := strings.Cut(rest, "<!-- END SHA linux-"+arch+" -->")
	if !found || !ended {
		return ""
	}
	return strings.ToLower(strings.TrimSpace(digest))
}

// lookUp asks for a release, the newest when version is empty.
func (s *Store) lookUp(ctx context.Context, version string) (release, error) {
	what, path := "look up the newest runner software", "latest"
	if version != "" {
		what, path = "look up runner software "+version, "tags/v"+version
	}
	if s.arch == "" {
		return release{}, &flint.Fault{
			Code: "runner.arch", What: what, Kind: flint.ErrConfig, Err: errors.New("GitHub has no runner for this architecture"),
			Fix: "set runner.dir to software of another source",
		}
	}
	ctx, cancel := context.WithTimeout(ctx, askTimeout)
	defer cancel()
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, s.cfg.API+"/repos/actions/runner/releases/"+path, nil)
	if err != nil {
		return release{}, fmt.Errorf("%s: %w", what, err)
	}
	req.Header.Set("Accept", "application/vnd.github+json")
	req.Header.Set("X-Github-Api-Version", "2022-11-28")
	req.Header.Set("User-Agent", "flint")
	resp, err := s.http.Do(req)
	if err != nil {
		return release{}, s.unreachable(what, err)
	}
	defer resp.Body.Close()
	if resp.StatusCode != http.StatusOK {
		return release{}, s.refused(what, version, resp)
	}
	body, err := io.ReadAll(io.LimitReader(resp.Body, int64(maxAnswer)+1))
	if err != nil {
		return release{}, s.unreachable(what, err)
	}
	var a answer
	if len(body) > int(maxAnswer) {
		err = fmt.Errorf("the answer is longer than %s", maxAnswer)
	} else {
		err = json.Unmarshal(body, &a)
	}
	if err != nil {
		return release{}, s.unusable(what, err)
	}
	r, err := a.pick(s.arch, s.cfg.API)
	if err == nil && version != "" && r.version != version {
		err = fmt.Errorf("the answer is of version %s", r.version)
	}
	if err != nil {
		return release{}, s.unusable(what, err)
	}
	return r, nil
}

// pick takes the archive of an architecture out of an answer.
func (a answer) pick(arch, api string) (release, error) {
	version := strings.TrimPrefix(a.Tag, "v")
	if !isVersion(version) {
		return release{}, fmt.Errorf("its tag %.60q is no version", a.Tag)
	}
	name := fmt.Sprintf("actions-runner-linux-%s-%s.tar.gz", arch, version)
	for _, x := range a.Assets {
		if x.Name != name {
			continue
		}
		digest, fromBody := strings.ToLower(strings.TrimPrefix(x.Digest, "sha256:")), bodyDigest(a.Body, arch)
		if digest == "" {
			digest = fromBody
		}
		switch {
		case !digestForm.MatchString(digest):
			return release{}, fmt.Errorf("it has no SHA-256 of %s", name)
		case digestForm.MatchString(fromBody) && fromBody != digest:
			return release{}, fmt.Errorf("it has two SHA-256 of %s, %s and %s", name, digest, fromBody)
		case x.Size <= 0 || x.Size > int64(maxArchive):
			return release{}, fmt.Errorf("its %s has %d bytes", name, x.Size)
		}
		at, err := url.Parse(x.URL)
		if err != nil || at.Host == "" || at.Scheme != "https" && (at.Scheme != "http" || !strings.HasPrefix(api, "http:")) {
			return release{}, fmt.Errorf("its %s is at %.100q, which is no address to fetch from", name, x.URL)
		}
		return release{version: version, published: a.Published, url: x.URL, size: x.Size, sha256: digest}, nil
	}
	return release{}, fmt.Errorf("version %s has no %s", version, name)
}

// client fetches, and follows redirections as long as they do not leave TLS.
func client(transport http.RoundTripper) *http.Client {
	return &http.Client{Transport: transport, CheckRedirect: func(req *http.Request, via []*http.Request) error {
		switch {
		case len(via) >= maxHops:
			return fmt.Errorf("more than %d redirections", maxHops)
		case via[0].URL.Scheme == "https" && req.URL.Scheme != "https":
			return errors.New("redirected to an address without TLS")
		}
		return nil
	}}
}

// The faults of the far end.

const importFix = "or take a file fetched elsewhere: flint runner-software import actions-runner-linux-….tar.gz"

func (s *Store) unreachable(what string, err error) error {
	return &flint.Fault{
		Code: "runner.unreachable", What: what, Err: err,
		Fix: "check that this machine reaches " + s.cfg.API + " (names, network, HTTPS_PROXY); " + importFix,
	}
}

func (s *Store) unusable(what string, err error) error {
	return &flint.Fault{
		Code: "runner.release", What: what, Err: err,
		Fix: "name another version: flint runner-software pull 2.…; check what " + s.cfg.API + " is; " + importFix,
	}
}

// refused reads an answer that is none.
func (s *Store) refused(what, version string, resp *http.Response) error {
	why := fmt.Errorf("%s answered %d %s", resp.Request.URL.Host, resp.StatusCode, http.StatusText(resp.StatusCode))
	limited := resp.Header.Get("Retry-After") != "" || resp.Header.Get("X-Ratelimit-Remaining") == "0"
	switch {
	case resp.StatusCode == http.StatusNotFound:
		fix := "see https://github.com/actions/runner/releases for what there is"
		if version == "" {
			fix = "set runner.releases to a server that has the repository actions/runner; " + importFix
		}
		return &flint.Fault{Code: "runner.unknown", What: what, Kind: flint.ErrNotFound, Err: why, Fix: fix}
	case resp.StatusCode == http.StatusTooManyRequests, resp.StatusCode == http.StatusForbidden && limited:
		return &flint.Fault{
			Code: "runner.limited", What: what, Fix: "try again then: GitHub answers an address 60 times an hour; " + importFix,
			Err: fmt.Errorf("%w: too many requests from this address, until %s", why, limitEnd(resp.Header, time.Now())),
		}
	}
	return s.unreachable(what, why)
}

// limitEnd says when GitHub answers again.
func limitEnd(h http.Header, now time.Time) string {
	if n, err := strconv.Atoi(h.Get("Retry-After")); err == nil && n >= 0 && n < 1e6 {
		return now.Add(time.Duration(n) * time.Second).Format(time.TimeOnly)
	}
	if n, err := strconv.ParseInt(h.Get("X-Ratelimit-Reset"), 10, 64); err == nil && n > 0 {
		return time.Unix(n, 0).Format(time.TimeOnly)
	}
	return "it does not say when"
}
