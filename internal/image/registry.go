package image

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"os"
	"path/filepath"
	"runtime"

	"github.com/google/go-containerregistry/pkg/name"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/empty"
	"github.com/google/go-containerregistry/pkg/v1/layout"
	"github.com/google/go-containerregistry/pkg/v1/remote"
	"github.com/google/go-containerregistry/pkg/v1/remote/transport"

	"flint"
	"flint/internal/rootfs"
)

// fromRegistry pulls an image, or uses what the reference gave last, as w says.
func (s *Store) fromRegistry(ctx context.Context, src source, w Want) (Base, error) {
	ref, err := name.ParseReference(src.name)
	if err != nil {
		return Base{}, missing(src.ref, "there is no such file or directory, and it is no image reference either", err)
	}
	if _, pinned := ref.(name.Digest); pinned {
		w.Pull = Missing
	}
	q := question{step: "pull image " + w.Ref, key: keyOf(w.version(), "registry", ref.Name(), runtime.GOARCH)}
	return s.answer(ctx, q, w, func() (Base, error) {
		done := w.Progress.Step(q.step)
		b, err := s.pull(ctx, ref, w)
		if err != nil {
			done("", err)
			return Base{}, err
		}
		done(summary(b), nil)
		return b, nil
	})
}

// pull fetches what an image is made of to the store, then flattens it. What was fetched
// before a pull was interrupted is not fetched again.
func (s *Store) pull(ctx context.Context, ref name.Reference, w Want) (Base, error) {
	options := []remote.Option{
		remote.WithContext(ctx), remote.WithAuthFromKeychain(logins()), remote.WithUserAgent("flint"), remote.WithTransport(s.transport()),
		remote.WithRetryBackoff(remote.Backoff{Duration: s.pause, Factor: 3, Jitter: 0.1, Steps: 3}),
		remote.WithPlatform(v1.Platform{OS: "linux", Architecture: runtime.GOARCH}),
	}
	img, err := find(ref, w.Ref, options)
	if err != nil {
		return Base{}, pullFault(ctx, w.Ref, err)
	}
	if err := checkImage(img, w.Limit); err != nil {
		return Base{}, err
	}
	m, err := img.Manifest()
	if err != nil {
		return Base{}, pullFault(ctx, w.Ref, err)
	}
	made := keyOf(w.version(), "image", m.Config.Digest.String())
	if b, ok := s.recallBase(made); ok {
		return b, nil
	}
	digest, err := img.Digest()
	if err != nil {
		return Base{}, pullFault(ctx, w.Ref, err)
	}
	dir := s.path(pullDir, digest.Hex)
	unlock, err := s.lock(ctx, "pull-"+digest.Hex, w.Progress)
	if err != nil {
		return Base{}, err
	}
	defer unlock()
	if b, ok := s.recallBase(made); ok {
		return b, nil // another was quicker
	}
	release, err := s.holdDownload(dir)
	if err != nil {
		return Base{}, err
	}
	defer release()
	if err := s.fetch(ctx, ref, img, dir, w); err != nil {
		if spaceFault(err, "") != nil {
			s.dropDownload(dir)
		}
		return Base{}, pullFault(ctx, w.Ref, err)
	}
	local, err := layoutImage(dir, "")
	if err != nil {
		return Base{}, err
	}
	b, err := s.fromImage(ctx, local, w)
	if ctx.Err() == nil {
		s.dropDownload(dir)
	}
	return b, err
}

// find asks the registry for the image of this machine's platform.
func find(ref name.Reference, as string, options []remote.Option) (v1.Image, error) {
	desc, err := remote.Get(ref, options...)
	if err != nil {
		return nil, err
	}
	if desc.Size > maxManifest {
		return nil, fmt.Errorf("manifest of %d bytes", desc.Size)
	}
	if !desc.MediaType.IsIndex() {
		return desc.Image()
	}
	index, err := desc.ImageIndex()
	if err != nil {
		return nil, err
	}
	return pick(index, as, "", 1)
}

// fetch makes dir a layout that holds img.
func (s *Store) fetch(ctx context.Context, ref name.Reference, img v1.Image, dir string, w Want) error {
	m, err := img.Manifest()
	if err != nil {
		return fmt.Errorf("read manifest: %w", err)
	}
	raw, err := img.RawManifest()
	if err != nil {
		return fmt.Errorf("read manifest: %w", err)
	}
	digest, err := img.Digest()
	if err != nil {
		return fmt.Errorf("read manifest: %w", err)
	}
	blobs := append([]v1.Descriptor{m.Config}, m.Layers...)
	if err := s.download(ctx, ref.Context(), blobs, dir, w); err != nil {
		return err
	}
	to, err := layout.Write(dir, empty.Index)
	if err != nil {
		return fmt.Errorf("write layout: %w", err)
	}
	if err := os.WriteFile(blobPath(dir, digest), raw, 0o600); err != nil {
		return fmt.Errorf("write layout: %w", err)
	}
	return to.AppendDescriptor(v1.Descriptor{MediaType: m.MediaType, Size: int64(len(raw)), Digest: digest})
}

// pullFault says what is wrong with a pull, and who can mend it.
func pullFault(ctx context.Context, ref string, err error) error {
	if ctx.Err() != nil {
		return context.Cause(ctx)
	}
	var fault *flint.Fault
	if errors.As(err, &fault) || spaceFault(err, "") != nil || errors.Is(err, rootfs.ErrTooBig) {
		return err
	}
	f := &flint.Fault{
		Code: "image.pull",
		What: fmt.Sprintf("pull image %q: the registry cannot be reached, or does not serve it", ref),
		Fix:  "check the network and the registry; what was downloaded is kept, and the next try goes on with it",
		Err:  err,
	}
	var t *transport.Error
	var bad *digestError
	var redirect *redirectError
	var login *loginError
	switch {
	case errors.As(err, &bad):
		f.Code, f.Kind = "image.digest", flint.ErrConflict
		f.What = fmt.Sprintf("pull image %q: the registry sent something else than its manifest promises", ref)
		f.Fix = "try again; if it stays so, the registry or a proxy before it is damaged: push the image again"
	case errors.As(err, &login):
		f.Code, f.Kind = "image.login", flint.ErrConfig
		f.What = fmt.Sprintf("pull image %q: a login that is kept on this machine cannot be used", ref)
		f.Fix = "mend the file or install the credential helper that is named above; or log out and in again, as the user that flint runs as"
	case errors.As(err, &t) && t.StatusCode == http.StatusTooManyRequests:
		f.Code = "image.limit"
		f.What = fmt.Sprintf("pull image %q: the registry has been asked too often", ref)
		f.Fix = "wait, log in as the user that flint runs as (docker login or podman login; Docker Hub gives anonymous users few pulls), or pull from a mirror"
	case errors.As(err, &redirect):
		f.Code, f.Kind, f.Err = "image.redirect", flint.ErrConfig, redirect
		f.What = fmt.Sprintf("pull image %q: flint does not go where the registry sends it", ref)
		f.Fix = "have the registry serve its blobs itself (registry's storage.redirect.disable), or name their storage by a host name and https"
	case errors.As(err, &t) && (t.StatusCode == http.StatusUnauthorized || t.StatusCode == http.StatusForbidden):
		f.Code, f.Kind = "image.login", flint.ErrPermission
		f.What = fmt.Sprintf("pull image %q: the registry refuses the login", ref)
		f.Fix = "log in as the user that flint runs as (docker login or podman login), or mend the name: many registries refuse what they do not have"
	case errors.As(err, &t) && t.StatusCode == http.StatusNotFound:
		f.Kind = flint.ErrNotFound
		f.What = fmt.Sprintf("pull image %q: the registry does not have it (and no file or directory has that name)", ref)
		f.Fix = "mend the name or the tag"
	}
	return f
}

// blobPath is where a layout keeps a blob.
func blobPath(dir string, digest v1.Hash) string {
	return filepath.Join(dir, "blobs", digest.Algorithm, digest.Hex)
}
