package kernel

import (
	"bufio"
	"bytes"
	"debug/elf"
	"errors"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"testing/fstest"

	"github.com/cavaliergopher/cpio"
)

// FuzzInitramfs: whatever the agent and the modules are, another's reader finds them in the initramfs as they were.
func FuzzInitramfs(f *testing.F) {
	f.Add([]byte("\x7fELF"), "virtio.ko", []byte("module"), "order", []byte("virtio.ko\n"))
	f.Add([]byte{}, "a", []byte{}, "TRAILER!!!", []byte("070701"))
	f.Fuzz(func(t *testing.T, agent []byte, name string, module []byte, other string, order []byte) {
		for _, n := range []string{name, other} {
			if !fs.ValidPath(n) || n == "." || strings.ContainsAny(n, "/\x00") {
				return // no name of a file
			}
		}
		want := map[string][]byte{"modules/" + other: order}
		want["modules/"+name] = module // where the names are the same, this one
		modules := fstest.MapFS{}
		for p, b := range want {
			modules[strings.TrimPrefix(p, "modules/")] = &fstest.MapFile{Data: b}
		}
		want["init"] = agent
		var b bytes.Buffer
		if err := writeInitramfs(&b, agent, modules); err != nil {
			t.Fatal(err)
		}
		path := filepath.Join(t.TempDir(), "initrd")
		if err := os.WriteFile(path, b.Bytes(), 0o600); err != nil {
			t.Fatal(err)
		}
		if !isWholeInitramfs(path) {
			t.Error("it is not taken for a whole one")
		}
		r := cpio.NewReader(bufio.NewReader(&b))
		for {
			h, err := r.Next()
			if errors.Is(err, io.EOF) {
				break
			}
			if err != nil {
				t.Fatal(err)
			}
			got, err := io.ReadAll(r)
			if err != nil {
				t.Fatal(err)
			}
			if w, ok := want[h.Name]; ok && !bytes.Equal(got, w) {
				t.Errorf("%s changed: %q, want %q", h.Name, got, w)
			}
			delete(want, h.Name)
		}
		if len(want) > 0 {
			t.Errorf("not found: %v", want)
		}
	})
}

// FuzzDecompress: no stream gives more than is asked for, and what it asks for is bounded.
func FuzzDecompress(f *testing.F) {
	for _, pack := range packers() {
		f.Add(pack(f, make([]byte, 1<<16)))
		f.Add(pack(f, []byte("some text, some text")))
	}
	if b, err := os.ReadFile(filepath.Join("testdata", "x86.xz")); err == nil {
		f.Add(b)
	}
	const limit = 1 << 15
	f.Fuzz(func(t *testing.T, b []byte) {
		if len(b) > 1<<16 {
			return
		}
		if out, err := decompress(b, limit); err == nil && len(out) > limit {
			t.Errorf("%d bytes come out", len(out))
		}
	})
}

// FuzzBzImage has the parts of a bzImage that FuzzUnpackKernel hardly gets right: a payload, packed or not, and its size.
func FuzzBzImage(f *testing.F) {
	plain := makeKernel(testRelease)
	for name, pack := range packers() {
		payload := pack(f, plain)
		if name != "gzip" {
			payload = withSize(payload, plain)
		}
		f.Add(payload, uint32(100), uint32(len(payload)), byte(3))
	}
	f.Add(plain, uint32(100), uint32(len(plain)), byte(0))
	f.Fuzz(func(t *testing.T, payload []byte, offset, length uint32, sectors byte) {
		if len(payload) > 1<<16 {
			return
		}
		b := makeBzImage(payload)
		b[bzSetupSects] = sectors
		for i := range 4 {
			b[bzPayloadOffset+i], b[bzPayloadLength+i] = byte(offset>>(8*i)), byte(length>>(8*i))
		}
		checkKernel(t, b)
	})
}

// FuzzELF has a good head more often than FuzzUnpackKernel.
func FuzzELF(f *testing.F) {
	f.Add(makeKernel(testRelease)[64:], uint16(elf.ET_EXEC), uint16(2), uint64(64))
	f.Fuzz(func(t *testing.T, body []byte, kind, programs uint16, at uint64) {
		b := append(makeKernel(testRelease)[:64:64], body...)
		b[16], b[17], b[56], b[57] = byte(kind), byte(kind>>8), byte(programs), byte(programs>>8)
		for i := range 8 {
			b[32+i] = byte(at >> (8 * i))
		}
		checkKernel(t, b)
	})
}

// checkKernel fails where something is taken for a kernel that is none.
func checkKernel(t *testing.T, b []byte) {
	t.Helper()
	got, err := unpackKernel(b)
	if err != nil {
		return
	}
	if got.arch == "amd64" && !bytes.HasPrefix(got.data, []byte(elf.ELFMAG)) || got.arch == "arm64" && len(got.data) <= 64 || got.arch == "" {
		t.Errorf("%d bytes are taken for a kernel for %q", len(got.data), got.arch)
	}
	if got.release != "" && !releaseName.MatchString(got.release) {
		t.Errorf("release %q", got.release)
	}
	_ = embeddedConfig(got.data)
}
