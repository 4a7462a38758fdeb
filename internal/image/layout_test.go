package image

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"testing"

	"github.com/google/go-containerregistry/pkg/name"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	archives "github.com/google/go-containerregistry/pkg/v1/tarball"
	"github.com/google/go-containerregistry/pkg/v1/types"

	"flint"
	"flint/internal/rootfs/rootfstest"
)

// lie is what is not as it should be in a layout: a file that has a GiB, which its descriptor says or does not, or other bytes.
type lie struct {
	in        string // index.json, index, manifest or configuration
	announced bool
	changed   bool // in place of a GiB
}

// lyingLayout writes a layout with an index within its index.
func lyingLayout(t testing.TB, l lie) (dir string) {
	t.Helper()
	dir = t.TempDir()
	put := func(what string, v any, kind types.MediaType) v1.Descriptor {
		b, err := json.Marshal(v)
		if err != nil {
			t.Fatal(err)
		}
		d := v1.Descriptor{MediaType: kind, Size: int64(len(b)), Digest: v1.Hash{Algorithm: "sha256", Hex: sumOf(b)}}
		path := blobPath(dir, d.Digest)
		if what == "index.json" {
			path = filepath.Join(dir, what)
		}
		err = os.MkdirAll(filepath.Dir(path), 0o700)
		if err == nil && what == l.in && l.changed {
			b[len(b)-1] = ' '
		}
		if err == nil {
			err = os.WriteFile(path, b, 0o600)
		}
		if err == nil && what == l.in && !l.changed {
			err = os.Truncate(path, 1<<30)
		}
		if err != nil {
			t.Fatal(err)
		}
		if what == l.in && l.announced {
			d.Size = 1 << 30
		}
		return d
	}
	config := put("configuration", v1.ConfigFile{OS: "linux", Architecture: runtime.GOARCH, RootFS: v1.RootFS{Type: "layers"}}, types.OCIConfigJSON)
	manifest := put("manifest", v1.Manifest{SchemaVersion: 2, MediaType: types.OCIManifestSchema1, Config: config}, types.OCIManifestSchema1)
	index := put("index", v1.IndexManifest{SchemaVersion: 2, Manifests: []v1.Descriptor{manifest}}, types.OCIImageIndex)
	put("index.json", v1.IndexManifest{SchemaVersion: 2, Manifests: []v1.Descriptor{index}}, types.OCIImageIndex)
	if err := os.WriteFile(filepath.Join(dir, "oci-layout"), []byte(`{"imageLayoutVersion":"1.0.0"}`), 0o600); err != nil {
		t.Fatal(err)
	}
	return dir
}

// counted counts what is read of a layout.
func counted(of layoutFiles, bytes *int64) layoutFiles {
	return func(name string) (io.ReadCloser, int64, error) {
		rc, size, err := of(name)
		if err != nil {
			return nil, 0, err
		}
		return struct {
			io.Reader
			io.Closer
		}{reading(func(p []byte) (int, error) {
			n, err := rc.Read(p)
			*bytes += int64(n)
			return n, err
		}), rc}, size, nil
	}
}

// TestLyingLayouts reads no file of a layout that is larger than what its image says, or than any manifest may be.
func TestLyingLayouts(t *testing.T) {
	wantBase(t, testStore(t), Want{Ref: lyingLayout(t, lie{})})
	for _, l := range []lie{
		{in: "index.json"},
		{in: "index"},
		{in: "index", announced: true},
		{in: "index", changed: true},
		{in: "manifest"},
		{in: "manifest", announced: true},
		{in: "manifest", changed: true},
		{in: "configuration"},
		{in: "configuration", announced: true},
		{in: "configuration", changed: true},
	} {
		t.Run(fmt.Sprintf("%+v", l), func(t *testing.T) {
			dir := lyingLayout(t, l)
			file := filepath.Join(t.TempDir(), "image.tar")
			if err := os.WriteFile(file, rootfstest.PackSparse(t, dir, rootfstest.SparseTars()["PAX 1.0"], "."), 0o600); err != nil {
				t.Fatal(err)
			}
			archive, err := indexArchive(file, 16*flint.GiB)
			if err != nil {
				t.Fatal(err)
			}
			for ref, files := range map[string]layoutFiles{dir: inDir(dir), file: archive.open} {
				var read int64
				if _, err := counted(files, &read).image(ref, ""); err == nil || read > 64<<10 {
					t.Errorf("%s: %d bytes were read, error %v", ref, read, err)
				}
				_, err := testStore(t).Base(t.Context(), Want{Ref: ref, Limit: 16 * flint.GiB})
				var f *flint.Fault
				if !errors.As(err, &f) || f.Code != "image.missing" && f.Code != "image.layer" {
					t.Errorf("%s: %v", ref, err)
				}
			}
		})
	}
}

// TestLayoutOfLinks has files of a layout that are none: what a link leads to is not read, and no pipe is waited for.
func TestLayoutOfLinks(t *testing.T) {
	for _, what := range []string{"link", "directory", "nothing"} {
		dir := lyingLayout(t, lie{})
		index := filepath.Join(dir, "index.json")
		err := os.Rename(index, index+".real")
		switch what {
		case "link":
			err = errors.Join(err, os.Symlink("index.json.real", index))
		case "directory":
			err = errors.Join(err, os.Mkdir(index, 0o700))
		}
		if err != nil {
			t.Fatal(err)
		}
		_, err = layoutImage(dir, "")
		wantFault(t, err, "image.missing", "index.json")
	}
}

// TestArchiveIsReadInPlace has nothing of an OCI archive written when its image is: its files may have holes of any size.
func TestArchiveIsReadInPlace(t *testing.T) {
	dir := t.TempDir()
	writeLayout(t, dir, "", testImage(t, pack(t, file("f", "1"))))
	ref := filepath.Join(t.TempDir(), "image.tar")
	if err := os.WriteFile(ref, rootfstest.PackSparse(t, dir, nil, "."), 0o600); err != nil {
		t.Fatal(err)
	}
	s, steps := testStore(t), 0
	wantBase(t, s, Want{Ref: ref, Progress: func(flint.Milestone) {
		if steps++; steps == 1 {
			wantEmptyTmp(t, s)
		}
	}})
	if steps == 0 {
		t.Error("no step was told")
	}
}

// TestArchiveOfSeveralImages takes the image that is named, and says which there are otherwise.
func TestArchiveOfSeveralImages(t *testing.T) {
	dir, images := t.TempDir(), map[name.Tag]v1.Image{}
	docker, oci := filepath.Join(dir, "docker.tar"), filepath.Join(dir, "oci.tar")
	for _, tag := range []string{"one:1", "example.com/two:2"} {
		ref, err := name.NewTag(tag)
		if err != nil {
			t.Fatal(err)
		}
		images[ref] = testImage(t, pack(t, file("f", tag)))
		writeLayout(t, filepath.Join(dir, "layout"), tag[len(tag)-1:], images[ref])
	}
	if err := archives.MultiWriteToFile(docker, images); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(oci, rootfstest.PackSparse(t, filepath.Join(dir, "layout"), nil, "."), 0o600); err != nil {
		t.Fatal(err)
	}
	for ref, texts := range map[string][]string{
		docker:                                {"it has 2 images", "docker-archive:" + docker + ":name:tag", "one:1", "example.com/two:2"},
		"docker-archive:" + docker + ":one:2": {`no image "one:2"`, "one:1"},
		"docker-archive:" + docker + ":One:1": {`no image "One:1"`, "one:1"},
		oci:                                   {"oci-archive:" + oci, "several images", "with :tag", "it has the tags"},
		"oci-archive:" + oci + ":3":           {`tag "3"`, "it has the tags"},
	} {
		_, err := testStore(t).Base(t.Context(), Want{Ref: ref})
		wantFault(t, err, "image.missing", texts...)
		if err != nil && strings.Contains(err.Error(), "damaged") {
			t.Errorf("%s: %v", ref, err)
		}
	}
	s := testStore(t)
	for i, tag := range []string{"one:1", "example.com/two:2"} {
		a, b := wantBase(t, s, Want{Ref: "docker-archive:" + docker + ":" + tag}), wantBase(t, s, Want{Ref: fmt.Sprintf("oci-archive:%s:%d", oci, i+1)})
		if a.Digest != b.Digest {
			t.Errorf("%s is %s in a docker archive, %s in one of OCI", tag, a.Digest, b.Digest)
		}
	}
}
