package kernel

import (
	"archive/tar"
	"bytes"
	"errors"
	"io"
	"io/fs"
	"os"
	"slices"
	"strings"
	"syscall"
	"testing"

	"flint"
	"flint/internal/regular"
)

func newUnpacked(t testing.TB) *unpacked {
	t.Helper()
	root, err := os.OpenRoot(t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = root.Close() })
	return &unpacked{root: root}
}

func filesOf(t testing.TB, root *os.Root) []string {
	t.Helper()
	var files []string
	err := fs.WalkDir(root.FS(), ".", func(p string, d fs.DirEntry, err error) error {
		if err == nil && !d.IsDir() {
			files = append(files, p)
		}
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	return files
}

func TestDebOfEveryCompression(t *testing.T) {
	files := []debFile{
		{name: "./boot/vmlinuz-6.1", data: []byte("kernel")},
		{name: "./boot/config-6.1", data: []byte("CONFIG_X=y")},
		{name: "./boot/System.map-6.1", data: []byte("skipped")},
		{name: "./usr/share/doc/x", data: []byte("skipped")},
		{name: "./lib/modules/6.1/kernel/a.ko", data: []byte("a")},
		{name: "./lib/modules/6.1/kernel/deep/er/b-c.ko.xz", data: []byte("b")},
		{name: "./lib/modules/6.1/kernel/readme", data: []byte("skipped")},
		{name: "./lib/modules/6.1/build", typ: tar.TypeSymlink},
		{name: "./lib/modules/6.1/source/x.ko", data: []byte("skipped")},
		{name: "./lib/modules/6.1/modules.builtin", data: []byte("")},
		{name: "./lib/modules/6.1/modules.dep", data: []byte("skipped: depmod makes it")},
	}
	want := []string{
		"config", "lib/modules/6.1/kernel/a.ko", "lib/modules/6.1/kernel/deep/er/b-c.ko.xz", "lib/modules/6.1/modules.builtin", "vmlinuz",
	}
	for _, packing := range []string{"", "gzip", "xz", "zstd"} {
		for _, prefix := range []string{"./lib", "./usr/lib"} {
			moved := slices.Clone(files)
			for i := range moved {
				moved[i].name = strings.Replace(moved[i].name, "./lib", prefix, 1)
			}
			u := newUnpacked(t)
			if err := u.addDeb(t.Context(), bytes.NewReader(makeDeb(t, packing, moved))); err != nil {
				t.Fatalf("%q: %v", packing, err)
			}
			if got := filesOf(t, u.root); !slices.Equal(got, want) {
				t.Errorf("%q: got %q, want %q", packing, got, want)
			}
			if u.version != "6.1" || !u.kernel {
				t.Errorf("%q: version %q kernel %v", packing, u.version, u.kernel)
			}
		}
	}
}

func TestBadDebs(t *testing.T) {
	module := func(name string) debFile { return debFile{name: name, data: []byte("x")} }
	tests := map[string]struct {
		deb  []byte
		want string
	}{
		"empty":         {nil, "not a .deb"},
		"no ar":         {[]byte("PK\x03\x04 something else"), "not a .deb"},
		"another ar":    {makeAr(debFile{name: "x.o", data: []byte("x")}), "first member"},
		"no data":       {makeAr(debFile{name: "debian-binary", data: []byte("2.0\n")}), "no member data.tar"},
		"bad header":    {append(makeAr(debFile{name: "debian-binary", data: []byte("2.0\n")}), make([]byte, 60)...), "ar header"},
		"bad size":      {bytes.Replace(makeAr(debFile{name: "debian-binary"}), []byte("0         `"), []byte("-5        `"), 1), "not a number"},
		"member cut":    {makeAr(debFile{name: "debian-binary", data: make([]byte, 100)})[:90], "skip ar member"},
		"two versions":  {makeDeb(t, "", []debFile{module("lib/modules/6.1/a.ko"), module("lib/modules/6.1/k/a.ko"), module("lib/modules/6.2/k/a.ko")}), "two versions"},
		"odd version":   {makeDeb(t, "", []debFile{module("lib/modules/-rf/k/a.ko")}), "not a kernel version"},
		"same twice":    {makeDeb(t, "", []debFile{module("lib/modules/6.1/k/a.ko"), module("lib/modules/6.1/k/a.ko")}), "exists"},
		"huge config":   {makeDeb(t, "gzip", []debFile{{name: "boot/config-6.1", data: make([]byte, maxConfig+1)}}), "configuration of"},
		"torn data.tar": {makeAr(debFile{name: "debian-binary"}, debFile{name: "data.tar", data: make([]byte, 700)[:600]}), "data.tar"},
		"unknown packing": {
			makeAr(debFile{name: "debian-binary"}, debFile{name: "data.tar.rar", data: []byte("Rar!0123456789abcdef")}), "known way",
		},
	}
	for name, tt := range tests {
		t.Run(name, func(t *testing.T) {
			err := newUnpacked(t).addDeb(t.Context(), bytes.NewReader(tt.deb))
			if err == nil || !strings.Contains(err.Error(), tt.want) {
				t.Errorf("got %v, want an error with %q", err, tt.want)
			}
		})
	}
}

// TestHugeKernel: it is refused by its size, before any of it is read.
func TestHugeKernel(t *testing.T) {
	u := newUnpacked(t)
	err := u.add("boot/vmlinuz-6.1", maxKernel+1, strings.NewReader("x"))
	if err == nil || !strings.Contains(err.Error(), "kernel of") || len(filesOf(t, u.root)) != 0 {
		t.Errorf("got %v and %q", err, filesOf(t, u.root))
	}
}

func TestDebStaysInItsDirectory(t *testing.T) {
	u := newUnpacked(t)
	deb := makeDeb(t, "", []debFile{
		{name: "../../lib/modules/6.1/k/a.ko", data: []byte("a")}, // cleaned: inside
		{name: "lib/modules/6.1/k/../../../../../../tmp/b.ko", data: []byte("b")},
		{name: "lib/modules/../../../etc/c.ko", data: []byte("c")},
		{name: "/lib/modules/6.1/k/d.ko", data: []byte("d")},
	})
	if err := u.addDeb(t.Context(), bytes.NewReader(deb)); err != nil {
		t.Fatal(err)
	}
	if got, want := filesOf(t, u.root), []string{"lib/modules/6.1/k/a.ko", "lib/modules/6.1/k/d.ko"}; !slices.Equal(got, want) {
		t.Errorf("got %q, want %q", got, want)
	}
}

// TestBoundedReader: what a package's archive unpacks to has an end, whether flint wants any of it or not.
func TestBoundedReader(t *testing.T) {
	b := &bounded{strings.NewReader("0123456789"), 8}
	got, err := io.ReadAll(b)
	if string(got) != "01234567" || err == nil || !strings.Contains(err.Error(), "more than 4GiB") {
		t.Errorf("got %q, %v", got, err)
	}
	if got, err := io.ReadAll(&bounded{strings.NewReader("01234567"), 9}); string(got) != "01234567" || err != nil {
		t.Errorf("got %q, %v", got, err)
	}
}

func FuzzDeb(f *testing.F) {
	for _, packing := range []string{"", "gzip", "zstd"} {
		f.Add(makeDeb(f, packing, []debFile{
			{name: "./boot/vmlinuz-6.1", data: []byte("kernel")},
			{name: "./lib/modules/6.1/kernel/a.ko", data: []byte("a")},
			{name: "./lib/modules/6.1/build", typ: tar.TypeSymlink},
		}))
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		if len(b) > 1<<16 {
			return
		}
		u := newUnpacked(t)
		_ = u.addDeb(t.Context(), bytes.NewReader(b))
		for _, name := range filesOf(t, u.root) {
			if name != workKernel && name != workConfig && !strings.HasPrefix(name, workTree+"/") {
				t.Errorf("%q was laid out", name)
			}
		}
	})
}

// TestUnpackFaultKinds: flint serve is not started again after a fault of the configuration, and must be after one of this machine.
func TestUnpackFaultKinds(t *testing.T) {
	for _, c := range []struct {
		err, kind error
		fix       string
	}{
		{io.ErrUnexpectedEOF, flint.ErrConfig, "fetch the package again"},
		{regular.Check("/"), flint.ErrConfig, "check the path"},
		{&fs.PathError{Op: "open", Path: "x", Err: syscall.ENOENT}, flint.ErrNotFound, "check the path"},
		{&fs.PathError{Op: "open", Path: "x", Err: syscall.EACCES}, flint.ErrPermission, "let the user"},
		{&fs.PathError{Op: "write", Path: "x", Err: syscall.ENOSPC}, nil, ""},
		{&fs.PathError{Op: "read", Path: "x", Err: syscall.EIO}, nil, ""},
	} {
		var f *flint.Fault
		if !errors.As(unpackFault("x", c.err), &f) || f.Kind != c.kind || !strings.HasPrefix(f.Fix, c.fix) {
			t.Errorf("%v: kind %v, fix %q", c.err, f.Kind, f.Fix)
		}
	}
}
