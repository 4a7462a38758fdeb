package host

import (
	"bytes"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

func reopen(t *testing.T, dir string) *logbook {
	t.Helper()
	b := openLogbook(dir, slog.New(slog.DiscardHandler))
	t.Cleanup(func() { _ = b.close() })
	return b
}

// TestLogbookOverRestarts loses nothing and doubles nothing, wherever the file was cut off by a process that died.
func TestLogbookOverRestarts(t *testing.T) {
	dir := t.TempDir()
	b := reopen(t, dir)
	out, errs := b.stream(outStream, 0), b.stream(errStream, 0)
	fmt.Fprint(out, "one ")
	fmt.Fprint(errs, "ONE ")
	fmt.Fprint(out, "two ")
	whole, err := os.ReadFile(filepath.Join(dir, logFile))
	if err != nil {
		t.Fatal(err)
	}
	for cut := range len(whole) + 1 {
		dir := t.TempDir()
		if err := os.WriteFile(filepath.Join(dir, logFile), whole[:cut], 0o600); err != nil {
			t.Fatal(err)
		}
		b := reopen(t, dir)
		if got := string(b.Bytes()); !strings.HasPrefix("one ONE two ", got) {
			t.Fatalf("cut at %d: %q", cut, got)
		}
		// The agent sends again from a position before what is kept, in other pieces.
		for _, s := range []struct {
			stream int
			text   string
		}{{outStream, "one t"}, {errStream, "ONE "}, {outStream, "one two three "}} {
			at := int64(0)
			fmt.Fprint(b.stream(s.stream, at), s.text)
		}
		again := reopen(t, dir)
		for _, have := range []*logbook{b, again} {
			got := string(have.Bytes())
			if strings.ReplaceAll(got, "ONE ", "") != "one two three " || strings.Count(got, "ONE ") != 1 {
				t.Fatalf("cut at %d: %q", cut, got)
			}
		}
	}
}

// TestLogbookKeepsTheNewest has all of what fits into a file, and positions of streams that are silent for long.
func TestLogbookKeepsTheNewest(t *testing.T) {
	dir := t.TempDir()
	b := reopen(t, dir)
	fmt.Fprint(b.stream(errStream, 0), "early")
	piece := bytes.Repeat([]byte("x"), 32<<10)
	out := b.stream(outStream, 0)
	const pieces = 3 * logFull / (32 << 10)
	for range pieces {
		if _, err := out.Write(piece); err != nil {
			t.Fatal(err)
		}
	}
	var size int64
	for _, name := range []string{logFile, logBefore} {
		info, err := os.Stat(filepath.Join(dir, name))
		if err != nil {
			t.Fatal(err)
		}
		size += info.Size()
	}
	if size < logFull || size > 2*logFull+64<<10 {
		t.Errorf("%d bytes are kept", size)
	}
	again := reopen(t, dir)
	if want := [streams]int64{pieces * 32 << 10, 5}; again.at != want {
		t.Errorf("positions %v, want %v", again.at, want)
	}
}

// TestLogbookWithoutDisk goes on in memory.
func TestLogbookWithoutDisk(t *testing.T) {
	b := reopen(t, filepath.Join(t.TempDir(), "nowhere"))
	if n, err := fmt.Fprint(b.stream(outStream, 0), "text"); n != 4 || err != nil || string(b.Bytes()) != "text" {
		t.Errorf("%d, %v, %q", n, err, b.Bytes())
	}
}

func FuzzLogbook(f *testing.F) {
	f.Add([]byte(logMark + "\x00\x00\x00\x00\x00\x00\x00\x00\x01\x00\x00\x00\x02ab"))
	f.Fuzz(func(t *testing.T, file []byte) {
		dir := t.TempDir()
		if err := os.WriteFile(filepath.Join(dir, logFile), file, 0o600); err != nil {
			t.Fatal(err)
		}
		b := reopen(t, dir)
		fmt.Fprint(b.stream(outStream, b.at[outStream]), "new")
		if again := reopen(t, dir); again.at != b.at || !bytes.Equal(again.Bytes(), b.Bytes()) {
			t.Errorf("%v, want %v", again.at, b.at)
		}
	})
}
