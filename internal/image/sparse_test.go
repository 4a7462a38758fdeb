package image

import (
	"bytes"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"testing"

	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/mutate"
	"github.com/google/go-containerregistry/pkg/v1/static"
	archives "github.com/google/go-containerregistry/pkg/v1/tarball"
	"github.com/google/go-containerregistry/pkg/v1/types"

	"flint"
)

// sparseTars are the ways by which GNU tar writes a file with holes.
var sparseTars = map[string][]string{
	"old GNU": {"--format=gnu"},
	"PAX 0.0": {"--format=posix", "--sparse-version=0.0"},
	"PAX 0.1": {"--format=posix", "--sparse-version=0.1"},
	"PAX 1.0": {"--format=posix", "--sparse-version=1.0"},
}

// tarSparse packs what is in dir with GNU tar, holes as holes.
func tarSparse(t testing.TB, dir string, how []string, names ...string) []byte {
	t.Helper()
	args := append(slices.Clone(how), "--sparse", "--owner=0", "--group=0", "-C", dir, "-cf", "-")
	out, err := exec.Command("tar", append(args, names...)...).Output()
	if err != nil {
		if v, verr := exec.Command("tar", "--version").Output(); verr != nil || !bytes.Contains(v, []byte("GNU tar")) {
			t.Skip("needs GNU tar")
		}
		t.Fatal(err)
	}
	return out
}

// holed makes a file of that size with a few bytes at each of some places.
func holed(t testing.TB, path string, size int64, places ...int64) {
	t.Helper()
	f, err := os.Create(path)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	err = f.Truncate(size)
	for _, at := range places {
		_, werr := f.WriteAt(fmt.Appendf(nil, "data at %d", at), at)
		err = errors.Join(err, werr)
	}
	if err != nil {
		t.Fatal(err)
	}
}

func sumOf(b []byte) string {
	sum := sha256.Sum256(b)
	return hex.EncodeToString(sum[:])
}

// TestSparseFilesInLayers has the holes of a layer's files come out as zeros, whichever way they were written.
func TestSparseFilesInLayers(t *testing.T) {
	dir := t.TempDir()
	holed(t, filepath.Join(dir, "middle"), 3<<20, 0, 1<<20, 2<<20+4097)
	holed(t, filepath.Join(dir, "end"), 1<<20+5, 17)
	holed(t, filepath.Join(dir, "begin"), 1<<20+13, 1<<20) // "data at 1048576" ends behind what truncate gave
	holed(t, filepath.Join(dir, "nothing"), 1<<20)
	var many []int64 // more than fit one header
	for i := range int64(100) {
		many = append(many, i*64<<10)
	}
	holed(t, filepath.Join(dir, "many"), 7<<20, many...)
	names := []string{"middle", "end", "begin", "nothing", "many"}
	want := map[string]string{}
	for _, n := range names {
		b, err := os.ReadFile(filepath.Join(dir, n))
		if err != nil {
			t.Fatal(err)
		}
		want[n] = sumOf(b)
	}
	for how, args := range sparseTars {
		b := tarSparse(t, dir, args, names...)
		if len(b) > 2<<20 {
			t.Skipf("needs a file system with holes: tar wrote %d bytes", len(b))
		}
		for _, format := range []Format{Ext4, Erofs} {
			t.Run(how+" to "+string(format), func(t *testing.T) {
				_, path, _, err := testStore(t).writeImage(t.Context(), baseDir, []layer{layerOf(b)}, flint.GiB, format)
				if err != nil {
					t.Fatal(err)
				}
				fsck(t, path)
				got := map[string]string{}
				for name, content := range filesOf(t, path, names...) {
					got[name] = sumOf(content)
				}
				if !maps.Equal(got, want) {
					t.Errorf("got  %v\nwant %v", got, want)
				}
			})
		}
	}
}

// filesOf reads files at the root of an image.
func filesOf(t testing.TB, image string, names ...string) map[string][]byte {
	t.Helper()
	root, _ := mount(t, image, "ro")
	got := map[string][]byte{}
	for _, n := range names {
		b, err := os.ReadFile(filepath.Join(root, n))
		if err != nil {
			t.Fatal(err)
		}
		got[n] = b
	}
	return got
}

// putHoled writes a file with a hole wherever a block is zero.
func putHoled(t testing.TB, path string, b []byte) {
	t.Helper()
	f, err := os.Create(path)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	h := &holes{f: &guard{File: f}}
	if _, err := h.Write(b); err != nil {
		t.Fatal(err)
	}
	if err := h.finish(); err != nil {
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
	for how, args := range sparseTars {
		for kind, from := range map[string]string{"docker": docker, "OCI": oci} {
			t.Run(kind+" archive, "+how, func(t *testing.T) {
				b := tarSparse(t, from, args, ".")
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

// TestHostileHoles has archives of some KiB that say they hold a TiB, or more than an image may have in several files.
func TestHostileHoles(t *testing.T) {
	dir := t.TempDir()
	const tib = 1 << 40
	holed(t, filepath.Join(dir, "huge"), tib, 0)
	if info, err := os.Stat(filepath.Join(dir, "huge")); err != nil || info.Size() < tib {
		t.Skipf("needs a file system with large files: %v", err)
	}
	holed(t, filepath.Join(dir, "a"), 600<<20, 0)
	holed(t, filepath.Join(dir, "b"), 600<<20, 0)
	docker := func(replace string, size int64) func(t *testing.T) string {
		return func(t *testing.T) string {
			dir := t.TempDir()
			writeDocker(t, dir, pack(t, file("f", "1")))
			holed(t, filepath.Join(dir, replace), size, 0)
			return dir
		}
	}
	for how, args := range sparseTars {
		for what, names := range map[string][]string{"a TiB": {"huge"}, "more than the limit": {"a", "b"}} {
			t.Run("layer with "+what+", "+how, func(t *testing.T) {
				l := layerOf(tarSparse(t, dir, args, names...))
				_, _, _, err := testStore(t).writeImage(t.Context(), baseDir, []layer{l}, 16*flint.MiB, Ext4)
				if !errors.Is(err, errTooBig) && !errors.Is(err, errBudget) {
					t.Error(err)
				}
			})
		}
		for what, make := range map[string]func(*testing.T) string{
			"layer":         docker("0/layer.tar", tib),
			"manifest":      docker("manifest.json", maxManifest+1),
			"configuration": docker("config.json", 1<<30),
		} {
			t.Run("docker archive, "+what+", "+how, func(t *testing.T) {
				file := filepath.Join(t.TempDir(), "image.tar")
				if err := os.WriteFile(file, tarSparse(t, make(t), args, "."), 0o600); err != nil {
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
	for _, how := range sparseTars {
		f.Add(tarSparse(f, docker, how, "."))
		f.Add(tarSparse(f, oci, how, "."))
	}
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
		contents := testSpool(t)
		defer contents.close()
		_, _ = merge(t.Context(), layers, 16*flint.MiB, contents)
	})
}
