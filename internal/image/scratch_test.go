package image

import (
	"bytes"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"flint"
)

func testStore(t testing.TB) *Store {
	t.Helper()
	s, err := Open(filepath.Join(t.TempDir(), "store"), slog.New(slog.DiscardHandler))
	if err != nil {
		t.Fatal(err)
	}
	return s
}

// fsck fails the test unless e2fsck finds nothing at all to say against the file system.
func fsck(t testing.TB, path string) {
	t.Helper()
	if filepath.Ext(path) == "."+string(Erofs) {
		if tool, err := exec.LookPath("fsck.erofs"); err != nil {
			t.Log("not checked: fsck.erofs is missing (sudo apt-get install erofs-utils)")
		} else if out, err := exec.Command(tool, "--extract", path).CombinedOutput(); err != nil {
			t.Fatalf("fsck.erofs: %v\n%s", err, out)
		}
		return
	}
	tool, err := exec.LookPath("e2fsck")
	if err != nil { // also where a test has put a PATH of its own
		tool, err = exec.LookPath("/usr/sbin/e2fsck")
	}
	if err != nil {
		t.Skip("needs e2fsck: sudo apt-get install e2fsprogs")
	}
	if out, err := exec.Command(tool, "-fn", path).CombinedOutput(); err != nil {
		t.Fatalf("e2fsck -fn: %v\n%s", err, out)
	}
}

func TestScratchIsSoundAtEverySize(t *testing.T) {
	s := testStore(t)
	for _, size := range []flint.Bytes{
		MinScratch, 64 * flint.MiB, 128 * flint.MiB, 128*flint.MiB + 4*flint.KiB, 129 * flint.MiB, 130*flint.MiB + 300*flint.KiB,
		flint.GiB, 10*flint.GiB + 12345, 64 * flint.GiB, 1000 * flint.GiB, 2 * flint.TiB,
	} {
		t.Run(size.String(), func(t *testing.T) {
			path := filepath.Join(t.TempDir(), "scratch")
			if err := s.Scratch(path, size); err != nil {
				t.Fatal(err)
			}
			info, err := os.Stat(path)
			if err != nil {
				t.Fatal(err)
			}
			if want := int64(size) / 4096 * 4096; info.Size() != want {
				t.Errorf("size %d, want %d", info.Size(), want)
			}
			fsck(t, path)
		})
	}
}

// mount mounts a file on a directory for the length of the test and returns the directory and how to unmount early.
func mount(t testing.TB, path, options string) (dir string, unmount func()) {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("needs root: mounts a file system")
	}
	dir = t.TempDir()
	format := "ext4"
	if filepath.Ext(path) == ".erofs" {
		format = "erofs"
		if b, err := os.ReadFile("/proc/filesystems"); err == nil && !strings.Contains(string(b), "erofs") && exec.Command("modprobe", "erofs").Run() != nil {
			t.Skip("needs a kernel with erofs")
		}
	}
	out, err := exec.Command("mount", "-t", format, "-o", "loop,"+options, path, dir).CombinedOutput()
	// Whoever else takes the same free loop device was quicker, or the device of an earlier mount of the same file is still mounted
	// in a mount namespace that was made meanwhile, by a VMM's jail of another test, say, until that is gone.
	for range 600 {
		if err == nil || !strings.Contains(string(out), "already mounted or mount point busy") {
			break
		}
		<-time.After(100 * time.Millisecond)
		out, err = exec.Command("mount", "-t", format, "-o", "loop,"+options, path, dir).CombinedOutput()
	}
	if err != nil {
		if _, err := os.Stat("/dev/loop-control"); err != nil {
			t.Skip("needs loop devices: /dev/loop-control is missing")
		}
		t.Fatalf("mount: %v\n%s", err, out)
	}
	unmount = sync.OnceFunc(func() {
		if out, err := exec.Command("umount", dir).CombinedOutput(); err != nil {
			t.Errorf("umount: %v\n%s", err, out)
		}
	})
	t.Cleanup(unmount)
	return dir, unmount
}

// TestScratchHoldsWhatItPromises fills a scratch disk to the last block through the kernel, in every group, and reads it
// back from a new mount.
func TestScratchHoldsWhatItPromises(t *testing.T) {
	path := filepath.Join(t.TempDir(), "scratch")
	if err := testStore(t).Scratch(path, 300*flint.MiB+20*flint.KiB); err != nil {
		t.Fatal(err)
	}
	dir, unmount := mount(t, path, "rw")
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
	fsck(t, path)

	dir, _ = mount(t, path, "ro")
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

func TestScratchRefuses(t *testing.T) {
	s := testStore(t)
	for _, size := range []flint.Bytes{-1, 0, MinScratch - 1, MaxScratch + 1} {
		path := filepath.Join(t.TempDir(), "scratch")
		var f *flint.Fault
		if err := s.Scratch(path, size); !errors.As(err, &f) || f.Code != "image.scratch" {
			t.Errorf("size %d: %v", size, err)
		}
		if _, err := os.Stat(path); !errors.Is(err, os.ErrNotExist) {
			t.Errorf("size %d: a file is left: %v", size, err)
		}
	}
	path := filepath.Join(t.TempDir(), "taken")
	if err := os.WriteFile(path, []byte("mine"), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := s.Scratch(path, flint.GiB); !errors.Is(err, os.ErrExist) {
		t.Errorf("existing file: %v", err)
	}
	if b, _ := os.ReadFile(path); string(b) != "mine" {
		t.Error("existing file was overwritten")
	}
}

// FuzzScratchLayout checks what must hold of the layout at every size.
func FuzzScratchLayout(f *testing.F) {
	for _, size := range []int64{int64(MinScratch), 1 << 27, 1<<27 + 4096, 1 << 36, int64(MaxScratch)} {
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
			s, dir := testStore(b), b.TempDir()
			for i := 0; b.Loop(); i++ {
				path := filepath.Join(dir, strconv.Itoa(i))
				if err := s.Scratch(path, size); err != nil {
					b.Fatal(err)
				}
				os.Remove(path)
			}
		})
	}
}
