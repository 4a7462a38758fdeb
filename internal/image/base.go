package image

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"reflect"
	"runtime"
	"slices"
	"strings"
	"syscall"
	"time"

	v1 "github.com/google/go-containerregistry/pkg/v1"

	"flint"
	"flint/internal/rootfs"
)

// Base finds or makes the base image that w names. What was made before from the same input is found again without
// reading images or running a builder; the result is the same whoever asks first, and asking twice at the same time
// makes it once. Errors a person can mend are *flint.Fault with a code that starts with "image.".
func (s *Store) Base(ctx context.Context, w Want) (Base, error) {
	if w.Limit <= 0 {
		w.Limit = defaultLimit
	}
	if w.Format == "" {
		w.Format = Ext4
	}
	last := keyOf(append([]string{w.version(), "last", w.Ref}, sortedArgs(w.BuildArgs)...)...)
	b, err := s.obtainInTime(ctx, w)
	if err == nil {
		before, ok := s.recallBase(last)
		if ours := filepath.Dir(b.Path) == s.path(baseDir); ours && (!ok || !reflect.DeepEqual(before, b)) {
			s.note(last, b)
		}
		s.forgive(w.Ref)
		return b, nil
	}
	if ctx.Err() != nil {
		return Base{}, err
	}
	err = explain(err, w)
	s.note(failureKey(w.Ref), Failure{Ref: w.Ref, At: time.Now(), Why: err.Error()})
	if !w.OrLast {
		return Base{}, err
	}
	b, ok := s.recallBase(last)
	if !ok || s.holdWhole(ctx, b.Path) != nil {
		return Base{}, err
	}
	b.Stale = err
	return b, nil
}

// longestMaking is how long an image may take: builds do what they like, and whoever else is asked may say nothing. What was
// downloaded, and most of what was built, is there for the next try.
const longestMaking = 2 * time.Hour

// obtainInTime is obtain, which may not take for ever.
func (s *Store) obtainInTime(ctx context.Context, w Want) (Base, error) {
	within, cancel := context.WithTimeout(ctx, s.longest)
	defer cancel()
	b, err := s.obtain(within, w)
	if err != nil && within.Err() != nil && ctx.Err() == nil {
		return Base{}, &flint.Fault{
			Code: "image.slow",
			What: fmt.Sprintf("make image %q within %s", w.Ref, s.longest),
			Fix:  "see whether its build, the builder, the daemon or the registry hangs; what was downloaded and built is kept for the next try",
			Err:  err,
		}
	}
	return b, err
}

// obtain finds or makes what w names, and holds it.
func (s *Store) obtain(ctx context.Context, w Want) (Base, error) {
	src, err := locate(w.Ref)
	if err != nil {
		return Base{}, err
	}
	for try := 1; ; try++ {
		b, err := s.base(ctx, src, w)
		if err != nil || src.kind == ext4File { // that is not the store's
			return b, err
		}
		err = s.holdWhole(ctx, b.Path)
		if err == nil {
			s.noteSource(b.Path, w.Ref)
			return b, nil
		}
		if !again(err) || try == maxTries {
			return Base{}, err
		}
	}
}

// maxTries bounds how often an image is made again that another process removes at once, or that is damaged at once.
const maxTries = 3

// again says that an image is not there any more: a GC was quicker, or it was damaged and is set aside.
func again(err error) bool { return errors.Is(err, fs.ErrNotExist) || errors.Is(err, errDamaged) }

// base finds or makes what src is.
func (s *Store) base(ctx context.Context, src source, w Want) (b Base, err error) {
	switch src.kind {
	case dockerfile:
		b, err = s.fromDockerfile(ctx, src, w)
	case ociLayout:
		b, err = s.fromLayout(ctx, src, w)
	case archive:
		b, err = s.fromArchive(ctx, src, w)
	case ext4File:
		b, err = s.fromExt4(ctx, src, w)
	case registry:
		b, err = s.fromRegistry(ctx, src, w)
	case dockerDaemon, containersStorage:
		b, err = s.fromDaemon(ctx, src, w)
	}
	return b, err
}

// explain turns what went wrong with an image into a fault, unless it is one already, or the fault of this machine, or
// the caller's wish.
func explain(err error, w Want) error {
	var f *flint.Fault
	var number syscall.Errno
	var path *fs.PathError
	if full := spaceFault(err, fmt.Sprintf("make image %q", w.Ref)); full != nil {
		return full
	}
	switch {
	case errors.As(err, &f):
		return err
	case errors.Is(err, rootfs.ErrTooBig):
		return &flint.Fault{
			Code: "image.size",
			What: fmt.Sprintf("make image %q", w.Ref),
			Fix:  fmt.Sprintf("make the image smaller; the limit is %s for all files together and %s for one file", w.Limit, rootfs.MaxFile),
			Kind: flint.ErrConfig,
			Err:  err,
		}
	case errors.Is(err, rootfs.ErrBudget):
		return &flint.Fault{
			Code: "image.size",
			What: fmt.Sprintf("make image %q", w.Ref),
			Fix:  fmt.Sprintf("make the image of fewer or smaller files; all layers together may have %d entries and %s unpacked", rootfs.MaxEntries, rootfs.MaxUnpacked(w.Limit)),
			Kind: flint.ErrConfig,
			Err:  err,
		}
	case errors.Is(err, rootfs.ErrAttributes):
		return &flint.Fault{
			Code: "image.attributes",
			What: fmt.Sprintf("make image %q", w.Ref),
			Fix:  "remove the attributes where the image is made (setfattr -x); erofs has room for more than ext4 (filesystem: erofs)",
			Kind: flint.ErrConfig,
			Err:  err,
		}
	case errors.Is(err, rootfs.ErrLinks):
		return &flint.Fault{
			Code: "image.links",
			What: fmt.Sprintf("make image %q", w.Ref),
			Fix:  "make it an erofs (filesystem: erofs, or flint run --filesystem erofs)",
			Kind: flint.ErrConfig,
			Err:  err,
		}
	case errors.Is(err, fs.ErrPermission):
		return &flint.Fault{
			Code: "image.denied",
			What: fmt.Sprintf("make image %q", w.Ref),
			Fix:  "let the user that flint runs as have what is named there, or run flint as root",
			Kind: flint.ErrPermission,
			Err:  err,
		}
	case errors.Is(err, context.Canceled), errors.Is(err, context.DeadlineExceeded), errors.As(err, &path), errors.As(err, &number):
		return fmt.Errorf("make image %q: %w", w.Ref, err)
	}
	return &flint.Fault{
		Code: "image.layer",
		What: fmt.Sprintf("make image %q", w.Ref),
		Fix:  "the image is damaged or not one flint accepts; build or pull it again, and check it with another tool (skopeo inspect, podman image inspect)",
		Kind: flint.ErrConfig,
		Err:  err,
	}
}

// summary is the detail of a finished step.
func summary(b Base) string {
	return fmt.Sprintf("%.19s, %s", b.Digest, b.Size)
}

// flattenStep makes the base image of an OCI image, as a step of its own.
func (s *Store) flattenStep(ctx context.Context, img v1.Image, w Want) (Base, error) {
	done := w.Progress.Step("write file system of " + w.Ref)
	b, err := s.fromImage(ctx, img, w)
	if err != nil {
		done("", err)
		return Base{}, err
	}
	done(summary(b), nil)
	return b, nil
}

func (s *Store) fromLayout(ctx context.Context, src source, w Want) (Base, error) {
	img, err := layoutImage(src.path, src.tag)
	if err != nil {
		return Base{}, err
	}
	return s.flattenStep(ctx, img, w)
}

// refAnnotation names an image in a layout's index.
const refAnnotation = "org.opencontainers.image.ref.name"

// layoutImage opens the image with that tag, or the only one, in an OCI layout.
func layoutImage(dir, tag string) (v1.Image, error) {
	return inDir(dir).image(dir, tag)
}

// pick chooses from an index: by tag, then by platform, going into indexes within it. Depth 0 is a layout's own index, whose entries
// are images of their own; in all others they are one image for several platforms.
func pick(index v1.ImageIndex, ref, tag string, depth int) (v1.Image, error) {
	m, err := index.IndexManifest()
	if err != nil {
		return nil, fmt.Errorf("read index: %w", err)
	}
	var fit []v1.Descriptor
	var tags, platforms []string
	for _, d := range m.Manifests {
		if t := d.Annotations[refAnnotation]; t != "" && depth == 0 {
			tags = append(tags, t)
		}
		if tag != "" && d.Annotations[refAnnotation] != tag {
			continue
		}
		if p := d.Platform; p != nil && p.OS != "" && p.OS != "unknown" { // that is what attestations say
			platforms = append(platforms, p.String())
		}
		if (d.MediaType.IsImage() || d.MediaType.IsIndex() && depth < 2) && d.Size <= maxManifest && suits(d.Platform) {
			fit = append(fit, d)
		}
	}
	have := ""
	if len(tags) > 0 {
		have = " (it has the tags " + strings.Join(tags, ", ") + ")"
	}
	switch {
	case len(fit) == 0 && len(platforms) > 0:
		return nil, wrongPlatform(ref, strings.Join(platforms, ", "))
	case len(fit) == 0 && tag != "":
		return nil, missing(ref, fmt.Sprintf("it has no image for linux/%s with the tag %q%s", runtime.GOARCH, tag, have), nil)
	case len(fit) == 0:
		return nil, missing(ref, fmt.Sprintf("it has no image for linux/%s%s", runtime.GOARCH, have), nil)
	case len(fit) > 1 && depth == 0 && !oneImage(fit):
		return nil, missing(ref, "it has several images: say which with :tag"+have, nil)
	}
	chosen := fit[max(0, slices.IndexFunc(fit, ordinary))]
	if chosen.MediaType.IsImage() {
		return index.Image(chosen.Digest)
	}
	inner, err := index.ImageIndex(chosen.Digest)
	if err != nil {
		return nil, fmt.Errorf("read index: %w", err)
	}
	return pick(inner, ref, "", depth+1)
}

// oneImage reports whether entries of a layout's own index are one image for several variants of a platform.
func oneImage(all []v1.Descriptor) bool {
	seen := map[string]bool{}
	for _, d := range all {
		if d.Platform == nil || seen[d.Platform.String()] || d.Annotations[refAnnotation] != all[0].Annotations[refAnnotation] {
			return false
		}
		seen[d.Platform.String()] = true
	}
	return true
}

// ordinary reports whether an image is for every machine of its architecture: newer variants need newer ones.
func ordinary(d v1.Descriptor) bool {
	p := d.Platform
	return p != nil && p.OS != "" && (p.Variant == "" || p.Architecture == "arm64" && p.Variant == "v8")
}

// wrongPlatform is the fault of an image that is for other machines than this one.
func wrongPlatform(ref, has string) error {
	return &flint.Fault{
		Code: "image.platform",
		What: fmt.Sprintf("use image %q on linux/%s: it is for %.256s", ref, runtime.GOARCH, has),
		Fix:  "name an image, or a tag, that is made for this machine too",
		Kind: flint.ErrNotFound,
	}
}

// suits reports whether an image for p runs in our guests. Builders often leave the platform out.
func suits(p *v1.Platform) bool {
	return p == nil || p.OS == "" && p.Architecture == "" || p.OS == "linux" && p.Architecture == runtime.GOARCH
}

func (s *Store) fromArchive(ctx context.Context, src source, w Want) (Base, error) {
	print, settled, err := fileStamp(src.path)
	if err != nil {
		return Base{}, err
	}
	key := keyOf(w.version(), "archive", print, src.tag)
	if b, ok := s.recallBase(key); ok {
		w.Progress.Step("prepare image "+w.Ref)("cached", nil)
		return b, nil
	}
	img, err := archiveImage(src, w.Limit)
	if err != nil {
		return Base{}, err
	}
	b, err := s.flattenStep(ctx, img, w)
	if err != nil || !settled {
		return b, err
	}
	s.note(key, b)
	return b, nil
}

// fromExt4 uses a file as it is. Only its digest is computed, once.
func (s *Store) fromExt4(ctx context.Context, src source, w Want) (Base, error) {
	print, settled, err := fileStamp(src.path)
	if err != nil {
		return Base{}, err
	}
	if err := rootfs.Whole(src.path); err != nil {
		return Base{}, err
	}
	info, err := os.Stat(src.path)
	if err != nil {
		return Base{}, fmt.Errorf("read image: %w", err)
	}
	b := Base{Path: src.path, Size: flint.Bytes(info.Size())}
	key := keyOf("ext4", print)
	if s.recall(key, &b.Digest) {
		return b, nil
	}
	done := w.Progress.Step("read image " + w.Ref)
	if b.Digest, err = hashFile(ctx, src.path); err != nil {
		done("", err)
		return Base{}, fmt.Errorf("read image: %w", err)
	}
	done(summary(b), nil)
	if !settled {
		return b, nil
	}
	s.note(key, b.Digest)
	return b, nil
}

// settleTime is how old a file must be before its time stamps are trusted to change with its content.
const settleTime = 2 * time.Second
