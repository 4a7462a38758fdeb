package config

import (
	"strings"
	"testing"
)

func TestOnStop(t *testing.T) {
	const start = "schema_version: 1\nhost:\n  "
	if c := Default(); c.Host.OnStop != KeepOnStop {
		t.Errorf("by default %q", c.Host.OnStop)
	}
	if c, err := Parse("f.yaml", []byte(start+"on_stop: end\n"), nil); err != nil || c.Host.OnStop != EndOnStop {
		t.Errorf("got %q, %v", c.Host.OnStop, err)
	}
	if _, err := Parse("f.yaml", []byte(start+"on_stop: kill\n"), nil); err == nil || !strings.Contains(err.Error(), "host.on_stop") {
		t.Errorf("a word it does not know: %v", err)
	}
}
