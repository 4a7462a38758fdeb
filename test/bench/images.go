package main

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"log/slog"
	"os"
	"os/exec"
	"path/filepath"
	"runtime/debug"
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

// peak prints the memory that making a base image takes of a large image, or of one of so many small files if that is not 0.
func (b *bench) peak(ctx context.Context, content flint.Bytes, small int) error {
	dir, err := os.MkdirTemp(b.state, "bench-images")
	if err != nil {
		return err
	}
	defer os.RemoveAll(dir)
	layout := filepath.Join(dir, "layout")
	content, files, err := synthesize(layout, content, small)
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
	if os.Getenv("GOMEMLIMIT") == "" {
		debug.SetMemoryLimit(640 << 20) // as flint's own main does
	}
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
