package app

import (
	"archive/tar"
	"bytes"
	"crypto/sha256"
	"debug/elf"
	"encoding/binary"
	"errors"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"testing"
	"time"

	"flint"
	"flint/internal/config"
	"flint/internal/image"
)

// packFiles makes a tar of files; a content that begins with "-> " is a symbolic link's target.
func packFiles(t *testing.T, files map[string]string) []byte {
	t.Helper()
	var b bytes.Buffer
	w := tar.NewWriter(&b)
	for _, name := range slices.Sorted(maps.Keys(files)) {
		h := tar.Header{Name: name, Mode: 0o755, Size: int64(len(files[name])), ModTime: time.Unix(1e9, 0)}
		target, link := strings.CutPrefix(files[name], "-> ")
		if link {
			h.Typeflag, h.Linkname, h.Size = tar.TypeSymlink, target, 0
		}
		err := w.WriteHeader(&h)
		if err == nil && !link {
			_, err = w.Write([]byte(files[name]))
		}
		if err != nil {
			t.Fatal(err)
		}
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	return b.Bytes()
}

// imageOf writes a docker archive of an image with these files, for machines of that kind.
func imageOf(t *testing.T, arch string, files map[string]string) (path string) {
	t.Helper()
	layer := packFiles(t, files)
	path = filepath.Join(t.TempDir(), "image.tar")
	err := os.WriteFile(path, packFiles(t, map[string]string{
		"layer.tar":     string(layer),
		"config.json":   fmt.Sprintf(`{"os":"linux","architecture":%q,"rootfs":{"type":"layers","diff_ids":["sha256:%x"]}}`, arch, sha256.Sum256(layer)),
		"manifest.json": `[{"Config":"config.json","Layers":["layer.tar"]}]`,
	}), 0o600)
	if err != nil {
		t.Fatal(err)
	}
	return path
}

// elfFor is the head of a program for a machine.
func elfFor(machine elf.Machine) string {
	b := make([]byte, 64)
	copy(b, elf.ELFMAG)
	b[elf.EI_CLASS], b[elf.EI_DATA], b[elf.EI_VERSION] = byte(elf.ELFCLASS64), byte(elf.ELFDATA2LSB), byte(elf.EV_CURRENT)
	binary.LittleEndian.PutUint16(b[16:], uint16(elf.ET_EXEC))
	binary.LittleEndian.PutUint16(b[18:], uint16(machine))
	return string(b)
}

// TestPoolsOfUnfitImagesAreHeldAtTheStart has pools of images that GitHub's runner cannot run in beside one of an image that it can.
func TestPoolsOfUnfitImagesAreHeldAtTheStart(t *testing.T) {
	ours, other := elf.EM_X86_64, elf.EM_AARCH64
	if runtime.GOARCH == "arm64" {
		ours, other = other, ours
	}
	sh := elfFor(ours)
	glibc := map[elf.Machine]string{elf.EM_X86_64: "lib64/ld-linux-x86-64.so.2", elf.EM_AARCH64: "lib/ld-linux-aarch64.so.1"}
	musl := map[string]string{"bin/busybox": sh, "bin/sh": "-> /bin/busybox", "lib/ld-musl-x86_64.so.1": "x", "etc/os-release": "PRETTY_NAME=Alpine\n"}
	for name, tt := range map[string]struct {
		arch       string
		files      map[string]string
		filesystem string
		code, says string
	}{
		"no shell":             {runtime.GOARCH, map[string]string{"app": sh}, config.Ext4, "image.shell", "no /bin/sh"},
		"no shell, erofs":      {runtime.GOARCH, map[string]string{"app": sh}, config.Erofs, "image.shell", "no /bin/sh"},
		"shell's link is cut":  {runtime.GOARCH, map[string]string{"bin/sh": "-> busybox"}, config.Ext4, "image.shell", "no /bin/sh"},
		"musl":                 {runtime.GOARCH, musl, config.Ext4, "image.libc", "C library is musl"},
		"musl, erofs":          {runtime.GOARCH, musl, config.Erofs, "image.libc", "C library is musl"},
		"static":               {runtime.GOARCH, map[string]string{"bin/sh": sh}, config.Ext4, "image.libc", "C library is none"},
		"another machine's":    {runtime.GOARCH, map[string]string{"bin/sh": elfFor(other), glibc[other]: "x"}, config.Ext4, "image.platform", "/bin/sh is made for"},
		"says another machine": {"riscv64", map[string]string{"bin/sh": sh, glibc[ours]: "x"}, config.Ext4, "image.platform", "linux/riscv64"},
	} {
		t.Run(name, func(t *testing.T) {
			a, _, _ := dockerfileRig(t)
			a.cfg.Runner = config.Runner{InImage: "auto"} // a drive of the runner's software is none of this
			unfit := config.NewPool("unfit", imageOf(t, tt.arch, tt.files))
			unfit.Format = tt.filesystem
			fit := config.NewPool("fit", imageOf(t, runtime.GOARCH, map[string]string{"bin/bash": sh, "bin/sh": "-> bash", glibc[ours]: "x"}))
			a.cfg.Pools = []config.Pool{unfit, fit}
			a.reloading.open(a.cfg)

			err := a.preparePool(t.Context(), unfit)
			var f *flint.Fault
			if !errors.As(err, &f) || f.Code != tt.code || !strings.Contains(f.Error(), tt.says) || f.Fix == "" {
				t.Errorf("error %v", err)
			}
			if err := a.preparePools(t.Context(), nil); err != nil {
				t.Fatal(err)
			}
			held := a.reloading.pools(a.cfg)
			if why := held[0].Held; why.Code != "pool.image" || !strings.Contains(why.Text, tt.says) {
				t.Errorf("the pool is held: %+v", why)
			}
			if s := a.Supplies(); len(s) != 1 || s["fit"].Base == "" || !held[1].Held.IsZero() {
				t.Errorf("pools have %+v; held: %+v", s, held[1].Held)
			}
		})
	}
}

// TestImagesAreInspectedWhateverTheirFileSystem looks into one image as ext4 and as erofs.
func TestImagesAreInspectedWhateverTheirFileSystem(t *testing.T) {
	a, _, _ := dockerfileRig(t)
	from := imageOf(t, runtime.GOARCH, map[string]string{"bin/bash": "x", "bin/sh": "-> bash", "etc/os-release": "PRETTY_NAME=Test\n"})
	for _, format := range []image.Format{image.Ext4, image.Erofs} {
		base, err := a.store.Base(t.Context(), image.Want{Ref: from, Format: format})
		if err != nil {
			t.Fatal(err)
		}
		d, err := InspectImage(t.Context(), a.cfg, a.opt, base.Digest)
		if err != nil || d.Contents == nil || *d.Contents != (ImageContents{OS: "Test", Shell: true, Libc: "none"}) {
			t.Errorf("%s: %+v, %v", format, d.Contents, err)
		}
	}
}
