package kernel

import (
	"bytes"
	"debug/elf"
	"encoding/binary"
	"errors"
	"fmt"
	"regexp"

	"flint"
)

// maxKernel bounds a kernel, compressed or not. A distribution's stripped vmlinux has 40 to 80 MiB.
const maxKernel = 1 << 30

// image is a kernel in the form a VMM boots.
type image struct {
	data    []byte
	arch    string // GOARCH
	release string // as uname -r will say; empty if the kernel does not carry its banner in the clear
	pvh     bool   // has the entry point by which QEMU boots an ELF; always true on arm64, which needs none
}

func formatFault(what string, err error) error {
	return &flint.Fault{
		Code: "kernel.format", What: "read kernel " + what, Kind: flint.ErrConfig, Err: err,
		Fix: "give a bzImage or an ELF vmlinux (x86-64), or an Image (arm64), as the distribution's kernel package has it in /boot",
	}
}

// unpackKernel turns a kernel as distributions ship it into the form a VMM boots.
func unpackKernel(file []byte) (image, error) {
	// A compressed file may hold an Image or an EFI zboot kernel, which holds an Image: no deeper nesting exists.
	for range 3 {
		switch {
		case bytes.HasPrefix(file, []byte(elf.ELFMAG)):
			return readELF(file)
		case isBzImage(file):
			payload, err := bzPayload(file)
			if err != nil {
				return image{}, err
			}
			if file, err = decompressPayload(payload); err != nil {
				return image{}, err
			}
		case len(file) > 64 && string(file[56:60]) == "ARM\x64":
			return image{data: file, arch: "arm64", release: release(file), pvh: true}, nil
		case len(file) > 64 && string(file[4:8]) == "zimg":
			payload, err := zbootPayload(file)
			if err != nil {
				return image{}, err
			}
			if file, err = decompress(payload, maxKernel); err != nil {
				return image{}, err
			}
		default:
			var err error
			if file, err = decompress(file, maxKernel); err != nil {
				return image{}, err
			}
		}
	}
	return image{}, errors.New("a kernel is packed more than three times")
}

// Offsets in the x86 boot protocol's setup header (the kernel's Documentation/arch/x86/boot.rst).
const (
	bzSetupSects    = 0x1f1
	bzBootFlag      = 0x1fe
	bzHeaderMagic   = 0x202
	bzVersion       = 0x206
	bzPayloadOffset = 0x248
	bzPayloadLength = 0x24c
	bzHeaderEnd     = 0x250
)

func isBzImage(b []byte) bool {
	return len(b) >= bzHeaderEnd && b[bzBootFlag] == 0x55 && b[bzBootFlag+1] == 0xaa &&
		string(b[bzHeaderMagic:bzHeaderMagic+4]) == "HdrS"
}

// bzPayload returns the compressed kernel inside a bzImage.
func bzPayload(b []byte) ([]byte, error) {
	if v := binary.LittleEndian.Uint16(b[bzVersion:]); v < 0x208 {
		return nil, fmt.Errorf("boot protocol %d.%02d is older than 2.08 and does not say where the payload is", v>>8, v&0xff)
	}
	sectors := uint64(b[bzSetupSects])
	if sectors == 0 {
		sectors = 4 // what zero means, for the sake of very old boot loaders
	}
	begin := (sectors+1)*512 + uint64(binary.LittleEndian.Uint32(b[bzPayloadOffset:]))
	length := uint64(binary.LittleEndian.Uint32(b[bzPayloadLength:]))
	if length == 0 || begin > uint64(len(b)) || length > uint64(len(b))-begin {
		return nil, fmt.Errorf("payload of %d bytes at %d lies outside the %d bytes of the file", length, begin, len(b))
	}
	return b[begin : begin+length], nil
}

// decompressPayload unpacks what bzPayload found. The kernel's build appends the unpacked size, 32 bits, to everything
// but gzip, which ends in it by itself.
func decompressPayload(p []byte) ([]byte, error) {
	if bytes.HasPrefix(p, []byte(elf.ELFMAG)) {
		return p, nil
	}
	if len(p) < 8 {
		return nil, errors.New("the payload is too short")
	}
	body, want := p[:len(p)-4], binary.LittleEndian.Uint32(p[len(p)-4:])
	if compression(p) == "gzip" {
		body = p
	}
	if want > maxKernel {
		return nil, fmt.Errorf("the payload claims to unpack to %d bytes", want)
	}
	out, err := decompress(body, maxKernel)
	if err != nil {
		return nil, err
	}
	if len(out) != int(want) {
		return nil, fmt.Errorf("the payload unpacks to %d bytes and says %d", len(out), want)
	}
	return out, nil
}

// zbootPayload returns the compressed Image inside an EFI zboot kernel: "MZ", two bytes, "zimg", offset and length.
func zbootPayload(b []byte) ([]byte, error) {
	begin := uint64(binary.LittleEndian.Uint32(b[8:]))
	length := uint64(binary.LittleEndian.Uint32(b[12:]))
	if length == 0 || begin > uint64(len(b)) || length > uint64(len(b))-begin {
		return nil, fmt.Errorf("payload of %d bytes at %d lies outside the %d bytes of the file", length, begin, len(b))
	}
	return b[begin : begin+length], nil
}

// readELF checks that an ELF is a kernel a VMM can boot.
func readELF(b []byte) (image, error) {
	f, err := elf.NewFile(bytes.NewReader(b))
	if err != nil {
		return image{}, fmt.Errorf("read ELF: %w", err)
	}
	if f.Class != elf.ELFCLASS64 || f.Machine != elf.EM_X86_64 {
		return image{}, fmt.Errorf("the ELF is for %v %v; x86-64 is needed (an arm64 kernel is an Image)", f.Machine, f.Class)
	}
	if f.Type != elf.ET_EXEC && f.Type != elf.ET_DYN {
		return image{}, fmt.Errorf("the ELF is a %v, not an executable", f.Type)
	}
	for _, p := range f.Progs {
		if p.Type == elf.PT_LOAD && (p.Off > uint64(len(b)) || p.Filesz > uint64(len(b))-p.Off) {
			return image{}, fmt.Errorf("a segment of %d bytes at %d lies outside the %d bytes of the ELF", p.Filesz, p.Off, len(b))
		}
	}
	return image{data: b, arch: "amd64", release: release(b), pvh: hasPVH(f, b)}, nil
}

// notePhys32Entry is the type of the note, by owner "Xen", that holds the PVH entry point (Xen's
// include/public/elfnote.h, XEN_ELFNOTE_PHYS32_ENTRY).
const notePhys32Entry = 18

func hasPVH(f *elf.File, b []byte) bool {
	for _, p := range f.Progs {
		if p.Type != elf.PT_NOTE || p.Off > uint64(len(b)) || p.Filesz > uint64(len(b))-p.Off {
			continue
		}
		if findNote(b[p.Off:p.Off+p.Filesz], "Xen\x00", notePhys32Entry) {
			return true
		}
	}
	return false
}

func findNote(b []byte, owner string, kind uint32) bool {
	for len(b) >= 12 {
		nameLen, descLen := uint64(binary.LittleEndian.Uint32(b)), uint64(binary.LittleEndian.Uint32(b[4:]))
		typ := binary.LittleEndian.Uint32(b[8:])
		b = b[12:]
		name, desc := (nameLen+3)&^3, (descLen+3)&^3
		if name+desc > uint64(len(b)) {
			return false
		}
		if typ == kind && string(b[:nameLen]) == owner {
			return true
		}
		b = b[name+desc:]
	}
	return false
}

var releaseName = regexp.MustCompile(`^[0-9][0-9A-Za-z.+~_-]{0,63}$`)

// release finds what uname -r will say in the kernel's banner.
func release(b []byte) string {
	marker := []byte("Linux version ")
	for {
		i := bytes.Index(b, marker)
		if i < 0 {
			return ""
		}
		b = b[i+len(marker):]
		word, _, ok := bytes.Cut(b[:min(len(b), 66)], []byte(" "))
		if ok && releaseName.Match(word) {
			return string(word)
		}
	}
}
