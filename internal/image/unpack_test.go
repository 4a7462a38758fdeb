package image

import (
	"bytes"
	"compress/gzip"
	"io"
	"testing"

	"github.com/klauspost/compress/zstd"
)

func TestDecompress(t *testing.T) {
	plain := bytes.Repeat([]byte("layer "), 100_000)
	zipped, squeezed := new(bytes.Buffer), new(bytes.Buffer)
	z := gzip.NewWriter(zipped)
	z.Write(plain[:1000])
	z.Close()
	z.Reset(zipped) // a second member: what pigz and estargz write
	z.Write(plain[1000:])
	z.Close()
	s, err := zstd.NewWriter(squeezed)
	if err != nil {
		t.Fatal(err)
	}
	s.Write(plain)
	s.Close()
	for name, c := range map[string]struct {
		in   []byte
		want []byte // nil: refused
	}{
		"gzip in two members": {zipped.Bytes(), plain},
		"zstd":                {squeezed.Bytes(), plain},
		"plain":               {plain, plain},
		"nothing":             {[]byte{}, []byte{}},
		"cut gzip":            {zipped.Bytes()[:zipped.Len()-1], nil},
		"cut zstd":            {squeezed.Bytes()[:squeezed.Len()/2], nil},
		"too wide a window":   {wideFrame(), nil},
	} {
		t.Run(name, func(t *testing.T) {
			r, err := decompress(bytes.NewReader(c.in))
			var got []byte
			if err == nil {
				got, err = io.ReadAll(r)
				r.Close()
			}
			if c.want == nil {
				if err == nil {
					t.Errorf("accepted: %d bytes", len(got))
				}
				return
			}
			if err != nil || !bytes.Equal(got, c.want) {
				t.Errorf("%d bytes, want %d; %v", len(got), len(c.want), err)
			}
		})
	}
}

// wideFrame is the head of a frame that asks for a larger window than is allowed; see RFC 8878, 3.1.1.1.2.
func wideFrame() []byte {
	const exponent = 29 - 10 // 512 MiB
	return []byte{0x28, 0xb5, 0x2f, 0xfd, 0x00, exponent << 3, 0x01, 0x00, 0x00}
}
