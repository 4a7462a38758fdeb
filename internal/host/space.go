package host

import (
	"errors"

	"flint"
)

// spaceOr says of the error of a record that the disk is full or read-only, where that is so. Any other is returned as it is.
func spaceOr(err error) error {
	var f *flint.Fault
	if errors.As(err, &f) {
		return err
	}
	if f := flint.SpaceFault("host.space", "keep the runner's record", "the state directory", err); f != nil {
		return f
	}
	return err
}
