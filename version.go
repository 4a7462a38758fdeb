package flint

import (
	"slices"
	"strconv"
	"strings"
)

// Version is the number of a release: three numbers, such as 2.335.0.
type Version [3]int

// maxVersionDigits bounds each of the numbers.
const maxVersionDigits = 6

// ParseVersion reads a version; ok is false where text is anything else.
func ParseVersion(text string) (v Version, ok bool) {
	numbers := strings.Split(text, ".")
	if len(numbers) != len(v) {
		return Version{}, false
	}
	for i, n := range numbers {
		x, err := strconv.ParseUint(n, 10, 32) // which takes no sign
		if err != nil || len(n) > maxVersionDigits {
			return Version{}, false
		}
		v[i] = int(x)
	}
	return v, true
}

// Compare is negative where v is older than o, and positive where it is newer.
func (v Version) Compare(o Version) int { return slices.Compare(v[:], o[:]) }
