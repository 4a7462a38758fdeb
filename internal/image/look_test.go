package image

import (
	"bytes"
	"os"
	"path/filepath"
	"testing"
)

func TestLook(t *testing.T) {
	s := testStore(t)
	look := func(items ...item) Contents {
		t.Helper()
		dir := filepath.Join(t.TempDir(), "layout")
		writeLayout(t, dir, "", testImage(t, pack(t, items...)))
		c, err := Look(wantBase(t, s, Want{Ref: dir}).Path)
		if err != nil {
			t.Fatal(err)
		}
		return c
	}
	if c := look(file("f", "1")); c != (Contents{Libc: "none"}) {
		t.Errorf("an empty image has %+v", c)
	}
	debian := look(
		dir("usr/"), dir("usr/bin/"), file("usr/bin/dash", "x"), sym("usr/bin/sh", "dash"), sym("bin", "usr/bin"),
		sym("lib", "usr/lib"), sym("lib64", "/usr/lib64"), file("usr/lib64/ld-linux-x86-64.so.2", "x"),
		file("usr/lib/systemd/systemd", "x"), sym("sbin", "usr/sbin"), sym("usr/sbin/init", "../lib/systemd/systemd"),
		file("usr/bin/dockerd", "x"), file("etc/passwd", "root:x:0:0::/root:/bin/sh\nrunner:x:1000:1000::/home/runner:/bin/sh\n"),
		file("usr/lib/os-release", "NAME=x\nPRETTY_NAME=\"Debian 12\"\n"), sym("etc/os-release", "../usr/lib/os-release"),
	)
	if want := (Contents{OS: "Debian 12", Shell: true, Libc: "glibc", Systemd: true, Docker: true, Runner: true}); debian != want {
		t.Errorf("got %+v, want %+v", debian, want)
	}
	if c := look(file("bin/busybox", "x"), sym("bin/sh", "busybox"), file("lib/ld-musl-x86_64.so.1", "x"), sym("loop", "loop"), sym("etc", "loop")); c != (Contents{Shell: true, Libc: "musl"}) {
		t.Errorf("got %+v", c)
	}
}

// FuzzLook reads file systems that are damaged.
func FuzzLook(f *testing.F) {
	dir := filepath.Join(f.TempDir(), "layout")
	writeLayout(f, dir, "", testImage(f, pack(f, file("bin/dash", "x"), sym("bin/sh", "dash"))))
	s := testStore(f)
	b := wantBase(f, s, Want{Ref: dir})
	whole, err := os.ReadFile(b.Path)
	if err != nil {
		f.Fatal(err)
	}
	f.Add(uint32(1024+0x28), []byte{0, 0, 0, 0})
	f.Fuzz(func(_ *testing.T, at uint32, patch []byte) {
		fs := bytes.Clone(whole)
		if int(at) < len(fs) {
			copy(fs[at:], patch)
		}
		if e, err := openExt4(bytes.NewReader(fs)); err == nil {
			_, _ = e.find("/bin/sh") // it must end, and not panic
		}
	})
}
