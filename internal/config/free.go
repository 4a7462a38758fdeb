package config

import (
	"fmt"
	"strconv"
	"strings"

	"flint"
)

// Free is how much of a disk stays free: a share of it, or a size. Its text form is 5% or 20GiB; 0 keeps nothing.
type Free struct {
	Percent float64     // of the disk; 0 where Bytes says it
	Bytes   flint.Bytes // 0 where Percent says it
}

// Of returns what that is of a disk of that size.
func (f Free) Of(disk flint.Bytes) flint.Bytes {
	return max(f.Bytes, flint.Bytes(float64(disk)*f.Percent/100))
}

// String returns the text form.
func (f Free) String() string {
	if f.Percent > 0 {
		return strconv.FormatFloat(f.Percent, 'g', -1, 64) + "%"
	}
	return f.Bytes.String()
}

// maxFreePercent is where a share is rather a slip of the pen: VMs would hardly ever start.
const maxFreePercent = 90

// UnmarshalText implements encoding.TextUnmarshaler.
func (f *Free) UnmarshalText(b []byte) error {
	text := strings.TrimSpace(string(b))
	if num, ok := strings.CutSuffix(text, "%"); ok {
		p, err := strconv.ParseFloat(strings.TrimSpace(num), 64)
		if err != nil || !(p >= 0 && p <= maxFreePercent) { // NaN is neither
			return fmt.Errorf("%q is not a share between 0%% and %d%%", text, maxFreePercent)
		}
		*f = Free{Percent: p}
		return nil
	}
	size, err := flint.ParseBytes(text)
	if err != nil {
		return fmt.Errorf("%q is neither a share of the disk, such as 5%%, nor a size, such as 20GiB", text)
	}
	*f = Free{Bytes: size}
	return nil
}
