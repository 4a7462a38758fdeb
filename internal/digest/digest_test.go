package digest_test

import (
	"context"
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"testing/iotest"

	"flint/internal/digest"
)

// abc is the SHA-256 of "abc": FIPS 180-2, B.1.
const abc = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"

func TestFile(t *testing.T) {
	path := filepath.Join(t.TempDir(), "f")
	if err := os.WriteFile(path, []byte("abc"), 0o600); err != nil {
		t.Fatal(err)
	}
	if got, err := digest.File(t.Context(), path); got != abc || err != nil {
		t.Errorf("got %s, %v", got, err)
	}
	if _, err := digest.File(t.Context(), path+"none"); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("of no file: %v", err)
	}
}

// endless is read without end. What reads it is told to stop at the third time.
type endless struct {
	reads int
	stop  func()
}

func (e *endless) Read(p []byte) (int, error) {
	if e.reads++; e.reads == 3 {
		e.stop()
	}
	return len(p), nil
}

func TestReader(t *testing.T) {
	if got, err := digest.Reader(t.Context(), iotest.DataErrReader(iotest.OneByteReader(strings.NewReader("abc")))); got != abc || err != nil {
		t.Errorf("got %s, %v", got, err)
	}
	broken := errors.New("broken")
	if _, err := digest.Reader(t.Context(), iotest.ErrReader(broken)); !errors.Is(err, broken) {
		t.Errorf("of what breaks: %v", err)
	}
	ctx, cancel := context.WithCancelCause(t.Context())
	e := &endless{stop: func() { cancel(broken) }}
	if _, err := digest.Reader(ctx, e); !errors.Is(err, broken) || e.reads != 3 {
		t.Errorf("after %d reads: %v", e.reads, err)
	}
}
