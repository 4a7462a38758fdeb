package kernel

import (
	"archive/tar"
	"bytes"
	"errors"
	"io"
	"os"
	"path"
	"slices"
	"strings"
	"testing"
	"testing/fstest"

	"github.com/cavaliergopher/cpio"

	"flint"
)

func testTable(t testing.TB, modules map[string][]string, builtin string) moduleTable {
	t.Helper()
	table, err := parseModules(depFile(modules), []byte(builtin))
	if err != nil {
		t.Fatal(err)
	}
	return table
}

func TestOrderOfBootModules(t *testing.T) {
	order, err := testTable(t, testModules(), "kernel/fs/ext4/ext4.ko\n").order(bootSet())
	if err != nil {
		t.Fatal(err)
	}
	var got []string
	for _, m := range order {
		got = append(got, strings.TrimSpace(m.file()+" "+m.group))
	}
	want := []string{
		"virtio_ring.ko", "virtio.ko", "virtio_mmio.ko", "virtio_blk.ko", "failover.ko", "net_failover.ko", "virtio_net.ko",
		"overlay.ko", "virtio_console.ko serial", "vsock.ko vsock", "vmw_vsock_virtio_transport_common.ko vsock",
		"vmw_vsock_virtio_transport.ko vsock", "virtio-rng.ko late",
	}
	if !slices.Equal(got, want) {
		t.Errorf("got  %q\nwant %q", got, want)
	}
}

func TestOrderWithModularExt4(t *testing.T) {
	modules := testModules()
	modules["kernel/fs/ext4/ext4.ko"] = []string{"jbd2", "mbcache"}
	modules["kernel/fs/jbd2/jbd2.ko"] = nil
	modules["kernel/fs/mbcache.ko"] = nil
	modules["kernel/crypto/crc32c_generic.ko"] = nil
	order, err := testTable(t, modules, "").order(bootSet())
	if err != nil {
		t.Fatal(err)
	}
	checkOrder(t, order, modules)
	var got []string
	for _, m := range order {
		got = append(got, moduleName(m.path))
	}
	for _, name := range []string{"ext4", "jbd2", "mbcache", "crc32c_generic"} {
		if !slices.Contains(got, name) {
			t.Errorf("%s is not among %q", name, got)
		}
	}
}

// checkOrder fails unless each module comes once, after what it needs, and what it needs is loaded wherever it is.
func checkOrder(t *testing.T, order []bootModule, modules map[string][]string) {
	t.Helper()
	groups := map[string]string{}
	for _, m := range order {
		name := moduleName(m.path)
		if _, twice := groups[name]; twice {
			t.Errorf("%s comes twice", name)
		}
		groups[name] = m.group
		for _, need := range modules[m.path] {
			group, before := groups[need]
			if !before {
				t.Errorf("%s comes before %s, which it needs", name, need)
			}
			if group != "" && group != m.group {
				t.Errorf("%s of group %q needs %s of group %q", name, m.group, need, group)
			}
		}
	}
}

func TestModuleThatGroupsShareHasNone(t *testing.T) {
	modules := map[string][]string{
		"a.ko": {"mid"}, "b.ko": {"shared"}, "c.ko": nil, "shared.ko": {"base"}, "base.ko": nil, "mid.ko": {"shared"},
	}
	order, err := testTable(t, modules, "").order([]want{
		{name: "a", group: groupSerial}, {name: "b", group: groupVsock}, {name: "c", group: groupLate}, {name: "c"},
	})
	if err != nil {
		t.Fatal(err)
	}
	checkOrder(t, order, modules)
	got := map[string]string{}
	for _, m := range order {
		got[moduleName(m.path)] = m.group
	}
	for name, group := range map[string]string{"a": groupSerial, "mid": groupSerial, "b": groupVsock, "shared": "", "base": "", "c": ""} {
		if got[name] != group {
			t.Errorf("%s has group %q, want %q", name, got[name], group)
		}
	}
}

func TestModulesThatCannotBeOrdered(t *testing.T) {
	without := testModules()
	delete(without, "kernel/drivers/char/virtio_console.ko")
	_, err := testTable(t, without, "kernel/fs/ext4/ext4.ko\n").order(bootSet())
	var f *flint.Fault
	if !errors.As(err, &f) || f.Code != "kernel.module" || !strings.Contains(f.What, "virtio_console") {
		t.Errorf("without a needed module: got %v", err)
	}
	circle := map[string][]string{"a.ko": {"b"}, "b.ko": {"a"}}
	if _, err := testTable(t, circle, "").order([]want{{name: "a"}}); err == nil || !strings.Contains(err.Error(), "needs itself") {
		t.Errorf("in a circle: got %v", err)
	}
	for _, dep := range []string{"no colon\n", "../../etc/x.ko:\n", "/abs/x.ko:\n", "x.ko: notamodule\n", "readme.txt:\n"} {
		if _, err := parseModules([]byte(dep), nil); err == nil {
			t.Errorf("modules.dep %q is taken", dep)
		}
	}
}

func FuzzModules(f *testing.F) {
	f.Add(depFile(testModules()), []byte("kernel/fs/ext4/ext4.ko\n"))
	f.Add([]byte("a.ko: b.ko\nb.ko: a.ko\n"), []byte(""))
	f.Fuzz(func(t *testing.T, dep, builtin []byte) {
		table, err := parseModules(dep, builtin)
		if err != nil {
			return
		}
		var set []want
		for name := range table.paths {
			set = append(set, want{name: name, group: []string{"", groupSerial, groupVsock}[len(name)%3]})
		}
		order, err := table.order(set)
		if err != nil {
			return
		}
		needs := map[string][]string{}
		for name, p := range table.paths {
			for _, n := range table.deps[name] {
				if table.paths[n] != "" {
					needs[p] = append(needs[p], n)
				}
			}
		}
		if len(order) != len(table.paths) {
			t.Errorf("%d modules ordered of %d", len(order), len(table.paths))
		}
		checkOrder(t, order, needs)
	})
}

func TestInitramfs(t *testing.T) {
	modules := fstest.MapFS{
		"order":     {Data: []byte("virtio.ko\n")},
		"virtio.ko": {Data: []byte("12345")},
	}
	var first, second bytes.Buffer
	for _, b := range []*bytes.Buffer{&first, &second} {
		if err := writeInitramfs(b, []byte("agent!"), modules); err != nil {
			t.Fatal(err)
		}
	}
	if !bytes.Equal(first.Bytes(), second.Bytes()) {
		t.Error("equal content gives different archives")
	}
	type file struct {
		mode cpio.FileMode
		data string
	}
	got := map[string]file{}
	r := cpio.NewReader(&first)
	for {
		h, err := r.Next()
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			t.Fatal(err)
		}
		data, err := io.ReadAll(r)
		if err != nil {
			t.Fatal(err)
		}
		if h.Uid != 0 || h.Guid != 0 || h.ModTime.Unix() != 0 {
			t.Errorf("%s belongs to %d:%d and is of %v", h.Name, h.Uid, h.Guid, h.ModTime)
		}
		got[h.Name] = file{h.Mode, string(data)}
	}
	want := map[string]file{
		"init":              {cpio.TypeReg | 0o755, "agent!"},
		"modules":           {cpio.TypeDir | 0o755, ""},
		"modules/order":     {cpio.TypeReg | 0o644, "virtio.ko\n"},
		"modules/virtio.ko": {cpio.TypeReg | 0o644, "12345"},
		"dev":               {cpio.TypeDir | 0o755, ""},
		"dev/console":       {cpio.TypeChar | 0o600, ""},
		"proc":              {cpio.TypeDir | 0o755, ""},
		"sys":               {cpio.TypeDir | 0o755, ""},
	}
	for name, w := range want {
		if got[name] != w {
			t.Errorf("%s is %v %q, want %v %q", name, got[name].mode, got[name].data, w.mode, w.data)
		}
	}
	if len(got) != len(want) {
		t.Errorf("%d files, want %d", len(got), len(want))
	}
}

func TestTarStream(t *testing.T) {
	big := bytes.Repeat([]byte("0123456789abcdef"), 1<<16)
	tree := fstest.MapFS{
		"modules.dep":         {Data: []byte("x")},
		"kernel/fs/ext4.ko":   {Data: big},
		"kernel/net/empty.ko": {Data: nil},
	}
	s, err := newTarStream(tree)
	if err != nil {
		t.Fatal(err)
	}
	defer s.close()
	var names []string
	r := tar.NewReader(s)
	for {
		h, err := r.Next()
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			t.Fatal(err)
		}
		names = append(names, h.Name)
		b, err := io.ReadAll(r)
		if err != nil {
			t.Fatal(err)
		}
		if f := tree[h.Name]; f != nil && !bytes.Equal(b, f.Data) {
			t.Errorf("%s has %d bytes, want %d", h.Name, len(b), len(f.Data))
		}
	}
	want := []string{"kernel/", "kernel/fs/", "kernel/fs/ext4.ko", "kernel/net/", "kernel/net/empty.ko", "modules.dep"}
	if !slices.Equal(names, want) {
		t.Errorf("got %q, want %q", names, want)
	}
	if s.bytes != int64(len(big)+1) {
		t.Errorf("sum of sizes is %d", s.bytes)
	}
}

func TestReadModuleDecompresses(t *testing.T) {
	root, err := os.OpenRoot(t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	defer root.Close()
	plain := []byte("\x7fELF module")
	for suffix, packing := range map[string]string{".ko": "", ".ko.xz": "xz", ".ko.zst": "zstd", ".ko.gz": "gzip"} {
		b := plain
		if packing != "" {
			b = packers()[packing](t, plain)
		}
		name := "m" + suffix
		if err := root.WriteFile(name, b, 0o644); err != nil {
			t.Fatal(err)
		}
		if got, err := readModule(root, name); err != nil || !bytes.Equal(got, plain) {
			t.Errorf("%s: got %q, %v", name, got, err)
		}
		if m := (bootModule{path: path.Join("kernel", name)}); m.file() != "m.ko" {
			t.Errorf("%s lies in the initramfs as %s", name, m.file())
		}
	}
}
