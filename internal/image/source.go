package image

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"unicode/utf8"

	v1 "github.com/google/go-containerregistry/pkg/v1"

	"flint"
	"flint/internal/regular"
	"flint/internal/rootfs"
)

// sourceKind says what a reference turned out to be.
type sourceKind int

const (
	dockerfile sourceKind = iota + 1
	ociLayout
	archive
	ext4File
	registry
	dockerDaemon      // an image of the local docker
	containersStorage // one of the local podman or buildah
)

// source is a reference that was looked at.
type source struct {
	kind sourceKind
	ref  string // as given
	path string // absolute; of the Dockerfile, layout, archive or file
	tag  string // of a layout or an archive; may be empty
	name string // in a registry, or of an image that is kept here
}

// transports are what a reference may begin with to say what it is. They are skopeo's.
var transports = []struct {
	prefix string
	kind   sourceKind
}{
	{"docker://", registry},
	{"docker-daemon:", dockerDaemon},
	{"containers-storage:", containersStorage},
	{"docker-archive:", archive},
	{"oci-archive:", archive},
	{ociPrefix, ociLayout},
}

// explicit locates a reference that says what it is; ok is false for one that does not.
func explicit(ref string) (s source, ok bool, err error) {
	for _, t := range transports {
		rest, found := strings.CutPrefix(ref, t.prefix)
		switch {
		case !found || t.kind == ociLayout:
			continue
		case rest == "" || strings.HasPrefix(rest, "-"):
			return source{}, true, missing(ref, "there is no name behind "+t.prefix, nil)
		case t.kind != archive:
			return source{kind: t.kind, ref: ref, name: rest}, true, nil
		}
		path, tag := rest, ""
		if _, err := os.Stat(path); err != nil {
			path, tag, _ = strings.Cut(rest, ":")
		}
		err := regular.Check(path)
		if errors.Is(err, fs.ErrNotExist) {
			return source{}, true, missing(ref, "there is no such file", nil)
		}
		if err != nil {
			return source{}, true, missing(ref, "it cannot be read", err)
		}
		path, err = filepath.Abs(path)
		return source{kind: archive, ref: ref, path: path, tag: tag}, true, err
	}
	return source{}, false, nil
}

// Check reports what is wrong with a reference, as far as looking at files tells.
func Check(ref string) error {
	_, err := locate(ref)
	return err
}

// locate finds out what ref names.
func locate(ref string) (source, error) {
	if ref == "" {
		return source{}, missing(ref, "no image is named", nil)
	}
	if s, ok, err := explicit(ref); ok {
		return s, err
	}
	name, isOCI := strings.CutPrefix(ref, ociPrefix)
	info, err := os.Stat(name)
	tag := ""
	if errors.Is(err, fs.ErrNotExist) {
		if i := strings.LastIndexByte(name, ':'); i > strings.LastIndexByte(name, '/') {
			if at, terr := os.Stat(name[:i]); terr == nil && at.IsDir() {
				name, tag, info, err = name[:i], name[i+1:], at, nil
			}
		}
	}
	looksLocal := isOCI || strings.HasPrefix(name, "/") || strings.HasPrefix(name, "./") || strings.HasPrefix(name, "../") ||
		name == "." || name == ".." || strings.HasSuffix(name, "/")
	switch {
	case errors.Is(err, fs.ErrNotExist) && looksLocal:
		return source{}, missing(ref, "there is no such file or directory", nil)
	case errors.Is(err, fs.ErrNotExist):
		return source{kind: registry, ref: ref, name: ref}, nil
	case err != nil:
		return source{}, missing(ref, "it cannot be looked at", regular.Cause(err))
	}
	path, err := filepath.Abs(name)
	if err != nil {
		return source{}, fmt.Errorf("find image %s: %w", ref, err)
	}
	s := source{ref: ref, path: path, tag: tag}
	if info.IsDir() {
		return s.inDirectory(isOCI)
	}
	return s.fromFile(info, isOCI)
}

// inDirectory tells a build context from an OCI layout.
func (s source) inDirectory(isOCI bool) (source, error) {
	if isRegular(filepath.Join(s.path, "oci-layout")) {
		s.kind = ociLayout
		return s, nil
	}
	if !isOCI && s.tag == "" {
		for _, name := range []string{"Dockerfile", "Containerfile"} {
			if file := filepath.Join(s.path, name); isRegular(file) {
				s.kind, s.path = dockerfile, file
				return s, nil
			}
		}
	}
	if isOCI || s.tag != "" {
		return source{}, missing(s.ref, "the directory holds no OCI layout (no file oci-layout)", nil)
	}
	return source{}, missing(s.ref, "the directory holds neither a Dockerfile nor an OCI layout (no Dockerfile, Containerfile or oci-layout file)", nil)
}

// fromFile tells the kinds of files apart by what is in them, not by their names.
func (s source) fromFile(info fs.FileInfo, isOCI bool) (source, error) {
	if !info.Mode().IsRegular() || isOCI {
		return source{}, missing(s.ref, "it is neither a directory nor an ordinary file", nil)
	}
	f, err := regular.Open(s.path)
	if err != nil {
		return source{}, missing(s.ref, "it cannot be read", err)
	}
	defer f.Close()
	var head [2048]byte
	n, err := io.ReadFull(f, head[:])
	if err != nil && !errors.Is(err, io.ErrUnexpectedEOF) && !errors.Is(err, io.EOF) {
		return source{}, missing(s.ref, "it cannot be read", err)
	}
	switch {
	case rootfs.Detect(head[:n]) != "":
		s.kind = ext4File
	case n >= 512 && string(head[257:262]) == "ustar":
		s.kind = archive
	case unpacker(head[:n]) != "":
		return source{}, missing(s.ref, "it is compressed; unpack it with "+unpacker(head[:n])+" first", nil)
	case strings.HasSuffix(s.path, ".ext4"), strings.HasSuffix(s.path, ".tar"):
		return source{}, missing(s.ref, "its content is not what its name says", nil)
	default:
		rest, err := io.ReadAll(io.LimitReader(f, maxDockerfile))
		if err != nil {
			return source{}, missing(s.ref, "it cannot be read", err)
		}
		if !isText(append(head[:n:n], rest...)) {
			return source{}, missing(s.ref, "it is no image, and no text that could be a Dockerfile", nil)
		}
		s.kind = dockerfile
	}
	return s, nil
}

// maxDockerfile bounds a Dockerfile, which has to be text.
const maxDockerfile = 1 << 20

// isText tells what a person may have written from what no builder can read.
func isText(b []byte) bool {
	return len(b) <= maxDockerfile && utf8.Valid(b) && bytes.IndexByte(b, 0) < 0
}

// unpacker names the program that unpacks a file that begins so; empty if it is not packed.
func unpacker(head []byte) string {
	for magic, program := range map[string]string{
		"\x1f\x8b": "gunzip", "\x28\xb5\x2f\xfd": "unzstd", "\xfd7zXZ\x00": "unxz", "BZh": "bunzip2",
	} {
		if bytes.HasPrefix(head, []byte(magic)) {
			return program
		}
	}
	return ""
}

func isRegular(path string) bool {
	info, err := os.Stat(path)
	return err == nil && info.Mode().IsRegular()
}

func missing(ref, why string, err error) error {
	f := &flint.Fault{
		Code: "image.missing",
		What: fmt.Sprintf("find image %q: %s", ref, why),
		Fix:  "name a directory with a Dockerfile, an OCI layout directory, a docker or OCI archive (.tar), an ext4 or erofs file, an image in a registry such as docker.io/library/debian:12, or one that is here: docker-daemon:name:tag, containers-storage:name",
		Kind: flint.ErrNotFound,
		Err:  err,
	}
	if errors.Is(err, fs.ErrPermission) {
		f.Fix, f.Kind = "let the user that flint runs as read it", flint.ErrPermission
	}
	return f
}

// maxManifest bounds manifests, indexes and configurations, which are held in memory whole. Registries bound manifests
// at 4 MiB.
const maxManifest = 8 << 20

// maxLayers bounds the layers of an image; Docker itself stops at 127.
const maxLayers = 1024

// checkImage refuses an image whose manifest alone asks for too much, before anything it names is read.
func checkImage(img v1.Image, limit flint.Bytes) error {
	m, err := img.Manifest()
	if err != nil {
		return fmt.Errorf("read manifest: %w", err)
	}
	if m.Config.Size > maxManifest || m.Config.Size < 0 {
		return fmt.Errorf("configuration of %d bytes", m.Config.Size)
	}
	if len(m.Layers) > maxLayers {
		return fmt.Errorf("%d layers, at most %d", len(m.Layers), maxLayers)
	}
	var sum flint.Bytes
	for _, l := range m.Layers {
		if l.Size < 0 || l.Size > int64(limit) {
			return fmt.Errorf("%w: layer of %d bytes", rootfs.ErrTooBig, l.Size)
		}
		if sum += flint.Bytes(l.Size); sum > rootfs.MaxUnpacked(limit) {
			return fmt.Errorf("%w: layers of more than %s", rootfs.ErrTooBig, rootfs.MaxUnpacked(limit))
		}
	}
	return nil
}

// layersOf lists an image's layers, lowest first, each with the digest its configuration promises. (A library's DiffID
// would compute it from the layer itself, which proves nothing.)
func layersOf(img v1.Image, config *v1.ConfigFile) ([]rootfs.Layer, error) {
	list, err := img.Layers()
	if err != nil {
		return nil, fmt.Errorf("list layers: %w", err)
	}
	if len(list) != len(config.RootFS.DiffIDs) {
		return nil, fmt.Errorf("%d layers, but the configuration has %d", len(list), len(config.RootFS.DiffIDs))
	}
	var layers []rootfs.Layer
	for i, l := range list {
		layers = append(layers, rootfs.Layer{Open: l.Uncompressed, DiffID: config.RootFS.DiffIDs[i].String()})
	}
	return layers, nil
}

// fromImage makes the base image of an OCI image, or finds it made.
func (s *Store) fromImage(ctx context.Context, img v1.Image, w Want) (Base, error) {
	if err := checkImage(img, w.Limit); err != nil {
		return Base{}, err
	}
	id, err := img.ConfigName()
	if err != nil {
		return Base{}, fmt.Errorf("read configuration: %w", err)
	}
	config, err := img.ConfigFile()
	if err != nil {
		return Base{}, fmt.Errorf("read configuration: %w", err)
	}
	if config.OS != "" && config.Architecture != "" && !suits(config.Platform()) {
		return Base{}, wrongPlatform(id.String(), config.OS+"/"+config.Architecture)
	}
	// The configuration names every layer by the digest of its content, so its own digest stands for the image.
	key := keyOf(w.version(), "image", id.String())
	if b, ok := s.recallBase(key); ok {
		return b, nil
	}
	unlock, err := s.lock(ctx, key, w.Progress)
	if err != nil {
		return Base{}, err
	}
	defer unlock()
	if b, ok := s.recallBase(key); ok {
		return b, nil
	}
	b, err := settings(config.Config)
	if err != nil {
		return Base{}, err
	}
	layers, err := layersOf(img, config)
	if err != nil {
		return Base{}, err
	}
	release, err := s.turn(ctx, w.Progress)
	if err != nil {
		return Base{}, err
	}
	defer release()
	if b.Digest, b.Path, b.Size, err = s.writeImage(ctx, baseDir, layers, w.Limit, w.Format); err != nil {
		return Base{}, err
	}
	s.note(key, b)
	return b, nil
}

// turn waits until no other image is written, and returns what lets the next one be written.
func (s *Store) turn(ctx context.Context, p flint.Progress) (release func(), err error) {
	release = func() { <-s.writing }
	select {
	case s.writing <- struct{}{}:
		return release, nil
	default:
	}
	done := p.Step("wait for another image to be written")
	defer func() { done("", err) }()
	select {
	case s.writing <- struct{}{}:
		return release, nil
	case <-ctx.Done():
		return nil, fmt.Errorf("wait for another image to be written: %w", context.Cause(ctx))
	}
}

// writeFile makes a file that must not exist yet, and the directories above it. It is on disk when writeFile returns.
func writeFile(path string, r io.Reader) error {
	if err := os.MkdirAll(filepath.Dir(path), 0o700); err != nil {
		return err
	}
	f, err := os.OpenFile(path, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return err
	}
	if _, err = io.Copy(f, r); err == nil {
		err = f.Sync()
	}
	if cerr := f.Close(); err == nil {
		err = cerr
	}
	return err
}
