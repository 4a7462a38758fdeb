package flint

import (
	"errors"
	"syscall"
)

// SpaceFault turns the error of a disk that is full, over a quota, or read-only into a fault that says so, with that code.
// It returns nil for every other error. What says what could not be done, place whose disk it is: "the image store".
func SpaceFault(code, what, place string, err error) *Fault {
	f := &Fault{Code: code, What: what, Err: err}
	switch {
	case errors.Is(err, syscall.ENOSPC):
		f.Fix = "make room on the disk of " + place + ": it is full, or has no inodes left (df -h, df -i)"
	case errors.Is(err, syscall.EDQUOT):
		f.Fix = "raise the quota on the disk of " + place + ", or make room there (quota -v)"
	case errors.Is(err, syscall.EROFS):
		f.Fix = "make the disk of " + place + " writable: it is mounted read-only, perhaps since the kernel saw it fail (dmesg)"
	default:
		return nil
	}
	return f
}
