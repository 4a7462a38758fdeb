package image

import (
	"context"
	"errors"
	"fmt"
	"path/filepath"
	"strings"
	"time"

	v1 "github.com/google/go-containerregistry/pkg/v1"

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
	unlock, err := s.lock(ctx, key, w.Progress)
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
	done := w.Progress.Step(step)
	b, err := s.builder(ctx, file, dir, w)
	if err != nil {
		done("", err)
		return nil, err
	}
	b.line = func(line string) { w.Progress.Report(flint.Milestone{Step: step, Line: line}) }
	err = s.whileRoom(ctx, dir, b.build)
	var failed *tool.Error
	if errors.As(err, &failed) {
		err = tool.OutOfSpace(err)
	}
	if errors.As(err, &failed) && spaceFault(err, "") == nil {
		err = &flint.Fault{
			Code: "image.build",
			What: fmt.Sprintf("build image %q with %s", w.Ref, b.name),
			Fix:  "mend what the end of the builder's output, above, complains of" + b.lacks(),
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
