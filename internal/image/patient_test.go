package image

import (
	"context"
	"fmt"
	"io"
	"net/http"
	"path/filepath"
	"runtime"
	"strings"
	"testing"
	"time"

	"github.com/google/go-containerregistry/pkg/name"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	archives "github.com/google/go-containerregistry/pkg/v1/tarball"

	"flint"
)

// TestSilentRegistry has a registry that takes a request and says nothing, or no more, each time at another request.
func TestSilentRegistry(t *testing.T) {
	silent := func(w http.ResponseWriter, r *http.Request) { <-r.Context().Done() }
	begins := func(w http.ResponseWriter, r *http.Request) {
		_, _ = io.WriteString(w, "{")
		w.(http.Flusher).Flush()
		<-r.Context().Done()
	}
	for name, tc := range map[string]struct {
		at     string // in the path of a request
		answer func(w http.ResponseWriter, r *http.Request)
	}{
		"greeting":            {"/v2/", silent},
		"token":               {"/token", silent},
		"end of the token":    {"/token", begins},
		"index":               {"/manifests/1", silent},
		"end of the index":    {"/manifests/1", begins},
		"manifest":            {"/manifests/sha256:", silent},
		"end of the manifest": {"/manifests/sha256:", begins},
		"blob":                {"/blobs/", silent},
		"end of a blob":       {"/blobs/", begins},
	} {
		t.Run(name, func(t *testing.T) {
			r, s := newRegistry(t), hastyStore(t)
			s.silence = 100 * time.Millisecond
			ref := r.push(t, "a/b:1", forPlatforms(t, testImage(t, pack(t, file("f", "1"))), v1.Platform{OS: "linux", Architecture: runtime.GOARCH}))
			r.misbehave(func(w http.ResponseWriter, req *http.Request) bool {
				switch {
				case strings.Contains(req.URL.Path, tc.at):
					tc.answer(w, req)
				case req.URL.Path == "/token":
					_, _ = io.WriteString(w, `{"token": "t"}`)
				case req.Header.Get("Authorization") == "":
					w.Header().Set("WWW-Authenticate", fmt.Sprintf(`Bearer realm="http://%s/token"`, r.host))
					w.WriteHeader(http.StatusUnauthorized)
				default:
					return false
				}
				return true
			})
			// Far more than it needs, so that one that waits for ever fails here and not with the whole run.
			ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
			defer cancel()
			_, err := s.Base(ctx, Want{Ref: ref})
			wantFault(t, err, "image.pull", "nothing came for 100ms")
		})
	}
}

// dockerSaves makes an archive such as docker save does.
func dockerSaves(t testing.TB) (path string) {
	t.Helper()
	path = filepath.Join(t.TempDir(), "saved.tar")
	tag, err := name.NewTag("localhost/flint:latest")
	if err != nil {
		t.Fatal(err)
	}
	if err := archives.WriteToFile(path, tag, testImage(t, pack(t, file("f", "1")))); err != nil {
		t.Fatal(err)
	}
	return path
}

// TestBuildThatNeverEnds: it is ended, and the last good image is used.
func TestBuildThatNeverEnds(t *testing.T) {
	s, saved := testStore(t), dockerSaves(t)
	fakeTool(t, "docker", `case "$1" in buildx) exit 1 ;; save) cp `+saved+` "$3" ;; esac`)
	dir := dockerfileDir(t, "FROM scratch")
	good := wantBase(t, s, Want{Ref: dir})
	fakeTool(t, "docker", `case "$1" in buildx) exit 1 ;; build) while :; do sleep 60; done ;; esac`)
	s.longest = 300 * time.Millisecond
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	_, err := s.Base(ctx, Want{Ref: dir, Pull: Always})
	wantFault(t, err, "image.slow", "within 300ms")
	if f := s.Failed(dir); f == nil || !strings.Contains(f.Why, "within 300ms") {
		t.Errorf("remembered as %+v", f)
	}
	b, err := s.Base(ctx, Want{Ref: dir, Pull: Always, OrLast: true})
	if err != nil || b.Digest != good.Digest {
		t.Fatalf("instead of the last good one: %+v, %v", b, err)
	}
	wantFault(t, b.Stale, "image.slow")
	wantEmptyTmp(t, s)
}

// TestDockerBuildsSideBySide: a build that hangs does not keep another Dockerfile's from being made.
func TestDockerBuildsSideBySide(t *testing.T) {
	s, saved := testStore(t), dockerSaves(t)
	hangs, other := dockerfileDir(t, "HANGS"), dockerfileDir(t, "FROM scratch")
	fakeTool(t, "docker", `case "$1" in
buildx) exit 1 ;;
build) for last; do :; done; if grep -q HANGS "$last/Dockerfile"; then echo hanging; while :; do sleep 60; done; fi ;;
save) cp `+saved+` "$3" ;;
esac`)
	ctx, cancel := context.WithCancel(t.Context())
	hanging, ended := make(chan struct{}), make(chan struct{})
	go func() {
		defer close(ended)
		_, _ = s.Base(ctx, Want{Ref: hangs, Progress: func(m flint.Milestone) {
			if m.Line == "hanging" {
				close(hanging)
			}
		}})
	}()
	defer func() { cancel(); <-ended }()
	<-hanging
	in, done := context.WithTimeout(t.Context(), time.Minute)
	defer done()
	if _, err := s.Base(in, Want{Ref: other}); err != nil {
		t.Error(err)
	}
}
