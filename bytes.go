package flint

import (
	"fmt"
	"strconv"
	"strings"
)

// Bytes is a size in bytes. Its text form has a binary unit: 512MiB, 8GiB.
type Bytes int64

// Binary multiples.
const (
	KiB Bytes = 1 << 10
	MiB Bytes = 1 << 20
	GiB Bytes = 1 << 30
	TiB Bytes = 1 << 40
)

var byteUnits = []struct {
	suffix string
	size   Bytes
}{{"TiB", TiB}, {"GiB", GiB}, {"MiB", MiB}, {"KiB", KiB}, {"B", 1}}

// ParseBytes reads a size with a unit (B, KiB, MiB, GiB, TiB). A bare number other than 0 is refused: people mean
// different things by it.
func ParseBytes(s string) (Bytes, error) {
	s = strings.TrimSpace(s)
	if s == "0" {
		return 0, nil
	}
	for _, u := range byteUnits {
		num, ok := strings.CutSuffix(s, u.suffix)
		if !ok {
			continue
		}
		f, err := strconv.ParseFloat(strings.TrimSpace(num), 64)
		if err != nil || !(f >= 0 && f*float64(u.size) <= 1<<62) { // NaN is neither
			break
		}
		return Bytes(f * float64(u.size)), nil
	}
	return 0, fmt.Errorf("size %q is not a number with a unit, such as 512MiB or 8GiB", s)
}

// String returns the size with its largest unit, with one decimal where it does not divide.
func (b Bytes) String() string {
	for _, u := range byteUnits {
		if b >= u.size && u.size > 1 {
			if b%u.size == 0 {
				return strconv.FormatInt(int64(b/u.size), 10) + u.suffix
			}
			return strconv.FormatFloat(float64(b)/float64(u.size), 'f', 1, 64) + u.suffix
		}
	}
	return strconv.FormatInt(int64(b), 10) + "B"
}

// MarshalText implements encoding.TextMarshaler. It is exact: a size that does not divide by a unit is written in bytes.
func (b Bytes) MarshalText() ([]byte, error) {
	for _, u := range byteUnits {
		if b != 0 && b%u.size == 0 {
			return []byte(strconv.FormatInt(int64(b/u.size), 10) + u.suffix), nil
		}
	}
	return []byte("0"), nil
}

// UnmarshalText implements encoding.TextUnmarshaler.
func (b *Bytes) UnmarshalText(t []byte) error {
	v, err := ParseBytes(string(t))
	if err != nil {
		return err
	}
	*b = v
	return nil
}
