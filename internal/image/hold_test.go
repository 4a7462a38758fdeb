package image

import (
	"errors"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"

	"flint"
)

// damage changes a byte of a file and nothing that a look at it would tell.
func damage(t testing.TB, path string) {
	t.Helper()
	f, err := os.OpenFile(path, os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	info, err := f.Stat()
	if err != nil {
		t.Fatal(err)
	}
	at, b := info.Size()/2, []byte{0}
	if _, err := f.ReadAt(b, at); err != nil {
		t.Fatal(err)
	}
	b[0] ^= 1
	if _, err := f.WriteAt(b, at); err != nil {
		t.Fatal(err)
	}
	if err := os.Chtimes(path, info.ModTime(), info.ModTime()); err != nil {
		t.Fatal(err)
	}
}

// TestKeptAgain: what was let go is held again where it is still there.
func TestKeptAgain(t *testing.T) {
	s := testStore(t)
	layout := filepath.Join(t.TempDir(), "layout")
	writeLayout(t, layout, "v1", testImage(t, pack(t, file("f", "x"))))
	base, other := wantBase(t, s, Want{Ref: layout}), another(t, s)
	for _, keep := range [][]string{{base.Path}, nil} { // needed, and then no longer
		if _, _, err := s.GC(t.Context(), keep, 0); err != nil {
			t.Fatal(err)
		}
	}
	if err := s.Keep("", "/dev/null", base.Path); err != nil {
		t.Fatal(err)
	}
	if _, removed, err := other.GC(t.Context(), nil, flint.TiB); err != nil || removed != nil {
		t.Fatalf("another process removed %v, %v", removed, err)
	}
	for _, keep := range [][]string{{base.Path}, nil} {
		if _, _, err := s.GC(t.Context(), keep, 0); err != nil {
			t.Fatal(err)
		}
	}
	if _, removed, err := other.GC(t.Context(), nil, flint.TiB); err != nil || len(removed) != 1 {
		t.Fatalf("another process removed %v, %v", removed, err)
	}
	if err := s.Keep(base.Path); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("what is gone: %v", err)
	}
}

// TestDamagedImagesAreMadeAgain: what another process made and a disk damaged is not handed out by the next one.
func TestDamagedImagesAreMadeAgain(t *testing.T) {
	s := testStore(t)
	layout, runner := filepath.Join(t.TempDir(), "layout"), runnerDir(t)
	writeLayout(t, layout, "v1", testImage(t, pack(t, file("etc/hostname", "x"))))
	base := wantBase(t, s, Want{Ref: layout})
	drive, err := s.Drive(t.Context(), runner, nil)
	if err != nil {
		t.Fatal(err)
	}
	damage(t, base.Path)
	damage(t, drive.Path)

	var log strings.Builder
	next, err := Open(s.dir, slog.New(slog.NewTextHandler(&log, nil)))
	if err != nil {
		t.Fatal(err)
	}
	if again := wantBase(t, next, Want{Ref: layout}); again.Digest != base.Digest || again.Path != base.Path {
		t.Errorf("made again: %+v, want %+v", again, base)
	}
	if again, err := next.Drive(t.Context(), runner, nil); err != nil || again != drive {
		t.Errorf("made again: %+v, %v, want %+v", again, err, drive)
	}
	for _, path := range []string{base.Path, drive.Path} {
		if digest, err := hashFile(t.Context(), path); err != nil || !isNamed(path, digest) {
			t.Errorf("%s has the digest %s, %v", path, digest, err)
		}
		if _, err := os.Stat(path + damagedSuffix); err != nil {
			t.Errorf("the damaged file is not set aside: %v", err)
		}
	}
	if got := strings.Count(log.String(), "an image is damaged"); got != 2 {
		t.Errorf("%d damages in the log, want 2:\n%s", got, &log)
	}
}

// TestImagesAreCheckedOnce: what this process made or has checked costs nothing again.
func TestImagesAreCheckedOnce(t *testing.T) {
	s := testStore(t)
	layout := filepath.Join(t.TempDir(), "layout")
	writeLayout(t, layout, "v1", testImage(t, pack(t, file("f", "x"))))
	base := wantBase(t, s, Want{Ref: layout})
	next, err := Open(s.dir, slog.New(slog.DiscardHandler))
	if err != nil {
		t.Fatal(err)
	}
	wantBase(t, next, Want{Ref: layout})
	damage(t, base.Path) // whoever looks again would find this
	for _, store := range []*Store{s, next} {
		wantBase(t, store, Want{Ref: layout})
		if _, err := os.Stat(base.Path + damagedSuffix); err == nil {
			t.Error("an image was checked twice by one process")
		}
	}
}

// TestManyAskAtOnce: stores of two processes and many of each.
func TestManyAskAtOnce(t *testing.T) {
	s := testStore(t)
	layout := filepath.Join(t.TempDir(), "layout")
	writeLayout(t, layout, "v1", testImage(t, pack(t, file("f", strings.Repeat("x", 1<<20)))))
	other, err := Open(s.dir, slog.New(slog.DiscardHandler))
	if err != nil {
		t.Fatal(err)
	}
	var wg sync.WaitGroup
	for i := range 16 {
		wg.Go(func() {
			store := []*Store{s, other}[i%2]
			if b, err := store.Base(t.Context(), Want{Ref: layout}); err != nil {
				t.Error(err)
			} else if digest, err := hashFile(t.Context(), b.Path); err != nil || digest != b.Digest {
				t.Errorf("%s has the digest %s: %v", b.Path, digest, err)
			}
		})
	}
	wg.Wait()
	if entries, err := os.ReadDir(s.path(baseDir)); err != nil || len(entries) != 1 {
		t.Errorf("%d files, %v", len(entries), err)
	}
	wantEmptyTmp(t, s)
}
