package app

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"flint"
	"flint/internal/config"
	"flint/internal/image"
)

// MakeImage makes the base image of a reference anew, or of a Dockerfile with its build arguments, and returns its digest and
// size. A pool with that image is served by it from its next look on.
func MakeImage(ctx context.Context, cfg config.Config, opt Options, ref string, args map[string]string) (image.Base, error) {
	store, err := image.Open(filepath.Join(cfg.StateDir, "images"), opt.Log)
	if err != nil {
		return image.Base{}, stateDenied(cfg, err)
	}
	if opt.LocalBase {
		a := &App{cfg: cfg, opt: opt, log: opt.Log, store: store}
		if args, err = a.localBase(ctx, config.Pool{Image: ref, Args: args}); err != nil {
			return image.Base{}, err
		}
	}
	return store.Base(ctx, image.Want{Ref: ref, BuildArgs: args, Progress: opt.Progress, Pull: image.Always})
}

// CopyImage copies a base image to a file of its owner's, which is whole or as it was before. It is no link: the owner may write
// to it.
func CopyImage(b image.Base, to string) (err error) {
	in, err := os.Open(b.Path)
	if err != nil {
		return fmt.Errorf("open image: %w", err)
	}
	defer in.Close()
	if err := os.MkdirAll(filepath.Dir(to), 0o755); err != nil {
		return fmt.Errorf("make image's directory: %w", err)
	}
	out, err := os.CreateTemp(filepath.Dir(to), filepath.Base(to)+".*.new")
	if err != nil {
		return fmt.Errorf("write image: %w", err)
	}
	_, err = io.Copy(out, in)
	if err = errors.Join(err, out.Chmod(0o644), out.Sync(), out.Close()); err == nil {
		err = os.Rename(out.Name(), to)
	}
	if err != nil {
		return errors.Join(fmt.Errorf("write image: %w", err), os.Remove(out.Name()))
	}
	return nil
}

// ImageContents is what flint looks for in an image.
type ImageContents = image.Contents

// ImageDetails is what is known of one image.
type ImageDetails struct {
	Stored
	Env  []string `json:"env,omitempty"`
	User string   `json:"user,omitempty"`
	Dir  string   `json:"dir,omitempty"`
	Cmd  []string `json:"cmd,omitempty"`
	// Contents is what flint found in it; nil where it cannot be looked into.
	Contents *image.Contents `json:"contents,omitempty"`
}

// InspectImage describes a base image that is kept.
func InspectImage(cfg config.Config, opt Options, name string) (ImageDetails, error) {
	s, err := findStored(cfg, opt, name)
	if err != nil {
		return ImageDetails{}, err
	}
	d := ImageDetails{Stored: s}
	store, err := openStore(cfg, opt)
	if err != nil {
		return d, err
	}
	if b, ok := store.Describe(s.Digest); ok {
		d.Env, d.User, d.Dir, d.Cmd = b.Env, b.User, b.Dir, b.Cmd
	}
	if path, ok := store.BasePath(s.Digest); ok {
		if has, err := image.Look(path); err == nil {
			d.Contents = &has
		}
	}
	return d, nil
}

// RemoveImage removes what is kept under a name, unless somebody uses it. It returns what that was, and how much of the disk
// it took.
func RemoveImage(cfg config.Config, opt Options, name string) (Stored, error) {
	s, err := findStored(cfg, opt, name)
	if err != nil {
		return s, err
	}
	store, err := openStore(cfg, opt)
	if err != nil {
		return s, err
	}
	gone, err := store.Remove(s.path)
	if err == nil && !gone {
		err = &flint.Fault{
			Code: "image.in_use", What: fmt.Sprintf("remove image %q", name), Kind: flint.ErrConflict,
			Err: fmt.Errorf("a process uses it: flint, or a VM"), Fix: "wait until its VMs have ended, or take it from the pool first",
		}
	}
	return s, err
}

// findStored finds what the image store keeps by the beginning of its digest, at least four digits of it, or by what it was
// made of last.
func findStored(cfg config.Config, opt Options, name string) (Stored, error) {
	list, err := StoredImages(cfg, opt)
	if err != nil {
		return Stored{}, err
	}
	const least = 4
	prefix := strings.TrimPrefix(name, "sha256:")
	var found []Stored
	for _, s := range list {
		if s.Kind == "kernel" || s.Kind == "initramfs" {
			continue
		}
		if len(prefix) >= least && strings.HasPrefix(strings.TrimPrefix(s.Digest, "sha256:"), prefix) || s.Digest == name {
			found = append(found, s)
		}
	}
	if len(found) > 1 {
		return Stored{}, &flint.Fault{
			Code: "image.ambiguous", What: fmt.Sprintf("find image %q", name), Kind: flint.ErrConflict,
			Err: fmt.Errorf("%d images have a digest that begins so", len(found)), Fix: "give more of the digest: flint image ls --json",
		}
	}
	if len(found) == 1 {
		return found[0], nil
	}
	at, err := filepath.Abs(name)
	for _, s := range slices.Backward(list) { // the most recently used one
		if n := len(s.Source); n > 0 && (s.Source[n-1] == name || err == nil && s.Source[n-1] == at) {
			return s, nil
		}
	}
	return Stored{}, &flint.Fault{
		Code: "image.unknown", What: fmt.Sprintf("find image %q", name), Kind: flint.ErrNotFound,
		Err: fmt.Errorf("nothing that is kept has this digest, or was made of this"), Fix: "see flint image ls; flint image pull and flint image build make images",
	}
}
