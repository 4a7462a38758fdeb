package image

import (
	"archive/tar"
	"bytes"
	"errors"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"flint"
	"flint/internal/rootfs/rootfstest"
)

// runnerDir makes a directory Drive accepts.
func runnerDir(t testing.TB) string {
	t.Helper()
	dir := t.TempDir()
	for name, content := range map[string]string{"start": "#!/bin/sh\n", "version": "runner 1.2\nmore\n", "bin/run": "x"} {
		path := filepath.Join(dir, name)
		if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(path, []byte(content), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.Symlink("bin/run", filepath.Join(dir, "link")); err != nil {
		t.Fatal(err)
	}
	return dir
}

func TestDrive(t *testing.T) {
	s, dir := testStore(t), runnerDir(t)
	d, err := s.Drive(t.Context(), dir, nil)
	if err != nil {
		t.Fatal(err)
	}
	if d.Version != "runner 1.2" {
		t.Errorf("version %q", d.Version)
	}
	rootfstest.Fsck(t, d.Path)

	// Times and places do not count, content does.
	twin := runnerDir(t)
	if err := os.Chtimes(filepath.Join(twin, "start"), time.Unix(1, 0), time.Unix(1, 0)); err != nil {
		t.Fatal(err)
	}
	if same, err := testStore(t).Drive(t.Context(), twin, nil); err != nil || same.Digest != d.Digest {
		t.Errorf("the same files gave %+v, %v, want digest %s", same, err, d.Digest)
	}
	if err := os.WriteFile(filepath.Join(dir, "bin/run"), []byte("y"), 0o755); err != nil {
		t.Fatal(err)
	}
	if other, err := s.Drive(t.Context(), dir, nil); err != nil || other.Digest == d.Digest {
		t.Errorf("another file gave %+v, %v", other, err)
	}
	wantEmptyTmp(t, s)

	root, _ := rootfstest.Mount(t, d.Path, "ro")
	if target, err := os.Readlink(filepath.Join(root, "link")); err != nil || target != "bin/run" {
		t.Errorf("link: %q, %v", target, err)
	}
	if info, err := os.Stat(filepath.Join(root, "start")); err != nil || info.Mode() != 0o755 || !info.ModTime().Equal(time.Unix(0, 0)) {
		t.Errorf("start: %v, %v", info, err)
	}
}

// TestDriveOfWhatChanges: nothing is remembered under the files that were there before.
func TestDriveOfWhatChanges(t *testing.T) {
	s, dir := testStore(t), runnerDir(t)
	script := filepath.Join(dir, "bin/run")
	change := func(content string) {
		t.Helper()
		if err := os.WriteFile(script, []byte(content), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	d, err := s.Drive(t.Context(), dir, func(m flint.Milestone) {
		if m.Step == "make runner drive" && !m.Done { // its digest is taken, and no file read for the drive yet
			change("new")
		}
	})
	if err != nil {
		t.Fatal(err)
	}
	if again, err := s.Drive(t.Context(), dir, nil); err != nil || again.Digest != d.Digest {
		t.Errorf("the new files gave %v, %v, then %v", d, err, again)
	}
	change("x")
	if old, err := s.Drive(t.Context(), dir, nil); err != nil || old.Digest == d.Digest {
		t.Errorf("the files of the beginning gave %v, %v, what the new ones give", old, err)
	}
}

func TestDriveNeedsStart(t *testing.T) {
	dir := runnerDir(t)
	if err := os.Chmod(filepath.Join(dir, "start"), 0o644); err != nil {
		t.Fatal(err)
	}
	_, err := testStore(t).Drive(t.Context(), dir, nil)
	wantFault(t, err, "runner.start", "start")
}

// demoModule is the real one of the source tree.
const demoModule = "../../images/demo-runner"

func TestDemoRunner(t *testing.T) {
	t.Setenv("SUDO_UID", "")
	log := fakeTool(t, "go", `
echo "$@" >>"$log"
case "$1" in
build) while [ "$1" != -o ]; do shift; done; mkdir -p "${2%/*}"; echo program >"$2"; chmod 755 "$2"; env >>"$log" ;;
list) echo example.com/runner v9 ;;
esac
`)
	s, out := testStore(t), filepath.Join(t.TempDir(), "runner")
	if err := BuildDemoRunner(t.Context(), demoModule, out, nil); err != nil {
		t.Fatal(err)
	}
	d, err := s.Drive(t.Context(), out, nil)
	if err != nil || d.Version != "example.com/runner v9" {
		t.Errorf("got %+v, %v", d, err)
	}
	b, err := os.ReadFile(log)
	if err != nil || strings.Count(string(b), "build ") != 1 || strings.Contains(string(b), "GOENV=") {
		t.Errorf("go was called so, %v:\n%s", err, b)
	}
	fakeTool(t, "go", "echo no such module; exit 1")
	wantFault(t, BuildDemoRunner(t.Context(), demoModule, out, nil), "runner.build", "no such module")
	wantFault(t, BuildDemoRunner(t.Context(), t.TempDir()+"/nowhere", out, nil), "runner.build", "nowhere")
	fakeTool(t, "unrelated", "")
	wantFault(t, BuildDemoRunner(t.Context(), demoModule, out, nil), "runner.go")
	wantEmptyTmp(t, s)
}

// TestSudoLeavesTheHomeAlone: under sudo the go command must write nothing that is root's into its user's home directory.
func TestSudoLeavesTheHomeAlone(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("needs root: only then the files would be root's")
	}
	module, err := filepath.Abs(demoModule)
	if err != nil {
		t.Fatal(err)
	}
	home, state := t.TempDir(), t.TempDir()
	t.Setenv("SUDO_UID", "1000")
	t.Setenv("HOME", home)
	t.Setenv("GOCACHE", filepath.Join(home, "cache"))
	t.Setenv("XDG_CONFIG_HOME", "")
	log := fakeTool(t, "go", `env | grep -v -e ^HOME= -e ^GOENV= >>"$log"; env | grep ^GOENV= >>"$log.env"; exit 1`)
	t.Chdir(state)
	wantFault(t, BuildDemoRunner(t.Context(), module, "runner", nil), "runner.build")
	b, err := os.ReadFile(log)
	if err != nil {
		t.Fatal(err)
	}
	for _, want := range []string{"GOPATH=" + state, "GOMODCACHE=" + state, "GOCACHE=" + state, "XDG_CONFIG_HOME=" + state} {
		if !strings.Contains(string(b), "\n"+want+"/go") {
			t.Errorf("%s… is missing:\n%s", want, b)
		}
	}
	if strings.Contains(string(b), home) {
		t.Errorf("the home directory is used:\n%s", b)
	}
	if b, err := os.ReadFile(log + ".env"); err != nil || string(b) != "GOENV="+home+"/.config/go/env\n" {
		t.Errorf("the person's own settings: %q, %v", b, err)
	}
}

// TestStartKeepsTheSecretOffTheCommandLine runs the demo runner's start script as the agent would, from a read-only
// place, with a runner that tells what it got.
func TestStartKeepsTheSecretOffTheCommandLine(t *testing.T) {
	drive, work := t.TempDir(), t.TempDir()
	start, err := os.ReadFile(filepath.Join(demoModule, "start"))
	if err != nil {
		t.Fatal(err)
	}
	fake := "#!/bin/sh\necho \"$@\"\npwd\nprintf '%s\\n' \"$ACTIONS_RUNNER_INPUT_JITCONFIG\"\ntr '\\0' ' ' </proc/$PPID/cmdline >/dev/null\nexit 7\n"
	for name, content := range map[string]string{"start": string(start), "github-act-runner": fake} {
		if err := os.WriteFile(filepath.Join(drive, name), []byte(content), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	cmd := exec.Command(filepath.Join(drive, "start"))
	cmd.Dir = work
	cmd.Stdin = strings.NewReader("s3cr3t==\nnot for you\n")
	out, err := cmd.CombinedOutput()
	if cmd.ProcessState.ExitCode() != 7 {
		t.Errorf("exit %v, want the runner's 7: %v", cmd.ProcessState, err)
	}
	lines := strings.Split(strings.TrimSpace(string(out)), "\n")
	if len(lines) != 3 || strings.Contains(lines[0], "s3cr3t") || lines[1] != work || lines[2] != "s3cr3t==" {
		t.Errorf("the runner got %q", lines)
	}
}

func TestDebianBase(t *testing.T) {
	s := testStore(t)
	root := filepath.Join(t.TempDir(), "root.tar")
	if err := os.WriteFile(root, pack(t, dir("etc"), file("etc/debian_version", "12.0")), 0o644); err != nil {
		t.Fatal(err)
	}
	log := fakeTool(t, "mmdebstrap", `echo "$@" >>"$log"; for last; do :; done; cp `+root+` "$last"`)
	var refs []string
	for range 2 {
		ref, err := s.DebianBase(t.Context(), "trixie", nil)
		if err != nil {
			t.Fatal(err)
		}
		refs = append(refs, ref)
	}
	if b, err := os.ReadFile(log); err != nil || bytes.Count(b, []byte("\n")) != 1 {
		t.Errorf("mmdebstrap was called so, %v:\n%s", err, b)
	}
	if refs[0] != refs[1] || !strings.HasPrefix(refs[0], "oci:/") {
		t.Errorf("references %q", refs)
	}
	b := wantBase(t, s, Want{Ref: refs[0]})
	if !slices.Equal(b.Cmd, []string{"/bin/bash"}) {
		t.Errorf("command %q", b.Cmd)
	}
	rootfstest.Fsck(t, b.Path)

	for _, suite := range []string{"--help", "../x", "a b", "UPPER"} {
		_, err := s.DebianBase(t.Context(), suite, nil)
		wantFault(t, err, "image.suite")
	}
	// What it unpacks is noted for sweep, should this process be killed, and goes with it.
	log = fakeTool(t, "mmdebstrap", `for last; do :; done; readlink "$(dirname "$last")/run" >"$log"; echo "$TMPDIR" >>"$log"; touch "$TMPDIR/x"; cp `+root+` "$last"`)
	if _, err := s.DebianBase(t.Context(), "bullseye", nil); err != nil {
		t.Fatal(err)
	}
	told, err := os.ReadFile(log)
	if noted, used, _ := strings.Cut(strings.TrimSpace(string(told)), "\n"); err != nil || noted != used || !isRun(used) {
		t.Errorf("noted for sweep and used by mmdebstrap: %q, %v", told, err)
	} else if _, err := os.Stat(used); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("what mmdebstrap unpacked is left: %v", err)
	}
	fakeTool(t, "mmdebstrap", "echo no mirror; exit 1")
	_, err = s.DebianBase(t.Context(), "sid", nil)
	wantFault(t, err, "image.mmdebstrap", "no mirror")
	fakeTool(t, "unrelated", "")
	_, err = s.DebianBase(t.Context(), "sid", nil)
	wantFault(t, err, "image.mmdebstrap", "not installed")
	wantEmptyTmp(t, s)
}

func TestHostSuite(t *testing.T) {
	for content, want := range map[string]string{
		"ID=debian\nVERSION_CODENAME=trixie\n":        "trixie",
		"ID=\"debian\"\nVERSION_CODENAME=\"forky\"\n": "forky",
		"ID=ubuntu\nVERSION_CODENAME=noble\n":         fallbackSuite,
		"ID=debian\nVERSION_CODENAME=--evil\n":        fallbackSuite,
		"":                                            fallbackSuite,
	} {
		path := filepath.Join(t.TempDir(), "os-release")
		if err := os.WriteFile(path, []byte(content), 0o644); err != nil {
			t.Fatal(err)
		}
		if got := hostSuite(path); got != want {
			t.Errorf("%q gave %q, want %q", content, got, want)
		}
	}
}

// probe is a program for an image without anything else: it writes a file and says what it sees.
const probe = `package main

import "os"

func main() {
	if err := os.WriteFile(os.Args[1], []byte("made by RUN"), 0o4755); err != nil {
		panic(err)
	}
	os.Chown(os.Args[1], 7, 8)
	os.Stdout.WriteString("probe ran\n")
}
`

// TestRealBuilder has buildah or podman build a Dockerfile with RUN on a local base image, without any network.
func TestRealBuilder(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("needs root: the builder's storage")
	}
	if !slices.ContainsFunc([]string{"buildah", "podman"}, func(n string) bool { _, err := exec.LookPath(n); return err == nil }) {
		t.Skip("needs buildah or podman: sudo apt-get install buildah")
	}
	src := t.TempDir()
	goProgram(t, probe, filepath.Join(src, "probe"))
	program, err := os.ReadFile(filepath.Join(src, "probe"))
	if err != nil {
		t.Fatal(err)
	}
	layoutDir := filepath.Join(t.TempDir(), "base")
	writeLayout(t, layoutDir, "latest", testImage(t, pack(t, dir("tmp"), item{Name: "probe", Content: string(program), Header: tar.Header{Mode: 0o755}}, file("gone", "1"))))

	s := testStore(t)
	context := dockerfileDir(t, "ARG BASE\nFROM ${BASE}\nUSER 0:0\nCOPY Dockerfile /copied\nRUN [\"/probe\", \"/made\"]\nUSER 5:6\nENV X=y\n")
	var output []string
	w := Want{
		Ref: context, BuildArgs: map[string]string{"BASE": "oci:" + layoutDir + ":latest"},
		Progress: func(m flint.Milestone) { output = append(output, m.Line, m.Detail) },
	}
	b := wantBase(t, s, w)
	if !slices.Contains(output, "probe ran") {
		t.Errorf("the build's output was not shown: %q", output)
	}
	if b.User != "5:6" || !slices.Contains(b.Env, "X=y") || !slices.Contains(b.Env, "A=b") {
		t.Errorf("configuration %+v", b)
	}
	output = nil
	if again := wantBase(t, s, w); again.Digest != b.Digest || !slices.Contains(output, "cached") {
		t.Errorf("second time: %+v, %q", again, output)
	}
	rootfstest.Fsck(t, b.Path)
	root, _ := rootfstest.Mount(t, b.Path, "ro")
	info, err := os.Stat(filepath.Join(root, "made"))
	if err != nil || info.Size() != int64(len("made by RUN")) {
		t.Errorf("made: %v, %v", info, err)
	}
	if _, err := os.Stat(filepath.Join(root, "copied")); err != nil {
		t.Errorf("copied: %v", err)
	}
	wantEmptyTmp(t, s)

	_, err = s.Base(t.Context(), Want{Ref: dockerfileDir(t, "ARG BASE\nFROM ${BASE}\nUSER 0:0\nRUN [\"/probe\"]\n"), BuildArgs: w.BuildArgs})
	wantFault(t, err, "image.build", "index out of range")
}

func TestTools(t *testing.T) {
	s, dir := testStore(t), t.TempDir()
	if err := os.MkdirAll(filepath.Join(dir, "node/22.1.0/x64"), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(dir, "node/22.1.0/x64/node"), []byte("x"), 0o755); err != nil {
		t.Fatal(err)
	}
	d, err := s.Tools(t.Context(), dir, nil)
	if err != nil {
		t.Fatal(err)
	}
	rootfstest.Fsck(t, d.Path)
	root, _ := rootfstest.Mount(t, d.Path, "ro")
	for name, mode := range map[string]os.FileMode{".": 0o777, "node/22.1.0": 0o777, "node/22.1.0/x64/node": 0o755} {
		if info, err := os.Stat(filepath.Join(root, name)); err != nil || info.Mode().Perm() != mode {
			t.Errorf("%s: %v, %v, want permissions %v", name, info, err, mode)
		}
	}
	if file, err := s.Tools(t.Context(), d.Path, nil); err != nil || file.Path != d.Path || file.Size != d.Size {
		t.Errorf("a file gave %+v, %v", file, err)
	}
	_, err = s.Tools(t.Context(), filepath.Join(dir, "absent"), nil)
	wantFault(t, err, "tools.missing", "absent")
	pipes := runnerDir(t)
	if err := errors.Join(os.Remove(filepath.Join(pipes, versionFile)), unix.Mkfifo(filepath.Join(pipes, versionFile), 0o600)); err != nil {
		t.Fatal(err)
	}
	if _, err = s.Drive(t.Context(), pipes, nil); err == nil || !strings.Contains(err.Error(), "version is neither a file") { // and it was not waited for
		t.Errorf("a pipe in a runner's directory: %v", err)
	}
	_, err = s.Tools(t.Context(), "/dev/null", nil) // nor is a disk of the host given to guests
	wantFault(t, err, "tools.missing", "/dev/null: it is neither")
}
