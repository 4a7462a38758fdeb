package image

import (
	"context"
	"encoding/base64"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"math/rand/v2"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/google/go-containerregistry/pkg/name"
	fake "github.com/google/go-containerregistry/pkg/registry"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/empty"
	"github.com/google/go-containerregistry/pkg/v1/layout"
	"github.com/google/go-containerregistry/pkg/v1/mutate"
	"github.com/google/go-containerregistry/pkg/v1/remote"
	"github.com/google/go-containerregistry/pkg/v1/static"
	"github.com/google/go-containerregistry/pkg/v1/types"

	"flint"
)

// badRegistry is a registry that can misbehave.
type badRegistry struct {
	*httptest.Server
	host string
	// before may answer a request instead of the registry; it reports whether it did.
	before atomic.Pointer[func(w http.ResponseWriter, r *http.Request) bool]
	sent   atomic.Int64 // bytes of blobs
	inner  http.Handler
}

func newRegistry(t testing.TB) *badRegistry {
	t.Helper()
	r := &badRegistry{}
	r.inner = fake.New(fake.Logger(slog.NewLogLogger(slog.DiscardHandler, 0)))
	r.Server = httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, req *http.Request) {
		if f := r.before.Load(); f != nil && (*f)(w, req) {
			return
		}
		if isBlob(req) {
			w = &counter{w, &r.sent}
		}
		r.inner.ServeHTTP(w, req)
	}))
	t.Cleanup(r.Close)
	r.host = strings.TrimPrefix(r.URL, "http://")
	return r
}

func (r *badRegistry) misbehave(f func(w http.ResponseWriter, r *http.Request) bool) {
	r.before.Store(&f)
}

// push stores an image and returns its reference.
func (r *badRegistry) push(t testing.TB, as string, img remote.Taggable) string {
	t.Helper()
	ref, err := name.ParseReference(r.host + "/" + as)
	if err != nil {
		t.Fatal(err)
	}
	switch img := img.(type) {
	case v1.Image:
		err = remote.Write(ref, img)
	case v1.ImageIndex:
		err = remote.WriteIndex(ref, img)
	}
	if err != nil {
		t.Fatal(err)
	}
	return ref.String()
}

func isBlob(r *http.Request) bool {
	return r.Method == http.MethodGet && strings.Contains(r.URL.Path, "/blobs/")
}

// counter counts what is answered.
type counter struct {
	http.ResponseWriter
	n *atomic.Int64
}

func (c *counter) Write(p []byte) (int, error) {
	n, err := c.ResponseWriter.Write(p)
	c.n.Add(int64(n))
	return n, err
}

// bigImage is an image with one layer that does not compress, of about that size.
func bigImage(t testing.TB, size int) v1.Image {
	t.Helper()
	b := make([]byte, size)
	_, _ = rand.NewChaCha8([32]byte{}).Read(b)
	return testImage(t, pack(t, file("big", string(b))))
}

func hastyStore(t testing.TB) *Store {
	s := testStore(t)
	s.pause = time.Millisecond
	return s
}

func wantNoDownload(t testing.TB, s *Store) {
	t.Helper()
	if left, err := os.ReadDir(s.path(pullDir)); err != nil || len(left) > 0 {
		t.Errorf("left of downloads: %v, %v", left, err)
	}
	wantEmptyTmp(t, s)
}

// forPlatforms is an index with an image for each platform.
func forPlatforms(t testing.TB, img v1.Image, platforms ...v1.Platform) v1.ImageIndex {
	t.Helper()
	var index v1.ImageIndex = empty.Index
	for _, p := range platforms {
		config, err := img.ConfigFile()
		if err != nil {
			t.Fatal(err)
		}
		config = config.DeepCopy()
		config.OS, config.Architecture = p.OS, p.Architecture
		one, err := mutate.ConfigFile(img, config)
		if err != nil {
			t.Fatal(err)
		}
		index = mutate.AppendManifests(index, mutate.IndexAddendum{Add: one, Descriptor: v1.Descriptor{Platform: &p}})
	}
	return index
}

func TestBaseFromRegistry(t *testing.T) {
	r, s := newRegistry(t), hastyStore(t)
	img := testImage(t, pack(t, file("f", "1")))
	ref := r.push(t, "team/image:1", forPlatforms(t, img, v1.Platform{OS: "windows", Architecture: "s390x"}, v1.Platform{OS: "linux", Architecture: runtime.GOARCH}))
	b := wantBase(t, s, Want{Ref: ref})
	checkConfig(t, b)
	wantNoDownload(t, s)

	// The tag moves on.
	r.push(t, "team/image:1", testImage(t, pack(t, file("f", "2"))))
	for _, p := range []Pull{Missing, Daily} {
		if again := wantBase(t, s, Want{Ref: ref, Pull: p}); again.Digest != b.Digest {
			t.Errorf("pull %q gave the new image", p)
		}
	}
	newer := wantBase(t, s, Want{Ref: "docker://" + ref, Pull: Always})
	if newer.Digest == b.Digest {
		t.Error("a moved tag gave the old image")
	}
	if again := wantBase(t, s, Want{Ref: ref}); again.Digest != newer.Digest {
		t.Error("what was pulled is not what the tag gives from now on")
	}
	// A day later it has moved again.
	parsed, err := name.ParseReference(ref)
	if err != nil {
		t.Fatal(err)
	}
	s.note(keyOf(Ext4.Version(), "registry", parsed.Name(), runtime.GOARCH), answered{newer, time.Now().Add(-day)})
	r.push(t, "team/image:1", img)
	if again := wantBase(t, s, Want{Ref: ref, Pull: Daily}); again.Digest != b.Digest {
		t.Error("a day later the tag gave the old image")
	}
}

func TestRegistryThatFails(t *testing.T) {
	img := bigImage(t, 1<<20)
	always := func(status int) func(http.ResponseWriter, *http.Request) bool {
		return func(w http.ResponseWriter, _ *http.Request) bool { w.WriteHeader(status); return true }
	}
	blobs := func(f func(w http.ResponseWriter, r *http.Request)) func(http.ResponseWriter, *http.Request) bool {
		return func(w http.ResponseWriter, r *http.Request) bool {
			if isBlob(r) {
				f(w, r)
			}
			return isBlob(r)
		}
	}
	for _, tc := range []struct {
		name, code, says string
		kind             error
		answer           func(w http.ResponseWriter, r *http.Request) bool
	}{
		{"refuses", "image.login", "refuses the login", flint.ErrPermission, func(w http.ResponseWriter, _ *http.Request) bool {
			w.Header().Set("WWW-Authenticate", `Basic realm="x"`)
			w.WriteHeader(http.StatusUnauthorized)
			return true
		}},
		{"forbids", "image.login", "refuses the login", flint.ErrPermission, blobs(func(w http.ResponseWriter, _ *http.Request) { w.WriteHeader(http.StatusForbidden) })},
		{"is asked too often", "image.limit", "pull rate limit", nil, func(w http.ResponseWriter, _ *http.Request) bool {
			w.WriteHeader(http.StatusTooManyRequests)
			_, _ = io.WriteString(w, `{"errors": [{"code": "TOOMANYREQUESTS", "message": "you have reached your pull rate limit"}]}`)
			return true
		}},
		{"is asked for blobs too often", "image.limit", "429", nil, blobs(func(w http.ResponseWriter, _ *http.Request) { w.WriteHeader(http.StatusTooManyRequests) })},
		{"is broken", "image.pull", "cannot be reached", nil, always(http.StatusInternalServerError)},
		{"has broken storage", "image.pull", "500", nil, blobs(func(w http.ResponseWriter, _ *http.Request) { w.WriteHeader(http.StatusInternalServerError) })},
		{"sends something else", "image.digest", "has the digest", flint.ErrConflict, blobs(func(w http.ResponseWriter, _ *http.Request) {
			_, _ = io.WriteString(w, strings.Repeat("x", 2<<20))
		})},
		{"sends nothing", "image.pull", "nothing came for", nil, blobs(func(w http.ResponseWriter, r *http.Request) {
			w.WriteHeader(http.StatusOK)
			w.(http.Flusher).Flush()
			<-r.Context().Done()
		})},
		{"sends nonsense parts", "image.pull", "", nil, blobs(func(w http.ResponseWriter, _ *http.Request) {
			w.Header().Set("Content-Range", "bytes 77-78/79")
			w.WriteHeader(http.StatusPartialContent)
		})},
	} {
		t.Run(tc.name, func(t *testing.T) {
			r, s := newRegistry(t), hastyStore(t)
			ref := r.push(t, "a/b:1", testImage(t, pack(t, file("f", "1"))))
			good := wantBase(t, s, Want{Ref: ref})
			r.push(t, "a/b:1", img)
			r.misbehave(tc.answer)
			patience := s.silence
			if tc.says == "nothing came for" {
				s.silence = 100 * time.Millisecond
			}
			_, err := s.Base(t.Context(), Want{Ref: ref, Pull: Always})
			wantFault(t, err, tc.code, tc.says)
			if tc.kind != nil && !errors.Is(err, tc.kind) {
				t.Errorf("%v is not %v", err, tc.kind)
			}
			if f := s.Failed(ref); f == nil || !strings.Contains(f.Why, tc.says) || f.Ref != ref {
				t.Errorf("remembered as %+v", f)
			}
			b := wantBase(t, s, Want{Ref: ref, Pull: Always, OrLast: true})
			if b.Digest != good.Digest || b.Stale == nil {
				t.Errorf("instead of the last good one: %+v", b)
			}
			r.before.Store(nil)
			s.silence = patience
			if b := wantBase(t, s, Want{Ref: ref, Pull: Always, OrLast: true}); b.Digest == good.Digest || b.Stale != nil {
				t.Errorf("when it is well again: %+v", b)
			}
			if f := s.Failed(ref); f != nil {
				t.Errorf("still remembered: %+v", f)
			}
			wantNoDownload(t, s)
		})
	}
}

func TestRegistryHasNothingForThisMachine(t *testing.T) {
	r, s := newRegistry(t), hastyStore(t)
	img := testImage(t, pack(t, file("f", "1")))
	other := v1.Platform{OS: "linux", Architecture: "s390x"}
	index := forPlatforms(t, img, other)
	_, err := s.Base(t.Context(), Want{Ref: r.push(t, "a/index:1", index)})
	wantFault(t, err, "image.platform", "linux/s390x", runtime.GOARCH)
	m, err := index.IndexManifest()
	if err != nil {
		t.Fatal(err)
	}
	alone, err := index.Image(m.Manifests[0].Digest)
	if err != nil {
		t.Fatal(err)
	}
	_, err = s.Base(t.Context(), Want{Ref: r.push(t, "a/image:1", alone)})
	wantFault(t, err, "image.platform", "linux/s390x", runtime.GOARCH)
	var ended []flint.Milestone
	_, err = s.Base(t.Context(), Want{Ref: r.host + "/a/none:1", Progress: func(m flint.Milestone) {
		if m.Done {
			ended = append(ended, m)
		}
	}})
	wantFault(t, err, "image.pull", "does not have it")
	if len(ended) != 1 || ended[0].Err == nil || ended[0].Detail != "" {
		t.Errorf("the step ended with %+v", ended)
	}
	if !errors.Is(err, flint.ErrNotFound) {
		t.Errorf("%v is not ErrNotFound", err)
	}
	r.Close()
	_, err = s.Base(t.Context(), Want{Ref: r.host + "/a/none:1"})
	wantFault(t, err, "image.pull", "connection refused")
	wantNoDownload(t, s)
}

// TestVariantsOfAnArchitecture has images for several variants of this machine's: the one for all of them is taken.
func TestVariantsOfAnArchitecture(t *testing.T) {
	r := newRegistry(t)
	var variants []v1.Image
	for i := range 4 {
		variants = append(variants, testImage(t, pack(t, file("f", fmt.Sprint(i)))))
	}
	here := func(variant string) *v1.Platform {
		return &v1.Platform{OS: "linux", Architecture: runtime.GOARCH, Variant: variant}
	}
	for name, tc := range map[string]struct {
		platforms []*v1.Platform
		want      int
		several   bool // where they are the entries of a layout
	}{
		"plain comes last":  {[]*v1.Platform{here("v3"), here("v2"), here("")}, 2, false},
		"plain comes first": {[]*v1.Platform{here(""), here("v2")}, 0, false},
		"none is plain":     {[]*v1.Platform{here("v2"), here("v3")}, 0, false},
		"two are the same":  {[]*v1.Platform{here("v2"), here(""), here("")}, 1, true}, // with other compression, say
		"one says nothing":  {[]*v1.Platform{nil, here("")}, 1, true},
	} {
		t.Run(name, func(t *testing.T) {
			s, plain := hastyStore(t), filepath.Join(t.TempDir(), "layout")
			want := wantBase(t, s, Want{Ref: r.push(t, "a/alone:1", variants[tc.want]), Pull: Always})
			var index v1.ImageIndex = empty.Index
			for i, p := range tc.platforms {
				index = mutate.AppendManifests(index, mutate.IndexAddendum{Add: variants[i], Descriptor: v1.Descriptor{Platform: p}})
			}
			if b := wantBase(t, s, Want{Ref: r.push(t, "a/index:1", index), Pull: Always}); b.Digest != want.Digest {
				t.Error("the registry gave another")
			}
			if _, err := layout.Write(plain, index); err != nil {
				t.Fatal(err)
			}
			b, err := s.Base(t.Context(), Want{Ref: plain})
			if tc.several {
				wantFault(t, err, "image.missing", "several images")
			} else if err != nil || b.Digest != want.Digest {
				t.Errorf("the layout gave %+v, %v", b, err)
			}
		})
	}
	if p := here("v8"); ordinary(v1.Descriptor{Platform: p}) != (p.Architecture == "arm64") {
		t.Error("v8 is what all machines of arm64 are, and of no other architecture")
	}
}

// TestDamagedLayer has a registry that serves what the manifest promises, which is no layer.
func TestDamagedLayer(t *testing.T) {
	r, s := newRegistry(t), hastyStore(t)
	for name, content := range map[string]string{"garbage": "no gzip at all", "cut": "\x1f\x8b\x08\x00\x00\x00\x00\x00\x00\xff\x01"} {
		img, err := mutate.AppendLayers(testImage(t), static.NewLayer([]byte(content), types.OCILayer))
		if err != nil {
			t.Fatal(err)
		}
		_, err = s.Base(t.Context(), Want{Ref: r.push(t, "a/"+name+":1", img)})
		wantFault(t, err, "image.layer")
	}
	wantNoDownload(t, s)
}

func TestPullGoesOnWhereItWasInterrupted(t *testing.T) {
	const size = 2 << 20
	r, s := newRegistry(t), hastyStore(t)
	ref := r.push(t, "a/big:1", bigImage(t, size))
	r.sent.Store(0)
	// The first answers break off after a while; so does the process that asked.
	var answers atomic.Int64
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	r.misbehave(func(w http.ResponseWriter, req *http.Request) bool {
		if !isBlob(req) {
			return false
		}
		cut := &cutter{ResponseWriter: w, left: size / 5}
		if answers.Add(1) == 4 { // of the layer the second or third: the others are of blobs too small to be cut
			cut.end = cancel
		}
		r.inner.ServeHTTP(&counter{cut, &r.sent}, req)
		return true
	})
	if _, err := s.Base(ctx, Want{Ref: ref}); !errors.Is(err, context.Canceled) {
		t.Fatalf("error %v", err)
	}
	list, err := s.List()
	if err != nil || len(list) != 1 || list[0].Kind != KindPull || list[0].Size < size/4 || list[0].InUse {
		t.Fatalf("of the interrupted pull there is %+v, %v", list, err)
	}
	r.before.Store(nil)
	var lines []string
	wantBase(t, another(t, s), Want{Ref: ref, Progress: func(m flint.Milestone) {
		if m.Line != "" {
			lines = append(lines, m.Line)
		}
	}})
	if sent := r.sent.Load(); sent > size+size/4 {
		t.Errorf("%d bytes were sent for an image of %d", sent, size)
	}
	if len(lines) == 0 || !strings.Contains(lines[0], " of 2") {
		t.Errorf("progress: %q", lines)
	}
	wantNoDownload(t, s)
}

// cutter hangs up after so many bytes, or ends something and then waits to be hung up on.
type cutter struct {
	http.ResponseWriter
	left int
	end  func()
}

func (c *cutter) Write(p []byte) (int, error) {
	if len(p) < c.left {
		c.left -= len(p)
		return c.ResponseWriter.Write(p)
	}
	_, _ = c.ResponseWriter.Write(p[:c.left])
	c.ResponseWriter.(http.Flusher).Flush()
	if c.end != nil {
		c.end()
	}
	panic(http.ErrAbortHandler)
}

func TestPullOnFullDisk(t *testing.T) {
	disk, _ := smallDisk(t, 5*flint.MiB)
	r := newRegistry(t)
	small, large := r.push(t, "a/small:1", testImage(t, pack(t, file("f", "1")))), r.push(t, "a/large:1", bigImage(t, 6<<20))
	s, err := Open(filepath.Join(disk, "store"), slog.New(slog.DiscardHandler))
	if err != nil {
		t.Fatal(err)
	}
	good := wantBase(t, s, Want{Ref: small})
	_, err = s.Base(t.Context(), Want{Ref: large})
	wantFault(t, err, "image.space", "no space left on device")
	wantNoDownload(t, s)
	wantImages(t, s, good)
}

func TestLogins(t *testing.T) {
	r := newRegistry(t)
	ref := r.push(t, "team/image:1", testImage(t, pack(t, file("f", "1"))))
	r.misbehave(func(w http.ResponseWriter, req *http.Request) bool {
		if user, password, ok := req.BasicAuth(); ok && user == "me" && password == "secret" {
			return false
		}
		w.Header().Set("WWW-Authenticate", `Basic realm="x"`)
		w.WriteHeader(http.StatusUnauthorized)
		return true
	})
	home := t.TempDir()
	t.Setenv("HOME", home)
	t.Setenv("XDG_CONFIG_HOME", "")
	t.Setenv("XDG_RUNTIME_DIR", filepath.Join(home, "run"))
	t.Setenv("REGISTRY_AUTH_FILE", "")
	t.Setenv("DOCKER_CONFIG", filepath.Join(home, ".docker")) // the library looks for HOME once in a process
	put := func(path, content string, mode os.FileMode) {
		path = filepath.Join(home, path)
		if err := errors.Join(os.MkdirAll(filepath.Dir(path), 0o755), os.WriteFile(path, []byte(content), mode)); err != nil {
			t.Fatal(err)
		}
	}
	t.Setenv("PATH", filepath.Join(home, "bin")+":/usr/bin:/bin")
	helper := func(name, script string) { put("bin/docker-credential-"+name, "#!/bin/sh\n"+script+"\n", 0o755) }
	auth := base64.StdEncoding.EncodeToString([]byte("me:secret"))
	_, err := hastyStore(t).Base(t.Context(), Want{Ref: ref})
	wantFault(t, err, "image.login")
	for name, write := range map[string]func(){
		"docker": func() { put(".docker/config.json", fmt.Sprintf(`{"auths": {%q: {"auth": %q}}}`, r.host, auth), 0o600) },
		"a credential helper": func() {
			helper("test", `cat >/dev/null; echo '{"Username": "me", "Secret": "secret"}'`)
			put(".docker/config.json", fmt.Sprintf(`{"credHelpers": {%q: "test"}}`, r.host), 0o600)
		},
		"podman beside docker": func() {
			put(".docker/config.json", "{}", 0o600)
			put("run/containers/auth.json", fmt.Sprintf(`{"auths": {%q: {"auth": %q}}}`, r.host+"/team", auth), 0o600)
		},
		"a credential helper of podman's beside docker": func() {
			put(".docker/config.json", "{}", 0o600)
			helper("podman", `read host; [ "$host" = `+r.host+` ] && echo '{"Username": "me", "Secret": "secret"}'`)
			put("run/containers/auth.json", fmt.Sprintf(`{"credHelpers": {%q: "podman"}}`, r.host), 0o600)
		},
	} {
		if err := os.RemoveAll(filepath.Join(home, "run")); err != nil {
			t.Fatal(err)
		}
		write()
		if _, err := hastyStore(t).Base(t.Context(), Want{Ref: ref}); err != nil {
			t.Errorf("%s: %v", name, err)
		}
	}
}

// TestLoginsThatCannotBeUsed: that is not the registry's fault, and what is to be mended is named.
func TestLoginsThatCannotBeUsed(t *testing.T) {
	r := newRegistry(t)
	ref := r.push(t, "team/image:1", testImage(t, pack(t, file("f", "1"))))
	for name, tc := range map[string]struct {
		docker, podman string // content of their files; "-" where there is none
		helper         string // the script of a credential helper
		says           string // of the error; empty: it is pulled without a login
	}{
		"none":                   {"-", "-", "", ""},
		"podman's is empty":      {"{}", "", "", ""},
		"docker's is empty":      {"", "-", "", ""},
		"only podman's, empty":   {"-", "", "", ""},
		"docker's is broken":     {"{", "-", "", "config.json"},
		"podman's is broken":     {"{}", "{", "", "auth.json"},
		"docker's names nobody":  {`{"credHelpers": {"HOST": "none"}}`, "-", "", "docker-credential-none"},
		"podman's names nobody":  {"{}", `{"credHelpers": {"HOST": "none"}}`, "", "docker-credential-none"},
		"podman's fails":         {"{}", `{"credHelpers": {"HOST": "bad"}}`, "echo locked; exit 1", "locked"},
		"podman's talks garbage": {"{}", `{"credHelpers": {"HOST": "bad"}}`, "echo garbage", "docker-credential-bad"},
		"podman's has none":      {"{}", `{"credHelpers": {"HOST": "bad"}}`, "echo credentials not found in native keychain; exit 1", ""},
	} {
		t.Run(name, func(t *testing.T) {
			home := t.TempDir()
			t.Setenv("HOME", home)
			t.Setenv("XDG_CONFIG_HOME", "")
			t.Setenv("XDG_RUNTIME_DIR", filepath.Join(home, "run"))
			t.Setenv("REGISTRY_AUTH_FILE", "")
			// The library remembers where docker's is, once for a process.
			t.Setenv("DOCKER_CONFIG", filepath.Join(home, ".docker"))
			t.Setenv("PATH", home+":/usr/bin:/bin")
			put := func(path, content string) {
				if content == "-" {
					return
				}
				path = filepath.Join(home, path)
				content = strings.ReplaceAll(content, "HOST", r.host)
				if err := errors.Join(os.MkdirAll(filepath.Dir(path), 0o755), os.WriteFile(path, []byte(content), 0o755)); err != nil {
					t.Fatal(err)
				}
			}
			put(".docker/config.json", tc.docker)
			put("run/containers/auth.json", tc.podman)
			put("docker-credential-bad", "#!/bin/sh\n"+tc.helper+"\n")
			_, err := hastyStore(t).Base(t.Context(), Want{Ref: ref})
			if tc.says == "" {
				if err != nil {
					t.Error(err)
				}
				return
			}
			wantFault(t, err, "image.login", "kept on this machine", tc.says)
		})
	}
}

// TestManyPullAtOnce fetches each blob once, whoever asks.
func TestManyPullAtOnce(t *testing.T) {
	r, s := newRegistry(t), hastyStore(t)
	ref := r.push(t, "a/image:1", testImage(t, pack(t, file("f", strings.Repeat("x", 1<<16)))))
	var blobs atomic.Int64
	r.misbehave(func(_ http.ResponseWriter, req *http.Request) bool {
		if isBlob(req) && req.Method == http.MethodGet {
			blobs.Add(1)
		}
		return false
	})
	var all sync.WaitGroup
	for range 4 {
		all.Go(func() {
			if _, err := s.Base(t.Context(), Want{Ref: ref}); err != nil {
				t.Error(err)
			}
		})
	}
	all.Wait()
	if n := blobs.Load(); n != 2 {
		t.Errorf("%d blobs were fetched, want the configuration and the layer", n)
	}
}

// TestRedirects has a registry that sends us elsewhere: to a host that fails, into this machine's network, out of TLS.
func TestRedirects(t *testing.T) {
	secret := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		w.WriteHeader(http.StatusBadRequest)
		_, _ = io.WriteString(w, "secret of an internal service")
	}))
	defer secret.Close()
	_, port, err := net.SplitHostPort(secret.Listener.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	blob := func(r *http.Request) bool { return isBlob(r) }
	ping := func(r *http.Request) bool { return r.URL.Path == "/v2/" }
	for name, tc := range map[string]struct {
		of         func(r *http.Request) bool
		to         string
		code, says string
	}{
		"this machine":          {blob, "http://127.0.0.2:" + port, "image.redirect", "127.0.0.2"},
		"this machine's name":   {blob, "http://localhost:" + port, "image.redirect", "localhost"},
		"this machine, by ping": {ping, "http://127.0.0.2:" + port, "image.redirect", "127.0.0.2"},
		"itself":                {blob, "http://127.0.0.1:1", "image.pull", "connection refused"},
	} {
		t.Run(name, func(t *testing.T) {
			r, s := newRegistry(t), hastyStore(t)
			ref := r.push(t, "a/image:1", testImage(t, pack(t, file("f", "x"))))
			r.misbehave(func(w http.ResponseWriter, req *http.Request) bool {
				if tc.of(req) {
					http.Redirect(w, req, tc.to+"/blob?signature=hunter2", http.StatusTemporaryRedirect)
				}
				return tc.of(req)
			})
			_, err := s.Base(t.Context(), Want{Ref: ref})
			wantFault(t, err, tc.code, tc.says)
			// Where a registry sends us may hold a signature.
			if strings.Contains(err.Error(), "hunter2") || strings.Contains(err.Error(), "secret") {
				t.Errorf("error %v", err)
			}
		})
	}
}

// TestWary asks through a transport that answers everything with a redirect, or at its end with an error.
func TestWary(t *testing.T) {
	for name, tc := range map[string]struct {
		hops []string
		says string // of the error; empty: it is followed to the end
	}{
		"to storage":              {[]string{"https://r.example/", "https://storage.example/"}, ""},
		"on to storage":           {[]string{"http://r.example/", "https://cdn.example/", "http://storage.example/"}, ""},
		"out of TLS":              {[]string{"https://r.example/", "http://storage.example/"}, "out of TLS"},
		"out of TLS, later":       {[]string{"https://r.example/", "https://cdn.example/", "http://r.example/"}, "out of TLS"},
		"metadata":                {[]string{"https://r.example/", "https://169.254.169.254/"}, "no public address"},
		"metadata, later":         {[]string{"http://r.example/", "http://cdn.example/", "http://[::ffff:169.254.169.254]/"}, "no public address"},
		"private":                 {[]string{"http://10.0.0.1/", "http://10.0.0.2/"}, "no public address"},
		"private, by IPv6":        {[]string{"http://r.example/", "http://[fd00::1]/"}, "no public address"},
		"link-local, with a zone": {[]string{"http://r.example/", "http://[fe80::1%25eth0]/"}, "no public address"},
		"any":                     {[]string{"http://r.example/", "http://0.0.0.0/"}, "no public address"},
		"public address":          {[]string{"http://r.example/", "http://8.8.8.8/"}, ""},
		"itself":                  {[]string{"http://10.0.0.1:5000/", "http://10.0.0.1:9000/"}, "body"},
	} {
		t.Run(name, func(t *testing.T) {
			hop := 0
			client := http.Client{Transport: wary{tripper(func(req *http.Request) (*http.Response, error) {
				resp := &http.Response{StatusCode: http.StatusFound, Header: http.Header{}, Body: io.NopCloser(strings.NewReader("body")), Request: req}
				if hop++; hop == len(tc.hops) {
					resp.StatusCode = http.StatusBadRequest
				} else {
					resp.Header.Set("Location", tc.hops[hop])
				}
				return resp, nil
			})}}
			resp, err := client.Get(tc.hops[0])
			if err == nil {
				defer resp.Body.Close()
				b, _ := io.ReadAll(resp.Body)
				err = errors.New(string(b))
			}
			if got := err.Error(); !strings.Contains(got, tc.says) || tc.says == "" && got != "" {
				t.Errorf("got %q", got)
			}
		})
	}
}

// tripper is a RoundTripper that is a function.
type tripper func(*http.Request) (*http.Response, error)

// RoundTrip implements http.RoundTripper.
func (t tripper) RoundTrip(r *http.Request) (*http.Response, error) { return t(r) }
