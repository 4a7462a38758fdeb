package rootfs

import (
	"archive/tar"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"flint"
	"flint/internal/rootfs/rootfstest"
)

// packed is one entry of the tar stream a file system is made from.
type packed struct {
	*tar.Header
	content string
}

// emitted flattens layers to that stream.
func emitted(t testing.TB, layers ...[]byte) ([]packed, error) {
	t.Helper()
	var ls []Layer
	for _, b := range layers {
		ls = append(ls, layerOf(b))
	}
	contents := testSpool(t)
	tree, err := merge(context.Background(), ls, flint.GiB, contents)
	if err != nil {
		return nil, err
	}
	p, err := tree.plan()
	if err != nil {
		return nil, err
	}
	var buf bytes.Buffer
	if err := p.emit(context.Background(), contents, &buf); err != nil {
		return nil, err
	}
	var list []packed
	for r := tar.NewReader(&buf); ; {
		h, err := r.Next()
		if errors.Is(err, io.EOF) {
			return list, nil
		}
		if err != nil {
			t.Fatal(err)
		}
		content, err := io.ReadAll(r)
		if err != nil {
			t.Fatal(err)
		}
		list = append(list, packed{h, string(content)})
	}
}

// listing says what is in the stream: "path = content", "path -> target", "path => hard link's target", "directory/".
func listing(files []packed) []string {
	var list []string
	for _, f := range files {
		line := f.Name
		switch f.Typeflag {
		case tar.TypeReg:
			line += " = " + f.content
		case tar.TypeSymlink:
			line += " -> " + f.Linkname
		case tar.TypeLink:
			line += " => " + f.Linkname
		case tar.TypeChar:
			line += fmt.Sprintf(" c%d:%d", f.Devmajor, f.Devminor)
		}
		if line != "./" {
			list = append(list, line)
		}
	}
	return list
}

// flattenCase is layers and the listing of what they give.
type flattenCase struct {
	layers [][]item
	want   []string
}

func (c flattenCase) check(t *testing.T) {
	var layers [][]byte
	for _, l := range c.layers {
		layers = append(layers, pack(t, l...))
	}
	files, err := emitted(t, layers...)
	if err != nil {
		t.Fatal(err)
	}
	if got := listing(files); !slices.Equal(got, c.want) {
		t.Errorf("got  %q\nwant %q", got, c.want)
	}
}

func TestFlatten(t *testing.T) {
	long := strings.Repeat("n", 255)
	for name, c := range map[string]flattenCase{
		"whiteout hides below, not in its own layer, wherever it stands": {
			[][]item{
				{dir("d"), file("d/old", "1"), file("gone", "1"), file("kept", "1")},
				{file("d/new", "2"), file(".wh.d", ""), file(".wh.gone", ""), file("gone", "2")},
			},
			[]string{"d/", "kept = 1", "d/new = 2", "gone = 2"},
		},
		"opaque hides what is below only": {
			[][]item{
				{dir("d"), file("d/a", "1"), dir("d/sub"), file("d/sub/x", "1")},
				{file("d/b", "2"), file("d/.wh..wh..opq", "")},
			},
			[]string{"d/", "d/b = 2"},
		},
		"whiteouts do not follow links, and hide links themselves": {
			[][]item{
				{dir("real"), file("real/f", "1"), sym("alias", "real")},
				{file("alias/.wh.f", "")},
			},
			[]string{"alias -> real", "real/", "real/f = 1"},
		},
		"whiteout of a link leaves its target": {
			[][]item{{dir("real"), file("real/f", "1"), sym("alias", "real")}, {file(".wh.alias", "")}},
			[]string{"real/", "real/f = 1"},
		},
		"a name below a symbolic link lands where the link leads": {
			[][]item{{dir("usr"), dir("usr/lib"), sym("lib", "usr/lib")}, {file("lib/x.so", "2")}},
			[]string{"lib -> usr/lib", "usr/", "usr/lib/", "usr/lib/x.so = 2"},
		},
		"a symbolic link cannot lead outside": {
			[][]item{{sym("up", "../../../.."), sym("abs", "/etc"), file("up/a", "1"), file("abs/b", "1"), sym("etc2", "up/etc"), file("etc2/c", "1")}},
			[]string{"abs -> /etc", "etc/", "etc2 -> up/etc", "up -> ../../../..", "a = 1", "etc/b = 1", "etc/c = 1"},
		},
		"absolute names are below the root": {
			[][]item{{file("/etc/passwd", "1"), file("//x", "1"), file("./y", "1")}},
			[]string{"etc/", "etc/passwd = 1", "x = 1", "y = 1"},
		},
		"file in place of a directory, and back": {
			[][]item{
				{dir("x"), file("x/in", "1"), file("y", "1")},
				{file("x", "2"), dir("y"), file("y/in", "2")},
			},
			[]string{"y/", "x = 2", "y/in = 2"},
		},
		"directory in place of a symbolic link": {
			[][]item{{dir("r"), file("r/f", "1"), sym("l", "r")}, {dir("l"), file("l/g", "2")}},
			[]string{"l/", "r/", "r/f = 1", "l/g = 2"},
		},
		"directory over directory keeps what is in it": {
			[][]item{{dir("d"), file("d/f", "1")}, {dir("d/")}},
			[]string{"d/", "d/f = 1"},
		},
		"same name twice in a layer: the last wins": {
			[][]item{{file("f", "1"), file("f", "2")}},
			[]string{"f = 2"},
		},
		"long names": {
			[][]item{{file(long+"/"+long+"/"+long, "1"), sym("s", strings.Repeat("t/", 1000))}},
			[]string{long + "/", long + "/" + long + "/", "s -> " + strings.Repeat("t/", 1000), long + "/" + long + "/" + long + " = 1"},
		},
		"device nodes stay, the overlay's whiteout form goes": {
			[][]item{{
				{Name: "null", Header: tar.Header{Typeflag: tar.TypeChar, Devmajor: 1, Devminor: 3}},
				{Name: "white", Header: tar.Header{Typeflag: tar.TypeChar}},
			}},
			[]string{"null c1:3"},
		},
		"AUFS's own names are skipped": {
			[][]item{{dir(".wh..wh.plnk"), file(".wh..wh.plnk/1.2", "x"), file(".wh..wh.aufs", ""), file("f", "1")}},
			[]string{"f = 1"},
		},
	} {
		t.Run(name, c.check)
	}
}

func TestFlattenHardLinks(t *testing.T) {
	for name, c := range map[string]flattenCase{
		"hard link whose target an upper layer replaced keeps the content": {
			[][]item{{file("a", "old"), link("b", "a")}, {file("a", "new")}},
			[]string{"b = old", "a = new"},
		},
		"hard link whose target an upper layer removed keeps the content": {
			[][]item{{file("a", "old"), link("b", "a"), link("c", "b")}, {file(".wh.a", "")}},
			[]string{"b = old", "c => b"},
		},
		"hard link before its target": {
			[][]item{{link("a", "z"), link("b", "a"), file("z", "1")}},
			[]string{"a = 1", "b => a", "z => a"},
		},
		"late hard link loses against a later entry of its name": {
			[][]item{{link("a", "z"), file("a", "mine"), file("z", "1")}},
			[]string{"a = mine", "z = 1"},
		},
		"hard link into a lower layer": {
			[][]item{{file("a", "1")}, {link("b", "a")}},
			[]string{"a = 1", "b => a"},
		},
		"hard link to a symbolic link": {
			[][]item{{sym("s", "nowhere"), link("t", "s")}},
			[]string{"s -> nowhere", "t => s"},
		},
	} {
		t.Run(name, c.check)
	}
}

func TestFlattenRefuses(t *testing.T) {
	for name, items := range map[string][]item{
		"dotdot":                {file("a/../../etc/passwd", "1")},
		"dotdot in a link":      {file("f", ""), link("l", "../f")},
		"link to nothing":       {link("l", "nowhere")},
		"links in a circle":     {link("a", "b"), link("b", "a")},
		"link to a directory":   {dir("d"), link("l", "d")},
		"symlink circle":        {sym("a", "b"), sym("b", "a"), file("a/f", "1")},
		"below a file":          {file("f", "1"), file("f/g", "1")},
		"below a whiteout":      {file(".wh.x/y", "1")},
		"long component":        {file(strings.Repeat("n", 256), "1")},
		"long path":             {file(strings.Repeat("n/", 2100)+"f", "1")},
		"deep through symlinks": {file(strings.Repeat("n/", 1500)+"f", "1"), sym("s", strings.Repeat("n/", 1500)), file("s/"+strings.Repeat("m/", 1000)+"f", "1")},
		"root as a file":        {file(".", "1")},
		"owner":                 {{Name: "f", Header: tar.Header{Uid: -1, Format: tar.FormatGNU}}},
		"device number":         {{Name: "d", Header: tar.Header{Typeflag: tar.TypeChar, Devmajor: 1 << 12, Devminor: 1}}},
		"unknown type":          {{Name: "f", Header: tar.Header{Typeflag: 'V'}}},
	} {
		t.Run(name, func(t *testing.T) {
			if got, err := emitted(t, pack(t, items...)); err == nil {
				t.Errorf("accepted: %.200q", listing(got))
			}
		})
	}
}

func TestFlattenBounds(t *testing.T) {
	big := pack(t, file("big", strings.Repeat("x", 5<<20)))
	contents := testSpool(t)
	var links []item // each of which has an inode, and none a block
	for i := range 4000 {
		links = append(links, sym(fmt.Sprint("l", i), "/usr/bin/true"))
	}
	for name, b := range map[string][]byte{"5 MiB": big, "4000 links": pack(t, links...)} {
		for _, format := range []Format{Ext4, Erofs} {
			if _, err := writeLayers(t, format, 4*flint.MiB, b); errors.Is(err, ErrTooBig) != (name == "5 MiB") {
				t.Errorf("%s in an %s of 4 MiB: %v", name, format, err)
			}
			if _, err := writeLayers(t, format, 8*flint.MiB, b); err != nil {
				t.Errorf("%s in an %s of 8 MiB: %v", name, format, err)
			}
		}
	}
	for name, b := range map[string]budget{
		"entries": {entries: 0, text: 100, stream: 1 << 30, content: 1 << 30},
		"text":    {entries: 1, text: 2, stream: 1 << 30, content: 1 << 30},
		"stream":  {entries: 1, text: 100, stream: 1 << 20, content: 1 << 30},
		"content": {entries: 1, text: 100, stream: 1 << 30, content: 1 << 20},
	} {
		_, err := layerOf(big).entries(context.Background(), &b, contents)
		if !errors.Is(err, ErrBudget) {
			t.Errorf("%s: %v", name, err)
		}
	}
	// As many entries as there may be pass, and in the next layer not one more.
	exact := budget{entries: 4000, text: 1 << 20, stream: 1 << 30, content: 1 << 30}
	if _, err := layerOf(pack(t, links...)).entries(t.Context(), &exact, contents); err != nil {
		t.Errorf("4000 of 4000 entries: %v", err)
	}
	if _, err := layerOf(pack(t, links[0])).entries(t.Context(), &exact, contents); !errors.Is(err, ErrBudget) {
		t.Errorf("one entry too many: %v", err)
	}
	l := layerOf(big)
	l.DiffID = "sha256:" + strings.Repeat("0", 64)
	if _, err := merge(context.Background(), []Layer{l}, flint.GiB, contents); err == nil {
		t.Error("a layer whose content is not what the image promised was accepted")
	}
	ctx, cancel := context.WithCancel(context.Background())
	cancel()
	if _, err := merge(ctx, []Layer{layerOf(big)}, flint.GiB, contents); !errors.Is(err, context.Canceled) {
		t.Errorf("cancelled: %v", err)
	}
}

// capability is what setcap cap_net_bind_service=p writes.
const capability = "\x01\x00\x00\x02\x00\x04\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00"

// kernelLayer is a layer with everything a tar can say of a file.
func kernelLayer(t testing.TB, content, long string) []byte {
	pax := func(kv ...string) map[string]string {
		m := map[string]string{}
		for i := 0; i < len(kv); i += 2 {
			m[xattrPrefix+kv[i]] = kv[i+1]
		}
		return m
	}
	return pack(
		t,
		item{Name: ".", Header: tar.Header{Typeflag: tar.TypeDir, Mode: 0o751}},
		item{Name: "tmp", Header: tar.Header{Typeflag: tar.TypeDir, Mode: 0o1777}},
		item{Name: "su", Content: "x", Header: tar.Header{Mode: 0o6755, Uid: 70000, Gid: 80000, ModTime: time.Unix(1234567890, 987654321), Format: tar.FormatPAX}},
		item{Name: "ping", Content: "x", Header: tar.Header{Mode: 0o755, PAXRecords: pax(
			"security.capability", capability, "user.note", strings.Repeat("n", 1000), "trusted.overlay.opaque", "y", "user.empty", "",
		)}},
		file("big", content), link("zz-big", "big"),
		item{Name: "null", Header: tar.Header{Typeflag: tar.TypeChar, Mode: 0o666, Devmajor: 1, Devminor: 3}},
		item{Name: "disk", Header: tar.Header{Typeflag: tar.TypeBlock, Devmajor: 259, Devminor: 70000}},
		item{Name: "pipe", Header: tar.Header{Typeflag: tar.TypeFifo}},
		item{Name: "early", Header: tar.Header{ModTime: time.Unix(-86400, 0), Format: tar.FormatPAX}},
		item{Name: "late", Header: tar.Header{ModTime: time.Unix(1<<31+5, 0), Format: tar.FormatPAX}},
		item{Name: "latest", Header: tar.Header{ModTime: time.Unix(1<<33, 0), Format: tar.FormatPAX}},
		item{Name: "holes", Content: strings.Repeat("\x00", 1<<20) + "end" + strings.Repeat("\x00", 1<<20)},
		sym("short", "big"), sym("far", strings.Repeat("f/", 500)),
		file(long, "1"), file("bad-utf8-\xff", "1"),
	)
}

// TestImageInTheKernel writes an image with everything a tar can say of a file, mounts it and looks.
func TestImageInTheKernel(t *testing.T) {
	for _, format := range []Format{Ext4, Erofs} {
		t.Run(string(format), func(t *testing.T) { lookAtImage(t, format) })
	}
}

func lookAtImage(t *testing.T, format Format) {
	content := strings.Repeat("0123456789abcdef", 100_000)
	long := strings.Repeat("ü", 127)
	b := kernelLayer(t, content, long)
	path := wrote(t, format, b)
	info, err := os.Stat(path)
	if err != nil {
		t.Fatal(err)
	}
	rootfstest.Fsck(t, path)
	root, _ := rootfstest.Mount(t, path, "ro")

	stat := func(name string) *syscall.Stat_t {
		var st syscall.Stat_t
		if err := syscall.Lstat(filepath.Join(root, name), &st); err != nil {
			t.Fatalf("%q: %v", name, err)
		}
		return &st
	}
	for name, mode := range map[string]uint32{
		".": 0o40751, "tmp": 0o41777, "su": 0o106755, "null": 0o20666, "pipe": 0o10644, "short": 0o120777, long: 0o100644, "bad-utf8-\xff": 0o100644,
	} {
		if got := stat(name).Mode; got != mode {
			t.Errorf("%q has mode %o, want %o", name, got, mode)
		}
	}
	if st := stat("su"); st.Uid != 70000 || st.Gid != 80000 || st.Mtim.Sec != 1234567890 || st.Mtim.Nsec != 987654321 {
		t.Errorf("su: %+v", st)
	}
	for name, sec := range map[string]int64{"early": -86400, "late": 1<<31 + 5, "latest": 1 << 33} {
		if got := stat(name).Mtim.Sec; got != sec {
			t.Errorf("%s is of %d, want %d", name, got, sec)
		}
	}
	if b, err := os.ReadFile(filepath.Join(root, "holes")); err != nil || len(b) != 2<<20+3 || strings.Trim(string(b), "\x00") != "end" {
		t.Errorf("holes: %d bytes, %v", len(b), err)
	}
	if st, ok := info.Sys().(*syscall.Stat_t); !ok || st.Blocks*512 > info.Size()-1<<20 {
		t.Errorf("the image takes %d bytes of the disk for %d with 2 MiB of zeros", st.Blocks*512, info.Size())
	}
	if st := stat("disk"); unix.Major(st.Rdev) != 259 || unix.Minor(st.Rdev) != 70000 {
		t.Errorf("disk is %d:%d", unix.Major(st.Rdev), unix.Minor(st.Rdev))
	}
	if a, b := stat("big"), stat("zz-big"); a.Ino != b.Ino || a.Nlink != 2 {
		t.Error("big and zz-big are not one file")
	}
	if got, err := os.ReadFile(filepath.Join(root, "zz-big")); err != nil || string(got) != content {
		t.Errorf("zz-big: %d bytes, %v", len(got), err)
	}
	if got, err := os.Readlink(filepath.Join(root, "far")); err != nil || got != strings.Repeat("f/", 500) {
		t.Errorf("far: %d bytes, %v", len(got), err)
	}
	attrs := map[string]string{}
	buf := make([]byte, 4096)
	n, err := unix.Listxattr(filepath.Join(root, "ping"), buf)
	if err != nil {
		t.Fatal(err)
	}
	for name := range strings.SplitSeq(strings.TrimRight(string(buf[:n]), "\x00"), "\x00") {
		v := make([]byte, 4096)
		n, err := unix.Getxattr(filepath.Join(root, "ping"), name, v)
		if err != nil {
			t.Errorf("%s: %v", name, err)
			continue
		}
		attrs[name] = string(v[:n])
	}
	want := map[string]string{"security.capability": capability, "user.note": strings.Repeat("n", 1000)}
	delete(attrs, "user.empty") // kept or not, both are right
	if !maps.Equal(attrs, want) {
		t.Errorf("attributes %q", attrs)
	}
}

func TestFlattenIsDeterministic(t *testing.T) {
	b := pack(t, dir("d"), file("d/b", "2"), file("a", "1"), link("c", "a"), sym("s", "a"))
	for _, format := range []Format{Ext4, Erofs} {
		var images [2][]byte
		for i := range images {
			var err error
			if images[i], err = os.ReadFile(wrote(t, format, b)); err != nil {
				t.Fatal(err)
			}
		}
		if !bytes.Equal(images[0], images[1]) {
			t.Errorf("two runs gave another %s", format)
		}
	}
}

// FuzzLayer feeds one layer of any bytes. Whatever is accepted must give a sound file system.
func FuzzLayer(f *testing.F) {
	f.Add(pack(f, dir("d"), file("d/f", "1"), link("l", "d/f"), sym("s", "/d"), file("s/g", "2"), file(".wh.l", "")))
	f.Add(pack(f, item{Name: "x", Content: "y", Header: tar.Header{PAXRecords: map[string]string{xattrPrefix + "user.a": "b"}}}))
	sparse := f.TempDir()
	rootfstest.PutHoled(f, filepath.Join(sparse, "s"), 1<<20, 5, 64<<10)
	for _, how := range rootfstest.SparseTars() {
		f.Add(rootfstest.PackSparse(f, sparse, how, "s"))
	}
	f.Fuzz(func(t *testing.T, b []byte) { checkFlatten(t, b) })
}

// FuzzMerge makes layers of a few names that get in each other's way: three bytes are an entry, its kind, its name, and
// its target.
func FuzzMerge(f *testing.F) {
	names := []string{"a", "b", "a/b", "b/a", "a/b/a", "lost+found", ".", "a/.wh..wh..opq", ".wh.a", "b/.wh.a", "/a/b/c", "c"}
	targets := []string{"a", "b", "/a/b", "../a", "../../..", ".", "/", "a/b", "c", "lost+found"}
	f.Add([]byte{1, 0, 0, 0, 2, 0, 2, 1, 1, 0, 3, 0, 9, 0, 0, 3, 4, 2, 0, 8, 0})
	f.Add([]byte{3, 0, 1, 0, 1, 0, 9, 0, 0, 0, 7, 0, 3, 11, 0, 2, 1, 4, 0, 3, 0})
	f.Fuzz(func(t *testing.T, program []byte) {
		var layers [][]byte
		var items []item
		for ; len(program) >= 3; program = program[3:] {
			name := names[int(program[1])%len(names)]
			target := targets[int(program[2])%len(targets)]
			switch program[0] % 10 {
			case 0, 4, 5:
				items = append(items, file(name, target))
			case 1, 6:
				items = append(items, dir(name))
			case 2, 7:
				items = append(items, sym(name, target))
			case 3, 8:
				items = append(items, link(name, target))
			default:
				layers = append(layers, pack(t, items...))
				items = nil
			}
		}
		checkFlatten(t, append(layers, pack(t, items...))...)
	})
}

// FuzzOverlay compares the flattener with a model of what layers mean that is too simple to be wrong: a table of paths.
// Three bytes are an entry, its kind, its name, and its content or target. Symbolic links stand only where nothing is below them.
func FuzzOverlay(f *testing.F) {
	f.Add([]byte{1, 0, 0, 0, 1, 1, 2, 3, 2, 9, 0, 0, 3, 1, 0, 4, 0, 0, 0, 3, 7})
	f.Add([]byte{0, 1, 1, 0, 2, 2, 2, 8, 1, 9, 0, 0, 5, 0, 0, 0, 4, 4, 1, 1, 0})
	f.Fuzz(func(t *testing.T, program []byte) {
		var m model
		var layers [][]byte
		var items []item
		for ; len(program) >= 3; program = program[3:] {
			if program[0]%7 == 6 {
				layers, items = append(layers, pack(t, items...)), nil
				m.nextLayer()
				continue
			}
			if i, ok := m.step(program[0]%7, program[1], program[2]); ok {
				items = append(items, i)
			}
		}
		layers = append(layers, pack(t, items...))
		m.nextLayer()
		files, err := emitted(t, layers...)
		if err != nil {
			t.Fatalf("%v\nwant %q", err, m.listing())
		}
		if got := resolved(files); !slices.Equal(got, m.listing()) {
			t.Errorf("got  %q\nwant %q", got, m.listing())
		}
	})
}

// model holds what each path is: "directory", or a content with a number for the file it is the content of.
type model struct {
	paths  map[string]string
	hidden []func() // what this layer's whiteouts hide in those below
	layer  []func() // what this layer brings
	brings map[string]bool
	files  int
}

// step adds an entry to the layer, or nothing where one builder would not write what another would understand: two entries of
// one name, or a name below what this layer makes a file.
func (m *model) step(kind, name, value byte) (item, bool) {
	dirs := []string{"a", "b", "a/b", "b/a", "a/b/a"}
	d := dirs[int(name)%len(dirs)]
	leaf := d + "/" + string("fgh"[value%3])
	if m.brings == nil {
		m.brings = map[string]bool{}
	}
	once := func(path string) bool {
		if m.brings[path] {
			return false
		}
		m.brings[path] = true
		return true
	}
	switch kind {
	case 0, 1:
		if !once(leaf) {
			return item{}, false
		}
		m.files++
		content := fmt.Sprintf("= %d", m.files)
		m.layer = append(m.layer, func() { m.put(leaf, content) })
		return file(leaf, fmt.Sprint(m.files)), true
	case 2:
		if !once(leaf) {
			return item{}, false
		}
		m.layer = append(m.layer, func() { m.put(leaf, "-> "+d) })
		return sym(leaf, d), true
	case 3:
		m.layer = append(m.layer, func() { m.put(d, "directory") })
		return dir(d), true
	case 4:
		m.hidden = append(m.hidden, func() { m.remove(leaf, true) })
		return file(d+"/.wh."+leaf[len(leaf)-1:], ""), true
	}
	if value%2 == 0 {
		m.hidden = append(m.hidden, func() { m.remove(d, false) })
		return file(d+"/.wh..wh..opq", ""), true
	}
	m.hidden = append(m.hidden, func() { m.remove(d, true) })
	dir, base := splitPath(d)
	return file(strings.TrimPrefix(dir+"/.wh."+base, "/"), ""), true
}

func (m *model) put(path, what string) {
	for dir, _ := splitPath(path); dir != ""; dir, _ = splitPath(dir) {
		m.paths[dir] = "directory"
	}
	m.paths[path] = what
}

// remove removes what is below a path, and the path with it or not.
func (m *model) remove(path string, itself bool) {
	for p := range m.paths {
		if strings.HasPrefix(p, path+"/") || itself && p == path {
			delete(m.paths, p)
		}
	}
}

func (m *model) nextLayer() {
	if m.paths == nil {
		m.paths = map[string]string{}
	}
	for _, do := range append(m.hidden, m.layer...) {
		do()
	}
	m.hidden, m.layer, m.brings = nil, nil, nil
}

func (m *model) listing() []string {
	var list []string
	for path, what := range m.paths {
		list = append(list, path+" "+what)
	}
	slices.Sort(list)
	return list
}

// resolved lists the files of a stream as the model does.
func resolved(files []packed) []string {
	var list []string
	for _, f := range files {
		name := strings.TrimSuffix(f.Name, "/")
		switch f.Typeflag {
		case tar.TypeDir:
			name += " directory"
		case tar.TypeSymlink:
			name += " -> " + f.Linkname
		default:
			name += " = " + f.content
		}
		if !strings.HasPrefix(name, ". ") {
			list = append(list, name)
		}
	}
	slices.Sort(list)
	return list
}

// checkFlatten flattens layers if they are acceptable, and fails the test unless fsck agrees with the result, every name
// is inside, said once, and comes after its directory and its link's target.
func checkFlatten(t *testing.T, layers ...[]byte) {
	var ls []Layer
	for _, b := range layers {
		ls = append(ls, layerOf(b))
	}
	out := newFile(t, "image")
	flattenErr := Write(t.Context(), ls, 64*flint.MiB, Ext4, newFile(t, "contents"), out)
	list, err := emitted(t, layers...)
	if err != nil {
		if flattenErr == nil {
			t.Fatalf("accepted once, refused then: %v", err)
		}
		return
	}
	seen := map[string]bool{"": true}
	for _, f := range list {
		name := strings.TrimSuffix(f.Name, "/")
		if name == "." {
			continue
		}
		if f.Typeflag == tar.TypeLink && !seen[f.Linkname] {
			t.Fatalf("%q comes before its target in %q", name, listing(list))
		}
		parent, base := splitPath(name)
		if !seen[parent] || seen[name] || base == ".." || base == "." || base == "" {
			t.Fatalf("%q is out of place in %q", name, listing(list))
		}
		seen[name] = true
	}
	if flattenErr != nil {
		return
	}
	checkErofs(t, ls, list)
	if _, err := exec.LookPath("e2fsck"); err == nil {
		rootfstest.Fsck(t, out.Name())
	}
}

// checkErofs flattens layers to an erofs, and fails the test unless flint's own reader finds the files of the list in it.
func checkErofs(t *testing.T, layers []Layer, list []packed) {
	out := newFile(t, "image.erofs")
	err := Write(t.Context(), layers, 64*flint.MiB, Erofs, newFile(t, "contents"), out)
	if err != nil {
		t.Fatal(err)
	}
	var e files
	find := func(path string) (number uint64, i fileInode) {
		if e, err = openErofs(newGlance(t.Context(), out)); err != nil {
			t.Fatal(err)
		}
		number = e.root()
		i, err = e.inode(number)
		for c := range components(strings.TrimSuffix(strings.TrimPrefix(path, "."), "/")) {
			if err == nil {
				number, err = e.child(i, c)
			}
			if err == nil {
				i, err = e.inode(number)
			}
		}
		if err != nil {
			t.Fatalf("%q: %v", path, err)
		}
		return number, i
	}
	for _, f := range list {
		number, got := find(f.Name)
		want := f.content
		switch f.Typeflag {
		case tar.TypeLink:
			if first, _ := find(f.Linkname); first != number {
				t.Fatalf("%q is file %d, %q is %d", f.Name, number, f.Linkname, first)
			}
			continue
		case tar.TypeSymlink:
			want = f.Linkname
		}
		if k := slices.Index(typeflags[:], f.Typeflag); got.mode&typeMask != erofsModes[k] {
			t.Fatalf("%q has the mode %o, and is a %q", f.Name, got.mode, f.Typeflag)
		}
		b, err := e.content(got)
		if err != nil || f.Typeflag != tar.TypeDir && string(b) != want {
			t.Fatalf("%q: %d bytes, %v; want %d", f.Name, len(b), err, len(want))
		}
	}
}

func BenchmarkFlatten(b *testing.B) {
	layers := map[string][]item{}
	for i := range 2000 {
		name := fmt.Sprintf("d%d/f%d", i%100, i)
		layers["files"] = append(layers["files"], file(name, strings.Repeat("x", 32<<10)))
		layers["small"] = append(layers["small"], file(name, strings.Repeat("x", i)), sym(name+"-link", name))
	}
	for name, items := range layers {
		data := pack(b, items...)
		for _, format := range []Format{Ext4, Erofs} {
			b.Run(name+"-"+string(format), func(b *testing.B) {
				b.SetBytes(int64(len(data)))
				for b.Loop() {
					os.Remove(wrote(b, format, data))
				}
				b.ReportMetric(float64(len(items)*b.N)/b.Elapsed().Seconds(), "entries/s")
			})
		}
	}
}
