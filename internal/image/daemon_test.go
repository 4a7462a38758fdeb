package image

import (
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-containerregistry/pkg/name"
	archives "github.com/google/go-containerregistry/pkg/v1/tarball"

	"flint"
)

func TestImagesThatAreKeptHere(t *testing.T) {
	img := testImage(t, pack(t, file("f", "1")))
	dir := t.TempDir()
	saved, made := filepath.Join(dir, "saved.tar"), filepath.Join(dir, "made")
	tag, err := name.NewTag("localhost/team/x:1")
	if err != nil {
		t.Fatal(err)
	}
	if err := archives.WriteToFile(saved, tag, img); err != nil {
		t.Fatal(err)
	}
	writeLayout(t, made, "", img)
	s := testStore(t)
	want := wantBase(t, s, Want{Ref: "docker-archive:" + saved})
	checkConfig(t, want)
	if b := wantBase(t, s, Want{Ref: "docker-archive:" + saved + ":localhost/team/x:1"}); b.Digest != want.Digest {
		t.Errorf("by its name in the archive: %+v", b)
	}
	_, err = s.Base(t.Context(), Want{Ref: "docker-archive:" + saved + ":localhost/other:1"})
	wantFault(t, err, "image.missing", "it has localhost/team/x:1")

	for ref, script := range map[string]string{
		"docker-daemon:localhost/team/y": `echo "$@" >>"$log"; case "$*" in "image inspect --format {{.Id}} localhost/team/y") echo sha256:def ;; "save --output "*" sha256:def") cp ` + saved + ` "$3" ;; *) exit 1 ;; esac`,
		"containers-storage:team/x":      `echo "$@" >>"$log"; case "$*" in "inspect --type image --format {{.FromImageID}} team/x") printf abc ;; "push abc oci:"*) cp -r ` + made + ` "${3#oci:}" ;; *) exit 1 ;; esac`,
	} {
		s, program := testStore(t), "docker"
		if strings.HasPrefix(ref, "containers") {
			program = "buildah"
		}
		log := fakeTool(t, program, script)
		for range 2 {
			b := wantBase(t, s, Want{Ref: ref, Pull: Always})
			checkConfig(t, b)
			if b.Digest != want.Digest {
				t.Errorf("%s gave %s", ref, b.Digest)
			}
		}
		asked, err := os.ReadFile(log)
		if err != nil || strings.Count(string(asked), "inspect ") != 2 || strings.Count(string(asked), "\n") != 3 {
			t.Errorf("%s: asked %q, %v", ref, asked, err)
		}
		fakeTool(t, program, "echo 'is the daemon running?' >&2; exit 1")
		_, err = s.Base(t.Context(), Want{Ref: ref, Pull: Always})
		wantFault(t, err, "image.daemon", "is the daemon running?")
		if b := wantBase(t, s, Want{Ref: ref, Pull: Always, OrLast: true}); b.Digest != want.Digest || b.Stale == nil {
			t.Errorf("instead of the last one: %+v", b)
		}
		fakeTool(t, program, `test "$1" = images || { echo 'not known' >&2; exit 1; }`)
		_, err = s.Base(t.Context(), Want{Ref: ref, Pull: Always})
		wantFault(t, err, "image.missing", "no such image", "not known")
		fakeTool(t, "unrelated", "")
		_, err = s.Base(t.Context(), Want{Ref: ref, Pull: Always})
		wantFault(t, err, "image.missing", "not installed")
		wantEmptyTmp(t, s)
	}
	for _, ref := range []string{"docker-daemon:", "docker-daemon:--help", "containers-storage:A B", "docker-archive:/nowhere", "oci-archive:" + dir} {
		_, err := s.Base(t.Context(), Want{Ref: ref})
		wantFault(t, err, "image.missing")
		if !errors.Is(err, flint.ErrNotFound) {
			t.Errorf("%q: %v", ref, err)
		}
	}
}
