package kernel

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
	"hash/crc64"
	"io"
	"math/bits"

	"github.com/ulikunitz/xz/lzma"
)

// xzHeaders is the most bytes the headers of an xz stream and its first block take: 12, and (255+1)*4.
const xzHeaders = 12 + 1024

// xzBlock is the first block of an xz stream (the .xz file format, sections 2.1 and 3.1).
type xzBlock struct {
	check      byte   // kind of the check after the block
	x86        bool   // the data went through the x86 filter before LZMA2, as the kernel's build does it
	start      uint32 // the filter's start offset
	dictionary uint64 // bytes
	data       []byte // what follows the block's header
}

const (
	filterX86   = 0x04
	filterLZMA2 = 0x21
	checkNone   = 0x00
	checkCRC32  = 0x01
	checkCRC64  = 0x04
)

// parseXZ reads the headers of an xz stream and reports whether their filters are ones it knows.
func parseXZ(b []byte) (xzBlock, bool) {
	var x xzBlock
	if len(b) < 13 || compression(b) != "xz" || b[12] == 0 {
		return x, false
	}
	x.check = b[7]
	size := (int(b[12]) + 1) * 4
	if len(b) < 12+size || crc32.ChecksumIEEE(b[12:12+size-4]) != binary.LittleEndian.Uint32(b[12+size-4:]) {
		return x, false
	}
	flags, fields := b[13], b[14:12+size-4]
	x.data = b[12+size:]
	number := func() uint64 {
		v, n := binary.Uvarint(fields)
		if n <= 0 {
			fields = nil
			return 0
		}
		fields = fields[n:]
		return v
	}
	for _, present := range []byte{0x40, 0x80} { // packed and unpacked size
		if flags&present != 0 {
			number()
		}
	}
	for i := range int(flags&3) + 1 {
		id, n := number(), number()
		if n > uint64(len(fields)) {
			return x, false
		}
		props := fields[:n]
		fields = fields[n:]
		last := i == int(flags&3)
		switch {
		case id == filterX86 && i == 0 && !last && (n == 0 || n == 4):
			x.x86 = true
			if n == 4 {
				x.start = binary.LittleEndian.Uint32(props)
			}
		case id == filterLZMA2 && last && n == 1 && props[0] <= 40:
			x.dictionary = (2 | uint64(props[0]&1)) << (props[0]/2 + 11)
		default:
			return x, false
		}
	}
	return x, true
}

// unpack returns the content of the block, to at most limit bytes, its check verified. What follows the block is not
// looked at: the kernel's own unpacker takes a single block too.
func (x xzBlock) unpack(limit int64) ([]byte, error) {
	if x.dictionary > maxDictionary {
		return nil, fmt.Errorf("unpack xz: it wants a dictionary of %d bytes", x.dictionary)
	}
	in := bytes.NewReader(x.data)
	r, err := lzma.Reader2Config{DictCap: max(int(x.dictionary), lzma.MinDictCap)}.NewReader2(in)
	if err != nil {
		return nil, fmt.Errorf("unpack xz: %w", err)
	}
	out, err := readAll("xz", r, limit)
	if err != nil {
		return nil, err
	}
	if x.x86 {
		unfilterX86(out, x.start)
	}
	if pad := (len(x.data) - in.Len()) % 4; pad != 0 {
		if _, err := in.Seek(int64(4-pad), io.SeekCurrent); err != nil {
			return nil, fmt.Errorf("unpack xz: %w", err)
		}
	}
	if err := x.verify(x.data[len(x.data)-in.Len():], out); err != nil {
		return nil, fmt.Errorf("unpack xz: %w", err)
	}
	return out, nil
}

func (x xzBlock) verify(check, out []byte) error {
	ok := false
	switch x.check {
	case checkNone:
		ok = true
	case checkCRC32:
		ok = len(check) >= 4 && binary.LittleEndian.Uint32(check) == crc32.ChecksumIEEE(out)
	case checkCRC64:
		ok = len(check) >= 8 && binary.LittleEndian.Uint64(check) == crc64.Checksum(out, crc64.MakeTable(crc64.ECMA))
	default:
		return fmt.Errorf("check of kind %d is not known", x.check)
	}
	if !ok {
		return errors.New("the check does not match the content")
	}
	return nil
}

// unfilterX86 undoes the x86 filter of xz: the operands of CALL and JMP (0xE8, 0xE9), which it made absolute to
// compress better, become relative again. Only operands whose top byte is a sign extension were touched, and the filter
// remembers which of the last three bytes looked like an opcode without having been converted, because such a byte may
// be part of an operand: bit n of seen is the byte n+1 before this one.
func unfilterX86(b []byte, start uint32) {
	isSign := func(c byte) bool { return c == 0 || c == 0xff }
	seen, last := uint32(0), -1
	for i := 0; i+5 <= len(b); {
		if b[i]&0xfe != 0xe8 {
			i++
			continue
		}
		if gap := i - last; gap > 3 {
			seen = 0
		} else {
			seen = seen << (gap - 1) & 7
		}
		last = i
		oldest := bits.Len32(seen) // 0: none
		ambiguous := oldest > 0 && (bits.OnesCount32(seen) > 1 || isSign(b[i+4-oldest]))
		if ambiguous || !isSign(b[i+4]) {
			seen = seen<<1&7 | 1
			i++
			continue
		}
		v := binary.LittleEndian.Uint32(b[i+1:])
		for {
			v -= start + uint32(i) + 5
			if oldest == 0 || !isSign(byte(v>>(24-8*oldest))) {
				break
			}
			v ^= 1<<(32-8*oldest) - 1
		}
		v &= 0x1ffffff
		if v&0x1000000 != 0 {
			v |= 0xff000000
		}
		binary.LittleEndian.PutUint32(b[i+1:], v)
		i += 5
	}
}
