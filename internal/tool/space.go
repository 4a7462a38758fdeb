package tool

import (
	"errors"
	"fmt"
	"slices"
	"strings"
	"syscall"
)

// OutOfSpace adds to the failure of a program, an *Error, what its last words name: syscall.ENOSPC or syscall.EDQUOT. The
// words are those of strerror(3), which programs in C and in Go print alike. Any other error is returned as it is.
func OutOfSpace(err error) error {
	var failed *Error
	if !errors.As(err, &failed) {
		return err
	}
	for _, number := range []syscall.Errno{syscall.ENOSPC, syscall.EDQUOT} {
		if slices.ContainsFunc(failed.Tail, func(line string) bool {
			return strings.Contains(strings.ToLower(line), number.Error())
		}) {
			return fmt.Errorf("%w: %w", number, err)
		}
	}
	return err
}
