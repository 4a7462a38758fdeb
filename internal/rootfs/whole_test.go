package rootfs

import (
	"encoding/binary"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"flint"
)

// TestFileSystemsThatNoGuestMounts: what is cut short or waits for its journal is refused before a VM is made.
func TestFileSystemsThatNoGuestMounts(t *testing.T) {
	dir := t.TempDir()
	made := func(name string, args ...string) string {
		path := filepath.Join(dir, name)
		if out, err := exec.Command(args[0], append(args[1:], path)...).CombinedOutput(); err != nil {
			t.Skipf("needs %s: %v\n%s", args[0], err, out)
		}
		return path
	}
	change := func(path string, f func([]byte) []byte) string {
		b, err := os.ReadFile(path)
		if err == nil {
			b = f(b)
			path += ".changed"
			err = os.WriteFile(path, b, 0o644)
		}
		if err != nil {
			t.Fatal(err)
		}
		return path
	}
	ext4 := filepath.Join(dir, "ext4")
	if err := os.WriteFile(ext4, nil, 0o644); err != nil || os.Truncate(ext4, 16<<20) != nil {
		t.Fatal(err)
	}
	ext4 = made("ext4", "mke2fs", "-q", "-t", "ext4")
	unclean := change(ext4, func(b []byte) []byte {
		at := b[1024+0x60:]
		binary.LittleEndian.PutUint32(at, binary.LittleEndian.Uint32(at)|4)
		return b
	})
	short := change(unclean, func(b []byte) []byte { return b[:12<<20] })
	huge := change(ext4, func(b []byte) []byte {
		binary.LittleEndian.PutUint32(b[1024+0x18:], 0xffffffff)
		return b
	})
	for path, want := range map[string]string{ext4: "", unclean: "e2fsck -p", short: "has only 12MiB", huge: "has only 16MiB"} {
		err := Whole(path)
		if want == "" && err != nil {
			t.Error(err)
		}
		var f *flint.Fault
		if want != "" && (!errors.As(err, &f) || f.Code != "image.file" || !strings.Contains(err.Error(), want)) {
			t.Errorf("got %v, want %q", err, want)
		}
	}
	for _, no := range [][]byte{nil, make([]byte, 4096), []byte("FROM scratch\n")} {
		path := filepath.Join(dir, "none")
		if err := os.WriteFile(path, no, 0o644); err != nil {
			t.Fatal(err)
		}
		if err := Whole(path); !errors.Is(err, errNoFS) {
			t.Errorf("%d bytes that are none: %v", len(no), err)
		}
	}
}

func TestDetect(t *testing.T) {
	for _, format := range []Format{Ext4, Erofs} {
		b, err := os.ReadFile(wrote(t, format, pack(t, file("f", "1"))))
		if err != nil {
			t.Fatal(err)
		}
		for size, want := range map[int]Format{0: "", headSize - 1: "", headSize: format, len(b): format} {
			if got := Detect(b[:size]); got != want {
				t.Errorf("%d bytes of an %s are %q", size, format, got)
			}
		}
	}
	if got := Detect(pack(t, file("f", "1"))); got != "" {
		t.Errorf("a tar is %q", got)
	}
}
