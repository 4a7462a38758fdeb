package host

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

func TestDrainNoteThatIsDamagedStillDrains(t *testing.T) {
	dir := t.TempDir()
	if err := os.WriteFile(filepath.Join(dir, drainNote), []byte("{"), 0o600); err != nil {
		t.Fatal(err)
	}
	var d Drain
	if err := d.Open(dir); err != nil || d.Reason(time.Now()).Code != "host.draining" {
		t.Errorf("%v, %v", d.Reason(time.Now()), err)
	}
}

// TestDrainIsKept: what a person asked for is there after a restart, until a person ends it; that flint stops is not.
func TestDrainIsKept(t *testing.T) {
	dir, since := t.TempDir(), time.Date(2026, 11, 3, 9, 5, 0, 0, time.Local)
	again := func() *Drain {
		t.Helper()
		var d Drain
		if err := d.Open(dir); err != nil {
			t.Fatal(err)
		}
		return &d
	}
	first := again()
	if why := first.Reason(since); !why.IsZero() || first.Stopping() {
		t.Errorf("drains from the start: %s", why)
	}
	first.Stop(since)
	if why := first.Reason(since); !first.Stopping() || why.Code != "host.draining" || !strings.Contains(why.Text, "since 09:05, because flint is to stop") {
		t.Errorf("told to stop: %q: %s", why.Code, why)
	}
	if why := again().Reason(since); !why.IsZero() {
		t.Errorf("after the stop: %s", why)
	}
	for range 2 { // the first time counts
		if err := first.Ask(true, since); err != nil {
			t.Fatal(err)
		}
		since = since.Add(time.Minute)
	}
	if why := again().Reason(since.Add(24 * time.Hour)); why.Code != "host.draining" || !strings.Contains(why.Text, "since 2026-11-03 09:05, by a person") {
		t.Errorf("after a restart: %q: %s", why.Code, why)
	}
	for range 2 {
		if err := again().Ask(false, since); err != nil {
			t.Fatal(err)
		}
	}
	if why := again().Reason(since); !why.IsZero() {
		t.Errorf("nobody drains it any more: %s", why)
	}
}
