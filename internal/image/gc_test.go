package image

import (
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"flint"
	"flint/internal/rootfs/rootfstest"
)

// another opens the same store as another process would: locks belong to open files, not to processes.
func another(t testing.TB, s *Store) *Store {
	t.Helper()
	o, err := Open(s.dir, slog.New(slog.DiscardHandler))
	if err != nil {
		t.Fatal(err)
	}
	return o
}

// ends gives up what a store holds, as the end of its process does.
func ends(s *Store) {
	for path, h := range s.held {
		h.f.Close()
		delete(s.held, path)
	}
}

// threeImages makes three base images that nobody uses, used an hour ago, two hours ago, and in an hour.
func threeImages(t testing.TB, s *Store) (wants []Want, bases []Base) {
	t.Helper()
	maker := another(t, s)
	for i, at := range []time.Duration{-time.Hour, -2 * time.Hour, time.Hour} {
		dir := filepath.Join(t.TempDir(), "layout")
		writeLayout(t, dir, "v", testImage(t, pack(t, file("name", fmt.Sprint("image ", i)))))
		wants = append(wants, Want{Ref: dir + ":v"})
		bases = append(bases, wantBase(t, maker, wants[i]))
		used := time.Now().Add(at)
		if err := os.Chtimes(bases[i].Path, used, used); err != nil {
			t.Fatal(err)
		}
	}
	ends(maker)
	return wants, bases
}

// wantImages fails the test unless exactly these base images are there.
func wantImages(t testing.TB, s *Store, want ...Base) {
	t.Helper()
	entries, err := os.ReadDir(s.path(baseDir))
	if err != nil {
		t.Fatal(err)
	}
	var have, names []string
	for _, e := range entries {
		have = append(have, e.Name())
	}
	for _, b := range want {
		names = append(names, filepath.Base(b.Path))
	}
	slices.Sort(names)
	if !slices.Equal(have, names) {
		t.Errorf("the store has %v, want %v", have, names)
	}
}

func TestGCRemovesTheLeastRecentlyUsedFirst(t *testing.T) {
	s := testStore(t)
	wants, b := threeImages(t, s)
	freed, removed, err := s.GC(t.Context(), nil, 0)
	if freed != 0 || removed != nil || err != nil {
		t.Errorf("without need of room: %s, %v, %v", freed, removed, err)
	}
	wantImages(t, s, b...)

	freed, removed, err = s.GC(t.Context(), nil, 1)
	if err != nil || !slices.Equal(removed, []string{b[1].Digest}) || freed < 4*flint.KiB {
		t.Errorf("for one byte: %s, %v, %v; want the image used two hours ago", freed, removed, err)
	}
	wantImages(t, s, b[0], b[2])

	// By digest and by path.
	_, removed, err = s.GC(t.Context(), []string{b[0].Digest, b[2].Path}, flint.TiB)
	if err != nil || removed != nil {
		t.Errorf("removed %v, %v although all was to be kept", removed, err)
	}
	// An image that is asked for again is made again, and its records with it.
	if again := wantBase(t, s, wants[1]); again.Digest != b[1].Digest {
		t.Errorf("made %s, was %s", again.Digest, b[1].Digest)
	}
	wantImages(t, s, b...)
}

func TestGCLeavesWhatIsUsed(t *testing.T) {
	s, other := testStore(t), (*Store)(nil)
	wants, b := threeImages(t, s)
	other = another(t, s)
	wantBase(t, other, wants[0])   // another process's
	vmm, err := os.Open(b[1].Path) // a VM's whose flint is gone: it has no lock
	if err != nil {
		t.Fatal(err)
	}
	defer vmm.Close()
	wantBase(t, s, wants[2]) // ours, and about to be used
	if _, removed, err := s.GC(t.Context(), nil, flint.TiB); err != nil || removed != nil {
		t.Errorf("removed %v, %v", removed, err)
	}
	wantImages(t, s, b...)
	list, err := s.List()
	if err != nil || len(list) != 3 {
		t.Fatalf("%v, %v", list, err)
	}
	for _, i := range list {
		if !i.InUse {
			t.Errorf("%+v is not in use", i)
		}
	}

	// Once named as needed and then no longer, ours goes; the others when their users end.
	if _, removed, err := s.GC(t.Context(), []string{b[2].Digest}, flint.TiB); err != nil || removed != nil {
		t.Errorf("removed %v, %v", removed, err)
	}
	if _, removed, err := s.GC(t.Context(), nil, flint.TiB); err != nil || !slices.Equal(removed, []string{b[2].Digest}) {
		t.Errorf("removed %v, %v; want what is no longer needed", removed, err)
	}
	ends(other)
	vmm.Close()
	if _, removed, err := s.GC(t.Context(), nil, flint.TiB); err != nil || len(removed) != 2 {
		t.Errorf("removed %v, %v", removed, err)
	}
	wantImages(t, s)
	if left, _ := os.ReadDir(s.path(recordDir)); len(left) != 0 {
		t.Errorf("records are left: %v", left)
	}
}

// TestGCWhileImagesAreMade has one process ask for images while another removes all it can: what Base returned is there.
func TestGCWhileImagesAreMade(t *testing.T) {
	s := testStore(t)
	wants, _ := threeImages(t, s)
	collector := another(t, s)
	stop := make(chan struct{})
	var collected sync.WaitGroup
	defer collected.Wait()
	defer close(stop)
	collected.Go(func() {
		for {
			if _, _, err := collector.GC(t.Context(), nil, flint.TiB); err != nil {
				t.Error(err)
			}
			select {
			case <-stop:
				return
			default:
			}
		}
	})
	for i := range 30 {
		user := another(t, s)
		b, err := user.Base(t.Context(), wants[i%len(wants)])
		if err != nil {
			t.Fatal(err)
		}
		if info, err := os.Stat(b.Path); err != nil || info.Size() != int64(b.Size) {
			t.Fatalf("the image that Base returned: %v", err)
		}
		ends(user)
	}
}

func TestList(t *testing.T) {
	s := testStore(t)
	wants, b := threeImages(t, s)
	drive, err := s.Drive(t.Context(), runnerDir(t), nil)
	if err != nil {
		t.Fatal(err)
	}
	if err := os.MkdirAll(s.path(builderDir, "storage"), 0o700); err != nil {
		t.Fatal(err)
	}
	list, err := s.List()
	if err != nil {
		t.Fatal(err)
	}
	if len(list) != 5 || list[0].Digest != b[1].Digest || list[0].InUse || !slices.Equal(list[0].Source, []string{wants[1].Ref}) ||
		list[0].Kind != KindBase || list[0].Size < 4*flint.KiB || time.Since(list[0].Used) < time.Hour {
		t.Errorf("got %+v", list)
	}
	kinds := map[Kind]Image{}
	for _, i := range list {
		kinds[i.Kind] = i
	}
	if d := kinds[KindDrive]; d.Digest != drive.Digest || !d.InUse {
		t.Errorf("the drive is listed as %+v", d)
	}
	if c := kinds[KindBuilder]; c.InUse || c.Digest == "" {
		t.Errorf("the builder's storage is listed as %+v", c)
	}
}

func TestGCEmptiesTheBuildersStorage(t *testing.T) {
	s := testStore(t)
	layer := s.path(builderDir, "storage", "overlay", "layer")
	if err := os.MkdirAll(layer, 0o700); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(layer, "file"), make([]byte, 1<<16), 0o600); err != nil {
		t.Fatal(err)
	}
	if os.Geteuid() == 0 { // as containers/storage does it
		dir := s.path(builderDir, "storage", "overlay")
		if err := unix.Mount(dir, dir, "", unix.MS_BIND, ""); err != nil {
			t.Logf("not on a mount: %v", err)
		}
		defer unix.Unmount(dir, unix.MNT_DETACH)
	}
	unlock, err := s.lock(t.Context(), builderLock, nil)
	if err != nil {
		t.Fatal(err)
	}
	if _, removed, err := s.GC(t.Context(), nil, flint.TiB); err != nil || removed != nil {
		t.Errorf("while it is used: removed %v, %v", removed, err)
	}
	unlock()
	freed, removed, err := s.GC(t.Context(), nil, flint.TiB)
	if err != nil || len(removed) != 1 || freed < 64*flint.KiB {
		t.Errorf("%s, %v, %v", freed, removed, err)
	}
	if left, err := os.ReadDir(s.path(builderDir)); err != nil || len(left) != 0 {
		t.Errorf("left: %v, %v", left, err)
	}
}

// TestSweepTrustsNoClock removes what killed processes left although its times lie an hour ahead, and leaves what lives
// although they lie a year back.
func TestSweepTrustsNoClock(t *testing.T) {
	s := testStore(t)
	live, release, err := s.work()
	if err != nil {
		t.Fatal(err)
	}
	defer release()
	dead := s.path(tmpDir, "dead")
	run, err := os.MkdirTemp(filepath.Split(runPrefix))
	if err != nil {
		t.Fatal(err)
	}
	defer os.RemoveAll(run)
	outside := t.TempDir()
	if err := errors.Join(os.Mkdir(dead, 0o700), os.WriteFile(filepath.Join(dead, "image"), make([]byte, 1<<16), 0o600),
		os.Symlink(run, filepath.Join(dead, runLink)), os.Mkdir(s.path(tmpDir, "other"), 0o700),
		os.Symlink(outside, s.path(tmpDir, "other", runLink))); err != nil {
		t.Fatal(err)
	}
	for dir, at := range map[string]time.Duration{live: -365 * 24 * time.Hour, dead: time.Hour} {
		at := time.Now().Add(at)
		if err := os.Chtimes(dir, at, at); err != nil {
			t.Fatal(err)
		}
	}
	freed, _, err := s.GC(t.Context(), nil, 0)
	if err != nil || freed < 64*flint.KiB {
		t.Errorf("freed %s, %v", freed, err)
	}
	for _, gone := range []string{dead, run} {
		if _, err := os.Stat(gone); !errors.Is(err, fs.ErrNotExist) {
			t.Errorf("%s: %v", gone, err)
		}
	}
	for _, stays := range []string{live, outside} {
		if _, err := os.Stat(stays); err != nil {
			t.Error(err)
		}
	}
}

// TestWaitingIsSaidAndEnds waits for a lock until its holder lets go: when it hears that somebody waits.
func TestWaitingIsSaidAndEnds(t *testing.T) {
	s := testStore(t)
	unlock, err := s.lock(t.Context(), "key", nil)
	if err != nil {
		t.Fatal(err)
	}
	var told []flint.Milestone
	again, err := s.lock(t.Context(), "key", func(m flint.Milestone) {
		if told = append(told, m); !m.Done {
			unlock()
		}
	})
	if err != nil {
		t.Fatal(err)
	}
	again()
	if len(told) != 2 || !told[1].Done || told[1].Err != nil {
		t.Errorf("told %+v", told)
	}
}

func TestTornFilesAreMadeAgain(t *testing.T) {
	s := testStore(t)
	wants, b := threeImages(t, s)
	records, err := filepath.Glob(s.path(recordDir, "*.json"))
	if err != nil || len(records) == 0 {
		t.Fatal(records, err)
	}
	for name, tear := range map[string]func() error{
		"image cut in the middle": func() error { return os.Truncate(b[0].Path, int64(b[0].Size)/2) },
		"image empty":             func() error { return os.Truncate(b[0].Path, 0) },
		"records cut in the middle": func() (err error) {
			for _, r := range records {
				info, serr := os.Stat(r)
				if serr != nil {
					return serr
				}
				err = errors.Join(err, os.Truncate(r, info.Size()/2))
			}
			return err
		},
	} {
		if err := tear(); err != nil {
			t.Fatal(err)
		}
		again := wantBase(t, another(t, s), wants[0])
		if again.Digest != b[0].Digest {
			t.Errorf("%s: made %s, was %s", name, again.Digest, b[0].Digest)
		}
		if info, err := os.Stat(again.Path); err != nil || info.Size() != int64(b[0].Size) {
			t.Errorf("%s: %v", name, err)
		}
		rootfstest.Fsck(t, again.Path)
	}
}

// smallDisk mounts a file system of that size and returns its directory, and what mounts it again with other flags.
func smallDisk(t *testing.T, size flint.Bytes) (dir string, remount func(flags uintptr)) {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("needs root: it mounts a small tmpfs")
	}
	dir = t.TempDir()
	options := fmt.Sprintf("size=%d", size)
	if err := unix.Mount("tmpfs", dir, "tmpfs", 0, options); err != nil {
		t.Skipf("needs to mount a tmpfs: %v", err)
	}
	t.Cleanup(func() {
		if err := unix.Unmount(dir, unix.MNT_DETACH); err != nil {
			t.Error(err)
		}
	})
	return dir, func(flags uintptr) {
		t.Helper()
		if err := unix.Mount("tmpfs", dir, "tmpfs", unix.MS_REMOUNT|flags, options); err != nil {
			t.Fatal(err)
		}
	}
}

// layoutOf writes a layout whose image has one file of that size.
func layoutOf(t *testing.T, name string, size int) Want {
	t.Helper()
	dir := filepath.Join(t.TempDir(), name)
	content := strings.Repeat(name+"\n", size/(len(name)+1))
	writeLayout(t, dir, "v", testImage(t, pack(t, file("content", content))))
	return Want{Ref: dir + ":v"}
}

func TestFullDisk(t *testing.T) {
	disk, _ := smallDisk(t, 12*flint.MiB)
	s, err := Open(filepath.Join(disk, "store"), slog.New(slog.DiscardHandler))
	if err != nil {
		t.Fatal(err)
	}
	small, large := layoutOf(t, "small", 1<<20), layoutOf(t, "large", 16<<20)
	good := wantBase(t, s, small)
	_, err = s.Base(t.Context(), large)
	wantFault(t, err, "image.space", "no space left on device")
	wantEmptyTmp(t, s)
	wantImages(t, s, good)

	runner := runnerDir(t)
	if err := os.WriteFile(filepath.Join(runner, "large"), make([]byte, 32<<20), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(disk, "full"), make([]byte, 64<<20), 0o600); !errors.Is(err, unix.ENOSPC) {
		t.Fatal(err)
	}
	_, err = s.Drive(t.Context(), runner, nil)
	wantFault(t, err, "image.space", "runner drive")
	scratch := filepath.Join(disk, "scratch.ext4")
	wantFault(t, s.Scratch(scratch, 64*flint.MiB), "image.space", "scratch disk")
	if _, err := os.Stat(scratch); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("half a scratch disk is left: %v", err)
	}
	wantEmptyTmp(t, s)
	// What was made before is served from a full disk, also by a process that starts on it.
	if again := wantBase(t, another(t, s), small); again.Digest != good.Digest {
		t.Errorf("got %s, want %s", again.Digest, good.Digest)
	}
	rootfstest.Fsck(t, good.Path)

	if err := os.Remove(filepath.Join(disk, "full")); err != nil {
		t.Fatal(err)
	}
	if err := s.Scratch(scratch, 64*flint.MiB); err != nil {
		t.Error(err)
	}
}

func TestReadOnlyDisk(t *testing.T) {
	disk, remount := smallDisk(t, 32*flint.MiB)
	s, err := Open(filepath.Join(disk, "store"), slog.New(slog.DiscardHandler))
	if err != nil {
		t.Fatal(err)
	}
	small, other, runner := layoutOf(t, "small", 1<<20), layoutOf(t, "other", 1<<20), runnerDir(t)
	good := wantBase(t, s, small)
	drive, err := s.Drive(t.Context(), runner, nil)
	if err != nil {
		t.Fatal(err)
	}
	remount(unix.MS_RDONLY)
	defer remount(0)
	s = another(t, s)
	if again := wantBase(t, s, small); again.Digest != good.Digest {
		t.Errorf("got %s, want %s", again.Digest, good.Digest)
	}
	if again, err := s.Drive(t.Context(), runner, nil); err != nil || again.Digest != drive.Digest {
		t.Errorf("got %s, %v; want %s", again.Digest, err, drive.Digest)
	}
	_, err = s.Base(t.Context(), other)
	wantFault(t, err, "image.space", "read-only")
	wantFault(t, s.Scratch(filepath.Join(disk, "scratch.ext4"), 64*flint.MiB), "image.space", "read-only")
	wantImages(t, s, good)
	if _, removed, err := s.GC(t.Context(), nil, flint.TiB); removed != nil || err != nil {
		t.Errorf("removed %v, %v", removed, err)
	}
}

func TestBuilderOutOfSpace(t *testing.T) {
	s := testStore(t)
	fakeTool(t, "buildah", `echo 'copying layers: write /x: no space left on device' >&2; exit 1`)
	dir := dockerfileDir(t, "FROM scratch\n")
	_, err := s.Base(t.Context(), Want{Ref: dir})
	wantFault(t, err, "image.space", "no space left on device")
	wantEmptyTmp(t, s)
}
