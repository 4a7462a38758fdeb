package flint_test

import (
	"testing"

	"flint"
)

func TestParseVersion(t *testing.T) {
	for text, want := range map[string]flint.Version{"2.335.0": {2, 335, 0}, "0.0.0": {}, "999999.1.000007": {999999, 1, 7}} {
		if v, ok := flint.ParseVersion(text); !ok || v != want {
			t.Errorf("%q: %v, %v", text, v, ok)
		}
	}
	for _, text := range []string{
		"", "2", "2.335", "2.335.", ".335.0", "2..0", "2.335.0.1", "v2.335.0", "2.335.0-rc1", "2.335.0\n", " 2.335.0", "2.+3.0", "-2.335.0", "2.3_5.0",
		"0x2.3.0", "2.1234567.0", "２.335.0", "99999999999999999999.0.0",
	} {
		if v, ok := flint.ParseVersion(text); ok || v != (flint.Version{}) {
			t.Errorf("%q: %v", text, v)
		}
	}
}

func TestCompareVersions(t *testing.T) {
	ordered := []flint.Version{{}, {0, 0, 9}, {0, 1, 0}, {1, 99, 99}, {2, 9, 0}, {2, 10, 0}, {2, 10, 1}}
	for i, v := range ordered {
		for j, o := range ordered {
			if got := v.Compare(o); got < 0 != (i < j) || got > 0 != (i > j) {
				t.Errorf("%v and %v: %d", v, o, got)
			}
		}
	}
}
