package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"time"
	"unsafe"

	"flint/internal/guest"

	"golang.org/x/sys/unix"
)

const (
	sampleEvery = 250 * time.Millisecond
	endWithin   = 2 * time.Second // from TERM to KILL when the guest reboots
	// shieldedScore is the oom_score_adj that keeps a process from being killed for memory (proc(5)).
	shieldedScore = -1000
)

// system is the guest.System of a real guest.
type system struct {
	users    users
	reaper   *reaper
	init     bool     // this is PID 1
	up       string   // a file that is there once systemd has started everything; empty: there is no systemd
	shielded bool     // the agent is never killed for memory; what it starts must not inherit that
	cgroups  *cgroups // nil: jobs have no limits of their own
	peak     atomic.Int64
	filled   atomic.Int64 // how often the scratch disk was seen full
	crammed  atomic.Int64 // how often a root in memory was

	configure  sync.Once
	configured chan struct{} // closed when the guest was configured for the first time
	end        sync.Once
	ending     chan struct{} // closed when the guest begins to reboot
}

func newSystem(init bool) *system {
	return &system{
		users: users{root: "/"}, reaper: newReaper(), init: init, configured: make(chan struct{}), ending: make(chan struct{}),
	}
}

// watch samples the memory in use, and loads the late modules after the first configuration, until stop is closed.
func (s *system) watch(stop <-chan struct{}) {
	tick := time.NewTicker(sampleEvery)
	defer tick.Stop()
	configured := s.configured
	for {
		s.sample()
		disk, root := fullDisks()
		s.filled.Add(disk)
		s.crammed.Add(root)
		if configured == nil { // from then on nobody replaces them
			s.cgroups.look(time.Now())
		}
		select {
		case <-tick.C:
		case <-configured:
			configured = nil
			loadLate()
		case <-stop:
			return
		}
	}
}

func (s *system) sample() (total, available int64) {
	b, err := os.ReadFile("/proc/meminfo")
	if err != nil {
		return 0, 0
	}
	total, available = parseMeminfo(b)
	s.peak.Store(max(s.peak.Load(), total-available))
	return total, available
}

// parseMeminfo returns, in bytes, the total and the available memory.
func parseMeminfo(b []byte) (total, available int64) {
	for line := range bytes.Lines(b) {
		f := strings.Fields(string(line))
		if len(f) < 2 {
			continue
		}
		kib, err := strconv.ParseInt(f[1], 10, 53)
		if err != nil {
			continue
		}
		switch f[0] {
		case "MemTotal:":
			total = kib << 10
		case "MemAvailable:":
			available = kib << 10
		}
	}
	return total, min(total, available)
}

func loadLate() {
	dir := filepath.Join(runDir, "late")
	files, err := filepath.Glob(filepath.Join(dir, "*.ko"))
	if err != nil {
		return
	}
	slices.Sort(files)
	for _, f := range files {
		if err := insertModule(f); err != nil {
			complain(err)
		}
	}
	if err := os.RemoveAll(dir); err != nil {
		complain(fmt.Errorf("free late modules: %w", err))
	}
}

// Configure implements guest.System.
func (s *system) Configure(ctx context.Context, c guest.Config) (guest.Configured, error) {
	var out guest.Configured
	step := func(name string, do func() error) error {
		start := time.Now()
		err := do()
		out.Steps = append(out.Steps, guest.Step{Name: name, Took: time.Since(start)})
		if err != nil {
			err = fmt.Errorf("%s: %w", name, err)
		}
		return err
	}
	note := func(err error) {
		if err != nil {
			out.Faults = append(out.Faults, err.Error())
		}
	}
	if !c.Time.IsZero() {
		out.Skew = time.Until(c.Time) * -1
		note(step("set clock", func() error {
			ts := unix.NsecToTimespec(c.Time.UnixNano())
			return unix.ClockSettime(unix.CLOCK_REALTIME, &ts)
		}))
	}
	note(step("add entropy", func() error { return addEntropy(c.Entropy) }))
	note(step("set identity", func() error { return setIdentity(c.Hostname, c.MachineID) }))
	if c.Interface != nil {
		if err := step("set up network", func() error { return setUpInterface(ctx, *c.Interface) }); err != nil {
			return out, err
		}
	}
	if len(c.DNS) > 0 {
		note(step("write resolv.conf", func() error {
			var b strings.Builder
			for _, a := range c.DNS {
				fmt.Fprintf(&b, "nameserver %s\n", a)
			}
			return replaceFile("/etc/resolv.conf", b.String(), 0o644)
		}))
	}
	if c.Probe != "" {
		_ = step("probe name servers", func() error {
			out.Faults = append(out.Faults, probeDNS(ctx, c.DNS, c.Probe)...)
			return nil
		})
	}
	if s.up != "" && c.Settle > 0 {
		note(step("wait for systemd", func() error { return s.settle(ctx, c.Settle) }))
	}
	s.configure.Do(func() {
		note(step("confine jobs", s.confineJobs)) // now that what the image starts has its memory
		close(s.configured)
	})
	return out, nil
}

// settle waits until systemd has started everything, but no longer than limit.
func (s *system) settle(ctx context.Context, limit time.Duration) error {
	ctx, cancel := context.WithTimeout(ctx, limit)
	defer cancel()
	if err := retry(ctx, func() error {
		_, err := os.Stat(s.up)
		return err
	}); err != nil {
		return fmt.Errorf("it was still starting services after %s, and commands run before they are up; `systemctl list-jobs` in the guest shows which",
			limit.Round(time.Second))
	}
	return nil
}

// addEntropy credits b to the kernel's pool and makes it used at once (random(4)).
func addEntropy(b []byte) error {
	if len(b) == 0 {
		return nil
	}
	f, err := os.OpenFile("/dev/random", os.O_WRONLY, 0)
	if err != nil {
		return err
	}
	defer f.Close()
	words := make([]uint32, 2+(len(b)+3)/4) // struct rand_pool_info: entropy_count in bits, buf_size in bytes, buf
	words[0], words[1] = uint32(8*len(b)), uint32(len(b))
	copy(unsafe.Slice((*byte)(unsafe.Pointer(&words[2])), len(b)), b)
	if _, _, errno := unix.Syscall(unix.SYS_IOCTL, f.Fd(), unix.RNDADDENTROPY, uintptr(unsafe.Pointer(&words[0]))); errno != 0 {
		return errno
	}
	if _, _, errno := unix.Syscall(unix.SYS_IOCTL, f.Fd(), unix.RNDRESEEDCRNG, 0); errno != 0 {
		return errno
	}
	return nil
}

func setIdentity(hostname, machineID string) error {
	var errs []error
	if err := unix.Sethostname([]byte(hostname)); err != nil {
		errs = append(errs, fmt.Errorf("set host name: %w", err))
	}
	hosts, err := os.ReadFile("/etc/hosts")
	if except(err, os.ErrNotExist) != nil {
		errs = append(errs, err)
	}
	return errors.Join(append(errs,
		replaceFile("/etc/hostname", hostname+"\n", 0o644),
		replaceFile("/etc/hosts", withHost(string(hosts), hostname), 0o644),
		replaceFile("/etc/machine-id", machineID+"\n", 0o444),
	)...)
}

// withHost returns the text of a hosts file in which localhost and the host's own name are found.
func withHost(hosts, hostname string) string {
	if hosts != "" && !strings.HasSuffix(hosts, "\n") {
		hosts += "\n"
	}
	has := func(name string) bool {
		for line := range strings.Lines(hosts) {
			line, _, _ = strings.Cut(line, "#")
			if f := strings.Fields(line); len(f) > 1 && slices.Contains(f[1:], name) {
				return true
			}
		}
		return false
	}
	if !has("localhost") {
		hosts += "127.0.0.1 localhost\n::1 localhost ip6-localhost ip6-loopback\n"
	}
	if !has(hostname) {
		hosts += "127.0.1.1 " + hostname + "\n"
	}
	return hosts
}

// Stats implements guest.System.
func (s *system) Stats() (guest.Stats, error) {
	var st guest.Stats
	total, available := s.sample()
	st.MemoryTotal, st.MemoryUsed = total, total-available
	st.MemoryPeak = s.peak.Load()
	var fs unix.Statfs_t
	if err := unix.Statfs("/tmp", &fs); err != nil { // bound from the scratch disk
		return st, fmt.Errorf("look at scratch disk: %w", err)
	}
	st.DiskTotal = int64(fs.Blocks) * fs.Bsize
	st.DiskUsed = int64(fs.Blocks-fs.Bfree) * fs.Bsize
	var info unix.Sysinfo_t
	if err := unix.Sysinfo(&info); err != nil {
		return st, fmt.Errorf("ask for load: %w", err)
	}
	st.Uptime = time.Duration(info.Uptime) * time.Second
	st.Load = float64(info.Loads[0]) / (1 << 16) // SI_LOAD_SHIFT
	return st, nil
}

// fullDisks is 1 for what has no space left: the scratch disk, or else a root that is not on it but in memory.
func fullDisks() (disk, root int64) {
	switch {
	case full("/tmp"):
		return 1, 0
	case full("/"):
		return 0, 1
	}
	return 0, 0
}

// full reports whether a file system has less than 1 MiB or 0.1 % left, or no inode.
func full(at string) bool {
	var fs unix.Statfs_t
	if err := unix.Statfs(at, &fs); err != nil || fs.Blocks == 0 {
		return false
	}
	free := int64(fs.Bavail) * fs.Bsize
	return free < 1<<20 || free < int64(fs.Blocks)*fs.Bsize/1000 || fs.Files > 0 && fs.Ffree == 0
}

// trouble counts what a guest can run out of. The difference of two says what it ran out of between them.
type trouble struct{ killed, refused, filled, crammed int64 }

func (s *system) trouble() trouble {
	disk, root := fullDisks() // not seen yet, maybe
	return trouble{oomKills(), s.cgroups.refused(), s.filled.Load() + disk, s.crammed.Load() + root}
}

// oomKills returns how many processes the kernel has killed for memory.
func oomKills() int64 {
	b, err := os.ReadFile("/proc/vmstat")
	if err != nil {
		return 0
	}
	return counter(b, "oom_kill")
}

// setOOMScore says how gladly the kernel kills this process for memory, and what it starts from then on.
func setOOMScore(score int) {
	err := os.WriteFile("/proc/self/oom_score_adj", []byte(strconv.Itoa(score)), 0)
	if err != nil {
		complain(fmt.Errorf("set OOM score: %w", err))
	}
}

// Reboot implements guest.System. As PID 1 it first gives what runs a moment to end.
func (s *system) Reboot() error {
	s.end.Do(func() { close(s.ending) })
	if s.init {
		s.endAll()
		_ = unix.Mount("", "/", "", unix.MS_REMOUNT|unix.MS_RDONLY, "") // best effort: sync below is what counts
	}
	restart()
	return nil
}

// ends reports whether the guest has begun to reboot.
func (s *system) ends() bool {
	select {
	case <-s.ending:
		return true
	default:
		return false
	}
}

func (s *system) endAll() {
	for _, sig := range []unix.Signal{unix.SIGTERM, unix.SIGKILL} {
		_ = unix.Kill(-1, sig) // that there is nobody to signal is what is wanted
		ctx, cancel := context.WithTimeout(context.Background(), endWithin)
		err := retry(ctx, func() error {
			if !s.reaper.collect() {
				return errors.New("processes still run")
			}
			return nil
		})
		cancel()
		if err == nil {
			return
		}
	}
}
