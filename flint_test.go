package flint_test

import (
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"strings"
	"testing"
	"time"

	"flint"
)

func TestBytes(t *testing.T) {
	for text, want := range map[string]flint.Bytes{
		"0": 0, "1B": 1, "512MiB": 512 * flint.MiB, "1.5GiB": 1536 * flint.MiB, " 2 TiB ": 2 * flint.TiB, "7KiB": 7 * flint.KiB,
	} {
		if got, err := flint.ParseBytes(text); err != nil || got != want {
			t.Errorf("ParseBytes(%q) = %d, %v; want %d", text, got, err, want)
		}
	}
	for _, text := range []string{"", "512", "-1MiB", "MiB", "1MB", "1e30GiB", "NaNGiB", "InfB", "0x10MiB"} {
		if got, err := flint.ParseBytes(text); err == nil {
			t.Errorf("ParseBytes(%q) = %d, want an error", text, got)
		}
	}
	for size, want := range map[flint.Bytes]string{0: "0B", 1: "1B", 1536: "1.5KiB", 8 * flint.GiB: "8GiB", 1536 * flint.MiB: "1.5GiB"} {
		if got := size.String(); got != want {
			t.Errorf("%d is shown as %s, want %s", int64(size), got, want)
		}
	}
}

func FuzzBytes(f *testing.F) {
	f.Add(int64(1536))
	f.Fuzz(func(t *testing.T, n int64) {
		if n < 0 || n > 1<<52 {
			t.Skip("not a size that text holds exactly")
		}
		text, err := flint.Bytes(n).MarshalText()
		if err != nil {
			t.Fatal(err)
		}
		var back flint.Bytes
		if err := back.UnmarshalText(text); err != nil || int64(back) != n {
			t.Fatalf("%d became %s became %d, %v", n, text, int64(back), err)
		}
	})
}

func TestSecretShowsItselfNowhere(t *testing.T) {
	reg := flint.Registration{Runner: "r", Credential: "hunter2"}
	var log strings.Builder
	slog.New(slog.NewTextHandler(&log, nil)).Info("x", "reg", reg, "jit", reg.Credential)
	encoded, err := json.Marshal(reg)
	if err != nil {
		t.Fatal(err)
	}
	for _, shown := range []string{log.String(), string(encoded), fmt.Sprintf("%v %+v %#v %s %q", reg, reg, reg, reg.Credential, reg.Credential)} {
		if strings.Contains(shown, "hunter2") || !strings.Contains(shown, "[secret]") {
			t.Errorf("secret or no placeholder in %s", shown)
		}
	}
}

func TestRunnerSurvivesJSON(t *testing.T) {
	at := time.Date(2026, 11, 21, 12, 0, 0, 0, time.UTC)
	r := flint.Runner{ID: "flint-a", Phase: flint.Booting, Timeline: flint.Timeline{flint.Planned: at, flint.Booting: at.Add(time.Second)}}
	b, err := json.Marshal(r)
	if err != nil {
		t.Fatal(err)
	}
	var back flint.Runner
	if err := json.Unmarshal(b, &back); err != nil {
		t.Fatal(err)
	}
	if back.Phase != flint.Booting || !back.Timeline[flint.Booting].Equal(at.Add(time.Second)) {
		t.Fatalf("%s became %+v", b, back)
	}
	if err := json.Unmarshal([]byte(`{"phase":"asleep"}`), &back); err == nil {
		t.Fatal("an unknown phase was taken")
	}
}

func TestFaultTellsItsKindAndCause(t *testing.T) {
	cause := errors.New("no space")
	err := fmt.Errorf("boot: %w", &flint.Fault{Code: "a.b", What: "make disk", Kind: flint.ErrGuest, Err: cause})
	if !errors.Is(err, flint.ErrGuest) || !errors.Is(err, cause) || err.Error() != "boot: make disk: no space" {
		t.Fatalf("%v hides its kind or cause", err)
	}
}
