package kernel

import (
	"bytes"
	"debug/elf"
	"encoding/binary"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

func TestBzImageOfEveryCompression(t *testing.T) {
	plain := makeKernel(testRelease)
	for name, pack := range packers() {
		t.Run(name, func(t *testing.T) {
			payload := pack(t, plain)
			if name != "gzip" {
				payload = withSize(payload, plain)
			}
			got, err := unpackKernel(makeBzImage(payload))
			if err != nil {
				t.Fatal(err)
			}
			if !bytes.Equal(got.data, plain) {
				t.Errorf("the kernel comes out changed: %d bytes of %d", len(got.data), len(plain))
			}
			if got.arch != "amd64" || got.release != testRelease || !got.pvh {
				t.Errorf("got arch %q release %q pvh %v", got.arch, got.release, got.pvh)
			}
		})
	}
}

// testdata/x86.xz is machineCode(16384) packed as the kernel's build packs x86 kernels: xz --check=crc32 --x86 --lzma2.
func TestXZWithX86Filter(t *testing.T) {
	packed, err := os.ReadFile(filepath.Join("testdata", "x86.xz"))
	if err != nil {
		t.Fatal(err)
	}
	got, err := decompress(packed, maxKernel)
	if err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(got, machineCode(16384)) {
		t.Error("the filter is not undone as xz applies it")
	}
	packed[len(packed)/2] ^= 1
	if _, err := decompress(packed, maxKernel); err == nil {
		t.Error("a flipped bit goes unnoticed")
	}
	if _, err := decompress(packed[:len(packed)/2], maxKernel); err == nil {
		t.Error("half a stream goes unnoticed")
	}
}

func TestKernelsThatAreNoBzImage(t *testing.T) {
	arm := make([]byte, 256)
	copy(arm[56:], "ARM\x64")
	arm = append(arm, "Linux version "+testRelease+" (x)"...)
	zboot := append([]byte("MZ\x00\x00zimg"), make([]byte, 72)...)
	packed := packers()["zstd"](t, arm)
	binary.LittleEndian.PutUint32(zboot[8:], uint32(len(zboot)))
	binary.LittleEndian.PutUint32(zboot[12:], uint32(len(packed)))
	zboot = append(zboot, packed...)
	tests := map[string]struct {
		file, want []byte
		arch       string
	}{
		"ELF":            {makeKernel(testRelease), makeKernel(testRelease), "amd64"},
		"gzipped ELF":    {packers()["gzip"](t, makeKernel(testRelease)), makeKernel(testRelease), "amd64"},
		"arm64 Image":    {arm, arm, "arm64"},
		"arm64 Image.gz": {packers()["gzip"](t, arm), arm, "arm64"},
		"arm64 zboot":    {zboot, arm, "arm64"},
	}
	for name, tt := range tests {
		t.Run(name, func(t *testing.T) {
			got, err := unpackKernel(tt.file)
			if err != nil {
				t.Fatal(err)
			}
			if got.arch != tt.arch || got.release != testRelease || !bytes.Equal(got.data, tt.want) {
				t.Errorf("got %d bytes for %s of %q", len(got.data), got.arch, got.release)
			}
		})
	}
}

func TestKernelWithoutPVH(t *testing.T) {
	got, err := unpackKernel(makeELF(elf.EM_X86_64, false, "Linux version 6.1 (x)"))
	if err != nil || got.pvh {
		t.Errorf("got pvh %v, error %v", got.pvh, err)
	}
}

func TestBadKernels(t *testing.T) {
	plain := makeKernel(testRelease)
	good := makeBzImage(withSize(packers()["lz4"](t, plain), plain))
	with := func(change func(b []byte)) []byte {
		b := bytes.Clone(good)
		change(b)
		return b
	}
	wrongSize := bytes.Clone(packers()["zstd"](t, plain))
	wrongSize = binary.LittleEndian.AppendUint32(wrongSize, uint32(len(plain)+1))
	tests := map[string]struct {
		file []byte
		want string
	}{
		"empty":           {nil, "neither a kernel"},
		"text":            {[]byte("#!/bin/sh\n"), "neither a kernel"},
		"old protocol":    {with(func(b []byte) { b[bzVersion] = 7 }), "boot protocol 2.07"},
		"payload outside": {with(func(b []byte) { b[bzPayloadLength+3] = 0x7f }), "outside"},
		"no payload":      {with(func(b []byte) { clear(b[bzPayloadLength : bzPayloadLength+4]) }), "outside"},
		"cut off":         {good[:len(good)-100], "outside"},
		"wrong size":      {makeBzImage(wrongSize), "and says"},
		"huge size":       {makeBzImage(append(packers()["zstd"](t, plain), 0xff, 0xff, 0xff, 0xff)), "claims"},
		"lzo":             {makeBzImage([]byte("\x89LZO\x00\x0d\x0a\x1a\x0a0123456789")), "LZO"},
		"32-bit machine":  {makeELF(elf.EM_386, true, ""), "x86-64 is needed"},
		"cut ELF":         {plain[:len(plain)-1], "outside"},
		"torn ELF":        {plain[:70], "read ELF"},
		"gzip in gzip in gzip in gzip": {
			gz(t, gz(t, gz(t, gz(t, plain)))), "more than three times",
		},
	}
	for name, tt := range tests {
		t.Run(name, func(t *testing.T) {
			_, err := unpackKernel(tt.file)
			if err == nil || !strings.Contains(err.Error(), tt.want) {
				t.Errorf("got %v, want an error with %q", err, tt.want)
			}
		})
	}
}

func gz(t *testing.T, b []byte) []byte { return packers()["gzip"](t, b) }

func TestDecompressIsBounded(t *testing.T) {
	for name, pack := range packers() {
		if _, err := decompress(pack(t, make([]byte, 1<<20)), 1<<20-1); err == nil || !strings.Contains(err.Error(), "more than") {
			t.Errorf("%s: got %v", name, err)
		}
	}
	// lzma.Writer ends its header's dictionary at byte 4; one of 4 GiB must be refused before it is allocated.
	b := packers()["lzma"](t, []byte("x"))
	copy(b[1:], "\xff\xff\xff\xff")
	if compression(b) == "lzma" {
		t.Error("a header with another dictionary should not even look like the kernel's lzma")
	}
	copy(b[1:], "\x00\x00\x00\xf0")
	if _, err := decompress(b, 1<<20); err == nil || !strings.Contains(err.Error(), "dictionary") {
		t.Errorf("got %v", err)
	}
}

func FuzzUnpackKernel(f *testing.F) {
	plain := makeKernel(testRelease)
	f.Add(plain)
	for name, pack := range packers() {
		payload := pack(f, plain)
		if name != "gzip" {
			payload = withSize(payload, plain)
		}
		f.Add(makeBzImage(payload))
	}
	if b, err := os.ReadFile(filepath.Join("testdata", "x86.xz")); err == nil {
		f.Add(b)
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		got, err := unpackKernel(b)
		if err == nil && (got.arch == "" || len(got.data) == 0) {
			t.Error("a kernel without content is no kernel")
		}
	})
}
