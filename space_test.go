package flint_test

import (
	"errors"
	"fmt"
	"io/fs"
	"strings"
	"syscall"
	"testing"

	"flint"
)

func TestSpaceFault(t *testing.T) {
	for number, fix := range map[syscall.Errno]string{syscall.ENOSPC: "df -i", syscall.EDQUOT: "quota", syscall.EROFS: "read-only"} {
		cause := fmt.Errorf("write: %w", &fs.PathError{Op: "write", Path: "x", Err: number})
		f := flint.SpaceFault("image.space", "make image", "the image store", cause)
		if f == nil || f.Code != "image.space" || !errors.Is(f, number) || !strings.Contains(f.Fix, fix) || !strings.Contains(f.Fix, "the image store") {
			t.Errorf("%v: %+v", number, f)
		}
	}
	for _, err := range []error{nil, syscall.EIO, fs.ErrNotExist} {
		if f := flint.SpaceFault("image.space", "make image", "the image store", err); f != nil {
			t.Errorf("%v: %+v", err, f)
		}
	}
}
