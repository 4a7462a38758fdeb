package image

import (
	"archive/tar"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"time"

	"flint"
	"flint/internal/regular"
	"flint/internal/rootfs"
	"flint/internal/tool"
)

// Drive is a read-only ext4 image of a directory.
type Drive struct {
	Digest  string      // "sha256:…" of the content; names the file
	Path    string      // readable by all
	Size    flint.Bytes // of the file
	Version string      // first line of the file "version" in the directory; empty without one
}

const (
	startFile   = "start"   // what the agent runs; see Drive
	versionFile = "version" // what the drive holds, for people
)

// maxVersion bounds a version file, of which one line counts.
const maxVersion = 1 << 20

// maxDrive bounds a drive; the official runner with all its tools has some 700 MiB.
const maxDrive = 8 * flint.GiB

// Drive makes a read-only image of a directory that holds a runner. All files belong to root and have no times, so that
// the same files always give the same digest.
//
// The directory must have an executable file "start" at its top: the agent runs it as user runner in the work directory,
// and it reads one line from its standard input, the encoded JIT configuration, runs at most one job and exits as the
// runner did. The drive is read-only, so what the runner writes goes to the work directory.
func (s *Store) Drive(ctx context.Context, dir string, p flint.Progress) (Drive, error) {
	dir, err := filepath.Abs(dir)
	if err != nil {
		return Drive{}, fmt.Errorf("make runner drive: %w", err)
	}
	if info, err := os.Stat(filepath.Join(dir, startFile)); err != nil || !info.Mode().IsRegular() || info.Mode()&0o111 == 0 {
		return Drive{}, &flint.Fault{
			Code: "runner.start", What: fmt.Sprintf("make runner drive of %s: it has no executable file %q", dir, startFile),
			Fix:  "put a script there that reads the JIT configuration from standard input and runs the runner once",
			Kind: flint.ErrConfig, Err: err,
		}
	}
	return s.driveOf(ctx, dir, runnerKind(), p)
}

// Tools makes a read-only image of a directory with tools in the layout of actions' tool cache
// (tool/version/architecture), or takes a file that holds a file system as it is. All files belong to root, and everybody may
// write to the directories, once something is laid over them.
func (s *Store) Tools(ctx context.Context, path string, p flint.Progress) (Drive, error) {
	info, err := os.Stat(path)
	switch {
	case err != nil:
	case info.IsDir():
		return s.driveOf(ctx, path, toolsKind(), p)
	case info.Mode().IsRegular():
		err = rootfs.Whole(path)
	default:
		err = errors.New("it is neither a directory nor an ordinary file")
	}
	var f *flint.Fault
	switch {
	case errors.As(err, &f):
		return Drive{}, err
	case err != nil:
		return Drive{}, &flint.Fault{
			Code: "tools.missing", What: "find the tool cache " + path, Kind: flint.ErrNotFound, Err: regular.Cause(err),
			Fix: "set the pool's tool_cache to a directory, or to a file that holds an ext4, erofs or squashfs file system",
		}
	}
	return Drive{Path: path, Size: flint.Bytes(info.Size())}, nil
}

// driveOf finds or makes a drive and keeps it from being collected.
func (s *Store) driveOf(ctx context.Context, dir string, kind driveKind, p flint.Progress) (Drive, error) {
	what := fmt.Sprintf("make %s of %s", kind.name, dir)
	for try := 1; ; try++ {
		d, changed, err := s.drive(ctx, dir, kind, p)
		if changed && try < maxTries {
			continue
		}
		if err == nil {
			err = s.holdWhole(ctx, d.Path)
			if again(err) && try < maxTries {
				continue
			}
		}
		if err == nil {
			s.noteSource(d.Path, dir)
			return d, nil
		}
		if f := spaceFault(err, what); f != nil {
			return Drive{}, f
		}
		return Drive{}, fmt.Errorf("%s: %w", what, err)
	}
}

// driveKind is what a drive is for.
type driveKind struct {
	name  string // for people
	key   string // for what the store remembers
	limit flint.Bytes
	dirs  int64 // permissions that all its directories have, beside their own
}

// The kinds of drives. GitHub's own machines let everybody write to the tool cache, too: actions add what is missing.
func runnerKind() driveKind { return driveKind{"runner drive", "drive", maxDrive, 0} }
func toolsKind() driveKind  { return driveKind{"tool cache drive", "tools", defaultLimit, 0o777} }

// drive finds or makes the drive of a directory. It says whether that changed meanwhile: such a drive is not remembered.
func (s *Store) drive(ctx context.Context, dir string, kind driveKind, p flint.Progress) (d Drive, changed bool, err error) {
	digest, err := s.contextDigest(ctx, dir, nil)
	if err != nil {
		return Drive{}, false, err
	}
	step := "make " + kind.name
	key := keyOf(Ext4.Version(), kind.key, digest)
	if d, ok := s.recallDrive(key); ok {
		p.Step(step)("cached", nil)
		return d, false, nil
	}
	unlock, err := s.lock(ctx, key, p)
	if err != nil {
		return Drive{}, false, err
	}
	defer unlock()
	if d, ok := s.recallDrive(key); ok {
		p.Step(step)("cached", nil)
		return d, false, nil
	}
	done := p.Step(step)
	d = Drive{Version: readVersion(filepath.Join(dir, versionFile))}
	d.Digest, d.Path, d.Size, err = s.writeImage(ctx, driveDir, []rootfs.Layer{{Open: func() (io.ReadCloser, error) { return tarOf(ctx, dir, kind.dirs), nil }}}, kind.limit, Ext4)
	after := ""
	if err == nil {
		after, err = s.contextDigest(ctx, dir, nil)
	}
	if err != nil {
		done("", err)
		return Drive{}, false, err
	}
	if after == digest {
		s.note(key, d)
	}
	done(fmt.Sprintf("%.19s, %s", d.Digest, d.Size), nil)
	return d, after != digest, nil
}

func (s *Store) recallDrive(key string) (Drive, bool) {
	var d Drive
	if !s.recall(key, &d) {
		return Drive{}, false
	}
	d.Path = s.path(driveDir, fileName(d.Digest, Ext4))
	info, err := os.Stat(d.Path)
	return d, err == nil && info.Mode().IsRegular() && info.Size() == int64(d.Size)
}

func readVersion(path string) string {
	b, err := regular.Read(path, maxVersion)
	if err != nil {
		return ""
	}
	line, _, _ := strings.Cut(string(b), "\n")
	return strings.TrimSpace(line)
}

// tarOf streams a directory as a tar, in which directories have the permissions dirs beside their own. Closing the stream ends the goroutine that writes it.
func tarOf(ctx context.Context, dir string, dirs int64) io.ReadCloser {
	r, w := io.Pipe()
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		t := tar.NewWriter(w)
		err := eachFile(ctx, dir, func(path string, info fs.FileInfo) error { return addFile(t, dir, path, info, dirs) })
		if err == nil {
			err = t.Close()
		}
		w.CloseWithError(err)
	}()
	return tarStream{r, ended}
}

type tarStream struct {
	*io.PipeReader
	ended chan struct{}
}

func (t tarStream) Close() error {
	err := t.PipeReader.Close()
	<-t.ended
	return err
}

// addFile writes one file, owned by root and without times.
func addFile(t *tar.Writer, dir, path string, info fs.FileInfo, dirs int64) error {
	rel, err := filepath.Rel(dir, path)
	if err != nil {
		return err
	}
	target := ""
	switch info.Mode().Type() {
	case 0, fs.ModeDir:
	case fs.ModeSymlink:
		if target, err = os.Readlink(path); err != nil {
			return err
		}
	default:
		return fmt.Errorf("%s is neither a file, a directory nor a symbolic link", path)
	}
	h, err := tar.FileInfoHeader(info, target)
	if err != nil {
		return err
	}
	*h = tar.Header{
		Typeflag: h.Typeflag, Name: filepath.ToSlash(rel), Linkname: h.Linkname, Size: h.Size, Mode: h.Mode & 0o777,
		ModTime: time.Unix(0, 0), Format: tar.FormatPAX,
	}
	if info.IsDir() {
		h.Mode |= dirs
	}
	if err := t.WriteHeader(h); err != nil || h.Typeflag != tar.TypeReg {
		return err
	}
	f, err := regular.Open(path)
	if err != nil {
		return fmt.Errorf("read %s: %w", path, err)
	}
	defer f.Close()
	_, err = io.Copy(t, f)
	return err
}

// demoRunner is the program of the demo runner's module.
const demoRunner = "github.com/ChristopherHX/github-act-runner"

// BuildDemoRunner builds the runner that `flint demo` uses with the go command into outDir, beside its module's start script and
// a version file; Drive makes a drive of that. It is a third-party program that speaks GitHub's protocol, meant for
// demonstrations and tests. The modules it needs are verified against the module's own go.sum.
func BuildDemoRunner(ctx context.Context, moduleDir, outDir string, p flint.Progress) error {
	path, err := exec.LookPath("go")
	if err != nil {
		return &flint.Fault{
			Code: "runner.go", What: "build demo runner: the go command is not here",
			Fix: "install Go 1.26 or newer from https://go.dev/dl and put it on the PATH", Kind: flint.ErrNotFound, Err: err,
		}
	}
	if moduleDir, err = filepath.Abs(moduleDir); err != nil {
		return fmt.Errorf("build demo runner: %w", err)
	}
	if outDir, err = filepath.Abs(outDir); err != nil {
		return fmt.Errorf("build demo runner: %w", err)
	}
	if _, err := os.Stat(filepath.Join(moduleDir, "go.mod")); err != nil {
		return &flint.Fault{
			Code: "runner.build", What: "build demo runner: its module is not there",
			Fix: "run flint from its source tree, which has images/demo-runner", Kind: flint.ErrNotFound, Err: err,
		}
	}
	const step = "build demo runner"
	done := p.Step(step)
	var version string
	t := tool.Tool{
		Path: path, Dir: moduleDir,
		Env: append(goCaches(outDir), "CGO_ENABLED=0", "GOOS=linux", "GOARCH="+runtime.GOARCH, "GOWORK=off"),
	}
	build, list := t, t
	build.Args = []string{"build", "-mod=readonly", "-trimpath", "-buildvcs=false", "-ldflags=-s -w", "-o", filepath.Join(outDir, filepath.Base(demoRunner)), demoRunner}
	build.Line = func(line string) { p.Report(flint.Milestone{Step: step, Line: line}) }
	list.Args = []string{"list", "-mod=readonly", "-m", "-f", "{{.Path}} {{.Version}}", demoRunner}
	list.Line = func(line string) { version = line }
	if err = build.Run(ctx); err == nil {
		err = list.Run(ctx)
	}
	if err == nil {
		err = copyDemoFiles(moduleDir, outDir, version)
	}
	var failed *tool.Error
	if errors.As(err, &failed) {
		err = &flint.Fault{
			Code: "runner.build", What: step,
			Fix: "check that this machine reaches the Go module proxy (go env GOPROXY); the go command's own message is above", Err: err,
		}
	}
	done(version, err)
	return err
}

// goCaches says where the go command keeps what it writes beside its result. Under sudo that is beside outDir: the files would
// be root's, and the person who called sudo could neither use nor remove them in the home directory. What that person has
// set with `go env -w` holds as before.
func goCaches(outDir string) []string {
	if os.Geteuid() != 0 || os.Getenv("SUDO_UID") == "" {
		return []string{"GOFLAGS="}
	}
	caches := filepath.Join(filepath.Dir(outDir), "go")
	env := []string{
		"GOFLAGS=-modcacherw", "GOPATH=" + caches, "GOMODCACHE=" + filepath.Join(caches, "pkg", "mod"),
		"GOCACHE=" + filepath.Join(caches, "build"), "XDG_CONFIG_HOME=" + filepath.Join(caches, "config"),
	}
	if config, err := os.UserConfigDir(); err == nil {
		env = append(env, "GOENV="+filepath.Join(config, "go", "env"))
	}
	return env
}

func copyDemoFiles(moduleDir, outDir, version string) error {
	start, err := os.ReadFile(filepath.Join(moduleDir, startFile))
	if err != nil {
		return fmt.Errorf("copy start script: %w", err)
	}
	if err := os.WriteFile(filepath.Join(outDir, startFile), start, 0o755); err != nil {
		return fmt.Errorf("copy start script: %w", err)
	}
	if err := os.WriteFile(filepath.Join(outDir, versionFile), []byte(version+"\n"), 0o644); err != nil {
		return fmt.Errorf("write version: %w", err)
	}
	return nil
}
