package host

import (
	"errors"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"flint"
)

func TestPressureIsWhatStateRefusesFor(t *testing.T) {
	var why flint.Reason
	h := New(Config{Name: "here", Pressure: func() flint.Reason { return why }})
	if got := h.State().Refuses; !got.IsZero() {
		t.Errorf("refuses %v without pressure", got)
	}
	why = flint.Because("host.disk", "the disk is nearly full")
	if got := h.State().Refuses; got != why {
		t.Errorf("refuses %v, want %v", got, why)
	}
	if got := New(Config{}).State().Refuses; !got.IsZero() {
		t.Errorf("a host that watches nothing refuses %v", got)
	}
}

// fakeDisk is a disk of 100 GiB that tests fill.
type fakeDisk struct {
	free   flint.Bytes
	inodes uint64
	flags  int64
	err    error
}

func (d *fakeDisk) statfs(path string, st *unix.Statfs_t) error {
	if path != "/state" {
		return unix.ENOENT
	}
	*st = unix.Statfs_t{Frsize: 4096, Blocks: uint64(100*flint.GiB) / 4096, Bavail: uint64(d.free) / 4096, Files: 1 << 20, Ffree: d.inodes, Flags: d.flags}
	return d.err
}

// watermark is a share of a disk, or a size.
type watermark struct {
	share, size flint.Bytes
	text        string
}

func (w watermark) Of(disk flint.Bytes) flint.Bytes { return max(w.size, disk*w.share/100) }
func (w watermark) String() string                  { return w.text }

// pressed is a machine of its own that lacks nothing.
func pressed(t *testing.T) (p *Pressure, d *fakeDisk, root string) {
	t.Helper()
	d, root = &fakeDisk{free: 50 * flint.GiB, inodes: 1 << 19}, t.TempDir()
	return &Pressure{Machine: Machine{Root: root, Statfs: d.statfs, Files: func() (uint64, error) { return 1024, nil }}}, d, root
}

func TestPressureOfTheDisk(t *testing.T) {
	p, d, _ := pressed(t)
	minFree := watermark{share: 5, text: "5%"}
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
		{"unreadable, with a size for a watermark", func() { minFree = watermark{size: 60 * flint.GiB, text: "60GiB"} }, "host.disk", "input/output error", 0},
		{"well again", func() { d.err, minFree = nil, watermark{share: 5, text: "5%"} }, "", "", 0},
		{"a size for a watermark", func() { minFree = watermark{size: 60 * flint.GiB, text: "60GiB"} }, "host.disk", "host.min_free keeps 60GiB", 70 * flint.GiB},
		{"no watermark", func() { minFree, d.free = watermark{}, 0 }, "", "", 0},
	} {
		step.change()
		why, lacks := p.Look("/state", minFree, 2)
		if why.Code != step.code || !strings.Contains(why.Text, step.text) || step.code != "" && step.text == "" {
			t.Errorf("%s: %q: %s", step.name, why.Code, why)
		}
		if got := p.Reason(); got != why {
			t.Errorf("%s: remembered as %q: %s", step.name, got.Code, got)
		}
		if lacks != step.unneeded {
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
	p, _, root := pressed(t)
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
			p.Machine.Files = func() (uint64, error) { return 80, nil }
		}, "host.files", "80 files open and has 6"},
	} {
		step.change()
		why, _ := p.Look("/state", watermark{}, 2)
		if why.Code != step.code || !strings.Contains(why.Text, step.text) {
			t.Errorf("%s: %q: %s", step.name, why.Code, why)
		}
	}
}

func TestThisMachineIsUnderstood(t *testing.T) {
	var m Machine
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
	if why := m.crowded(0); why.Code == "host.files" {
		t.Errorf("this test cannot run: %s", why)
	}
}

func TestLimitsOfThisMachine(t *testing.T) {
	if got, asked := LimitsOf(flint.Shape{CPUs: 3, Memory: flint.GiB}), (flint.Shape{CPUs: 3, Memory: flint.GiB}); got != asked {
		t.Errorf("asked for %+v, got %+v", asked, got)
	}
	if got := LimitsOf(flint.Shape{}); got.CPUs != 2*runtime.NumCPU() || got.Memory < 16*flint.MiB || got.Disk != 0 {
		t.Errorf("this machine has %+v", got)
	}
}
