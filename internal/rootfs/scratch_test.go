package rootfs

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"flint"
	"flint/internal/rootfs/rootfstest"
)

// scratch makes an empty file system of that size.
func scratch(t testing.TB, size flint.Bytes) (path string) {
	t.Helper()
	f := newFile(t, "scratch")
	if err := WriteScratch(f, size); err != nil {
		t.Fatal(err)
	}
	return f.Name()
}

func TestScratchIsSoundAtEverySize(t *testing.T) {
	for _, size := range []flint.Bytes{
		minScratch, 64 * flint.MiB, 128 * flint.MiB, 128*flint.MiB + 4*flint.KiB, 129 * flint.MiB, 130*flint.MiB + 300*flint.KiB,
		flint.GiB, 10*flint.GiB + 12345, 64 * flint.GiB, 1000 * flint.GiB, 2 * flint.TiB,
	} {
		t.Run(size.String(), func(t *testing.T) {
			path := scratch(t, size)
			info, err := os.Stat(path)
			if err != nil {
				t.Fatal(err)
			}
			if want := int64(size) / 4096 * 4096; info.Size() != want {
				t.Errorf("size %d, want %d", info.Size(), want)
			}
			rootfstest.Fsck(t, path)
		})
	}
}

// TestScratchHoldsWhatItPromises fills a scratch disk to the last block through the kernel, in every group, and reads it
// back from a new mount.
func TestScratchHoldsWhatItPromises(t *testing.T) {
	path := scratch(t, 300*flint.MiB+20*flint.KiB)
	dir, unmount := rootfstest.Mount(t, path, "rw")
	const small = 3000
	for i := range small {
		name := filepath.Join(dir, fmt.Sprintf("d%d", i%50), fmt.Sprintf("small-%d", i))
		if err := os.MkdirAll(filepath.Dir(name), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(name, []byte(name), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	chunk := bytes.Repeat([]byte("flint fills the disk. "), 1<<20/22)
	f, err := os.Create(filepath.Join(dir, "big"))
	if err != nil {
		t.Fatal(err)
	}
	var written int64
	for {
		n, err := f.Write(chunk)
		written += int64(n)
		if errors.Is(err, syscall.ENOSPC) {
			break
		}
		if err != nil {
			t.Fatal(err)
		}
	}
	f.Close()
	// 3 groups of 514 blocks of overhead, and small files of one block each: what is left of 300 MiB is some 280.
	if written < 275<<20 {
		t.Errorf("only %d bytes fit", written)
	}
	unmount()
	rootfstest.Fsck(t, path)

	dir, _ = rootfstest.Mount(t, path, "ro")
	for i := range small {
		name := filepath.Join(fmt.Sprintf("d%d", i%50), fmt.Sprintf("small-%d", i))
		if b, err := os.ReadFile(filepath.Join(dir, name)); err != nil || !strings.HasSuffix(string(b), name) {
			t.Fatalf("%s: %q, %v", name, b, err)
		}
	}
	big, err := os.ReadFile(filepath.Join(dir, "big"))
	if err != nil || int64(len(big)) != written {
		t.Fatalf("big: %d bytes of %d, %v", len(big), written, err)
	}
	for at := 0; at < len(big); at += len(chunk) {
		if part := big[at:min(at+len(chunk), len(big))]; !bytes.Equal(part, chunk[:len(part)]) {
			t.Fatalf("big differs at %d", at)
		}
	}
}

func TestSizesOfScratch(t *testing.T) {
	for _, size := range []flint.Bytes{-1, 0, minScratch - 1, maxScratch + 1} {
		f := newFile(t, "scratch")
		var fault *flint.Fault
		if err := WriteScratch(f, size); !errors.As(err, &fault) || fault.Code != "image.scratch" {
			t.Errorf("size %d: %v", size, err)
		}
		if info, err := f.Stat(); err != nil || info.Size() > 0 {
			t.Errorf("size %d: the file is %v, %v", size, info, err)
		}
	}
}

// FuzzScratchLayout checks what must hold of the layout at every size.
func FuzzScratchLayout(f *testing.F) {
	for _, size := range []int64{int64(minScratch), 1 << 27, 1<<27 + 4096, 1 << 36, int64(maxScratch)} {
		f.Add(size)
	}
	f.Fuzz(func(t *testing.T, size int64) {
		l, err := layoutScratch(flint.Bytes(size))
		if err != nil {
			return
		}
		if lost := size/ext4Block - int64(l.blocks); lost < 0 || lost >= groupOverhead+64 {
			t.Fatalf("%d bytes: %d blocks lost", size, lost)
		}
		if l.used > l.inGroup(0) || l.used < l.lostFound+lostFoundLen {
			t.Fatalf("%d bytes: %d blocks used in group 0 of %d", size, l.used, l.inGroup(0))
		}
		if last := l.groups - 1; last > 0 && l.inGroup(last) < groupOverhead+64 {
			t.Fatalf("%d bytes: last group has %d blocks", size, l.inGroup(last))
		}
		if uint64(l.groups)*groupInodes > 1<<32-1 {
			t.Fatalf("%d bytes: %d groups have too many inodes", size, l.groups)
		}
	})
}

func BenchmarkScratch(b *testing.B) {
	for _, size := range []flint.Bytes{64 * flint.MiB, 64 * flint.GiB, 2 * flint.TiB} {
		b.Run(size.String(), func(b *testing.B) {
			path := filepath.Join(b.TempDir(), "scratch")
			for b.Loop() {
				f, err := os.Create(path)
				if err == nil {
					err = errors.Join(WriteScratch(f, size), f.Close(), os.Remove(path))
				}
				if err != nil {
					b.Fatal(err)
				}
			}
		})
	}
}
