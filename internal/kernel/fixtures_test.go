package kernel

import (
	"archive/tar"
	"bytes"
	"compress/gzip"
	"debug/elf"
	"encoding/binary"
	"fmt"
	"io"
	"math/rand/v2"
	"path"
	"sort"
	"testing"

	"github.com/klauspost/compress/zstd"
	"github.com/pierrec/lz4/v4"
	"github.com/ulikunitz/xz"
	"github.com/ulikunitz/xz/lzma"
)

const testRelease = "6.99.1-7-cloud-amd64"

// makeELF is a kernel, or anything else, reduced to its headers, a banner and notes.
func makeELF(machine elf.Machine, pvh bool, content string) []byte {
	var b bytes.Buffer
	put := func(v any) {
		if err := binary.Write(&b, binary.LittleEndian, v); err != nil {
			panic(err)
		}
	}
	const progs = 2
	body := uint64(64 + progs*56)
	h := elf.Header64{
		Type: uint16(elf.ET_EXEC), Machine: uint16(machine), Version: 1, Phoff: 64, Ehsize: 64, Phentsize: 56,
		Phnum: progs, Shentsize: 64,
	}
	copy(h.Ident[:], elf.ELFMAG)
	h.Ident[elf.EI_CLASS], h.Ident[elf.EI_DATA], h.Ident[elf.EI_VERSION] = byte(elf.ELFCLASS64), byte(elf.ELFDATA2LSB), 1
	put(h)
	note := []byte{4, 0, 0, 0, 4, 0, 0, 0, notePhys32Entry, 0, 0, 0, 'X', 'e', 'n', 0, 1, 2, 3, 4}
	if !pvh {
		note[8] = 1
	}
	// A note of another owner before it, whose name and content need padding.
	note = append([]byte{2, 0, 0, 0, 1, 0, 0, 0, 1, 0, 0, 0, 'Y', 0, 0, 0, 9, 0, 0, 0}, note...)
	put(elf.Prog64{Type: uint32(elf.PT_NOTE), Off: body, Filesz: uint64(len(note))})
	put(elf.Prog64{Type: uint32(elf.PT_LOAD), Off: body, Filesz: uint64(len(note) + len(content))})
	b.Write(note)
	b.WriteString(content)
	return b.Bytes()
}

func makeKernel(release string) []byte { return makeKernelWith(release, driverNames) }

// driverNames are those of the virtio drivers, as they lie in a kernel that has them built in.
const driverNames = "virtio-mmio\x00virtio_blk\x00virtio_net\x00virtio_console\x00vmw_vsock_virtio_transport\x00"

func makeKernelWith(release, content string) []byte {
	banner := "%s version %s\x00Linux version %s\x00Linux version " + release + " (someone@somewhere) #1 SMP\n\x00"
	return makeELF(elf.EM_X86_64, true, banner+content)
}

// makeBzImage wraps a payload as the kernel's build does.
func makeBzImage(payload []byte) []byte {
	const sectors = 3
	b := make([]byte, (sectors+1)*512)
	b[bzSetupSects], b[bzBootFlag], b[bzBootFlag+1] = sectors, 0x55, 0xaa
	copy(b[bzHeaderMagic:], "HdrS")
	binary.LittleEndian.PutUint16(b[bzVersion:], 0x20f)
	binary.LittleEndian.PutUint32(b[bzPayloadOffset:], 100)
	binary.LittleEndian.PutUint32(b[bzPayloadLength:], uint32(len(payload)))
	b = append(b, bytes.Repeat([]byte{0x90}, 100)...) // the code that would unpack it
	b = append(b, payload...)
	return append(b, "and what follows"...)
}

// withSize appends the unpacked size, as the kernel's build does to all but gzip.
func withSize(packed, plain []byte) []byte {
	return binary.LittleEndian.AppendUint32(bytes.Clone(packed), uint32(len(plain)))
}

type packer func(t testing.TB, plain []byte) []byte

func packers() map[string]packer {
	through := func(open func(w io.Writer) (io.WriteCloser, error)) packer {
		return func(t testing.TB, plain []byte) []byte {
			t.Helper()
			var b bytes.Buffer
			w, err := open(&b)
			if err == nil {
				_, err = w.Write(plain)
			}
			if err == nil {
				err = w.Close()
			}
			if err != nil {
				t.Fatal(err)
			}
			return b.Bytes()
		}
	}
	return map[string]packer{
		"gzip": through(func(w io.Writer) (io.WriteCloser, error) { return gzip.NewWriter(w), nil }),
		"xz":   through(func(w io.Writer) (io.WriteCloser, error) { return xz.NewWriter(w) }),
		"zstd": through(func(w io.Writer) (io.WriteCloser, error) { return zstd.NewWriter(w) }),
		"lzma": through(func(w io.Writer) (io.WriteCloser, error) { return lzma.NewWriter(w) }),
		"lz4": through(func(w io.Writer) (io.WriteCloser, error) {
			z := lz4.NewWriter(w)
			return z, z.Apply(lz4.LegacyOption(true))
		}),
	}
}

// machineCode is bytes among which calls and jumps, real and seeming, are far more common than in any program.
func machineCode(n int) []byte {
	r := rand.New(rand.NewPCG(7, 11))
	alphabet := []byte{0xe8, 0xe9, 0x00, 0xff, 0x00, 0xff, 0x12, 0x48}
	b := make([]byte, n)
	for i := range b {
		b[i] = alphabet[r.IntN(len(alphabet))]
	}
	return b
}

// debFile is one file for makeDeb.
type debFile struct {
	name string
	data []byte
	typ  byte // 0: a regular file
}

// makeDeb makes a .deb whose data.tar is packed in the given way ("" for not at all).
func makeDeb(t testing.TB, packing string, files []debFile) []byte {
	t.Helper()
	var data bytes.Buffer
	w := tar.NewWriter(&data)
	for _, f := range files {
		h := &tar.Header{Name: f.name, Mode: 0o644, Size: int64(len(f.data)), Typeflag: tar.TypeReg}
		if f.typ != 0 {
			h.Typeflag, h.Linkname, h.Size = f.typ, "/etc/passwd", 0
		}
		if err := w.WriteHeader(h); err != nil {
			t.Fatal(err)
		}
		if _, err := w.Write(f.data[:h.Size]); err != nil {
			t.Fatal(err)
		}
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	packed, suffix := data.Bytes(), map[string]string{"": "", "gzip": ".gz", "xz": ".xz", "zstd": ".zst"}[packing]
	if packing != "" {
		packed = packers()[packing](t, packed)
	}
	return makeAr(
		debFile{name: "debian-binary", data: []byte("2.0\n")},
		debFile{name: "control.tar.xz", data: []byte("odd")},
		debFile{name: "data.tar" + suffix, data: packed},
	)
}

func makeAr(members ...debFile) []byte {
	b := []byte("!<arch>\n")
	for _, m := range members {
		b = fmt.Appendf(b, "%-16s%-12d%-6d%-6d%-8s%-10d`\n", m.name, 0, 0, 0, "100644", len(m.data))
		b = append(b, m.data...)
		if len(m.data)%2 == 1 {
			b = append(b, '\n')
		}
	}
	return b
}

// testModules is a module tree's modules and what they need, by path.
func testModules() map[string][]string {
	return map[string][]string{
		"kernel/drivers/virtio/virtio_ring.ko":                      nil,
		"kernel/drivers/virtio/virtio.ko":                           {"virtio_ring"},
		"kernel/drivers/virtio/virtio_mmio.ko":                      {"virtio", "virtio_ring"},
		"kernel/drivers/block/virtio_blk.ko":                        {"virtio", "virtio_ring"},
		"kernel/net/core/failover.ko":                               nil,
		"kernel/drivers/net/net_failover.ko":                        {"failover"},
		"kernel/drivers/net/virtio_net.ko":                          {"net_failover", "virtio"},
		"kernel/drivers/char/virtio_console.ko":                     {"virtio"},
		"kernel/drivers/char/hw_random/virtio-rng.ko":               {"virtio"},
		"kernel/fs/overlayfs/overlay.ko":                            nil,
		"kernel/drivers/net/veth.ko":                                nil,
		"kernel/net/vmw_vsock/vsock.ko":                             nil,
		"kernel/net/vmw_vsock/vmw_vsock_virtio_transport.ko":        {"vmw_vsock_virtio_transport_common", "virtio", "vsock"},
		"kernel/net/vmw_vsock/vmw_vsock_virtio_transport_common.ko": {"vsock"},
	}
}

// depFile is what depmod would say of the modules.
func depFile(modules map[string][]string) []byte {
	byName := map[string]string{}
	var paths []string
	for p := range modules {
		byName[moduleName(p)] = p
		paths = append(paths, p)
	}
	sort.Strings(paths)
	var b bytes.Buffer
	for _, p := range paths {
		b.WriteString(p + ":")
		for _, need := range modules[p] {
			b.WriteString(" " + byName[need])
		}
		b.WriteString("\n")
	}
	return b.Bytes()
}

// kernelDeb is a kernel package with the modules, one of them compressed.
func kernelDeb(t testing.TB, release string, modules map[string][]string) []byte {
	t.Helper()
	plain := makeKernel(release)
	files := []debFile{
		{name: "./boot/vmlinuz-" + release, data: makeBzImage(withSize(packers()["lz4"](t, plain), plain))},
		{name: "./boot/config-" + release, data: []byte("CONFIG_NAMESPACES=y\nCONFIG_VETH=m\n# CONFIG_BRIDGE is not set\n")},
		{name: "./boot/System.map-" + release, data: []byte("ignored")},
		{name: "./lib/modules/" + release + "/modules.builtin", data: []byte("kernel/fs/ext4/ext4.ko\n")},
		{name: "./lib/modules/" + release + "/modules.order", data: []byte("\n")},
		{name: "./lib/modules/" + release + "/build", typ: tar.TypeSymlink},
	}
	for p := range modules {
		data := []byte("\x7fELF module " + path.Base(p))
		if moduleName(p) == "overlay" {
			p, data = p+".xz", packers()["xz"](t, data)
		}
		files = append(files, debFile{name: "./lib/modules/" + release + "/" + p, data: data})
	}
	sort.Slice(files, func(i, j int) bool { return files[i].name < files[j].name })
	return makeDeb(t, "zstd", files)
}
