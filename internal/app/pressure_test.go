package app

import (
	"context"
	"errors"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"golang.org/x/sys/unix"

	"flint"
	"flint/internal/config"
	"flint/internal/host"
	"flint/internal/image"
)

// fakeDisk is a disk of 100 GiB that tests fill.
type fakeDisk struct {
	mu     sync.Mutex
	free   flint.Bytes
	inodes uint64
	flags  int64
	err    error
	looks  int
}

func (d *fakeDisk) statfs(_ string, st *unix.Statfs_t) error {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.looks++
	*st = unix.Statfs_t{Frsize: 4096, Blocks: uint64(100*flint.GiB) / 4096, Bavail: uint64(d.free) / 4096, Files: 1 << 20, Ffree: d.inodes, Flags: d.flags}
	return d.err
}

func (d *fakeDisk) set(free flint.Bytes) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.free = free
}

// pressed is an App of which only the pressure works, on a machine of its own that lacks nothing.
func pressed(t *testing.T) (*App, *fakeDisk, string) {
	t.Helper()
	dir, d := t.TempDir(), &fakeDisk{free: 50 * flint.GiB, inodes: 1 << 19}
	log := slog.New(slog.NewTextHandler(t.Output(), nil))
	store, err := image.Open(filepath.Join(dir, "images"), log)
	if err != nil {
		t.Fatal(err)
	}
	cfg := config.Default()
	cfg.StateDir = dir
	cfg.Pools = []config.Pool{config.NewPool("flint", "unused")}
	root := t.TempDir()
	a := &App{cfg: cfg, log: log, store: store, supply: map[string]host.Supply{}}
	a.pressure.machine = machine{root: root, statfs: d.statfs, files: func() (uint64, error) { return 1024, nil }}
	return a, d, root
}

func TestPressureOfTheDisk(t *testing.T) {
	a, d, _ := pressed(t)
	for _, step := range []struct {
		name     string
		change   func()
		code     string
		text     string
		unneeded flint.Bytes // of unused images
	}{
		{"half free", func() {}, "", "", 0},
		{"below twice the watermark", func() { d.free = 8 * flint.GiB }, "", "", 2 * flint.GiB},
		{"at the watermark", func() { d.free = 5 * flint.GiB }, "", "", 5 * flint.GiB},
		{"below it", func() { d.free = 5*flint.GiB - flint.MiB }, "host.disk", "5.0GiB free, and host.min_free keeps 5%", 5*flint.GiB + flint.MiB},
		{"a little above it again", func() { d.free = 5*flint.GiB + 100*flint.MiB }, "host.disk", "a tenth more", 5*flint.GiB - 100*flint.MiB},
		{"enough again", func() { d.free = 6 * flint.GiB }, "", "", 4 * flint.GiB},
		{"no inodes", func() { d.free, d.inodes = 50*flint.GiB, 10 }, "host.disk", "10 inodes", 0},
		{"read-only", func() { d.inodes, d.flags = 1<<19, unix.ST_RDONLY }, "host.readonly", "read-only", 0},
		{"unreadable", func() { d.flags, d.err = 0, unix.EIO }, "host.disk", "input/output error", 0},
		{"well again", func() { d.err = nil }, "", "", 0},
		{"a size for a watermark", func() { a.cfg.Host.MinFree = config.Free{Bytes: 60 * flint.GiB} }, "host.disk", "host.min_free keeps 60GiB", 70 * flint.GiB},
		{"no watermark", func() { a.cfg.Host.MinFree, d.free = config.Free{}, 0 }, "", "", 0},
	} {
		step.change()
		lacks := a.feelPressure()
		why := a.pressure.reason()
		if why.Code != step.code || !strings.Contains(why.Text, step.text) || step.code != "" && step.text == "" {
			t.Errorf("%s: %q: %s", step.name, why.Code, why)
		}
		if d.err == nil && lacks != step.unneeded {
			t.Errorf("%s: %s of unused images are to go, want %s", step.name, lacks, step.unneeded)
		}
	}
}

// put writes a file of the machine's.
func put(t *testing.T, root, name, content string) {
	t.Helper()
	path := filepath.Join(root, name)
	if err := errors.Join(os.MkdirAll(filepath.Dir(path), 0o755), os.WriteFile(path, []byte(content+"\n"), 0o644)); err != nil {
		t.Fatal(err)
	}
}

func TestPressureOfFilesAndProcesses(t *testing.T) {
	a, _, root := pressed(t)
	group := "/sys/fs/cgroup/system.slice"
	for _, step := range []struct {
		name   string
		change func()
		code   string
		text   string
	}{
		{"nothing can be read", func() {}, "", ""},
		{"plenty", func() {
			put(t, root, "/proc/loadavg", "0.20 0.18 0.12 1/800 11206")
			put(t, root, "/proc/sys/kernel/pid_max", "32768")
			put(t, root, "/proc/sys/kernel/threads-max", "63000")
			put(t, root, "/proc/self/cgroup", "0::/system.slice/flint.service")
			put(t, root, group+"/flint.service/pids.max", "max")
			put(t, root, group+"/flint.service/pids.current", "30000")
		}, "", ""},
		{"pid_max", func() { put(t, root, "/proc/sys/kernel/pid_max", "850") }, "host.pids", "kernel.pid_max is 850, and 800"},
		{"threads-max", func() {
			put(t, root, "/proc/sys/kernel/pid_max", "32768")
			put(t, root, "/proc/sys/kernel/threads-max", "880")
		}, "host.pids", "kernel.threads-max is 880"},
		{"the cgroup above", func() {
			put(t, root, "/proc/sys/kernel/threads-max", "63000")
			put(t, root, group+"/pids.max", "100")
			put(t, root, group+"/pids.current", "50")
		}, "host.pids", "system.slice (TasksMax= in a unit) is 100"},
		{"room in it", func() { put(t, root, group+"/pids.current", "1") }, "", ""},
		{"files", func() {
			for _, n := range strings.Fields("0 1 2 3 4 5") {
				put(t, root, "/proc/self/fd/"+n, "")
			}
			a.pressure.machine.files = func() (uint64, error) { return 80, nil }
		}, "host.files", "80 files open and has 6"},
	} {
		step.change()
		a.feelPressure()
		why := a.pressure.reason()
		if why.Code != step.code || !strings.Contains(why.Text, step.text) {
			t.Errorf("%s: %q: %s", step.name, why.Code, why)
		}
	}
}

func TestThisMachineIsUnderstood(t *testing.T) {
	var m machine
	d, err := m.disk(t.TempDir())
	if err != nil || d.size < flint.MiB || d.free > d.size {
		t.Errorf("the disk is %+v, %v", d, err)
	}
	limits := m.processLimits()
	if len(limits) < 2 {
		t.Fatalf("the limits are %+v", limits)
	}
	for _, l := range limits {
		if l.limit < 1 || l.used < 1 {
			t.Errorf("%+v", l)
		}
	}
	if why := m.crowded(nil); why.Code == "host.files" {
		t.Errorf("this test cannot run: %s", why)
	}
}

// TestPressureCollects lets the watch run: it looks every five seconds, removes an unused image below twice the watermark,
// and where there is none does not search again at once.
func TestPressureCollects(t *testing.T) {
	a, d, _ := pressed(t)
	unused := filepath.Join(a.cfg.StateDir, "images", "base", strings.Repeat("ab", 32)+".ext4")
	needed := filepath.Join(a.cfg.StateDir, "images", "base", strings.Repeat("cd", 32)+".ext4")
	for _, path := range []string{unused, needed} {
		if err := os.WriteFile(path, make([]byte, 1<<16), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	a.supply["flint"] = host.Supply{Base: needed}
	synctest.Test(t, func(t *testing.T) {
		ctx, stop := context.WithCancel(t.Context())
		ended := make(chan error)
		go func() { ended <- a.watchPressure(ctx) }()
		time.Sleep(12 * time.Second)
		d.mu.Lock()
		if d.looks != 3 {
			t.Errorf("looked %d times in 12 s", d.looks)
		}
		d.mu.Unlock()
		if _, err := os.Stat(unused); err != nil {
			t.Errorf("removed without need: %v", err)
		}
		d.set(7 * flint.GiB)
		time.Sleep(5 * time.Second)
		if _, err := os.Stat(unused); !errors.Is(err, os.ErrNotExist) {
			t.Errorf("the unused image is still there: %v", err)
		}
		if _, err := os.Stat(needed); err != nil {
			t.Errorf("what the next VM needs: %v", err)
		}
		// Nothing was found twice: the next search is a minute later.
		time.Sleep(5 * time.Second)
		if err := os.WriteFile(unused, make([]byte, 1<<16), 0o644); err != nil {
			t.Fatal(err)
		}
		time.Sleep(30 * time.Second)
		if _, err := os.Stat(unused); err != nil {
			t.Errorf("searched again at once: %v", err)
		}
		time.Sleep(40 * time.Second)
		if _, err := os.Stat(unused); !errors.Is(err, os.ErrNotExist) {
			t.Errorf("not searched again: %v", err)
		}
		stop()
		if err := <-ended; err != nil {
			t.Error(err)
		}
	})
}

func TestStateDirectoryOnABadDisk(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("needs root: it mounts a small tmpfs")
	}
	disk := t.TempDir()
	if err := unix.Mount("tmpfs", disk, "tmpfs", 0, "size=64k,nr_inodes=2"); err != nil {
		t.Skipf("needs to mount a tmpfs: %v", err)
	}
	defer unix.Unmount(disk, unix.MNT_DETACH)
	cfg := config.Default()
	cfg.StateDir = disk
	for _, step := range []struct {
		flags uintptr
		why   error
	}{{0, unix.ENOSPC}, {unix.MS_RDONLY, unix.EROFS}} {
		if err := unix.Mount("tmpfs", disk, "tmpfs", unix.MS_REMOUNT|step.flags, "size=64k,nr_inodes=2"); err != nil {
			t.Fatal(err)
		}
		_, err := New(t.Context(), cfg, Options{Log: slog.New(slog.DiscardHandler)})
		var f *flint.Fault
		if !errors.As(err, &f) || f.Code != "state.space" || !errors.Is(err, step.why) {
			t.Errorf("got %v, want state.space for %v", err, step.why)
		}
	}
}
