package app

import (
	"bytes"
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
	mu    sync.Mutex
	free  flint.Bytes
	looks int
}

func (d *fakeDisk) statfs(_ string, st *unix.Statfs_t) error {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.looks++
	*st = unix.Statfs_t{Frsize: 4096, Blocks: uint64(100*flint.GiB) / 4096, Bavail: uint64(d.free) / 4096}
	return nil
}

func (d *fakeDisk) set(free flint.Bytes) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.free = free
}

// pressed is an App of which only the pressure works, on a machine of its own that lacks nothing.
func pressed(t *testing.T) (*App, *fakeDisk) {
	t.Helper()
	dir, d := t.TempDir(), &fakeDisk{free: 50 * flint.GiB}
	log := slog.New(slog.NewTextHandler(t.Output(), nil))
	store, err := image.Open(filepath.Join(dir, "images"), log)
	if err != nil {
		t.Fatal(err)
	}
	cfg := config.Default()
	cfg.StateDir = dir
	cfg.Pools = []config.Pool{config.NewPool("flint", "unused")}
	a := &App{cfg: cfg, log: log, store: store, supply: map[string]host.Supply{}}
	a.pressure.Machine = host.Machine{Root: t.TempDir(), Statfs: d.statfs}
	return a, d
}

// TestPressureIsTold: with the configuration's bound, and once as long as it is the same.
func TestPressureIsTold(t *testing.T) {
	a, d := pressed(t)
	var log bytes.Buffer
	a.log = slog.New(slog.NewTextHandler(&log, nil))
	d.free = 4 * flint.GiB
	for range 2 {
		if lacks := a.feelPressure(); lacks != 6*flint.GiB {
			t.Errorf("%s of unused images are to go", lacks)
		}
	}
	if why := a.refuses(); why.Code != "host.disk" || !strings.Contains(why.Text, "4GiB free, and host.min_free keeps 5%") {
		t.Errorf("%q: %s", why.Code, why)
	}
	a.cfg.Host.MinFree = config.Free{Bytes: flint.GiB}
	a.feelPressure()
	if why := a.refuses(); !why.IsZero() {
		t.Errorf("%q: %s", why.Code, why)
	}
	said := log.String()
	if strings.Count(said, "no VM is started") != 1 || strings.Count(said, "VMs are started again") != 1 || !strings.Contains(said, "after=host.disk") {
		t.Errorf("%s", said)
	}
	put(t, a.pressure.Machine.Root, "/proc/loadavg", "0.20 0.18 0.12 1/100 11206")
	put(t, a.pressure.Machine.Root, "/proc/sys/kernel/threads-max", "200")
	for cpus, code := range map[int]string{2: "", 64: "host.pids"} { // of the largest pool
		a.cfg.Pools[0].VM.CPUs = cpus
		a.feelPressure()
		if why := a.refuses(); why.Code != code {
			t.Errorf("VMs of %d CPUs: %q: %s", cpus, why.Code, why)
		}
	}
}

// TestPressureCollects lets the watch run: it looks every five seconds, removes an unused image below twice the watermark,
// and where there is none does not search again at once.
func TestPressureCollects(t *testing.T) {
	a, d := pressed(t)
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
