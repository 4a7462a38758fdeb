package image

import (
	"bytes"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"testing"

	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/mutate"
	"github.com/google/go-containerregistry/pkg/v1/static"
	archives "github.com/google/go-containerregistry/pkg/v1/tarball"
	"github.com/google/go-containerregistry/pkg/v1/types"

	"flint"
	"flint/internal/rootfs/rootfstest"
)

func sumOf(b []byte) string {
	sum := sha256.Sum256(b)
	return hex.EncodeToString(sum[:])
}

// putHoled writes a file with a hole wherever a block is zero.
func putHoled(t testing.TB, path string, b []byte) {
	t.Helper()
	f, err := os.Create(path)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	err = f.Truncate(int64(len(b)))
	const block = 4096
	for at := 0; at < len(b); at += block {
		if part := b[at:min(at+block, len(b))]; len(bytes.Trim(part, "\x00")) > 0 {
			_, werr := f.WriteAt(part, int64(at))
			err = errors.Join(err, werr)
		}
	}
	if err != nil {
		t.Fatal(err)
	}
}

// writeDocker writes what is in a docker archive: its layers have the names older dockers gave them, the last one that of a link to
// another.
func writeDocker(t testing.TB, dir string, layers ...[]byte) {
	t.Helper()
	config := v1.ConfigFile{OS: "linux", Architecture: runtime.GOARCH}
	config.RootFS.Type = "layers"
	image := archives.Descriptor{Config: "config.json"}
	for i, b := range layers {
		at, name := filepath.Join(dir, fmt.Sprint(i)), fmt.Sprintf("%d/layer.tar", i)
		if err := os.MkdirAll(at, 0o700); err != nil {
			t.Fatal(err)
		}
		putHoled(t, filepath.Join(at, "layer.tar"), b)
		config.RootFS.DiffIDs = append(config.RootFS.DiffIDs, v1.Hash{Algorithm: "sha256", Hex: sumOf(b)})
		image.Layers = append(image.Layers, name)
	}
	if err := os.Symlink("0/layer.tar", filepath.Join(dir, "again.tar")); err != nil {
		t.Fatal(err)
	}
	config.RootFS.DiffIDs = append(config.RootFS.DiffIDs, config.RootFS.DiffIDs[0])
	image.Layers = append(image.Layers, "again.tar")
	for name, v := range map[string]any{"config.json": config, "manifest.json": archives.Manifest{image}} {
		b, err := json.Marshal(v)
		if err == nil {
			err = os.WriteFile(filepath.Join(dir, name), b, 0o600)
		}
		if err != nil {
			t.Fatal(err)
		}
	}
}

// TestSparseArchives has archives whose own files have holes: the layers in them, and with them what is in those.
func TestSparseArchives(t *testing.T) {
	b := pack(t, file("f", "begin"+strings.Repeat("\x00", 1<<20)+"end"))
	dir := t.TempDir()
	docker, oci := filepath.Join(dir, "docker"), filepath.Join(dir, "oci")
	writeDocker(t, docker, b)
	img, err := mutate.AppendLayers(testImage(t), static.NewLayer(b, types.OCIUncompressedLayer))
	if err != nil {
		t.Fatal(err)
	}
	writeLayout(t, oci, "", img)
	want := wantBase(t, testStore(t), Want{Ref: oci})
	putHoled(t, filepath.Join(oci, "blobs/sha256", sumOf(b)), b)
	for how, args := range rootfstest.SparseTars() {
		for kind, from := range map[string]string{"docker": docker, "OCI": oci} {
			t.Run(kind+" archive, "+how, func(t *testing.T) {
				b := rootfstest.PackSparse(t, from, args, ".")
				if len(b) > 512<<10 {
					t.Skipf("needs a file system with holes: tar wrote %d bytes", len(b))
				}
				file := filepath.Join(t.TempDir(), "image.tar")
				if err := os.WriteFile(file, b, 0o600); err != nil {
					t.Fatal(err)
				}
				if got := wantBase(t, testStore(t), Want{Ref: file}); got.Digest != want.Digest {
					t.Errorf("the image is %s, of the layout %s", got.Digest, want.Digest)
				}
			})
		}
	}
}

// TestHostileArchives has archives of some KiB that say they hold a TiB, or a GiB where a few bytes are read into memory.
func TestHostileArchives(t *testing.T) {
	const tib = 1 << 40
	if f, err := os.Create(filepath.Join(t.TempDir(), "huge")); err != nil || errors.Join(f.Truncate(tib), f.Close()) != nil {
		t.Skip("needs a file system with large files")
	}
	docker := func(replace string, size int64) func(t *testing.T) string {
		return func(t *testing.T) string {
			dir := t.TempDir()
			writeDocker(t, dir, pack(t, file("f", "1")))
			rootfstest.PutHoled(t, filepath.Join(dir, replace), size, 0)
			return dir
		}
	}
	for how, args := range rootfstest.SparseTars() {
		for what, make := range map[string]func(*testing.T) string{
			"layer":         docker("0/layer.tar", tib),
			"manifest":      docker("manifest.json", maxManifest+1),
			"configuration": docker("config.json", 1<<30),
		} {
			t.Run("docker archive, "+what+", "+how, func(t *testing.T) {
				file := filepath.Join(t.TempDir(), "image.tar")
				if err := os.WriteFile(file, rootfstest.PackSparse(t, make(t), args, "."), 0o600); err != nil {
					t.Fatal(err)
				}
				_, err := testStore(t).Base(t.Context(), Want{Ref: file, Limit: 16 * flint.GiB})
				code := "image.layer"
				if what == "layer" {
					code = "image.size"
				}
				wantFault(t, err, code)
			})
		}
	}
}

// FuzzArchive opens archives of any bytes, and reads the layers of the image in them.
func FuzzArchive(f *testing.F) {
	docker, oci, b := f.TempDir(), f.TempDir(), pack(f, file("f", strings.Repeat("\x00", 64<<10)+"1"))
	writeDocker(f, docker, b)
	writeLayout(f, oci, "", testImage(f, b))
	for _, how := range rootfstest.SparseTars() {
		f.Add(rootfstest.PackSparse(f, docker, how, "."))
		f.Add(rootfstest.PackSparse(f, oci, how, "."))
	}
	s := testStore(f)
	f.Fuzz(func(t *testing.T, b []byte) {
		file := filepath.Join(t.TempDir(), "image.tar")
		if err := os.WriteFile(file, b, 0o600); err != nil {
			t.Fatal(err)
		}
		img, err := archiveImage(source{path: file}, 16*flint.MiB)
		if err != nil || checkImage(img, 16*flint.MiB) != nil {
			return
		}
		config, err := img.ConfigFile()
		if err != nil {
			t.Fatal(err) // it was read before
		}
		layers, err := layersOf(img, config)
		if err != nil {
			t.Fatal(err)
		}
		out, err := os.Create(filepath.Join(t.TempDir(), "image"))
		if err != nil {
			t.Fatal(err)
		}
		defer out.Close()
		_ = s.fill(t.Context(), layers, 16*flint.MiB, Erofs, t.TempDir(), out)
	})
}
