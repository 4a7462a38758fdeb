package image

import (
	"context"
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"flint"
)

// TestTidy: what every change of a directory and every failure adds goes when it is old, and a lock when it is free.
func TestTidy(t *testing.T) {
	s, made := testStore(t), filepath.Join(t.TempDir(), "made")
	writeLayout(t, made, "", testImage(t, pack(t, file("f", "1"))))
	log := fakeTool(t, "buildah", strings.ReplaceAll(fakeBuildah, "$FAKE_LAYOUT", made))
	dir := dockerfileDir(t, "FROM scratch")
	base := wantBase(t, s, Want{Ref: dir})
	const ref = "./nowhere"
	if _, err := s.Base(t.Context(), Want{Ref: ref}); err == nil {
		t.Fatal("it is there")
	}
	s.note(keyOf("tree", dir, "stamp"), "digest of a directory")
	unlock, err := s.lock(t.Context(), keyOf("held"), nil)
	if err != nil {
		t.Fatal(err)
	}
	collect := func() (locks, records int) {
		t.Helper()
		if _, _, err := s.GC(t.Context(), nil, 0); err != nil {
			t.Error(err)
		}
		for dir, n := range map[string]*int{lockDir: &locks, recordDir: &records} {
			entries, err := os.ReadDir(s.path(dir))
			if err != nil {
				t.Fatal(err)
			}
			*n = len(entries)
		}
		return locks, records
	}
	const named = 2 // workLock and builderLock
	locks, before := collect()
	if locks != named+1 || s.Failed(ref) == nil {
		t.Errorf("%d locks, want %d; the failure is %v", locks, named+1, s.Failed(ref))
	}
	unlock()
	records, err := filepath.Glob(s.path(recordDir, "*"))
	if err != nil {
		t.Fatal(err)
	}
	for _, old := range []struct {
		age  time.Duration
		gone int
	}{{day, 1}, {memory, 2}} {
		then := time.Now().Add(-old.age - time.Hour)
		for _, r := range records {
			if err := os.Chtimes(r, then, then); err != nil && !errors.Is(err, fs.ErrNotExist) {
				t.Fatal(err)
			}
		}
		if locks, after := collect(); locks != named || after != before-old.gone || s.Failed(ref) != nil {
			t.Errorf("%s: %d locks, want %d; %d records of %d, want %d less; the failure is %v", old.age, locks, named, after, before, old.gone, s.Failed(ref))
		}
	}
	if again := wantBase(t, s, Want{Ref: dir}); again.Digest != base.Digest {
		t.Errorf("got %s, was %s", again.Digest, base.Digest)
	}
	if b, err := os.ReadFile(log); err != nil || strings.Count(string(b), " build ") != 1 {
		t.Errorf("it was built again: %q, %v", b, err)
	}
}

// TestLockThatIsRemoved: who waited for a lock that was removed meanwhile has the one that others find.
func TestLockThatIsRemoved(t *testing.T) {
	s := testStore(t)
	unlock, err := s.lock(t.Context(), "key", nil)
	if err != nil {
		t.Fatal(err)
	}
	type result struct {
		unlock func()
		err    error
	}
	waited := make(chan result)
	said := make(chan flint.Milestone, 2)
	go func() {
		unlock, err := s.lock(t.Context(), "key", func(m flint.Milestone) { said <- m })
		waited <- result{unlock, err}
	}()
	if m := <-said; m.Step == "" || m.Done {
		t.Errorf("that it waits it said by %+v", m)
	}
	if err := os.Remove(s.path(lockDir, "key")); err != nil {
		t.Fatal(err)
	}
	unlock()
	second := <-waited
	if second.err != nil {
		t.Fatal(second.err)
	}
	if m := <-said; m.Step == "" || !m.Done || m.Err != nil {
		t.Errorf("that it waited it said by %+v", m)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
	defer cancel()
	if _, err := s.lock(ctx, "key", nil); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("a third has it, too: %v", err)
	}
	second.unlock()
}
