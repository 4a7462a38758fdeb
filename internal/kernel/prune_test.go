package kernel

import (
	"debug/elf"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"flint"
)

func (w *world) cache() Config { return w.preparer().Config }

// agent changes the agent, so that another initramfs is made.
func (w *world) agent(t testing.TB, text string) {
	w.write(t, filepath.Join(w.dir, "agent"), string(makeELF(elf.EM_X86_64, false, text)))
}

func (w *world) prune(t testing.TB, room flint.Bytes, keep ...string) []string {
	t.Helper()
	freed, removed, err := Prune(t.Context(), w.cache(), keep, room)
	if err != nil {
		t.Fatal(err)
	}
	if len(removed) > 0 && freed < 1 {
		t.Errorf("removed %v and freed nothing", removed)
	}
	slices.Sort(removed)
	return removed
}

func wantGone(t testing.TB, paths ...string) {
	t.Helper()
	for _, path := range paths {
		if _, err := os.Lstat(path); !errors.Is(err, fs.ErrNotExist) {
			t.Errorf("%s is still there (%v)", path, err)
		}
	}
}

func TestPrune(t *testing.T) {
	w := newWorld(t)
	one := w.prepare(t, Source{})
	w.agent(t, "agent two")
	two := w.prepare(t, Source{})
	dir := filepath.Dir(one.Kernel)
	list, err := List(w.cache().Dir)
	if err != nil || len(list) != 3 || slices.ContainsFunc(list, func(c Cached) bool { return !c.InUse || c.Version != testRelease || c.Size < 1 }) {
		t.Errorf("listed %+v, %v", list, err)
	}
	if removed := w.prune(t, flint.TiB); removed != nil {
		t.Errorf("removed %v although all is in use", removed)
	}
	one.Close()
	if removed := w.prune(t, 0); removed != nil {
		t.Errorf("removed %v without need of room", removed)
	}
	if removed := w.prune(t, flint.TiB, one.Initrd); removed != nil {
		t.Errorf("removed %v although it was to be kept", removed)
	}
	// Its kernel is used by the other.
	if removed := w.prune(t, flint.TiB); !slices.Equal(removed, []string{one.Initrd}) {
		t.Errorf("removed %v, want the initramfs of the first agent", removed)
	}
	two.Close()
	vmm, err := os.Open(two.Modules) // a VM's whose flint is gone
	if err != nil {
		t.Fatal(err)
	}
	defer vmm.Close()
	if removed := w.prune(t, flint.TiB, two.Initrd); removed != nil {
		t.Errorf("removed %v although a VM has it open", removed)
	}
	vmm.Close()
	if removed := w.prune(t, flint.TiB, two.Kernel); !slices.Equal(removed, []string{two.Initrd}) {
		t.Errorf("removed %v, want the initramfs", removed)
	}
	if removed := w.prune(t, flint.TiB); !slices.Equal(removed, []string{dir}) {
		t.Errorf("removed %v, want the kernel", removed)
	}
	wantGone(t, dir)
	if again := w.prepare(t, Source{}); again.Kernel != two.Kernel || again.Initrd != two.Initrd {
		t.Errorf("made again as %+v", again)
	}
}

func TestPruneTakesTheLeastRecentlyUsed(t *testing.T) {
	w := newWorld(t)
	var packs []Pack
	for i, at := range []time.Duration{-time.Hour, -2 * time.Hour, time.Hour} { // the last as a clock that was put back leaves it
		w.agent(t, fmt.Sprint("agent ", i))
		p := w.prepare(t, Source{})
		p.Close()
		used := time.Now().Add(at)
		if err := os.Chtimes(p.Initrd, used, used); err != nil {
			t.Fatal(err)
		}
		packs = append(packs, p)
	}
	if removed := w.prune(t, 1, packs[1].Kernel); !slices.Equal(removed, []string{packs[1].Initrd}) {
		t.Errorf("removed %v, want %s", removed, packs[1].Initrd)
	}
}

func TestPruneClearsWhatIsHalfMade(t *testing.T) {
	w := newWorld(t)
	pack := w.prepare(t, Source{})
	cache := w.cache().Dir
	fetch, err := os.MkdirTemp("", fetchPrefix)
	if err != nil {
		t.Fatal(err)
	}
	defer os.RemoveAll(fetch)
	outside := t.TempDir()
	dead, live := filepath.Join(cache, "dead"), filepath.Join(cache, "live")
	part := pack.Initrd + newSuffix
	if err := errors.Join(
		os.Mkdir(dead+workSuffix, 0o755), os.WriteFile(filepath.Join(dead+workSuffix, "x"), make([]byte, 1<<16), 0o644),
		os.WriteFile(dead+lockSuffix, nil, 0o644), os.WriteFile(filepath.Join(cache, "killed"+lockSuffix), nil, 0o644),
		os.Mkdir(dead+newSuffix, 0o755), os.Symlink(fetch, dead+workSuffix+fetchLink),
		os.Mkdir(live+workSuffix, 0o755), os.Symlink(outside, filepath.Join(cache, "other"+workSuffix+fetchLink)),
		os.WriteFile(part, nil, 0o644),
	); err != nil {
		t.Fatal(err)
	}
	unlock, err := w.preparer().lock(t.Context(), live)
	if err != nil {
		t.Fatal(err)
	}
	defer unlock()
	freed, removed, err := Prune(t.Context(), w.cache(), nil, 0)
	if err != nil || removed != nil || freed < 64*flint.KiB {
		t.Errorf("%s, %v, %v", freed, removed, err)
	}
	wantGone(t, dead+workSuffix, dead+newSuffix, dead+workSuffix+fetchLink, dead+lockSuffix, filepath.Join(cache, "killed"+lockSuffix), fetch, part)
	for _, stays := range []string{live + workSuffix, live + lockSuffix, filepath.Dir(pack.Kernel) + lockSuffix, outside, pack.Kernel, pack.Initrd} {
		if _, err := os.Stat(stays); err != nil {
			t.Error(err)
		}
	}
}

// TestPruneWhilePacksAreMade has one process prepare packs while another removes all it can: what Prepare returned is there.
func TestPruneWhilePacksAreMade(t *testing.T) {
	w := newWorld(t)
	p := w.prepare(t, Source{})
	p.Close()
	stop := make(chan struct{})
	var pruned sync.WaitGroup
	defer pruned.Wait()
	defer close(stop)
	pruned.Go(func() {
		for {
			if _, _, err := Prune(t.Context(), w.cache(), nil, flint.TiB); err != nil {
				t.Error(err)
			}
			select {
			case <-stop:
				return
			default:
			}
		}
	})
	for range 10 {
		p, err := w.preparer().prepare(t.Context(), Source{})
		if err != nil {
			t.Fatal(err)
		}
		for _, path := range []string{p.Kernel, p.Initrd, p.Modules} {
			if _, err := os.Stat(path); err != nil {
				t.Fatal(err)
			}
		}
		p.Close()
	}
}

func TestTornPacksAreMadeAgain(t *testing.T) {
	w := newWorld(t)
	pack := w.prepare(t, Source{})
	dir := filepath.Dir(pack.Kernel)
	boot, err := filepath.Glob(filepath.Join(dir, bootDir, "*.ko"))
	if err != nil || len(boot) == 0 {
		t.Fatal(boot, err)
	}
	was := map[string]int64{}
	for _, path := range []string{pack.Modules, pack.Initrd, filepath.Join(dir, entryFile), filepath.Join(dir, bootDir, orderFile), boot[0]} {
		info, err := os.Stat(path)
		if err != nil {
			t.Fatal(err)
		}
		was[path] = info.Size()
	}
	for path, size := range was {
		if err := os.Truncate(path, size/2); err != nil {
			t.Fatal(err)
		}
		w.prepare(t, Source{})
		if info, err := os.Stat(path); err != nil || info.Size() != size {
			t.Errorf("%s was cut in the middle and is not made again (%v)", path, err)
		}
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

func TestFullAndReadOnlyDisk(t *testing.T) {
	w := newWorld(t)
	disk, remount := smallDisk(t, 64*flint.MiB)
	w.write(t, filepath.Join(disk, "agent"), string(makeELF(elf.EM_X86_64, false, "agent one")))
	for _, name := range []string{"os-release"} {
		b, err := os.ReadFile(filepath.Join(w.dir, name))
		if err != nil {
			t.Fatal(err)
		}
		w.write(t, filepath.Join(disk, name), string(b))
	}
	w.dir = disk
	good := w.prepare(t, Source{})
	full := filepath.Join(disk, "full")
	if err := os.WriteFile(full, make([]byte, 64<<20), 0o600); !errors.Is(err, unix.ENOSPC) {
		t.Fatal(err)
	}

	// The same again needs no room; another kernel does.
	if again := w.prepare(t, Source{}); again.Kernel != good.Kernel {
		t.Errorf("got %s", again.Kernel)
	}
	before, err := os.ReadDir(w.cache().Dir)
	if err != nil {
		t.Fatal(err)
	}
	vmlinuz := filepath.Join(t.TempDir(), "vmlinux")
	w.write(t, vmlinuz, string(makeKernel("7.0.0-other")))
	w.fails(t, Source{Vmlinuz: vmlinuz}, "kernel.space", "no space left on device")
	// A new version of the package cannot be unpacked: the one from before serves.
	w.offer("linux-image-cloud-amd64", "7.0", "linux-image-7.0.0-other (= 7.0)", []byte("nothing in it"))
	w.offer("linux-image-7.0.0-other", "7.0", "", kernelDeb(t, "7.0.0-other", testModules()))
	w.write(t, w.lists, "changed lists")
	if again := w.prepare(t, Source{}); again.Kernel != good.Kernel || again.Initrd != good.Initrd {
		t.Errorf("got %+v", again)
	}
	after, err := os.ReadDir(w.cache().Dir)
	if err != nil {
		t.Fatal(err)
	}
	for _, e := range after {
		if !slices.ContainsFunc(before, func(b os.DirEntry) bool { return b.Name() == e.Name() }) {
			t.Errorf("%s is left half made", e.Name())
		}
	}

	if err := os.Remove(full); err != nil {
		t.Fatal(err)
	}
	w.write(t, filepath.Join(w.dir, "agent"), string(makeELF(elf.EM_X86_64, false, "agent one")))
	remount(unix.MS_RDONLY)
	defer remount(0)
	if again := w.prepare(t, Source{}); again.Kernel != good.Kernel {
		t.Errorf("got %s", again.Kernel)
	}
	w.fails(t, Source{Vmlinuz: vmlinuz}, "kernel.space", "read-only")
}
