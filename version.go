package flint

import (
	"fmt"
	"regexp"
	"slices"
	"strconv"
	"strings"
)

// Version is the number of a release: three numbers, such as 2.335.0.
type Version [3]int

// String returns the version as ParseVersion reads it.
func (v Version) String() string { return fmt.Sprintf("%d.%d.%d", v[0], v[1], v[2]) }

// Compare is negative where v is older than o, and positive where it is newer.
func (v Version) Compare(o Version) int { return slices.Compare(v[:], o[:]) }

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

var versionInText = regexp.MustCompile(`\bv?([0-9]+\.[0-9]+\.[0-9]+)\b`)

// FindVersion finds the first version in what a program says: "Firecracker v1.16.1", "1.16.0-dev", "QEMU emulator version 7.2.22 (…)".
func FindVersion(text string) (v Version, ok bool) {
	m := versionInText.FindStringSubmatch(text)
	if m == nil {
		return Version{}, false
	}
	return ParseVersion(m[1])
}
