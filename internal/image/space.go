package image

import (
	"errors"

	"flint"
)

// spaceFault is the fault of an error that a full or read-only disk gave; nil for every other, and for one that is it already.
func spaceFault(err error, what string) *flint.Fault {
	var f *flint.Fault
	if errors.As(err, &f) && f.Code == "image.space" {
		return nil
	}
	return flint.SpaceFault("image.space", what, "the image store", err)
}
