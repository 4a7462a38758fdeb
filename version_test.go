package flint_test

import (
	"testing"

	"flint"
)

func TestParseVersion(t *testing.T) {
	for text, want := range map[string]flint.Version{"2.335.0": {2, 335, 0}, "0.0.0": {}, "999999.1.000007": {999999, 1, 7}} {
		if v, ok := flint.ParseVersion(text); !ok || v != want {
			t.Errorf("%q: %s, %v", text, v, ok)
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

func TestFindVersion(t *testing.T) {
	for text, want := range map[string]string{
		"Firecracker v1.16.1\n\n2026-01-01 [x] exiting": "1.16.1", "Jailer v1.13.0": "1.13.0", "1.17.0-dev": "1.17.0", "v1.2": "", "": "", "1.2.3.4": "1.2.3",
		"9999999.1.1": "", "QEMU emulator version 7.2.22 (Debian 1:7.2+dfsg-7+deb12u18)": "7.2.22", "x1.2.3": "",
	} {
		v, ok := flint.FindVersion(text)
		if ok != (want != "") || ok && v.String() != want {
			t.Errorf("%q: %s, %v; want %q", text, v, ok, want)
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
