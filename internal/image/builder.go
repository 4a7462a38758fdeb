package image

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"flint"
	"flint/internal/regular"
	"flint/internal/tool"
)

const (
	runPrefix = "/tmp/flint-" // of the paths of run directories
	runLink   = "run"         // in a build's work directory: where its run directory is

	answerTime = 20 * time.Second // what a builder has to say that it works
)

// build is one build by one builder.
type build struct {
	name  string // docker, podman or buildah
	path  string // of the program
	store *Store // whose storage podman and buildah use; docker has its own
	file  string // the Dockerfile; its directory is the context
	dir   string // private, for what is made
	tag   string // the same for the same Dockerfile, so that a new build replaces the old one's name
	args  map[string]string
	pull  bool // the base is looked up again, though it is here
	line  func(string)

	progress flint.Progress
}

// builder chooses: docker if its daemon answers and it can build on the base asked for, then podman if it is set up, then buildah.
func (s *Store) builder(ctx context.Context, file, dir string, w Want) (*build, error) {
	b := &build{
		store: s, file: file, dir: dir, args: w.BuildArgs, progress: w.Progress, pull: w.Pull.renews() && !w.BaseIsHere,
		tag: tagOf(file),
	}
	var unfit []error // why those that are installed cannot do it
	for _, name := range []string{"docker", "podman", "buildah"} {
		path, err := exec.LookPath(name)
		if err != nil {
			continue
		}
		b.name, b.path = name, path
		if err = b.fit(ctx); err == nil {
			return b, nil
		}
		if ctx.Err() != nil {
			return nil, context.Cause(ctx)
		}
		unfit = append(unfit, err)
	}
	return nil, &flint.Fault{
		Code: "image.builder",
		What: fmt.Sprintf("build image %q: neither a running docker nor podman nor buildah is here that can", w.Ref),
		Fix:  "sudo apt-get install buildah",
		Kind: flint.ErrNotFound,
		Err:  errors.Join(unfit...),
	}
}

// tagOf is the name that a builder gives to what it makes of a Dockerfile.
func tagOf(file string) string { return "localhost/flint-" + keyOf(file)[:12] + ":latest" }

// fit returns why a builder that is installed cannot do this build: docker's client builds nothing without the daemon, nor podman
// without a container runtime.
func (b *build) fit(ctx context.Context) error {
	answers := func(t tool.Tool) error {
		ctx, cancel := context.WithTimeout(ctx, answerTime)
		defer cancel()
		return t.Run(ctx)
	}
	switch b.name {
	case "docker":
		for _, a := range sortedArgs(b.args) {
			if strings.HasPrefix(a, ociPrefix) {
				return fmt.Errorf("docker cannot build on the local image %s", a)
			}
		}
		return answers(b.quiet("version", "--format", "{{.Server.Version}}"))
	case "podman":
		return b.inStorage(ctx, func(_ string, with command) error { return answers(with("info")) })
	}
	return nil
}

// hereDocument is an instruction that begins one, which Debian 12's buildah takes for a file's name.
var hereDocument = regexp.MustCompile(`(?mi)^\s*(run|copy|add)\s.*<<-?["']?[a-z_]`)

// lacks says what of a Dockerfile that could not be built the builder may be too old for, to follow a fix.
func (b *build) lacks() string {
	if b.name == "docker" {
		return ""
	}
	text, err := regular.Read(b.file, maxDockerfile)
	if err != nil || !hereDocument.Match(text) {
		return ""
	}
	return "; it has a here-document (<<), which needs docker's BuildKit, or a newer " + b.name + " than Debian 12's"
}

// out is where the image is put: a layout, or docker's archive.
func (b *build) out() string {
	if b.name == "docker" {
		return filepath.Join(b.dir, "image.tar")
	}
	return filepath.Join(b.dir, "layout")
}

func (b *build) build(ctx context.Context) error {
	if b.name == "docker" {
		return b.withDocker(ctx)
	}
	return b.inStorage(ctx, func(run string, with command) error { return b.withStorage(ctx, run, with) })
}

// withDocker builds with docker's own cache. Names of images it made before go to the new one; what is left without a name is removed.
func (b *build) withDocker(ctx context.Context) error {
	unlock, err := b.store.lock(ctx, keyOf("docker", b.tag), b.progress)
	if err != nil {
		return err
	}
	defer unlock()
	args := []string{"build"}
	// A builder of buildx's may be elsewhere and keep what it made. Without buildx docker has a builder of its own.
	if os.Getenv("DOCKER_BUILDKIT") != "0" && b.quiet("buildx", "version").Run(ctx) == nil {
		args = []string{"buildx", "build", "--load"}
	}
	label := "flint=" + b.tag
	args = append(append(args, "--file", b.file, "--tag", b.tag, "--label", label), buildArgs(b.args)...)
	if b.pull {
		args = append(args, "--pull")
	}
	plain := []string{"BUILDKIT_PROGRESS=plain"} // harmless to the classic builder
	if err := b.tool(append(args, filepath.Dir(b.file)), plain).Run(ctx); err != nil {
		return err
	}
	if err := b.tool([]string{"save", "--output", b.out(), b.tag}, nil).Run(ctx); err != nil {
		return err
	}
	// A build that went well is not failed for what is left.
	if err := b.quiet("image", "prune", "--force", "--filter", "label="+label).Run(ctx); err != nil && ctx.Err() != nil {
		return err
	}
	return nil
}

// command makes the command of a builder that works in the storage which is kept in the store.
type command func(args ...string) tool.Tool

// inStorage has podman or buildah work in a storage that is kept in the store: its layers make the next build quick, and nothing is
// left elsewhere. The run directory is there as long as do runs.
func (b *build) inStorage(ctx context.Context, do func(run string, with command) error) error {
	// Builds share the storage, and what a killed build left there is removed by name.
	unlock, err := b.store.lock(ctx, builderLock, b.progress)
	if err != nil {
		return err
	}
	defer unlock()
	storage := b.store.path(builderDir)
	b.store.used(storage)
	// Not $TMPDIR: podman refuses a path of more than 50 bytes, and it becomes part of an image's name, which has no
	// upper case.
	run, release, err := runIn(filepath.Dir(runPrefix), b.dir)
	if err != nil {
		return err
	}
	defer release()
	root := filepath.Join(storage, "storage")
	// Podman's database holds where the run directory was, and refuses another. The rest of it is of containers, of which none
	// outlives a build.
	for _, database := range []string{"libpod", "db.sql"} {
		if err := os.RemoveAll(filepath.Join(root, database)); err != nil {
			return fmt.Errorf("remove podman's database: %w", err)
		}
	}
	return do(run, func(args ...string) tool.Tool {
		return b.tool(append([]string{"--root", root, "--runroot", run}, args...), nil)
	})
}

// runIn makes a run directory in dir for what works in the directory work, and notes it there for sweep, should this process be
// killed.
func runIn(dir, work string) (run string, release func(), err error) {
	if run, err = os.MkdirTemp(dir, filepath.Base(runPrefix)); err != nil {
		return "", nil, fmt.Errorf("make run directory: %w", err)
	}
	link := filepath.Join(work, runLink)
	if err := os.Symlink(run, link); err != nil {
		return "", nil, errors.Join(fmt.Errorf("note run directory: %w", err), os.Remove(run))
	}
	return run, func() { os.RemoveAll(run); os.Remove(link) }, nil
}

// isRun reports whether a path may be that of a run directory.
func isRun(path string) bool {
	dir, name := filepath.Split(path)
	inOurs := filepath.Clean(dir) == filepath.Dir(runPrefix) || filepath.Clean(dir) == filepath.Clean(os.TempDir())
	return inOurs && strings.HasPrefix(name, filepath.Base(runPrefix))
}

// withStorage builds with podman or buildah.
func (b *build) withStorage(ctx context.Context, run string, with command) error {
	args := []string{"build", "--layers", "--force-rm", "--timestamp", "0", "--file", b.file, "--tag", b.tag}
	args = append(args, isolation(unifiedCgroups(), tool.Find)...)
	if b.pull {
		args = append(args, "--pull=always")
	}
	local, names, err := linkBases(b.args, run)
	if err != nil {
		return err
	}
	args = append(append(args, buildArgs(local)...), filepath.Dir(b.file))
	if err := with(args...).Run(ctx); err != nil {
		b.tidy(ctx, with)
		return err
	}
	if err := with("push", b.tag, ociPrefix+b.out()).Run(ctx); err != nil {
		return err
	}
	return b.prune(ctx, names, with)
}

// prune takes the names of local bases away, and then the layers no image uses any more. A build that went well is not
// failed for what is left; the next one tries again.
func (b *build) prune(ctx context.Context, names []string, with command) error {
	untag, prune := []string{"rmi"}, []string{"rmi", "--prune"}
	if b.name == "podman" {
		untag, prune = []string{"untag"}, []string{"image", "prune", "--force"}
	}
	var list [][]string
	for _, name := range names {
		list = append(list, append(untag, name))
	}
	for _, args := range append(list, prune) {
		t := with(args...)
		t.Line = nil
		if err := t.Run(ctx); err != nil && ctx.Err() != nil {
			return err
		}
	}
	return nil
}

// linkBases replaces the local images among build arguments by links in dir: buildah and podman name what they read
// after its path, and fail on paths that make no good name. It returns the names they will give.
func linkBases(args map[string]string, dir string) (linked map[string]string, names []string, err error) {
	linked = map[string]string{}
	for _, k := range slices.Sorted(maps.Keys(args)) {
		v := args[k]
		linked[k] = v
		if !strings.HasPrefix(v, ociPrefix) {
			continue
		}
		src, err := locate(v)
		if err != nil {
			return nil, nil, err
		}
		link := filepath.Join(dir, fmt.Sprintf("base%d", len(names)))
		if err := os.Symlink(src.path, link); err != nil {
			return nil, nil, fmt.Errorf("link base image: %w", err)
		}
		linked[k] = ociPrefix + link
		tag := src.tag
		if tag == "" {
			tag = "latest"
		} else {
			linked[k] += ":" + tag
		}
		names = append(names, "localhost"+link+":"+tag)
	}
	return linked, names, nil
}

// tidy removes the working containers of a build that failed or was ended. The storage is ours alone and locked.
func (b *build) tidy(ctx context.Context, with command) {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), 30*time.Second)
	defer cancel()
	t := with("rm", "--all")
	if b.name == "podman" {
		t = with("rm", "--all", "--force")
	}
	if err := t.Run(ctx); err != nil {
		b.line("remove working containers: " + err.Error())
	}
}

func (b *build) tool(args, env []string) tool.Tool {
	return tool.Tool{Path: b.path, Args: args, Env: env, Line: b.line}
}

// quiet is a command whose messages are of no interest to who waits.
func (b *build) quiet(args ...string) tool.Tool { return tool.Tool{Path: b.path, Args: args} }

func buildArgs(args map[string]string) []string {
	var list []string
	kv := sortedArgs(args)
	for i := 0; i < len(kv); i += 2 {
		list = append(list, "--build-arg", kv[i]+"="+kv[i+1])
	}
	return list
}

// isolation is how podman and buildah run a build's commands: in a container where there is a runtime for it and cgroups it
// takes, else with no more than a chroot. Distributions only recommend a runtime, so it may not be installed.
func isolation(unified bool, find func(name string) (string, error)) []string {
	if unified {
		for _, runtime := range []string{"crun", "runc"} {
			if _, err := find(runtime); err == nil {
				return nil
			}
		}
	}
	return []string{"--isolation", "chroot"}
}

// unifiedCgroups reports whether the host has cgroup v2 only. Container runtimes refuse the hybrid layout.
func unifiedCgroups() bool {
	var st unix.Statfs_t
	return unix.Statfs("/sys/fs/cgroup", &st) == nil && st.Type == unix.CGROUP2_SUPER_MAGIC
}
