package image

import (
	"archive/tar"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path"
	"path/filepath"
	"slices"
	"strings"

	"github.com/google/go-containerregistry/pkg/name"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/partial"
	"github.com/google/go-containerregistry/pkg/v1/tarball"
	"github.com/google/go-containerregistry/pkg/v1/types"

	"flint"
)

// maxMembers bounds the files of an archive: older dockers write three and a directory for each layer.
const maxMembers = 16 * maxLayers

// errNotDocker says that an archive has no manifest.json.
var errNotDocker = errors.New("no manifest.json")

// archiveImage opens a docker archive in place, or an OCI archive by unpacking it to dir.
func archiveImage(ctx context.Context, src source, dir string, limit flint.Bytes) (v1.Image, error) {
	img, dockerErr := dockerImage(src.path, src.tag, limit)
	if dockerErr == nil {
		return img, nil
	}
	if err := unpackArchive(ctx, src.path, dir, limit); err != nil {
		return nil, err
	}
	switch {
	case isRegular(filepath.Join(dir, "index.json")): // newer dockers write both
		return layoutImage(dir, src.tag)
	case errors.Is(dockerErr, errNotDocker):
		return nil, errors.New("neither a docker archive (no manifest.json) nor an OCI archive (no index.json)")
	}
	return nil, fmt.Errorf("read docker archive: %w", dockerErr)
}

// archiveIndex is an archive's files by their names. An archive is not trusted: sparse files in it may be far larger than it is.
type archiveIndex struct {
	path    string
	members map[string]*tar.Header
}

// indexArchive reads the headers of an archive's files, which may have twice the limit together.
func indexArchive(path string, limit flint.Bytes) (*archiveIndex, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, fmt.Errorf("open archive: %w", err)
	}
	defer f.Close()
	c := &archiveIndex{path: path, members: map[string]*tar.Header{}}
	left := maxStream(limit)
	t := tar.NewReader(f)
	for n := 0; n <= maxMembers; n++ {
		h, err := t.Next()
		if errors.Is(err, io.EOF) {
			return c, nil
		}
		if err != nil {
			return nil, fmt.Errorf("read archive: %w", err)
		}
		name, err := cleanName(h.Name)
		if err != nil {
			return nil, fmt.Errorf("entry %.256q: %w", h.Name, err)
		}
		if left -= h.Size; left < 0 {
			return nil, fmt.Errorf("%w: archive of more than %s", errTooBig, flint.Bytes(maxStream(limit)))
		}
		if c.members[name] == nil {
			c.members[name] = h
		}
	}
	return nil, fmt.Errorf("%w: an archive of %d files", errBudget, maxMembers)
}

// find follows the links by which older dockers name a layer again, and returns what they lead to.
func (c *archiveIndex) find(name string) (string, *tar.Header, error) {
	at := path.Clean("/" + name)[1:]
	for range maxHops {
		switch h := c.members[at]; {
		case h == nil:
			return "", nil, fmt.Errorf("no %.256q in the archive", name)
		case h.Typeflag == tar.TypeSymlink:
			at = path.Join("/", path.Dir(at), h.Linkname)[1:]
		case h.Typeflag == tar.TypeLink:
			at = path.Clean("/" + h.Linkname)[1:]
		default:
			return at, h, nil
		}
	}
	return "", nil, fmt.Errorf("%.256q in the archive: %w", name, errLoop)
}

// open opens a file in the archive.
func (c *archiveIndex) open(name string) (io.ReadCloser, error) {
	at, _, err := c.find(name)
	if err != nil {
		return nil, err
	}
	f, err := os.Open(c.path)
	if err != nil {
		return nil, fmt.Errorf("open archive: %w", err)
	}
	t := tar.NewReader(f)
	for range len(c.members) {
		h, err := t.Next()
		if err != nil {
			f.Close()
			return nil, fmt.Errorf("read archive: %w", err)
		}
		if is, err := cleanName(h.Name); err == nil && is == at {
			return struct {
				io.Reader
				io.Closer
			}{t, f}, nil
		}
	}
	f.Close()
	return nil, fmt.Errorf("%.256q is gone from the archive", name)
}

// read reads a small file in the archive.
func (c *archiveIndex) read(name string) ([]byte, error) {
	_, h, err := c.find(name)
	if err != nil {
		return nil, err
	}
	if h.Size > maxManifest {
		return nil, fmt.Errorf("%.256q in the archive has %s", name, flint.Bytes(h.Size))
	}
	r, err := c.open(name)
	if err != nil {
		return nil, err
	}
	defer r.Close()
	b, err := io.ReadAll(io.LimitReader(r, maxManifest))
	if err != nil {
		return nil, fmt.Errorf("read %.256q in the archive: %w", name, err)
	}
	return b, nil
}

// dockerImage opens the image with that tag, or the only one, in what `docker save` writes: a tar whose manifest.json names
// each image's configuration, and its layers with the lowest first.
func dockerImage(path, tag string, limit flint.Bytes) (v1.Image, error) {
	c, err := indexArchive(path, limit)
	if err != nil {
		return nil, err
	}
	if c.members["manifest.json"] == nil {
		return nil, errNotDocker
	}
	b, err := c.read("manifest.json")
	if err != nil {
		return nil, err
	}
	var all tarball.Manifest
	if err := json.Unmarshal(b, &all); err != nil {
		return nil, fmt.Errorf("read manifest.json: %w", err)
	}
	d, err := choose(all, tag)
	if err != nil {
		return nil, err
	}
	return c.image(d)
}

// choose finds the image with that tag, or the only one.
func choose(all tarball.Manifest, tag string) (tarball.Descriptor, error) {
	want, err := name.NewTag(tag)
	if tag == "" || err != nil {
		if len(all) != 1 {
			return tarball.Descriptor{}, fmt.Errorf("it has %d images: say which with :tag", len(all))
		}
		return all[0], nil
	}
	i := slices.IndexFunc(all, func(d tarball.Descriptor) bool {
		return slices.ContainsFunc(d.RepoTags, func(t string) bool {
			is, err := name.NewTag(t) // the same tag can be written in several ways
			return err == nil && is.Name() == want.Name()
		})
	})
	if i < 0 {
		return tarball.Descriptor{}, fmt.Errorf("it has no image %q", tag)
	}
	return all[i], nil
}

// image opens one image of the archive.
func (c *archiveIndex) image(d tarball.Descriptor) (v1.Image, error) {
	raw, err := c.read(d.Config)
	if err != nil {
		return nil, err
	}
	config, err := v1.ParseConfigFile(bytes.NewReader(raw))
	if err != nil {
		return nil, fmt.Errorf("read configuration: %w", err)
	}
	if len(d.Layers) != len(config.RootFS.DiffIDs) {
		return nil, fmt.Errorf("%d layers, but the configuration has %d", len(d.Layers), len(config.RootFS.DiffIDs))
	}
	img := archived{config: raw, layers: map[v1.Hash]archivedLayer{}}
	m := &v1.Manifest{Config: v1.Descriptor{Size: int64(len(raw))}}
	for i, name := range d.Layers {
		_, h, err := c.find(name)
		if err != nil {
			return nil, err
		}
		id := config.RootFS.DiffIDs[i]
		img.layers[id] = archivedLayer{c, name, id}
		m.Layers = append(m.Layers, v1.Descriptor{Size: h.Size})
	}
	all, err := partial.UncompressedToImage(img)
	if err != nil {
		return nil, err
	}
	return listed{all, m}, nil
}

// listed is an image in a docker archive. The library would compress every layer to make its manifest, of which only the sizes are
// looked at.
type listed struct {
	v1.Image
	manifest *v1.Manifest
}

// Manifest returns a manifest without digests.
func (l listed) Manifest() (*v1.Manifest, error) { return l.manifest, nil }

// archived is what the library makes such an image of: a partial.UncompressedImageCore.
type archived struct {
	config []byte
	layers map[v1.Hash]archivedLayer
}

func (a archived) RawConfigFile() ([]byte, error)      { return a.config, nil }
func (a archived) MediaType() (types.MediaType, error) { return types.DockerManifestSchema2, nil }
func (a archived) LayerByDiffID(id v1.Hash) (partial.UncompressedLayer, error) {
	l, ok := a.layers[id]
	if !ok {
		return nil, fmt.Errorf("no layer %s", id)
	}
	return l, nil
}

type archivedLayer struct {
	in     *archiveIndex
	name   string
	diffID v1.Hash
}

func (l archivedLayer) DiffID() (v1.Hash, error) { return l.diffID, nil }
func (l archivedLayer) MediaType() (types.MediaType, error) {
	return types.DockerUncompressedLayer, nil
}

// Uncompressed is the layer's tar stream. Docker leaves layers uncompressed, others do not.
func (l archivedLayer) Uncompressed() (io.ReadCloser, error) {
	rc, err := l.in.open(l.name)
	if err != nil {
		return nil, err
	}
	r, err := decompress(rc)
	if err != nil {
		rc.Close()
		return nil, err
	}
	return unpacked{r, rc}, nil
}

// unpackArchive writes the blobs and the index of an OCI archive to dir, so that it can be read as a layout.
func unpackArchive(ctx context.Context, path, dir string, limit flint.Bytes) error {
	f, err := os.Open(path)
	if err != nil {
		return fmt.Errorf("open archive: %w", err)
	}
	defer f.Close()
	left := maxStream(limit)
	t := tar.NewReader(f)
	for n := 0; ; n++ {
		h, err := t.Next()
		if errors.Is(err, io.EOF) {
			return nil
		}
		if err != nil {
			return fmt.Errorf("read archive: %w", err)
		}
		name, err := cleanName(h.Name)
		if err != nil {
			return fmt.Errorf("entry %.256q: %w", h.Name, err)
		}
		if h.Typeflag != tar.TypeReg && h.Typeflag != tar.TypeGNUSparse || !isLayoutFile(name) {
			continue
		}
		if n > maxMembers {
			return fmt.Errorf("%w: %d files", errBudget, n)
		}
		if left -= h.Size; left < 0 {
			return fmt.Errorf("%w: archive of more than %s", errTooBig, flint.Bytes(maxStream(limit)))
		}
		if err := writeFile(filepath.Join(dir, filepath.FromSlash(name)), contextReader{ctx, t}); err != nil {
			return fmt.Errorf("unpack archive: %w", err)
		}
	}
}

// isLayoutFile reports whether name is one an OCI layout has: index.json, oci-layout, or a blob by its digest.
func isLayoutFile(name string) bool {
	if name == "index.json" || name == "oci-layout" {
		return true
	}
	blob, ok := strings.CutPrefix(name, "blobs/sha256/")
	return ok && len(blob) == 64 && strings.Trim(blob, "0123456789abcdef") == ""
}
