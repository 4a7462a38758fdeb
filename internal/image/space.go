package image

import (
	"errors"
	"fmt"
	"slices"
	"strings"
	"syscall"

	"flint"
	"flint/internal/tool"
)

// spaceFault is the fault of an error that a full or read-only disk gave; nil for every other, and for one that is it already.
func spaceFault(err error, what string) *flint.Fault {
	var f *flint.Fault
	if errors.As(err, &f) && f.Code == "image.space" {
		return nil
	}
	return flint.SpaceFault("image.space", what, "the image store", err)
}

// outOfSpace adds to a program's failure the error that its last words name, where they do. They are strerror(3)'s, which
// tools of C and of Go print alike.
func outOfSpace(failed *tool.Error) error {
	for _, number := range []syscall.Errno{syscall.ENOSPC, syscall.EDQUOT} {
		if slices.ContainsFunc(failed.Tail, func(line string) bool {
			return strings.Contains(strings.ToLower(line), number.Error())
		}) {
			return fmt.Errorf("%w: %w", number, failed)
		}
	}
	return failed
}
