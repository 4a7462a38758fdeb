package image

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"testing"

	"github.com/google/go-containerregistry/pkg/name"
	"github.com/google/go-containerregistry/pkg/v1/mutate"
	archives "github.com/google/go-containerregistry/pkg/v1/tarball"

	"flint"
	"flint/internal/rootfs/rootfstest"
)

// needEngine skips the test where the program is not installed or does not answer, but not in make test-images. A docker needs its
// daemon.
func needEngine(t *testing.T, program string) {
	t.Helper()
	give := t.Skipf
	if os.Getenv("FLINT_TEST_ENGINES") != "" {
		give = t.Fatalf
	}
	if _, err := exec.LookPath(program); err != nil {
		give("needs %s, which make test-images fetches", program)
	}
	if out, err := exec.Command(program, "info").CombinedOutput(); err != nil {
		give("needs a %s that answers: %s", program, out)
	}
}

// engine runs a command of the real program, with the environment that flint gives it.
func engine(t *testing.T, program string, args ...string) string {
	t.Helper()
	out, err := exec.Command(program, args...).CombinedOutput()
	if err != nil {
		t.Fatalf("%s %q: %v\n%s", program, args, err, out)
	}
	return strings.TrimSpace(string(out))
}

// ownStorage gives podman a storage of the test's.
func ownStorage(t *testing.T) {
	t.Helper()
	dir, err := os.MkdirTemp("/tmp", "flint") // podman refuses long paths
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := os.RemoveAll(dir); err != nil {
			t.Error(err)
		}
	})
	storageOf(t, dir, "vfs")
}

func storageOf(t *testing.T, dir, driver string) {
	t.Helper()
	conf := filepath.Join(dir, driver+".conf")
	content := fmt.Sprintf("[storage]\ndriver = %q\nrunroot = %q\ngraphroot = %q\n", driver, dir+"/run", dir+"/graph")
	if err := os.WriteFile(conf, []byte(content), 0o600); err != nil {
		t.Fatal(err)
	}
	t.Setenv("CONTAINERS_STORAGE_CONF", conf)
}

// made is a program for RUN: it leaves a file that says by which argument.
const made = `package main

import "os"

func main() {
	if err := os.WriteFile("/made", []byte(os.Getenv("WHO")), 0o644); err != nil {
		panic(err)
	}
}
`

const madeDockerfile = `FROM scratch
ARG WHO=nobody
COPY made /bin/made
RUN ["/bin/made"]
USER runner:1
`

// goProgram makes a static program of a source.
func goProgram(t *testing.T, content, program string) {
	t.Helper()
	source := filepath.Join(t.TempDir(), "main.go")
	if err := os.WriteFile(source, []byte(content), 0o644); err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command("go", "build", "-o", program, source)
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("go build: %v\n%s", err, out)
	}
}

// readFile reads a file of a base image.
func readFile(t *testing.T, b Base, path string) string {
	t.Helper()
	out, err := exec.Command("debugfs", "-R", "cat "+path, b.Path).Output()
	if err != nil {
		t.Fatalf("debugfs: %v", err)
	}
	return string(out)
}

// TestRealEnginesBuild builds with real programs, more than once with each: what the first build left must not stop the second.
func TestRealEnginesBuild(t *testing.T) {
	program := filepath.Join(t.TempDir(), "made")
	goProgram(t, made, program)
	for _, tt := range []struct{ name, program, variable, value string }{
		{"podman while docker is silent", "podman", "DOCKER_HOST", "unix:///nowhere"},
		{"docker", "docker", "DOCKER_BUILDKIT", "0"},
		{"docker with BuildKit", "docker", "DOCKER_BUILDKIT", "1"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			ownStorage(t)
			needEngine(t, tt.program)
			t.Setenv(tt.variable, tt.value)
			if out, err := exec.Command(tt.program, "build", "--help").CombinedOutput(); err != nil {
				t.Skipf("needs buildx beside docker: %s", out)
			}
			s, dir := testStore(t), dockerfileDir(t, madeDockerfile)
			if err := os.Link(program, filepath.Join(dir, "made")); err != nil {
				t.Fatal(err)
			}
			lines, with := 0, ""
			w := Want{Ref: dir, Progress: func(m flint.Milestone) {
				if m.Line != "" {
					lines++
				}
				if m.Done && strings.HasPrefix(m.Step, "build") {
					with = m.Detail
				}
			}}
			for _, who := range []string{"first", "second"} {
				w.BuildArgs, w.Pull = map[string]string{"WHO": who}, Always
				b := wantBase(t, s, w)
				rootfstest.Fsck(t, b.Path)
				if got := readFile(t, b, "/made"); got != who || b.User != "runner:1" {
					t.Errorf("made by %q, want %q; %+v", got, who, b)
				}
			}
			if lines == 0 || with != "with "+tt.program {
				t.Errorf("%d lines of progress; built %q", lines, with)
			}
			if tt.program == "docker" {
				label := "label=flint=" + tagOf(filepath.Join(dir, "Dockerfile"))
				left := strings.Fields(engine(t, "docker", "images", "--quiet", "--filter", label))
				t.Cleanup(func() { engine(t, "docker", append([]string{"rmi", "--force"}, left...)...) })
				if len(left) != 1 {
					t.Errorf("docker keeps %v of two builds", left)
				}
			}
			broken := dockerfileDir(t, "FROM scratch\nCOPY nothing-of-that-name /\n")
			_, err := s.Base(t.Context(), Want{Ref: broken})
			wantFault(t, err, "image.build", "with "+tt.program, "nothing-of-that-name")
			wantEmptyTmp(t, s)
		})
	}
}

// loadImage has the program load an image for that architecture, and returns its id.
func loadImage(t *testing.T, program, arch, tag string) string {
	t.Helper()
	img := testImage(t, pack(t, file("f", arch)))
	config, err := img.ConfigFile()
	if err != nil {
		t.Fatal(err)
	}
	config = config.DeepCopy()
	config.OS, config.Architecture = "linux", arch
	if img, err = mutate.ConfigFile(img, config); err != nil {
		t.Fatal(err)
	}
	ref, err := name.NewTag(tag)
	if err != nil {
		t.Fatal(err)
	}
	saved := filepath.Join(t.TempDir(), "saved.tar")
	if err := archives.WriteToFile(saved, ref, img); err != nil {
		t.Fatal(err)
	}
	engine(t, program, "load", "--input", saved)
	return engine(t, program, "image", "inspect", "--format", "{{.Id}}", tag)
}

// TestRealEnginesGiveWhatTheyKeep takes images from real programs, by every name they have for them.
func TestRealEnginesGiveWhatTheyKeep(t *testing.T) {
	for _, program := range []string{"docker", "podman"} {
		t.Run(program, func(t *testing.T) {
			prefix := "docker-daemon:"
			if program == "podman" {
				prefix = "containers-storage:"
			}
			ownStorage(t)
			needEngine(t, program)
			const first, second, foreign = "localhost/flint-test/kept:1", "docker.io/flint-test/hub:latest", "localhost/flint-test/foreign:1"
			id := loadImage(t, program, runtime.GOARCH, first)
			loadImage(t, program, elsewhere(), foreign)
			engine(t, program, "tag", first, second)
			t.Cleanup(func() { engine(t, program, "rmi", "--force", first, second, foreign) })
			hash := strings.TrimPrefix(id, "sha256:")
			s, want := testStore(t), ""
			for _, ref := range []string{first, second, "docker.io/flint-test/hub", "flint-test/hub", "flint-test/hub:latest", id, hash, hash[:12]} {
				b := wantBase(t, s, Want{Ref: prefix + ref})
				checkConfig(t, b)
				if got := readFile(t, b, "/f"); got != runtime.GOARCH || want != "" && b.Digest != want {
					t.Errorf("%s gave %s, which says %q", ref, b.Digest, got)
				}
				want = b.Digest
			}
			_, err := s.Base(t.Context(), Want{Ref: prefix + foreign})
			wantFault(t, err, "image.platform", elsewhere())
			for _, ref := range []string{"localhost/flint-test/kept", "localhost/flint-test/kept:2", "flint-test/kept:1/2"} {
				_, err := s.Base(t.Context(), Want{Ref: prefix + ref})
				wantFault(t, err, "image.missing")
			}
			silence(t, program)
			_, err = s.Base(t.Context(), Want{Ref: prefix + first, Pull: Always})
			wantFault(t, err, "image.daemon", program)
			wantEmptyTmp(t, s)
		})
	}
}

// elsewhere is an architecture that is not this machine's.
func elsewhere() string {
	if runtime.GOARCH == "arm64" {
		return "amd64"
	}
	return "arm64"
}

// silence keeps what the program asks from answering, until the test is over.
func silence(t *testing.T, program string) {
	t.Helper()
	if program == "podman" {
		storageOf(t, t.TempDir(), "nonsense")
		return
	}
	t.Setenv("DOCKER_HOST", "unix:///nowhere")
}
