package main

import (
	"archive/tar"
	"bytes"
	"compress/gzip"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"hash"
	"io"
	"log/slog"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"syscall"
	"time"

	"flint"
	"flint/internal/image"
)

// images compares making a base image of an OCI layout with what others make of it: umoci and mkfs.ext4 the same, mksquashfs
// a smaller one that cannot be written to. One after the other, in the same run, each in a process of its own, which also
// tells its memory.
func (b *bench) images(ctx context.Context, layout string, rounds int) error {
	for _, program := range []string{"umoci", "mkfs.ext4", "mksquashfs"} {
		if _, err := exec.LookPath(program); err != nil {
			fmt.Printf("\nno comparison of images: %s is not installed (umoci, e2fsprogs, squashfs-tools)\n", program)
			return nil
		}
	}
	dir, err := os.MkdirTemp(b.state, "bench-images")
	if err != nil {
		return err
	}
	defer os.RemoveAll(dir)
	var ours, theirs, squash []cost
	for range rounds {
		o, t, s, err := compare(ctx, layout, dir)
		if err != nil {
			return err
		}
		ours, theirs, squash = append(ours, o), append(theirs, t), append(squash, s)
	}
	fmt.Printf("\n%s, %d rounds\n", layout, rounds)
	o, t, s := median("flint: OCI layout → base image", ours), median("umoci unpack + mkfs.ext4 -d", theirs), median("umoci unpack + mksquashfs", squash)
	fmt.Printf("  flint is %.1f times as fast as mkfs.ext4's way (%.1f by processor time), %.1f times as mksquashfs's (%.1f)\n",
		t.wall.Seconds()/o.wall.Seconds(), t.cpu.Seconds()/o.cpu.Seconds(), s.wall.Seconds()/o.wall.Seconds(), s.cpu.Seconds()/o.cpu.Seconds())
	return nil
}

// peak prints the memory that making a base image of a large image takes.
func (b *bench) peak(ctx context.Context, content flint.Bytes) error {
	dir, err := os.MkdirTemp(b.state, "bench-images")
	if err != nil {
		return err
	}
	defer os.RemoveAll(dir)
	layout := filepath.Join(dir, "layout")
	files, err := synthesize(layout, content)
	if err != nil {
		return fmt.Errorf("make an image: %w", err)
	}
	self, err := os.Executable()
	if err != nil {
		return err
	}
	c, err := run(ctx, self, "-state", filepath.Join(dir, "store"), "-base", layout)
	if err != nil {
		return err
	}
	fmt.Printf("\nbase image of %s in %d files: %.1f s, processor %.1f s, memory %s\n", content, files, c.wall.Seconds(), c.cpu.Seconds(), c.memory)
	return nil
}

// cost is what a program took.
type cost struct {
	wall, cpu time.Duration
	memory    flint.Bytes // at its peak
}

func (c cost) plus(d cost) cost { return cost{c.wall + d.wall, c.cpu + d.cpu, max(c.memory, d.memory)} }

func median(name string, costs []cost) cost {
	pick := func(of func(cost) int64) int64 {
		var all []int64
		for _, c := range costs {
			all = append(all, of(c))
		}
		slices.Sort(all)
		return all[len(all)/2]
	}
	m := cost{
		time.Duration(pick(func(c cost) int64 { return int64(c.wall) })), time.Duration(pick(func(c cost) int64 { return int64(c.cpu) })),
		flint.Bytes(pick(func(c cost) int64 { return int64(c.memory) })),
	}
	fmt.Printf("  %-32s median %6.2f s, processor %6.2f s, memory %s\n", name, m.wall.Seconds(), m.cpu.Seconds(), m.memory)
	return m
}

// compare makes all three of one layout, whose only image has the tag bench or is the only one.
func compare(ctx context.Context, layout, dir string) (ours, theirs, squash cost, err error) {
	store, bundle := filepath.Join(dir, "store"), filepath.Join(dir, "bundle")
	defer os.RemoveAll(store)
	defer os.RemoveAll(bundle)
	self, err := os.Executable()
	if err != nil {
		return ours, theirs, squash, err
	}
	if ours, err = run(ctx, self, "-state", store, "-base", layout); err != nil {
		return ours, theirs, squash, err
	}
	base, err := filepath.Glob(filepath.Join(store, "base", "*.ext4"))
	if err != nil || len(base) != 1 {
		return ours, theirs, squash, fmt.Errorf("%d base images: %v", len(base), err)
	}
	info, err := os.Stat(base[0])
	if err != nil {
		return ours, theirs, squash, err
	}
	os.RemoveAll(store)
	tag, err := tagOf(layout)
	if err != nil {
		return ours, theirs, squash, err
	}
	unpack, err := run(ctx, "umoci", "unpack", "--image", layout+":"+tag, bundle)
	if err != nil {
		return ours, theirs, squash, err
	}
	root := filepath.Join(bundle, "rootfs")
	// The room a file system of this size needs for itself, which mkfs.ext4 has to be told.
	size := fmt.Sprint(info.Size()*5/4/int64(flint.MiB)+64, "M")
	format, err := run(ctx, "mkfs.ext4", "-q", "-F", "-d", root, filepath.Join(bundle, "image.ext4"), size)
	if err != nil {
		return ours, theirs, squash, err
	}
	os.Remove(filepath.Join(bundle, "image.ext4"))
	pack, err := run(ctx, "mksquashfs", root, filepath.Join(bundle, "image.squashfs"), "-quiet", "-no-progress")
	return ours, unpack.plus(format), unpack.plus(pack), err
}

// run runs a program to its end.
func run(ctx context.Context, name string, args ...string) (cost, error) {
	cmd := exec.CommandContext(ctx, name, args...)
	var said bytes.Buffer
	cmd.Stdout, cmd.Stderr = &said, &said
	began := time.Now()
	if err := cmd.Run(); err != nil {
		return cost{}, fmt.Errorf("run %s: %w: %s", name, err, said.Bytes())
	}
	c := cost{wall: time.Since(began), cpu: cmd.ProcessState.UserTime() + cmd.ProcessState.SystemTime()}
	if usage, ok := cmd.ProcessState.SysUsage().(*syscall.Rusage); ok {
		c.memory = flint.Bytes(usage.Maxrss) * flint.KiB // Linux counts in these
	}
	return c, nil
}

// makeBase makes the base image of a layout in a store of its own: what the compared process does.
func makeBase(ctx context.Context, dir, layout string) error {
	s, err := image.Open(dir, slog.New(slog.DiscardHandler))
	if err != nil {
		return err
	}
	_, err = s.Base(ctx, image.Want{Ref: "oci:" + layout})
	return err
}

// tagOf reads the tag of a layout's first image, without which umoci does not open it.
func tagOf(layout string) (string, error) {
	b, err := os.ReadFile(filepath.Join(layout, "index.json"))
	if err != nil {
		return "", err
	}
	var index struct {
		Manifests []struct{ Annotations map[string]string }
	}
	if err := json.Unmarshal(b, &index); err != nil {
		return "", err
	}
	for _, m := range index.Manifests {
		if tag := m.Annotations["org.opencontainers.image.ref.name"]; tag != "" {
			return tag, nil
		}
	}
	return "", fmt.Errorf("%s has no tag", layout)
}

// synthesize writes an OCI layout with one image of that content, in layers of about a GiB: files of 1 KiB to 1 MiB and a
// few large ones, half of it random and half zeros and text, as programs are.
func synthesize(dir string, content flint.Bytes) (files int, err error) {
	if err := os.MkdirAll(filepath.Join(dir, "blobs/sha256"), 0o755); err != nil {
		return 0, err
	}
	random := rand.NewChaCha8([32]byte{})
	type descriptor struct {
		MediaType   string            `json:"mediaType"`
		Digest      string            `json:"digest"`
		Size        int64             `json:"size"`
		Annotations map[string]string `json:"annotations,omitempty"`
	}
	var layers []descriptor
	var diffs []string
	for n := 0; content > 0; n++ {
		part := min(content, flint.GiB)
		content -= part
		digest, diff, size, count, err := writeLayer(dir, n, int64(part), random)
		if err != nil {
			return 0, err
		}
		files += count
		layers = append(layers, descriptor{MediaType: "application/vnd.oci.image.layer.v1.tar+gzip", Digest: digest, Size: size})
		diffs = append(diffs, diff)
	}
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
		return 0, err
	}
	manifest, err := put("application/vnd.oci.image.manifest.v1+json", map[string]any{
		"schemaVersion": 2, "mediaType": "application/vnd.oci.image.manifest.v1+json", "config": config, "layers": layers,
	})
	if err != nil {
		return 0, err
	}
	manifest.Annotations = map[string]string{"org.opencontainers.image.ref.name": "bench"}
	index, err := json.Marshal(map[string]any{"schemaVersion": 2, "manifests": []descriptor{manifest}})
	if err != nil {
		return 0, err
	}
	if err := os.WriteFile(filepath.Join(dir, "oci-layout"), []byte(`{"imageLayoutVersion":"1.0.0"}`), 0o644); err != nil {
		return 0, err
	}
	return files, os.WriteFile(filepath.Join(dir, "index.json"), index, 0o644)
}

// writeLayer writes one layer and returns the digests of what is stored and of what is in it.
func writeLayer(dir string, number int, content int64, random *rand.ChaCha8) (digest, diff string, size int64, files int, err error) {
	f, err := os.CreateTemp(dir, "layer")
	if err != nil {
		return "", "", 0, 0, err
	}
	defer f.Close()
	sum, inner := sha256.New(), sha256.New()
	z, err := gzip.NewWriterLevel(io.MultiWriter(f, sum), gzip.BestSpeed)
	if err != nil {
		return "", "", 0, 0, err
	}
	t := tar.NewWriter(io.MultiWriter(z, inner))
	text := bytes.Repeat([]byte("The quick brown fox jumps over the lazy dog. 0123456789abcdef\n"), 1<<10)
	for n := 0; content > 0; n++ {
		files++
		length := min(content, int64(1)<<(10+random.Uint64()%11))
		if n%4000 == 3999 {
			length = min(content, 64<<20)
		}
		content -= length
		name := fmt.Sprintf("usr/lib/part%d/dir%d/file%d", number, n/100, n)
		if err := t.WriteHeader(&tar.Header{Typeflag: tar.TypeReg, Name: name, Size: length, Mode: 0o644, ModTime: time.Unix(1e9, 0)}); err != nil {
			return "", "", 0, 0, err
		}
		for left := length; left > 0; left -= 32 << 10 {
			piece := make([]byte, min(left, 32<<10))
			random.Read(piece[:len(piece)/2])
			copy(piece[len(piece)/2:], text)
			if _, err := t.Write(piece); err != nil {
				return "", "", 0, 0, err
			}
		}
	}
	if err := t.Close(); err != nil {
		return "", "", 0, 0, err
	}
	if err := z.Close(); err != nil {
		return "", "", 0, 0, err
	}
	info, err := f.Stat()
	if err != nil {
		return "", "", 0, 0, err
	}
	name := func(h hash.Hash) string { return hex.EncodeToString(h.Sum(nil)) }
	return "sha256:" + name(sum), "sha256:" + name(inner), info.Size(), files, os.Rename(f.Name(), filepath.Join(dir, "blobs/sha256", name(sum)))
}
