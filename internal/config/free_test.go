package config

import (
	"strings"
	"testing"

	"flint"
)

func TestMinFree(t *testing.T) {
	const disk = 200 * flint.GiB
	for text, want := range map[string]struct {
		of   flint.Bytes
		text string
	}{
		"5%":    {10 * flint.GiB, "5%"},
		"2.5 %": {5 * flint.GiB, "2.5%"},
		"0%":    {0, "0B"},
		"0":     {0, "0B"},
		"20GiB": {20 * flint.GiB, "20GiB"},
	} {
		var f Free
		if err := f.UnmarshalText([]byte(text)); err != nil || f.Of(disk) != want.of || f.String() != want.text {
			t.Errorf("%q: %v of %s, as text %q, %v; want %v and %q", text, f.Of(disk), disk, f.String(), err, want.of, want.text)
		}
	}
	for _, text := range []string{"", "5", "-1%", "91%", "NaN%", "%", "lots", "-1GiB"} {
		var f Free
		if err := f.UnmarshalText([]byte(text)); err == nil {
			t.Errorf("%q was taken as %v", text, f)
		}
	}
}

func TestMinFreeInTheFile(t *testing.T) {
	const start = "schema_version: 1\nhost:\n  "
	c, err := Parse("f.yaml", []byte(start+"min_free: 12GiB\n"), nil)
	if err != nil || c.Host.MinFree != (Free{Bytes: 12 * flint.GiB}) {
		t.Errorf("got %+v, %v", c.Host.MinFree, err)
	}
	if c, err = Parse("f.yaml", []byte(start+"cpus: 2\n"), []string{"FLINT_HOST_MIN_FREE=7%"}); err != nil || c.Host.MinFree != (Free{Percent: 7}) {
		t.Errorf("from the environment: %+v, %v", c.Host.MinFree, err)
	}
	if c = Default(); c.Host.MinFree != (Free{Percent: 5}) {
		t.Errorf("by default: %+v", c.Host.MinFree)
	}
	if _, err = Parse("f.yaml", []byte(start+"min_free: some\n"), nil); err == nil || !strings.Contains(err.Error(), "line 3") || !strings.Contains(err.Error(), "host.min_free") {
		t.Errorf("got %v", err)
	}
}
