package image

import (
	"archive/tar"
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"path"
	"slices"
	"strings"

	"github.com/google/go-containerregistry/pkg/name"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/partial"
	"github.com/google/go-containerregistry/pkg/v1/tarball"
	"github.com/google/go-containerregistry/pkg/v1/types"

	"flint"
	"flint/internal/regular"
	"flint/internal/rootfs"
)

// maxMembers bounds the files of an archive: older dockers write three and a directory for each layer.
const maxMembers = 16 * maxLayers

// maxLinks bounds the links from one file of an archive to the next.
const maxLinks = 40

// errNotDocker says that an archive has no manifest.json.
var errNotDocker = errors.New("no manifest.json")

// archiveImage opens the image with the tag that src names, or the only one, in a docker or OCI archive. It is read in place.
func archiveImage(src source, limit flint.Bytes) (v1.Image, error) {
	c, err := indexArchive(src.path, limit)
	if err != nil {
		return nil, err
	}
	img, dockerErr := c.docker(src.ref, src.tag)
	if dockerErr == nil {
		return img, nil
	}
	if c.members["index.json"] != nil { // newer dockers write both
		ref := src.ref
		if !strings.HasPrefix(ref, "oci-archive:") {
			ref = "oci-archive:" + src.path // behind that stands the tag which a fault asks for
		}
		img, err := layoutFiles(c.open).image(ref, src.tag)
		if err == nil || errors.Is(dockerErr, errNotDocker) {
			return img, err
		}
	}
	if errors.Is(dockerErr, errNotDocker) {
		return nil, errors.New("neither a docker archive (no manifest.json) nor an OCI archive (no index.json)")
	}
	return nil, dockerErr
}

// archiveIndex is an archive's files by their names. An archive is not trusted: sparse files in it may be far larger than it is.
type archiveIndex struct {
	path    string
	members map[string]*tar.Header
}

// indexArchive reads the headers of an archive's files, which may have twice the limit together.
func indexArchive(path string, limit flint.Bytes) (*archiveIndex, error) {
	f, err := regular.Open(path)
	if err != nil {
		return nil, fmt.Errorf("open archive %s: %w", path, err)
	}
	defer f.Close()
	c := &archiveIndex{path: path, members: map[string]*tar.Header{}}
	left := rootfs.MaxUnpacked(limit)
	t := tar.NewReader(f)
	for n := 0; n <= maxMembers; n++ {
		h, err := t.Next()
		if errors.Is(err, io.EOF) {
			return c, nil
		}
		if err != nil {
			return nil, fmt.Errorf("read archive: %w", err)
		}
		name, err := rootfs.CleanName(h.Name)
		if err != nil {
			return nil, fmt.Errorf("entry %.256q: %w", h.Name, err)
		}
		if left -= flint.Bytes(h.Size); left < 0 {
			return nil, fmt.Errorf("%w: archive of more than %s", rootfs.ErrTooBig, rootfs.MaxUnpacked(limit))
		}
		if c.members[name] == nil { // the rest of its header may be large
			c.members[name] = &tar.Header{Typeflag: h.Typeflag, Size: h.Size, Linkname: h.Linkname}
		}
	}
	return nil, fmt.Errorf("%w: an archive of %d files", rootfs.ErrBudget, maxMembers)
}

// find follows the links by which older dockers name a layer again, and returns what they lead to.
func (c *archiveIndex) find(name string) (string, *tar.Header, error) {
	at := path.Clean("/" + name)[1:]
	for range maxLinks {
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
	return "", nil, fmt.Errorf("%.256q in the archive: too many symbolic links", name)
}

// open opens a file in the archive, and says its size.
func (c *archiveIndex) open(name string) (io.ReadCloser, int64, error) {
	at, _, err := c.find(name)
	if err != nil {
		return nil, 0, err
	}
	f, err := regular.Open(c.path)
	if err != nil {
		return nil, 0, fmt.Errorf("open archive %s: %w", c.path, err)
	}
	t := tar.NewReader(f)
	for range maxMembers {
		h, err := t.Next()
		if err != nil {
			f.Close()
			return nil, 0, fmt.Errorf("read archive: %w", err)
		}
		if is, err := rootfs.CleanName(h.Name); err == nil && is == at {
			return struct {
				io.Reader
				io.Closer
			}{t, f}, h.Size, nil
		}
	}
	f.Close()
	return nil, 0, fmt.Errorf("%.256q is gone from the archive", name)
}

// read reads a small file in the archive.
func (c *archiveIndex) read(name string) ([]byte, error) {
	r, size, err := c.open(name)
	if err != nil {
		return nil, err
	}
	defer r.Close()
	if size > maxManifest {
		return nil, fmt.Errorf("%.256q in the archive has %s", name, flint.Bytes(size))
	}
	b, err := io.ReadAll(io.LimitReader(r, maxManifest))
	if err != nil {
		return nil, fmt.Errorf("read %.256q in the archive: %w", name, err)
	}
	return b, nil
}

// dockerImage opens the image with that tag, or the only one, in a docker archive.
func dockerImage(path, tag string, limit flint.Bytes) (v1.Image, error) {
	c, err := indexArchive(path, limit)
	if err != nil {
		return nil, err
	}
	return c.docker(path, tag)
}

// docker opens the image with that tag, or the only one, in what `docker save` writes: a tar whose manifest.json names each image's
// configuration, and its layers with the lowest first.
func (c *archiveIndex) docker(ref, tag string) (v1.Image, error) {
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
	i, why := choose(all, tag)
	if i < 0 {
		return nil, missing(ref, fmt.Sprintf("%s: say which with docker-archive:%s:name:tag%s", why, c.path, tagsOf(all)), nil)
	}
	img, err := c.image(all[i])
	if err != nil {
		return nil, fmt.Errorf("read docker archive: %w", err)
	}
	return img, nil
}

// choose finds the image with that tag, or the only one; if there is none, i is -1 and why says so.
func choose(all tarball.Manifest, tag string) (i int, why string) {
	if tag == "" {
		if len(all) == 1 {
			return 0, ""
		}
		return -1, fmt.Sprintf("it has %d images", len(all))
	}
	why = fmt.Sprintf("it has no image %q", tag)
	want, err := name.NewTag(tag)
	if err != nil {
		return -1, why
	}
	return slices.IndexFunc(all, func(d tarball.Descriptor) bool {
		return slices.ContainsFunc(d.RepoTags, func(t string) bool {
			is, err := name.NewTag(t) // the same tag can be written in several ways
			return err == nil && is.Name() == want.Name()
		})
	}), why
}

// tagsOf says which tags an archive has.
func tagsOf(all tarball.Manifest) string {
	var tags []string
	for _, d := range all {
		tags = append(tags, d.RepoTags...)
	}
	if len(tags) == 0 {
		return ""
	}
	return fmt.Sprintf(" (it has %.1024s)", strings.Join(tags, ", "))
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
	rc, _, err := l.in.open(l.name)
	if err != nil {
		return nil, err
	}
	return unpack(rc)
}
