package image

import (
	"bufio"
	"bytes"
	"fmt"
	"io"

	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/klauspost/compress/gzip"
	"github.com/klauspost/compress/zstd"
)

// unpacking is an image whose layers are decompressed by us: faster than by its library, and with bounded memory.
type unpacking struct{ v1.Image }

// Layers lists the layers, lowest first.
func (u unpacking) Layers() ([]v1.Layer, error) {
	list, err := u.Image.Layers()
	if err != nil {
		return nil, err
	}
	for i, l := range list {
		list[i] = unpackingLayer{l}
	}
	return list, nil
}

type unpackingLayer struct{ v1.Layer }

// Uncompressed is the layer's tar stream; its first bytes tell how it is compressed, since many a media type does not.
func (u unpackingLayer) Uncompressed() (io.ReadCloser, error) {
	rc, err := u.Compressed()
	if err != nil {
		return nil, err
	}
	return unpack(rc)
}

// unpack reads what its first bytes say how to decompress. It takes over the stream, which is closed with what it returns, or on error.
func unpack(rc io.ReadCloser) (io.ReadCloser, error) {
	r, err := decompress(rc)
	if err != nil {
		rc.Close()
		return nil, err
	}
	return unpacked{r, rc}, nil
}

// unpacked reads a decompressed stream. Close ends both it and what it is read from.
type unpacked struct {
	io.ReadCloser
	from io.Closer
}

func (u unpacked) Close() error {
	err := u.ReadCloser.Close()
	if cerr := u.from.Close(); cerr != nil {
		err = cerr
	}
	return err
}

// maxWindow bounds the memory a zstd stream may ask for: what `zstd --long` uses and every zstd reads.
const maxWindow = 128 << 20

// readSize is how much of a layer is read at once.
const readSize = 256 << 10

func decompress(r io.Reader) (io.ReadCloser, error) {
	br := bufio.NewReaderSize(r, readSize)
	head, _ := br.Peek(4) // what is shorter is not compressed
	switch {
	case bytes.HasPrefix(head, []byte{0x1f, 0x8b}):
		z, err := gzip.NewReader(br)
		if err != nil {
			return nil, fmt.Errorf("read gzip: %w", err)
		}
		return z, nil
	case bytes.Equal(head, []byte{0x28, 0xb5, 0x2f, 0xfd}):
		z, err := zstd.NewReader(br, zstd.WithDecoderConcurrency(1), zstd.WithDecoderLowmem(true), zstd.WithDecoderMaxWindow(maxWindow))
		if err != nil {
			return nil, fmt.Errorf("read zstd: %w", err)
		}
		return z.IOReadCloser(), nil
	}
	return io.NopCloser(br), nil
}
