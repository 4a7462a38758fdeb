package image

import (
	"archive/tar"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/google/go-containerregistry/pkg/name"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/empty"
	"github.com/google/go-containerregistry/pkg/v1/layout"
	"github.com/google/go-containerregistry/pkg/v1/mutate"
	archives "github.com/google/go-containerregistry/pkg/v1/tarball"
	"github.com/google/go-containerregistry/pkg/v1/types"
	"golang.org/x/sys/unix"

	"flint"
	"flint/internal/rootfs"
	"flint/internal/rootfs/rootfstest"
)

// testImage makes an image of layers, with a configuration that Base has to carry over.
func testImage(t testing.TB, layers ...[]byte) v1.Image {
	t.Helper()
	img := mutate.ConfigMediaType(mutate.MediaType(empty.Image, types.OCIManifestSchema1), types.OCIConfigJSON)
	for _, b := range layers {
		l, err := archives.LayerFromOpener(func() (io.ReadCloser, error) { return io.NopCloser(bytes.NewReader(b)), nil }, archives.WithMediaType(types.OCILayer))
		if err != nil {
			t.Fatal(err)
		}
		if img, err = mutate.AppendLayers(img, l); err != nil {
			t.Fatal(err)
		}
	}
	config, err := img.ConfigFile()
	if err != nil {
		t.Fatal(err)
	}
	config = config.DeepCopy()
	config.OS, config.Architecture = "linux", runtime.GOARCH
	config.Config = v1.Config{
		Env: []string{"A=b"}, User: "runner:1", WorkingDir: "/work", Entrypoint: []string{"/entry"}, Cmd: []string{"arg"},
	}
	if img, err = mutate.ConfigFile(img, config); err != nil {
		t.Fatal(err)
	}
	return img
}

// writeLayout adds an image to a layout directory under a tag.
func writeLayout(t testing.TB, dir, tag string, img v1.Image) {
	t.Helper()
	to, err := layout.FromPath(dir)
	if err != nil {
		to, err = layout.Write(dir, empty.Index)
	}
	if err != nil {
		t.Fatal(err)
	}
	if err := to.AppendImage(img, layout.WithAnnotations(map[string]string{refAnnotation: tag})); err != nil {
		t.Fatal(err)
	}
}

func wantBase(t testing.TB, s *Store, w Want) Base {
	t.Helper()
	b, err := s.Base(t.Context(), w)
	if err != nil {
		t.Fatal(err)
	}
	return b
}

func checkConfig(t testing.TB, b Base) {
	t.Helper()
	if got := fmt.Sprintf("%v %v %v %v", b.Env, b.User, b.Dir, b.Cmd); got != "[A=b] runner:1 /work [/entry arg]" {
		t.Errorf("configuration %s", got)
	}
	info, err := os.Stat(b.Path)
	if err != nil || info.Mode() != 0o644 || flint.Bytes(info.Size()) != b.Size || !strings.HasPrefix(b.Digest, "sha256:") {
		t.Errorf("base %+v: %v, %v", b, info, err)
	}
}

func wantFault(t testing.TB, err error, code string, texts ...string) {
	t.Helper()
	var f *flint.Fault
	if !errors.As(err, &f) || f.Code != code || f.Fix == "" || f.What == "" {
		t.Fatalf("error %v (%T), want fault %s", err, err, code)
	}
	for _, text := range texts {
		if !strings.Contains(err.Error(), text) {
			t.Errorf("error %q does not say %q", err, text)
		}
	}
}

func wantEmptyTmp(t testing.TB, s *Store) {
	t.Helper()
	if left, err := os.ReadDir(s.path(tmpDir)); err != nil || len(left) > 0 {
		t.Errorf("left in tmp: %v, %v", left, err)
	}
}

func TestBaseFromEveryKind(t *testing.T) {
	s, dir := testStore(t), t.TempDir()
	img := testImage(t, pack(t, file("f", "1")), pack(t, file("g", "2"), link("h", "f")))
	writeLayout(t, filepath.Join(dir, "layout"), "one", img)
	writeLayout(t, filepath.Join(dir, "layout"), "two", testImage(t, pack(t, file("other", "1"))))
	tag, err := name.NewTag("example.com/img:1")
	if err != nil {
		t.Fatal(err)
	}
	if err := archives.WriteToFile(filepath.Join(dir, "docker.tar"), tag, img); err != nil {
		t.Fatal(err)
	}
	writeLayout(t, filepath.Join(dir, "single"), "", img)
	ociTar, err := os.Create(filepath.Join(dir, "oci.tar"))
	if err != nil {
		t.Fatal(err)
	}
	w := tar.NewWriter(ociTar)
	if err := w.AddFS(os.DirFS(filepath.Join(dir, "single"))); err != nil {
		t.Fatal(err)
	}
	if err := errors.Join(w.Close(), ociTar.Close()); err != nil {
		t.Fatal(err)
	}

	first := wantBase(t, s, Want{Ref: filepath.Join(dir, "layout:one")})
	checkConfig(t, first)
	rootfstest.Fsck(t, first.Path)
	for _, ref := range []string{"oci:" + filepath.Join(dir, "layout:one"), filepath.Join(dir, "single"), filepath.Join(dir, "docker.tar"), filepath.Join(dir, "oci.tar")} {
		b := wantBase(t, s, Want{Ref: ref})
		checkConfig(t, b)
		if b.Digest != first.Digest || b.Path != first.Path {
			t.Errorf("%s gave %s, want %s", ref, b.Digest, first.Digest)
		}
	}
	if b := wantBase(t, s, Want{Ref: filepath.Join(dir, "layout:two")}); b.Digest == first.Digest {
		t.Error("another tag gave the same image")
	}
	b := wantBase(t, s, Want{Ref: first.Path})
	if again := wantBase(t, s, Want{Ref: first.Path}); b.Path != first.Path || b.Size != first.Size || again.Digest != b.Digest {
		t.Errorf("ext4 file as it is: %+v, then %+v", b, again)
	}
	wantEmptyTmp(t, s)
}

func TestBaseNamesNothing(t *testing.T) {
	s, dir := testStore(t), t.TempDir()
	writeLayout(t, filepath.Join(dir, "layout"), "one", testImage(t))
	writeLayout(t, filepath.Join(dir, "layout"), "two", testImage(t, pack(t)))
	for path, content := range map[string]string{
		"gz": "\x1f\x8b\x08 etc", "zst": "\x28\xb5\x2f\xfd etc", "xz": "\xfd7zXZ\x00 etc", "bz2": "BZh9 etc",
		"no.tar": "not a tar", "no.ext4": "nothing", "empty/x": "",
		"binary": "FROM \x00", "far.binary": strings.Repeat("FROM x\n", 1000) + "\x00", "latin1": "FROM x # caf\xe9",
		"big": strings.Repeat("FROM x\n", 150_000),
	} {
		if err := os.MkdirAll(filepath.Dir(filepath.Join(dir, path)), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(filepath.Join(dir, path), []byte(content), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	for ref, text := range map[string]string{
		"":                                   "no image is named",
		"./nowhere":                          "no such file",
		filepath.Join(dir, "nowhere"):        "no such file",
		"Not A Reference":                    "no image reference either",
		filepath.Join(dir, "empty"):          "neither a Dockerfile nor an OCI layout",
		filepath.Join(dir, "layout"):         "tags one, two",
		filepath.Join(dir, "layout:three"):   "tags one, two",
		filepath.Join(dir, "gz"):             "unpack it with gunzip",
		filepath.Join(dir, "zst"):            "unpack it with unzstd",
		filepath.Join(dir, "xz"):             "unpack it with unxz",
		filepath.Join(dir, "bz2"):            "unpack it with bunzip2",
		filepath.Join(dir, "binary"):         "no text",
		filepath.Join(dir, "far.binary"):     "no text",
		filepath.Join(dir, "latin1"):         "no text",
		filepath.Join(dir, "big"):            "no text",
		filepath.Join(dir, "no.tar"):         "not what its name says",
		filepath.Join(dir, "no.ext4"):        "not what its name says",
		"oci:" + filepath.Join(dir, "empty"): "holds no OCI layout",
		"/dev/null":                          "neither a directory nor an ordinary file",
	} {
		_, err := s.Base(t.Context(), Want{Ref: ref})
		wantFault(t, err, "image.missing", text)
		if !errors.Is(err, flint.ErrNotFound) {
			t.Errorf("%q: %v is not ErrNotFound", ref, err)
		}
	}
}

func TestImageThatFlintMayNotRead(t *testing.T) {
	dir := t.TempDir()
	putFile(t, dir, "image.tar", "x")
	if err := errors.Join(os.Chmod(filepath.Join(dir, "image.tar"), 0), os.Chmod(dir, 0o755), os.Chmod(filepath.Dir(dir), 0o755)); err != nil {
		t.Fatal(err)
	}
	asNobody(t, func() {
		_, err := locate(filepath.Join(dir, "image.tar"))
		wantFault(t, err, "image.missing", "permission denied")
		if !errors.Is(err, flint.ErrPermission) {
			t.Errorf("%v is not ErrPermission", err)
		}
	})
	denied := &fs.PathError{Op: "open", Path: "/blobs/x", Err: unix.EACCES}
	wantFault(t, explain(fmt.Errorf("read layer: %w", denied), Want{Ref: "x"}), "image.denied", "/blobs/x")
}

func TestBaseRefusesBadImages(t *testing.T) {
	s, dir := testStore(t), t.TempDir()
	writeLayout(t, filepath.Join(dir, "dotdot"), "", testImage(t, pack(t, file("../x", "1"))))
	_, err := s.Base(t.Context(), Want{Ref: filepath.Join(dir, "dotdot")})
	wantFault(t, err, "image.layer", "..")

	writeLayout(t, filepath.Join(dir, "big"), "", testImage(t, pack(t, file("x", strings.Repeat("x", 9<<20)))))
	_, err = s.Base(t.Context(), Want{Ref: filepath.Join(dir, "big"), Limit: 8 * flint.MiB})
	wantFault(t, err, "image.size", "8MiB")
	wantBase(t, s, Want{Ref: filepath.Join(dir, "big")})

	// A layer that was changed after the image was made: its gzip is sound, its content is not what was promised.
	good, evil := pack(t, file("x", "good")), pack(t, file("x", "evil"))
	writeLayout(t, filepath.Join(dir, "evil"), "", testImage(t, good))
	writeLayout(t, filepath.Join(dir, "other"), "", testImage(t, evil))
	goodLayer, evilLayer := layerBlob(t, filepath.Join(dir, "evil")), layerBlob(t, filepath.Join(dir, "other"))
	b, err := os.ReadFile(evilLayer)
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(goodLayer, b, 0o644); err != nil {
		t.Fatal(err)
	}
	_, err = s.Base(t.Context(), Want{Ref: filepath.Join(dir, "evil")})
	wantFault(t, err, "image.layer", "the image says")
	wantEmptyTmp(t, s)
}

// TestRefusalsAreExplained: what a file system has no room for is a fault that says how to mend it.
func TestRefusalsAreExplained(t *testing.T) {
	for err, code := range map[error]string{
		rootfs.ErrTooBig: "image.size", rootfs.ErrBudget: "image.size", rootfs.ErrAttributes: "image.attributes", rootfs.ErrLinks: "image.links",
	} {
		wantFault(t, explain(fmt.Errorf("layer 1: %w", err), Want{Ref: "ref", Limit: flint.GiB}), code, `"ref"`, "layer 1: "+err.Error())
	}
}

// TestFilesThatNoGuestMounts: what is used as it is, as a base and as a tool cache, is looked at before a VM is made.
func TestFilesThatNoGuestMounts(t *testing.T) {
	s, dir := testStore(t), t.TempDir()
	short := filepath.Join(dir, "short")
	if err := errors.Join(s.Scratch(short, 16*flint.MiB), os.Truncate(short, 12<<20)); err != nil {
		t.Fatal(err)
	}
	_, err := s.Base(t.Context(), Want{Ref: short})
	wantFault(t, err, "image.file", "has only 12MiB")
	_, err = s.Tools(t.Context(), short, nil)
	wantFault(t, err, "image.file", "has only 12MiB")
	putFile(t, dir, "none", "FROM scratch\n")
	_, err = s.Tools(t.Context(), filepath.Join(dir, "none"), nil)
	wantFault(t, err, "tools.missing", "holds no ext4")
}

// layerBlob is the path of the only layer's blob in a layout.
func layerBlob(t testing.TB, dir string) string {
	t.Helper()
	img, err := layoutImage(dir, "")
	if err != nil {
		t.Fatal(err)
	}
	layers, err := img.Layers()
	if err != nil {
		t.Fatal(err)
	}
	d, err := layers[0].Digest()
	if err != nil {
		t.Fatal(err)
	}
	return filepath.Join(dir, "blobs", d.Algorithm, d.Hex)
}

// fakeTool puts an executable shell script into a new directory that becomes the whole PATH but for the shell's own
// tools, and returns a file the script can append to.
func fakeTool(t testing.TB, name, script string) (log string) {
	t.Helper()
	dir := t.TempDir()
	log = filepath.Join(dir, "log")
	script = "#!/bin/sh\nlog=" + log + "\nPATH=/usr/bin:/bin\n" + script
	if err := os.WriteFile(filepath.Join(dir, name), []byte(script), 0o755); err != nil {
		t.Fatal(err)
	}
	t.Setenv("PATH", dir)
	return log
}

// fakeBuildah answers like buildah: build notes its arguments, push copies a layout made beforehand.
const fakeBuildah = `
for last; do :; done
case " $* " in
*" build "*) echo "$@" >>"$log"; echo STEP 1; grep -q BROKEN "$last/Dockerfile" && { echo "no such instruction: BROKEN"; exit 125; }; echo "TOKEN=$FLINT_TEST_TOKEN" >>"$log" ;;
*" push "*) cp -r "$FAKE_LAYOUT" "${last#oci:}" ;;
*) ;;
esac
exit 0
`

func dockerfileDir(t testing.TB, content string) string {
	t.Helper()
	dir := t.TempDir()
	if err := os.WriteFile(filepath.Join(dir, "Dockerfile"), []byte(content), 0o644); err != nil {
		t.Fatal(err)
	}
	return dir
}

func TestDockerfileIsBuiltOnce(t *testing.T) {
	s := testStore(t)
	made := filepath.Join(t.TempDir(), "made")
	writeLayout(t, made, "", testImage(t, pack(t, file("f", "1"))))
	base := filepath.Join(t.TempDir(), "base")
	writeLayout(t, base, "latest", testImage(t, pack(t, file("base", "1"))))
	log := fakeTool(t, "buildah", strings.ReplaceAll(fakeBuildah, "$FAKE_LAYOUT", made))
	t.Setenv("FLINT_TEST_TOKEN", "secret")
	dir := dockerfileDir(t, "ARG BASE\nFROM ${BASE}\n")

	builds := func() int {
		b, err := os.ReadFile(log)
		if err != nil && !errors.Is(err, fs.ErrNotExist) {
			t.Fatal(err)
		}
		if strings.Contains(string(b), "secret") {
			t.Error("the builder saw our environment")
		}
		return strings.Count(string(b), " build ")
	}
	var lines atomic.Int32
	w := Want{Ref: dir, BuildArgs: map[string]string{"BASE": "oci:" + base + ":latest"}, Progress: func(m flint.Milestone) {
		if m.Line == "STEP 1" {
			lines.Add(1)
		}
	}}
	var wg sync.WaitGroup
	for range 4 {
		wg.Go(func() {
			if _, err := s.Base(t.Context(), w); err != nil {
				t.Error(err)
			}
		})
	}
	wg.Wait()
	if builds() != 1 || lines.Load() != 1 {
		t.Errorf("%d builds and %d lines of output, want 1 each", builds(), lines.Load())
	}
	checkConfig(t, wantBase(t, s, w))

	steps := []struct {
		name   string
		change func()
		want   int
	}{
		{"another store of the same directory", func() { s, _ = Open(s.dir, slog.New(slog.DiscardHandler)) }, 1},
		{"another build argument", func() { w.BuildArgs["X"] = "1" }, 2},
		{"another file", func() { os.WriteFile(filepath.Join(dir, "new"), nil, 0o644) }, 3},
		{"another content", func() { os.WriteFile(filepath.Join(dir, "new"), []byte("x"), 0o644) }, 4},
		{"another content of the base", func() {
			os.RemoveAll(base)
			writeLayout(t, base, "latest", testImage(t, pack(t, file("base", "2"))))
		}, 5},
		{"the base image was deleted", func() {
			b, _ := s.Base(t.Context(), w)
			os.Remove(b.Path)
		}, 6},
		{"nothing", func() {}, 6},
	}
	for _, step := range steps {
		step.change()
		wantBase(t, s, w)
		if got := builds(); got != step.want {
			t.Errorf("after %s: %d builds, want %d", step.name, got, step.want)
		}
	}
	wantEmptyTmp(t, s)
}

// TestDockerfileThatChangesWhileItIsBuilt: the builder's double changes the directory when it has read it.
func TestDockerfileThatChangesWhileItIsBuilt(t *testing.T) {
	made := filepath.Join(t.TempDir(), "made")
	writeLayout(t, made, "", testImage(t, pack(t, file("f", "1"))))
	for name, tt := range map[string]struct {
		change string
		builds []int // after it was asked for once, twice, and again with the files of the beginning
	}{
		"once":       {`echo two >"$last/two"`, []int{2, 2, 3}},
		"every time": {`echo two >>"$last/two"`, []int{3, 6, 9}},
	} {
		t.Run(name, func(t *testing.T) {
			s, dir := testStore(t), dockerfileDir(t, "FROM scratch")
			script := strings.Replace(fakeBuildah, "echo STEP 1;", "echo STEP 1; "+tt.change+";", 1)
			log := fakeTool(t, "buildah", strings.ReplaceAll(script, "$FAKE_LAYOUT", made))
			for i, want := range tt.builds {
				if i == 2 {
					os.Remove(filepath.Join(dir, "two"))
				}
				wantBase(t, s, Want{Ref: dir})
				b, err := os.ReadFile(log)
				if got := strings.Count(string(b), " build "); err != nil || got != want {
					t.Errorf("asked for %d times: %d builds, %v, want %d", i+1, got, err, want)
				}
			}
		})
	}
}

func TestDockerfileThatFails(t *testing.T) {
	s := testStore(t)
	fakeTool(t, "buildah", fakeBuildah)
	_, err := s.Base(t.Context(), Want{Ref: dockerfileDir(t, "BROKEN")})
	wantFault(t, err, "image.build", "no such instruction: BROKEN", "buildah")
	if strings.Contains(err.Error(), "here-document") {
		t.Errorf("it has none: %v", err)
	}
	for _, begin := range []string{"RUN <<EOF", "copy --chmod=755 <<-'end' /x", "ADD <<\"end\" /x"} {
		_, err := s.Base(t.Context(), Want{Ref: dockerfileDir(t, "BROKEN\n"+begin+"\n")})
		var f *flint.Fault
		if !errors.As(err, &f) || !strings.Contains(f.Fix, "here-document") {
			t.Errorf("%s: %v", begin, err)
		}
	}
	wantEmptyTmp(t, s)
}

func TestIsolation(t *testing.T) {
	for _, tc := range []struct {
		name    string
		unified bool
		here    string // the runtime that is installed
		chroot  bool
	}{
		{"crun", true, "crun", false},
		{"runc", true, "runc", false},
		{"no runtime", true, "", true},
		{"hybrid cgroups", false, "crun", true},
	} {
		find := func(name string) (string, error) {
			if name != tc.here {
				return "", exec.ErrNotFound
			}
			return "/usr/bin/" + name, nil
		}
		if got := isolation(tc.unified, find); slices.Equal(got, []string{"--isolation", "chroot"}) != tc.chroot || len(got) != 0 && !tc.chroot {
			t.Errorf("%s: %q", tc.name, got)
		}
	}
}

func TestNoBuilder(t *testing.T) {
	s := testStore(t)
	dir := dockerfileDir(t, "FROM scratch")
	base := filepath.Join(t.TempDir(), "base")
	writeLayout(t, base, "latest", testImage(t))
	fakeTool(t, "unrelated", "")
	_, err := s.Base(t.Context(), Want{Ref: dir})
	wantFault(t, err, "image.builder", "neither")
	fakeTool(t, "docker", "exit 1") // a client without its daemon
	_, err = s.Base(t.Context(), Want{Ref: dir})
	wantFault(t, err, "image.builder", "neither")
	fakeTool(t, "docker", "exit 0")
	_, err = s.Base(t.Context(), Want{Ref: dir, BuildArgs: map[string]string{"BASE": "oci:" + base + ":latest"}})
	wantFault(t, err, "image.builder", "docker cannot")
	_, err = s.Base(t.Context(), Want{Ref: dir, BuildArgs: map[string]string{"BASE": "oci:/nowhere:latest"}})
	wantFault(t, err, "image.missing", "/nowhere")
}

func TestDocker(t *testing.T) {
	s := testStore(t)
	saved := filepath.Join(t.TempDir(), "saved.tar")
	tag, err := name.NewTag("localhost/flint:latest")
	if err != nil {
		t.Fatal(err)
	}
	if err := archives.WriteToFile(saved, tag, testImage(t, pack(t, file("f", "1")))); err != nil {
		t.Fatal(err)
	}
	fakeTool(t, "docker", `case "$1" in save) cp `+saved+` "$3" ;; version|build|image) ;; *) exit 1 ;; esac`)
	checkConfig(t, wantBase(t, s, Want{Ref: dockerfileDir(t, "FROM scratch")}))
}

// TestBuildEndsWithItsContext has a builder that waits for ever, and a child of it that does too.
func TestBuildEndsWithItsContext(t *testing.T) {
	s := testStore(t)
	fakeTool(t, "buildah", `case " $* " in *" build "*) sleep 1000 & echo started $!; wait ;; esac`)
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	var child string
	_, err := s.Base(ctx, Want{Ref: dockerfileDir(t, "FROM scratch"), Progress: func(m flint.Milestone) {
		if pid, ok := strings.CutPrefix(m.Line, "started "); ok {
			child = pid
			cancel()
		}
	}})
	if !errors.Is(err, context.Canceled) {
		t.Fatalf("error %v", err)
	}
	if b, err := os.ReadFile("/proc/" + child + "/stat"); err == nil && !strings.Contains(string(b), ") Z ") {
		t.Errorf("the builder's child still runs: %s", b)
	}
	wantEmptyTmp(t, s)
}

func TestSweepRemovesWhatNobodyHolds(t *testing.T) {
	s := testStore(t)
	held, release, err := s.work()
	if err != nil {
		t.Fatal(err)
	}
	defer release()
	dead := s.path(tmpDir, "dead")
	if err := os.Mkdir(dead, 0o700); err != nil {
		t.Fatal(err)
	}
	old := time.Now().Add(-time.Hour)
	for _, dir := range []string{held, dead} {
		if err := os.WriteFile(filepath.Join(dir, "x"), nil, 0o600); err != nil {
			t.Fatal(err)
		}
		if err := os.Chtimes(dir, old, old); err != nil {
			t.Fatal(err)
		}
	}
	if _, err := Open(s.dir, slog.New(slog.DiscardHandler)); err != nil {
		t.Fatal(err)
	}
	if _, err := os.Stat(dead); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("dead work is still there: %v", err)
	}
	if _, err := os.Stat(held); err != nil {
		t.Errorf("held work is gone: %v", err)
	}
}

func BenchmarkBaseCached(b *testing.B) {
	s := testStore(b)
	made := filepath.Join(b.TempDir(), "made")
	writeLayout(b, made, "", testImage(b, pack(b, file("f", "1"))))
	fakeTool(b, "buildah", strings.ReplaceAll(fakeBuildah, "$FAKE_LAYOUT", made))
	dir := dockerfileDir(b, "FROM scratch\n")
	for i := range 100 {
		if err := os.WriteFile(filepath.Join(dir, fmt.Sprint(i)), []byte(strings.Repeat("x", 10_000)), 0o644); err != nil {
			b.Fatal(err)
		}
	}
	wantBase(b, s, Want{Ref: dir})
	for b.Loop() {
		wantBase(b, s, Want{Ref: dir})
	}
}

// TestLastGoodImageIsOfTheSameArguments: two pools may build one Dockerfile with other arguments.
func TestLastGoodImageIsOfTheSameArguments(t *testing.T) {
	s, made := testStore(t), filepath.Join(t.TempDir(), "made")
	writeLayout(t, made, "", testImage(t, pack(t, file("f", "1"))))
	fakeTool(t, "buildah", strings.ReplaceAll(fakeBuildah, "$FAKE_LAYOUT", made))
	dir := dockerfileDir(t, "FROM scratch")
	good := Want{Ref: dir, BuildArgs: map[string]string{"KIND": "a"}, OrLast: true}
	wantBase(t, s, good)
	if err := os.WriteFile(filepath.Join(dir, "Dockerfile"), []byte("BROKEN"), 0o644); err != nil {
		t.Fatal(err)
	}
	if b := wantBase(t, s, good); b.Stale == nil {
		t.Error("nothing is said of the failure")
	}
	_, err := s.Base(t.Context(), Want{Ref: dir, BuildArgs: map[string]string{"KIND": "b"}, OrLast: true})
	wantFault(t, err, "image.build", "BROKEN")
}

// TestLastGoodImageWhenItsSourceIsBroken: what is at a path may be missing or half there, as it is after a restart in the middle of a copy.
func TestLastGoodImageWhenItsSourceIsBroken(t *testing.T) {
	made := filepath.Join(t.TempDir(), "made")
	writeLayout(t, made, "", testImage(t, pack(t, file("f", "1"))))
	fakeTool(t, "buildah", strings.ReplaceAll(fakeBuildah, "$FAKE_LAYOUT", made))
	layout, tar := filepath.Join(t.TempDir(), "layout"), filepath.Join(t.TempDir(), "image.tar")
	writeLayout(t, layout, "", testImage(t, pack(t, file("f", "2"))))
	tag, err := name.NewTag("acme/image:1")
	if err == nil {
		err = archives.WriteToFile(tar, tag, testImage(t, pack(t, file("f", "3"))))
	}
	if err != nil {
		t.Fatal(err)
	}
	docker := dockerfileDir(t, "FROM scratch")
	for what, tt := range map[string]struct {
		ref    string
		damage func() error
	}{
		"Dockerfile is gone": {docker, func() error { return os.Remove(filepath.Join(docker, "Dockerfile")) }},
		"layout is gone":     {layout, func() error { return os.RemoveAll(layout) }},
		"archive is cut":     {tar, func() error { return os.Truncate(tar, 700) }},
	} {
		t.Run(what, func(t *testing.T) {
			s := testStore(t)
			good := wantBase(t, s, Want{Ref: tt.ref})
			if err := tt.damage(); err != nil {
				t.Fatal(err)
			}
			if b, err := s.Base(t.Context(), Want{Ref: tt.ref}); err == nil {
				t.Errorf("a person who asks gets %+v", b)
			}
			if b := wantBase(t, another(t, s), Want{Ref: tt.ref, OrLast: true}); b.Digest != good.Digest || b.Stale == nil {
				t.Errorf("the last good one is %s, got %s; stale: %v", good.Digest, b.Digest, b.Stale)
			}
			if s.Failed(tt.ref) == nil {
				t.Error("the failure is not kept")
			}
		})
	}
}
