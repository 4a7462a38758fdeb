// Package digest names content by its SHA-256.
//
// Images and kernels are kept by what they were made of, and some of that is large: reading it ends with the caller's context. The
// package must not keep or remember anything, and does not know what the content is.
package digest

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"io"

	"flint/internal/regular"
)

// chunk is how much is read between two looks at the context.
const chunk = 256 << 10

// File returns the SHA-256 of an ordinary file's content, in hexadecimal. Its errors are those of the package regular.
func File(ctx context.Context, path string) (string, error) {
	f, err := regular.Open(path)
	if err != nil {
		return "", err
	}
	defer f.Close()
	return Reader(ctx, f)
}

// Reader reads to the end and returns the SHA-256 of what it read, in hexadecimal.
func Reader(ctx context.Context, r io.Reader) (string, error) {
	sum, buf := sha256.New(), make([]byte, chunk)
	for {
		if ctx.Err() != nil {
			return "", context.Cause(ctx)
		}
		n, err := r.Read(buf)
		sum.Write(buf[:n])
		if err == io.EOF {
			return hex.EncodeToString(sum.Sum(nil)), nil
		}
		if err != nil {
			return "", err
		}
	}
}
