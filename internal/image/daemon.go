package image

import (
	"context"
	"errors"
	"fmt"
	"os/exec"
	"path/filepath"
	"strings"

	"github.com/google/go-containerregistry/pkg/name"
	v1 "github.com/google/go-containerregistry/pkg/v1"

	"flint"
	"flint/internal/tool"
)

// fromDaemon takes an image that the local docker, podman or buildah keeps: what their commands see as the user that flint
// runs as.
func (s *Store) fromDaemon(ctx context.Context, src source, w Want) (Base, error) {
	if _, err := name.ParseReference(src.name); err != nil {
		return Base{}, missing(src.ref, "that is no name of an image", err)
	}
	q := question{step: "take image " + w.Ref, key: keyOf(w.version(), "daemon", src.ref)}
	return s.answer(ctx, q, w, func() (Base, error) {
		dir, release, err := s.work()
		if err != nil {
			return Base{}, err
		}
		defer release()
		done := w.Progress.Step(q.step)
		img, id, err := s.export(ctx, src, dir, w)
		if err != nil {
			done("", err)
			return Base{}, err
		}
		done(fmt.Sprintf("%.19s", id), nil)
		key := keyOf(w.version(), "daemon", id)
		if b, ok := s.recallBase(key); img == nil && ok {
			return b, nil
		}
		b, err := s.flattenStep(ctx, img, w)
		if err == nil {
			s.note(key, b)
		}
		return b, err
	})
}

// export writes an image to dir and opens it, unless what it holds is in the store: then img is nil.
func (s *Store) export(ctx context.Context, src source, dir string, w Want) (img v1.Image, id string, err error) {
	path, err := keeper(src)
	if err != nil {
		return nil, "", err
	}
	run := tool.Tool{Path: path, Line: func(line string) {
		w.Progress.Report(flint.Milestone{Step: "take image " + w.Ref, Line: line})
	}}
	if id, err = identify(ctx, run, src); err != nil {
		return nil, "", err
	}
	if _, ok := s.recallBase(keyOf(w.version(), "daemon", id)); ok {
		return nil, id, nil
	}
	// By its id: its name may be another's by now.
	if src.kind == dockerDaemon {
		file := filepath.Join(dir, "image.tar")
		run.Args = []string{"save", "--output", file, id}
		if err := run.Run(ctx); err != nil {
			return nil, "", daemonFault(src, err)
		}
		img, err = dockerImage(file, "", w.Limit)
		return img, id, err
	}
	layout := filepath.Join(dir, "layout")
	run.Args = []string{"push", id, ociPrefix + layout}
	if err := run.Run(ctx); err != nil {
		return nil, "", daemonFault(src, err)
	}
	img, err = layoutImage(layout, "")
	return img, id, err
}

// identify asks for the id of the image that a name, with or without a tag, or the beginning of an id stands for.
func identify(ctx context.Context, run tool.Tool, src source) (string, error) {
	program := filepath.Base(run.Path)
	run.Line = nil
	if run.Args = []string{"image", "inspect", "--format", "{{.Id}}", src.name}; program == "buildah" {
		run.Args = []string{"inspect", "--type", "image", "--format", "{{.FromImageID}}", src.name}
	}
	out, err := run.Output(ctx)
	var failed *tool.Error
	if errors.As(err, &failed) {
		// It has no such image, unless it lists none at all.
		if run.Args = []string{"images", "--quiet"}; run.Run(ctx) == nil {
			return "", missing(src.ref, program+" has no such image", err)
		}
	}
	if err != nil {
		return "", daemonFault(src, err)
	}
	return strings.TrimSpace(string(out)), nil
}

// keeper finds the program that shows what is kept here.
func keeper(src source) (path string, err error) {
	names := []string{"podman", "buildah"}
	if src.kind == dockerDaemon {
		names = []string{"docker"}
	}
	for _, name := range names {
		if path, err := exec.LookPath(name); err == nil {
			return path, nil
		}
	}
	return "", missing(src.ref, strings.Join(names, " or ")+" is not installed", nil)
}

// daemonFault tells a full disk from a daemon that does not answer.
func daemonFault(src source, err error) error {
	var failed *tool.Error
	if err = tool.OutOfSpace(err); spaceFault(err, "") != nil || !errors.As(err, &failed) {
		return err
	}
	return &flint.Fault{
		Code: "image.daemon",
		What: fmt.Sprintf("take image %q from %s", src.ref, failed.Name),
		Fix:  "see that it runs and that flint's user may ask it; what it said is above",
		Err:  err,
	}
}
