package app

import (
	"cmp"
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
	"flint/internal/rootfs"
)

// MakeImage makes the base image of a reference anew, or of a Dockerfile with its build arguments: as the configured pools with
// that image want it, which is one for each file system and, where no arguments are given, each set of theirs. Their VMs get it
// from the next look on.
func MakeImage(ctx context.Context, cfg config.Config, opt Options, ref string, args map[string]string) (made []image.Base, err error) {
	store, err := makeStore(cfg, opt.Log)
	if err != nil {
		return nil, err
	}
	a := &App{cfg: cfg, opt: opt, log: opt.Log, store: store}
	for _, p := range makings(cfg, ref, args) {
		args := p.Args
		if opt.LocalBase {
			if args, err = a.localBase(ctx, p); err != nil {
				return made, err
			}
		}
		b, err := store.Base(ctx, image.Want{
			Ref: ref, BuildArgs: args, Format: image.Format(p.Format), Progress: opt.Progress,
			Pull: image.Always, BaseIsHere: p.Pull == config.PullMissing,
		})
		if err != nil {
			return made, err
		}
		made = append(made, b)
	}
	return made, nil
}

// makings are the different ways in which the pools with an image have it made, each as a pool of that image. Arguments that are
// given are used instead of theirs. Where no pool has the image there is one.
func makings(cfg config.Config, ref string, args map[string]string) (all []config.Pool) {
	for _, p := range cfg.Pools {
		m := config.Pool{Image: ref, Args: p.Args, Format: cmp.Or(p.Format, string(image.Ext4)), Pull: p.Pull}
		if len(args) > 0 {
			m.Args = args
		}
		same := func(o config.Pool) bool { return madeFrom(o).equal(madeFrom(m)) }
		if p.Image == ref && !slices.ContainsFunc(all, same) {
			all = append(all, m)
		}
	}
	if len(all) == 0 {
		all = []config.Pool{{Image: ref, Args: args}}
	}
	return all
}

// CopyImage copies a base image to a file of its owner's, which is whole or as it was before. It is no link: the owner may write
// to it.
func CopyImage(b image.Base, to string) error {
	err := copyImage(b, to)
	if err == nil {
		return nil
	}
	if f := flint.SpaceFault("image.output", "write "+to, to, err); f != nil {
		return f
	}
	return &flint.Fault{Code: "image.output", What: "write " + to, Err: err, Fix: "name a file in a directory that you may write to"}
}

func copyImage(b image.Base, to string) error {
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
type ImageContents = rootfs.Contents

// ImageDetails is what is known of one image.
type ImageDetails struct {
	Stored
	Env  []string `json:"env,omitempty"`
	User string   `json:"user,omitempty"`
	Dir  string   `json:"dir,omitempty"`
	Cmd  []string `json:"cmd,omitempty"`
	// Contents is what flint found in it; nil where it cannot be looked into.
	Contents *rootfs.Contents `json:"contents,omitempty"`
}

// InspectImage describes a base image that is kept.
func InspectImage(ctx context.Context, cfg config.Config, opt Options, name string) (ImageDetails, error) {
	s, err := findStored(ctx, cfg, opt, name)
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
		if has, err := rootfs.Look(ctx, path); err == nil {
			d.Contents = &has
		}
	}
	return d, nil
}

// RemoveImage removes what is kept under a name, unless somebody uses it. It returns what that was, and how much of the disk
// it took.
func RemoveImage(ctx context.Context, cfg config.Config, opt Options, name string) (Stored, error) {
	s, err := findStored(ctx, cfg, opt, name)
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

// leastDigits is how much of a digest has to be given.
const leastDigits = 4

// findStored finds what the image store keeps by the beginning of its digest, at least four digits of it, or by what it was
// made of last. What is damaged gives way to the good one of that digest.
func findStored(ctx context.Context, cfg config.Config, opt Options, name string) (Stored, error) {
	list, err := StoredImages(ctx, cfg, opt)
	if err != nil {
		return Stored{}, err
	}
	prefix := strings.TrimPrefix(name, "sha256:")
	var found []Stored
	isDamaged := func(s Stored) bool { return s.Kind == string(image.KindDamaged) }
	isKernel := func(s Stored) bool { return s.Kind == "kernel" || s.Kind == "initramfs" }
	kernels := slices.DeleteFunc(slices.Clone(list), func(s Stored) bool { return !isKernel(s) })
	list = slices.DeleteFunc(list, isKernel)
	for _, s := range list {
		if len(prefix) >= leastDigits && strings.HasPrefix(strings.TrimPrefix(s.Digest, "sha256:"), prefix) || s.Digest == name {
			found = append(found, s)
		}
	}
	if good := slices.DeleteFunc(slices.Clone(found), isDamaged); len(good) > 0 {
		found = good
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
	return Stored{}, notAnImage(name, kernels)
}

// notAnImage is the fault of a name that is no image's.
func notAnImage(name string, kernels []Stored) error {
	f := &flint.Fault{Code: "image.unknown", What: fmt.Sprintf("find image %q", name), Kind: flint.ErrNotFound}
	f.Err, f.Fix = errors.New("nothing that is kept has this digest, or was made of this"), "see flint image ls; flint image pull and flint image build make images"
	for _, k := range kernels {
		if strings.HasPrefix(k.Digest, name) && len(name) >= leastDigits || slices.Contains(k.Source, name) {
			f.Err, f.Fix = errors.New("it is a kernel"), "see flint kernel ls; flint kernel inspect and flint kernel rm are for kernels"
		}
	}
	return f
}
