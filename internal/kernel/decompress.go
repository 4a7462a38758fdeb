package kernel

import (
	"bufio"
	"bytes"
	"compress/bzip2"
	"compress/gzip"
	"encoding/binary"
	"errors"
	"fmt"
	"io"

	"github.com/klauspost/compress/zstd"
	"github.com/pierrec/lz4/v4"
	"github.com/ulikunitz/xz"
	"github.com/ulikunitz/xz/lzma"
)

// maxDictionary bounds the memory a compressed stream may ask for. xz -9 and zstd --ultra -22 want 64 and 128 MiB.
const maxDictionary = 128 << 20

// compression names the format of a stream by its first bytes, or returns "".
func compression(b []byte) string {
	for _, f := range []struct{ magic, name string }{
		{"\x1f\x8b", "gzip"},
		{"\xfd7zXZ\x00", "xz"},
		{"\x28\xb5\x2f\xfd", "zstd"},
		{"\x02\x21\x4c\x18", "lz4"},
		{"\x04\x22\x4d\x18", "lz4"},
		{"\x89LZO", "lzo"},
		{"BZh", "bzip2"},
		{"\x5d\x00\x00", "lzma"},
	} {
		if bytes.HasPrefix(b, []byte(f.magic)) {
			return f.name
		}
	}
	return ""
}

// decompress unpacks data, of any known format, to at most limit bytes.
func decompress(data []byte, limit int64) ([]byte, error) {
	name := compression(data)
	if name == "xz" {
		if block, ok := parseXZ(data); ok && block.x86 {
			return block.unpack(limit)
		}
	}
	r, release, err := decompressor(bytes.NewReader(data))
	if err != nil {
		return nil, err
	}
	defer release()
	return readAll(name, r, limit)
}

func readAll(name string, r io.Reader, limit int64) ([]byte, error) {
	out, err := io.ReadAll(io.LimitReader(r, limit+1))
	if err != nil {
		return nil, fmt.Errorf("unpack %s: %w", name, err)
	}
	if int64(len(out)) > limit {
		return nil, fmt.Errorf("unpack %s: more than %d bytes come out", name, limit)
	}
	return out, nil
}

// decompressor returns a reader of what r unpacks to, by r's first bytes, and what to call when it is no longer needed.
func decompressor(r io.Reader) (io.Reader, func(), error) {
	br := bufio.NewReaderSize(r, 1<<16)
	head, err := br.Peek(16)
	if err != nil && !errors.Is(err, io.EOF) {
		return nil, nil, err
	}
	name, none := compression(head), func() {}
	var out io.Reader
	switch name {
	case "gzip":
		z, err := gzip.NewReader(br)
		if err != nil {
			return nil, nil, fmt.Errorf("unpack gzip: %w", err)
		}
		z.Multistream(false) // a kernel's payload may be padded
		out = z
	case "xz":
		if out, err = newXZ(br); err != nil {
			return nil, nil, fmt.Errorf("unpack xz: %w", err)
		}
	case "zstd":
		z, err := zstd.NewReader(br, zstd.WithDecoderConcurrency(1), zstd.WithDecoderMaxWindow(maxDictionary))
		if err != nil {
			return nil, nil, fmt.Errorf("unpack zstd: %w", err)
		}
		return z, z.Close, nil
	case "lz4":
		out = lz4.NewReader(br)
	case "bzip2":
		out = bzip2.NewReader(br)
	case "lzma":
		if len(head) < 13 || binary.LittleEndian.Uint32(head[1:]) > maxDictionary {
			return nil, nil, errors.New("unpack lzma: it wants too large a dictionary")
		}
		if out, err = lzma.NewReader(br); err != nil {
			return nil, nil, fmt.Errorf("unpack lzma: %w", err)
		}
	case "lzo":
		return nil, nil, errors.New("it is compressed with LZO, which flint does not unpack")
	default:
		return nil, nil, errors.New("it is neither a kernel nor compressed in a known way (gzip, xz, zstd, lz4, lzma, bzip2)")
	}
	return out, none, nil
}

// newXZ checks the dictionary of the first block, for which memory is taken at once, before it hands the stream on.
func newXZ(br *bufio.Reader) (io.Reader, error) {
	head, err := br.Peek(xzHeaders)
	if err != nil && !errors.Is(err, io.EOF) {
		return nil, err
	}
	if block, ok := parseXZ(head); ok && block.dictionary > maxDictionary {
		return nil, fmt.Errorf("it wants a dictionary of %d bytes", block.dictionary)
	}
	return xz.NewReader(br)
}
