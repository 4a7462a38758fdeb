package image

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"time"

	v1 "github.com/google/go-containerregistry/pkg/v1"
	"golang.org/x/sys/unix"

	"flint"
	"flint/internal/tool"
)

// ociPrefix marks a build argument that names a local OCI layout: only buildah and podman can build on one.
const ociPrefix = "oci:"

// fromDockerfile builds an ordinary Dockerfile, or finds it built from the same files with the same build arguments. What changed
// while it was built is built again. If that never ends, the image is used but not remembered: nobody knows what files it is of.
func (s *Store) fromDockerfile(ctx context.Context, src source, w Want) (Base, error) {
	asked := time.Now()
	for try := 1; ; try++ {
		key, err := s.buildKey(ctx, src.path, w)
		if err != nil {
			return Base{}, err
		}
		if b, ok := s.fresh(key, w.Pull.suffices); ok {
			w.Progress.Step("build image "+w.Ref)("cached", nil)
			return b, nil
		}
		b, changed, err := s.builtAs(ctx, key, src.path, w, asked)
		if err != nil || !changed || try == maxTries {
			return b, err
		}
		s.log.Info("files changed while an image was built of them: it is built again", "image", w.Ref)
	}
}

// builtAs builds a Dockerfile of that key, unless another process did since asked. It says whether the key is another by now.
func (s *Store) builtAs(ctx context.Context, key, file string, w Want, asked time.Time) (b Base, changed bool, err error) {
	step := "build image " + w.Ref
	unlock, err := s.lock(ctx, key)
	if err != nil {
		return Base{}, false, err
	}
	defer unlock()
	// Another may have built it while we waited.
	if b, ok := s.fresh(key, func(at time.Time) bool { return w.Pull.suffices(at) || at.After(asked) }); ok {
		w.Progress.Step(step)("cached", nil)
		return b, false, nil
	}
	dir, release, err := s.work()
	if err != nil {
		return Base{}, false, err
	}
	defer release()
	img, err := s.buildStep(ctx, file, dir, w)
	if err != nil {
		return Base{}, false, err
	}
	if b, err = s.flattenStep(ctx, img, w); err != nil {
		return Base{}, false, err
	}
	after, err := s.buildKey(ctx, file, w)
	if err != nil {
		return Base{}, false, err
	}
	if after == key {
		s.note(key, answered{b, time.Now()})
	}
	return b, after != key, nil
}

// buildKey names what a build depends on: not what it ignores. A local base image counts by its content, not its path.
func (s *Store) buildKey(ctx context.Context, file string, w Want) (string, error) {
	dir := filepath.Dir(file)
	but, err := ignoredBy(file)
	if err != nil {
		return "", err
	}
	digest, err := s.contextDigest(ctx, dir, but)
	if err != nil {
		return "", contextFault(dir, err)
	}
	parts := []string{w.version(), "dockerfile", digest, filepath.Base(file)}
	for _, a := range sortedArgs(w.BuildArgs) {
		if ref, ok := strings.CutPrefix(a, ociPrefix); ok {
			src, err := locate(ociPrefix + ref)
			if err != nil {
				return "", err
			}
			img, err := layoutImage(src.path, src.tag)
			if err != nil {
				return "", err
			}
			id, err := img.ConfigName()
			if err != nil {
				return "", fmt.Errorf("read %s: %w", a, err)
			}
			a = ociPrefix + id.String()
		}
		parts = append(parts, a)
	}
	return keyOf(parts...), nil
}

// buildStep runs a builder and opens what it made, which lies in dir.
func (s *Store) buildStep(ctx context.Context, file, dir string, w Want) (v1.Image, error) {
	step := "build image " + w.Ref
	b, err := s.builder(ctx, file, dir, w)
	if err != nil {
		return nil, err
	}
	done := w.Progress.Step(step)
	b.line = func(line string) { w.Progress.Report(flint.Milestone{Step: step, Line: line}) }
	// Builds share one storage, and what a killed build left there is removed by name. Docker sees to its own.
	lock := builderLock
	if b.name == "docker" {
		lock = keyOf("docker", b.tag)
	}
	unlock, err := s.lock(ctx, lock)
	if err == nil {
		defer unlock()
		s.used(b.storage)
		err = b.build(ctx)
	}
	var failed *tool.Error
	if errors.As(err, &failed) {
		err = tool.OutOfSpace(err)
	}
	if errors.As(err, &failed) && spaceFault(err, "") == nil {
		err = &flint.Fault{
			Code: "image.build",
			What: fmt.Sprintf("build image %q with %s", w.Ref, b.name),
			Fix:  "mend what the end of the builder's output, above, complains of",
			Kind: flint.ErrConfig,
			Err:  err,
		}
	}
	if err != nil {
		done("", err)
		return nil, err
	}
	done("with "+b.name, nil)
	if b.name == "docker" {
		return dockerImage(b.out(), "", w.Limit)
	}
	return layoutImage(b.out(), "")
}

const (
	runPrefix = "/tmp/flint-" // of the paths of run directories
	runLink   = "run"         // in a build's work directory: where its run directory is
)

// build is one build by one builder.
type build struct {
	name    string // docker, podman or buildah
	path    string // of the program
	storage string // root of its storage; docker has its own
	file    string // the Dockerfile; its directory is the context
	dir     string // private, for what is made
	tag     string // the same for the same Dockerfile, so that a new build replaces the old one's name
	args    map[string]string
	pull    bool // the base is looked up again, though it is here
	line    func(string)
}

// builder chooses: docker if its daemon answers and it can build on the base asked for, then podman, then buildah.
func (s *Store) builder(ctx context.Context, file, dir string, w Want) (*build, error) {
	b := &build{
		storage: s.path(builderDir), file: file, dir: dir, args: w.BuildArgs, pull: w.Pull.renews(),
		tag: "localhost/flint-" + keyOf(file)[:12] + ":latest",
	}
	localBase := ""
	for _, a := range sortedArgs(w.BuildArgs) {
		if strings.HasPrefix(a, ociPrefix) {
			localBase = a
		}
	}
	dockerWorks := false
	for _, name := range []string{"docker", "podman", "buildah"} {
		path, err := exec.LookPath(name)
		if err != nil {
			continue
		}
		if name == "docker" {
			dockerWorks = dockerAnswers(ctx, path)
			if !dockerWorks || localBase != "" {
				continue
			}
		}
		b.name, b.path = name, path
		return b, nil
	}
	if err := ctx.Err(); err != nil {
		return nil, context.Cause(ctx)
	}
	f := &flint.Fault{
		Code: "image.builder",
		What: fmt.Sprintf("build image %q: neither a running docker nor podman nor buildah is here", w.Ref),
		Fix:  "sudo apt-get install buildah",
		Kind: flint.ErrNotFound,
	}
	if dockerWorks {
		f.What = fmt.Sprintf("build image %q on the local image %s: docker cannot do that", w.Ref, localBase)
	}
	return nil, f
}

// dockerAnswers reports whether docker's daemon is there. The client without the daemon builds nothing.
func dockerAnswers(ctx context.Context, path string) bool {
	ctx, cancel := context.WithTimeout(ctx, 5*time.Second)
	defer cancel()
	return tool.Tool{Path: path, Args: []string{"version", "--format", "{{.Server.Version}}"}}.Run(ctx) == nil
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
	return b.withStorage(ctx)
}

func (b *build) withDocker(ctx context.Context) error {
	args := append([]string{"build", "--file", b.file, "--tag", b.tag}, buildArgs(b.args)...)
	if b.pull {
		args = append(args, "--pull")
	}
	plain := []string{"BUILDKIT_PROGRESS=plain"} // harmless to the classic builder
	if err := b.tool(append(args, filepath.Dir(b.file)), plain).Run(ctx); err != nil {
		return err
	}
	return b.tool([]string{"save", "--output", b.out(), b.tag}, nil).Run(ctx)
}

// withStorage builds with podman or buildah, whose storage is kept in the store: its layers make the next build quick,
// and nothing is left elsewhere.
func (b *build) withStorage(ctx context.Context) error {
	// Not $TMPDIR: podman refuses a path of more than 50 bytes, and it becomes part of an image's name, which has no
	// upper case.
	run, err := os.MkdirTemp(filepath.Split(runPrefix))
	if err != nil {
		return fmt.Errorf("make run directory: %w", err)
	}
	defer os.RemoveAll(run)
	if err := os.Symlink(run, filepath.Join(b.dir, runLink)); err != nil { // for sweep, should this process be killed
		return fmt.Errorf("note run directory: %w", err)
	}
	global := []string{"--root", filepath.Join(b.storage, "storage"), "--runroot", run}
	with := func(args ...string) tool.Tool { return b.tool(append(global[:len(global):len(global)], args...), nil) }

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
func (b *build) prune(ctx context.Context, names []string, with func(args ...string) tool.Tool) error {
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
func (b *build) tidy(ctx context.Context, with func(args ...string) tool.Tool) {
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
