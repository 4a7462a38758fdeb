package main

import (
	"archive/tar"
	"bytes"
	"compress/gzip"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"hash"
	"io"
	"math/rand/v2"
	"os"
	"path/filepath"
	"runtime"
	"time"

	"flint"
)

type descriptor struct {
	MediaType   string            `json:"mediaType"`
	Digest      string            `json:"digest"`
	Size        int64             `json:"size"`
	Annotations map[string]string `json:"annotations,omitempty"`
}

// synthesize writes an OCI layout with one image: of that content, in layers of about a GiB, or of so many small files in one layer
// if that is not 0. It returns what is in it.
func synthesize(dir string, content flint.Bytes, small int) (held flint.Bytes, files int, err error) {
	if err := os.MkdirAll(filepath.Join(dir, "blobs/sha256"), 0o755); err != nil {
		return 0, 0, err
	}
	var layers []descriptor
	var diffs []string
	add := func(fill func(*tar.Writer) (int, error)) error {
		layer, diff, count, err := writeLayer(dir, fill)
		layers, diffs, files = append(layers, layer), append(diffs, diff), files+count
		return err
	}
	if small > 0 {
		content = flint.Bytes(small * len(smallContent))
		err = add(func(t *tar.Writer) (int, error) { return small, writeSmall(t, small) })
		return content, files, errors.Join(err, writeIndex(dir, layers, diffs))
	}
	random := rand.NewChaCha8([32]byte{})
	for done := flint.Bytes(0); done < content; done += flint.GiB {
		err := add(func(t *tar.Writer) (int, error) {
			return writeMixed(t, int(done/flint.GiB), int64(min(content-done, flint.GiB)), random)
		})
		if err != nil {
			return 0, 0, err
		}
	}
	return content, files, writeIndex(dir, layers, diffs)
}

// writeIndex writes what of a layout is not its layers.
func writeIndex(dir string, layers []descriptor, diffs []string) error {
	put := func(kind string, v any) (descriptor, error) {
		b, err := json.Marshal(v)
		if err != nil {
			return descriptor{}, err
		}
		sum := sha256.Sum256(b)
		name := hex.EncodeToString(sum[:])
		return descriptor{MediaType: kind, Digest: "sha256:" + name, Size: int64(len(b))}, os.WriteFile(filepath.Join(dir, "blobs/sha256", name), b, 0o644)
	}
	config, err := put("application/vnd.oci.image.config.v1+json", map[string]any{
		"architecture": runtime.GOARCH, "os": "linux", "config": map[string]any{}, "rootfs": map[string]any{"type": "layers", "diff_ids": diffs},
	})
	if err != nil {
		return err
	}
	manifest, err := put("application/vnd.oci.image.manifest.v1+json", map[string]any{
		"schemaVersion": 2, "mediaType": "application/vnd.oci.image.manifest.v1+json", "config": config, "layers": layers,
	})
	if err != nil {
		return err
	}
	manifest.Annotations = map[string]string{"org.opencontainers.image.ref.name": "bench"}
	index, err := json.Marshal(map[string]any{"schemaVersion": 2, "manifests": []descriptor{manifest}})
	if err != nil {
		return err
	}
	if err := os.WriteFile(filepath.Join(dir, "oci-layout"), []byte(`{"imageLayoutVersion":"1.0.0"}`), 0o644); err != nil {
		return err
	}
	return os.WriteFile(filepath.Join(dir, "index.json"), index, 0o644)
}

// writeLayer writes one layer of what fill puts into it, and returns the digest of what is in it, too, and the number of its files.
func writeLayer(dir string, fill func(*tar.Writer) (int, error)) (layer descriptor, diff string, files int, err error) {
	f, err := os.CreateTemp(dir, "layer")
	if err != nil {
		return layer, "", 0, err
	}
	defer f.Close()
	sum, inner := sha256.New(), sha256.New()
	z, err := gzip.NewWriterLevel(io.MultiWriter(f, sum), gzip.BestSpeed)
	if err != nil {
		return layer, "", 0, err
	}
	t := tar.NewWriter(io.MultiWriter(z, inner))
	if files, err = fill(t); err != nil {
		return layer, "", 0, err
	}
	if err := errors.Join(t.Close(), z.Close()); err != nil {
		return layer, "", 0, err
	}
	info, err := f.Stat()
	if err != nil {
		return layer, "", 0, err
	}
	name := func(h hash.Hash) string { return hex.EncodeToString(h.Sum(nil)) }
	layer = descriptor{MediaType: "application/vnd.oci.image.layer.v1.tar+gzip", Digest: "sha256:" + name(sum), Size: info.Size()}
	return layer, "sha256:" + name(inner), files, os.Rename(f.Name(), filepath.Join(dir, "blobs/sha256", name(sum)))
}

func regular(name string, size int64) *tar.Header {
	return &tar.Header{Typeflag: tar.TypeReg, Name: name, Size: size, Mode: 0o644, ModTime: time.Unix(1e9, 0)}
}

// writeMixed writes files of 1 KiB to 1 MiB and a few large ones, half of them random and half text, as programs are.
func writeMixed(t *tar.Writer, number int, content int64, random *rand.ChaCha8) (files int, err error) {
	text := bytes.Repeat([]byte("The quick brown fox jumps over the lazy dog. 0123456789abcdef\n"), 1<<10)
	for n := 0; content > 0; n++ {
		files++
		length := min(content, int64(1)<<(10+random.Uint64()%11))
		if n%4000 == 3999 {
			length = min(content, 64<<20)
		}
		content -= length
		if err := t.WriteHeader(regular(fmt.Sprintf("usr/lib/part%d/dir%d/file%d", number, n/100, n), length)); err != nil {
			return 0, err
		}
		for left := length; left > 0; left -= 32 << 10 {
			piece := make([]byte, min(left, 32<<10))
			random.Read(piece[:len(piece)/2])
			copy(piece[len(piece)/2:], text)
			if _, err := t.Write(piece); err != nil {
				return 0, err
			}
		}
	}
	return files, nil
}

const smallContent = "module.exports = require('./lib')\n"

// writeSmall writes files of one line, twenty in a directory, whose paths have some 65 characters, as those of npm's packages.
func writeSmall(t *tar.Writer, files int) error {
	for n := range files {
		name := fmt.Sprintf("opt/service/node_modules/package-with-a-name-%06d/file-%07d.js", n/20, n)
		if err := t.WriteHeader(regular(name, int64(len(smallContent)))); err != nil {
			return err
		}
		if _, err := io.WriteString(t, smallContent); err != nil {
			return err
		}
	}
	return nil
}
