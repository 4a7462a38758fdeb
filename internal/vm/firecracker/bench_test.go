package firecracker

import (
	"context"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"flint/internal/vm"
	"flint/internal/vm/firecracker/fctest"
)

// BenchmarkBoot measures what the driver adds to the bare start of Firecracker by its jailer: users, directories, links,
// pipes, cgroup, and the calls of the API. Both are medians over the iterations; the budget for the difference is 15 ms.
func BenchmarkBoot(b *testing.B) {
	r := newRig(b, fctest.Options{})
	r.config.Log = nil
	d := r.driver()
	var boots, bares []time.Duration
	for b.Loop() {
		s := r.spec()
		bares = append(bares, bareStart(b, d, s))
		start := time.Now()
		m, err := d.Boot(b.Context(), s)
		boots = append(boots, time.Since(start))
		if err != nil {
			b.Fatal(err)
		}
		if err := m.Close(b.Context()); err != nil {
			b.Fatal(err)
		}
	}
	boot, bare := median(boots), median(bares)
	b.ReportMetric(float64(bare.Microseconds())/1000, "bare-ms")
	b.ReportMetric(float64(boot.Microseconds())/1000, "boot-ms")
	b.ReportMetric(float64((boot-bare).Microseconds())/1000, "added-ms")
}

func median(d []time.Duration) time.Duration {
	slices.Sort(d)
	return d[len(d)/2]
}

// bareStart returns the time from starting the jailer to Firecracker's API being there.
func bareStart(b *testing.B, d *Driver, s vm.Spec) time.Duration {
	b.Helper()
	id := s.ID + "-bare"
	home := filepath.Join(d.base, id)
	cmd := exec.Command(d.c.Jailer, "--id", id, "--exec-file", d.c.Firecracker, "--uid", "1900002900", "--gid", "1900002900",
		"--chroot-base-dir", d.c.ChrootBase, "--", "--api-sock", "/api.sock")
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true, Cloneflags: unix.CLONE_NEWPID}
	m := newMachine(id, d.log, true)
	start := time.Now()
	if err := cmd.Start(); err != nil {
		b.Fatal(err)
	}
	m.uid = 1900002900
	err := m.retry(b.Context(), func() error {
		if err := m.dir.open(filepath.Join(home, "root")); err != nil {
			return err
		}
		defer m.dir.close()
		conn, err := m.connect(b.Context(), apiSocket)
		if err == nil {
			conn.Close()
		}
		return err
	})
	took := time.Since(start)
	if err != nil {
		b.Fatal(err)
	}
	_ = cmd.Process.Kill()
	_ = cmd.Wait()
	if err := os.RemoveAll(home); err != nil {
		b.Fatal(err)
	}
	return took
}

// BenchmarkDial measures the way to an agent that is there.
func BenchmarkDial(b *testing.B) {
	r := newBareRig(b, fctest.Options{})
	r.config.Log = nil
	m, err := r.driver().Boot(b.Context(), r.spec())
	if err != nil {
		b.Fatal(err)
	}
	defer m.Close(context.Background())
	for b.Loop() {
		conn, err := m.Dial(b.Context(), vm.AgentPort)
		if err != nil {
			b.Fatal(err)
		}
		conn.Close()
	}
}
