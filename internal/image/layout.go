package image

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path"
	"path/filepath"

	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/partial"
	"github.com/google/go-containerregistry/pkg/v1/types"
	"golang.org/x/sys/unix"

	"flint"
)

// layoutFiles opens a file of an OCI layout by its name within it, and says its size. The library's own reader of layouts takes
// directories only, and reads into memory whatever stands where a manifest should be.
type layoutFiles func(name string) (rc io.ReadCloser, size int64, err error)

// inDir has the files of a layout in a directory.
func inDir(dir string) layoutFiles {
	return func(name string) (io.ReadCloser, int64, error) {
		// A layout may be somebody else's: what its links lead to is not its own, and a pipe would be waited for.
		f, err := os.OpenFile(filepath.Join(dir, filepath.FromSlash(name)), os.O_RDONLY|unix.O_NOFOLLOW|unix.O_NONBLOCK, 0)
		switch {
		case errors.Is(err, fs.ErrNotExist):
			return nil, 0, fmt.Errorf("no %s in the layout", name)
		case errors.Is(err, unix.ELOOP):
			return nil, 0, fmt.Errorf("%s in the layout is a link", name)
		case err != nil:
			return nil, 0, fmt.Errorf("open layout: %w", err)
		}
		info, err := f.Stat()
		if err == nil && !info.Mode().IsRegular() {
			err = fmt.Errorf("%s in the layout is no ordinary file", name)
		}
		if err != nil {
			f.Close()
			return nil, 0, err
		}
		return f, info.Size(), nil
	}
}

// image opens the image with that tag, or the only one. ref is what a fault calls the layout.
func (l layoutFiles) image(ref, tag string) (v1.Image, error) {
	rc, size, err := l("index.json")
	if err != nil {
		return nil, missing(ref, "its index.json cannot be read", err)
	}
	defer rc.Close()
	if size > maxManifest {
		return nil, missing(ref, fmt.Sprintf("its index.json has %s", flint.Bytes(size)), nil)
	}
	raw, err := io.ReadAll(io.LimitReader(rc, size))
	if err != nil {
		return nil, fmt.Errorf("read index: %w", err)
	}
	img, err := pick(localIndex{l, raw, types.OCIImageIndex}, ref, tag, 0)
	if err != nil {
		return nil, err
	}
	return unpacking{img}, nil
}

// blob opens a blob that has the size its descriptor promises.
func (l layoutFiles) blob(d v1.Descriptor) (io.ReadCloser, error) {
	rc, size, err := l(path.Join("blobs", d.Digest.Algorithm, d.Digest.Hex))
	if err != nil {
		return nil, err
	}
	if size != d.Size {
		rc.Close()
		return nil, fmt.Errorf("%s has %d bytes, the image says %d", d.Digest, size, d.Size)
	}
	return rc, nil
}

// read reads a manifest, an index or a configuration.
func (l layoutFiles) read(d v1.Descriptor) ([]byte, error) {
	if d.Size > maxManifest {
		return nil, fmt.Errorf("%s, a manifest or configuration, has %s", d.Digest, flint.Bytes(d.Size))
	}
	rc, err := l.blob(d)
	if err != nil {
		return nil, err
	}
	defer rc.Close()
	sum, err := v1.Hasher(d.Digest.Algorithm)
	if err != nil {
		return nil, err
	}
	b, err := io.ReadAll(io.TeeReader(io.LimitReader(rc, d.Size), sum))
	if err != nil {
		return nil, fmt.Errorf("read %s: %w", d.Digest, err)
	}
	if got := hexSum(sum); got != d.Digest.Hex {
		return nil, fmt.Errorf("%s has the digest %s", d.Digest, got)
	}
	return b, nil
}

// localIndex is a v1.ImageIndex of a layout.
type localIndex struct {
	in        layoutFiles
	raw       []byte
	mediaType types.MediaType
}

func (i localIndex) MediaType() (types.MediaType, error) { return i.mediaType, nil }
func (i localIndex) Digest() (v1.Hash, error)            { return partial.Digest(i) }
func (i localIndex) Size() (int64, error)                { return partial.Size(i) }
func (i localIndex) RawManifest() ([]byte, error)        { return i.raw, nil }
func (i localIndex) IndexManifest() (*v1.IndexManifest, error) {
	return v1.ParseIndexManifest(bytes.NewReader(i.raw))
}

// member reads the manifest or index of that digest.
func (i localIndex) member(h v1.Hash) (v1.Descriptor, []byte, error) {
	m, err := i.IndexManifest()
	if err != nil {
		return v1.Descriptor{}, nil, fmt.Errorf("read index: %w", err)
	}
	for _, d := range m.Manifests {
		if d.Digest == h {
			raw, err := i.in.read(d)
			return d, raw, err
		}
	}
	return v1.Descriptor{}, nil, fmt.Errorf("no %s in the index", h)
}

// ImageIndex opens an index within this one.
func (i localIndex) ImageIndex(h v1.Hash) (v1.ImageIndex, error) {
	d, raw, err := i.member(h)
	if err != nil {
		return nil, err
	}
	return localIndex{i.in, raw, d.MediaType}, nil
}

// Image opens an image, and reads all of it but its layers.
func (i localIndex) Image(h v1.Hash) (v1.Image, error) {
	d, raw, err := i.member(h)
	if err != nil {
		return nil, err
	}
	m, err := v1.ParseManifest(bytes.NewReader(raw))
	if err != nil {
		return nil, fmt.Errorf("read manifest: %w", err)
	}
	config, err := i.in.read(m.Config)
	if err != nil {
		return nil, fmt.Errorf("read configuration: %w", err)
	}
	img := localImage{in: i.in, raw: raw, config: config, mediaType: d.MediaType, layers: map[v1.Hash]localLayer{}}
	for _, l := range m.Layers {
		img.layers[l.Digest] = localLayer{i.in, l}
	}
	return partial.CompressedToImage(img)
}

// localImage is what the library makes an image of a layout of: a partial.CompressedImageCore.
type localImage struct {
	in          layoutFiles
	raw, config []byte
	mediaType   types.MediaType
	layers      map[v1.Hash]localLayer
}

func (i localImage) MediaType() (types.MediaType, error) { return i.mediaType, nil }
func (i localImage) RawManifest() ([]byte, error)        { return i.raw, nil }
func (i localImage) RawConfigFile() ([]byte, error)      { return i.config, nil }
func (i localImage) LayerByDigest(h v1.Hash) (partial.CompressedLayer, error) {
	l, ok := i.layers[h]
	if !ok {
		return nil, fmt.Errorf("no layer %s", h)
	}
	return l, nil
}

type localLayer struct {
	in layoutFiles
	d  v1.Descriptor
}

func (l localLayer) Digest() (v1.Hash, error)            { return l.d.Digest, nil }
func (l localLayer) Size() (int64, error)                { return l.d.Size, nil }
func (l localLayer) MediaType() (types.MediaType, error) { return l.d.MediaType, nil }
func (l localLayer) Compressed() (io.ReadCloser, error)  { return l.in.blob(l.d) }
