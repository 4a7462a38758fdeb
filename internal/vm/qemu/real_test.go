package qemu

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"log/slog"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"flint"
	"flint/internal/guest"
	"flint/internal/vm"
	"flint/internal/vm/vmtest"
)

// assets returns the directory of what a real VM boots from: vmlinux, initrd, base.ext4 and, as a template, scratch.ext4.
func assets(tb testing.TB) string {
	tb.Helper()
	dir := os.Getenv("FLINT_TEST_ASSETS")
	if dir == "" {
		tb.Skip("needs a kernel, an initramfs and a base image: FLINT_TEST_ASSETS names no directory with them")
	}
	target, err := targetFor(os.Getenv("FLINT_TEST_ARCH"))
	if err != nil {
		tb.Fatal(err)
	}
	if _, err := exec.LookPath(target.program); err != nil {
		tb.Skipf("needs QEMU: %v", err)
	}
	return dir
}

// realSpec returns a bootable spec with a directory and a scratch disk of its own.
func realSpec(tb testing.TB, dir, id string) vm.Spec {
	tb.Helper()
	own := tb.TempDir()
	scratch := filepath.Join(own, "scratch.ext4")
	if err := clone(filepath.Join(dir, "scratch.ext4"), scratch); err != nil {
		tb.Fatalf("make scratch disk: %v", err)
	}
	return vm.Spec{
		ID: id, Kernel: filepath.Join(dir, "vmlinux"), Initrd: filepath.Join(dir, "initrd"), CPUs: 1, Memory: 512 * flint.MiB, Dir: own,
		Drives: []vm.Drive{{ID: "base", Path: filepath.Join(dir, "base.ext4"), ReadOnly: true}, {ID: "scratch", Path: scratch}},
	}
}

// clone copies a sparse file without filling its holes.
func clone(from, to string) error {
	src, err := os.Open(from)
	if err != nil {
		return err
	}
	defer src.Close()
	st, err := src.Stat()
	if err != nil {
		return err
	}
	dst, err := os.OpenFile(to, os.O_CREATE|os.O_EXCL|os.O_WRONLY, 0o600)
	if err != nil {
		return err
	}
	defer dst.Close()
	if err := dst.Truncate(st.Size()); err != nil {
		return err
	}
	for end := int64(0); ; {
		start, err := src.Seek(end, unix.SEEK_DATA)
		if err != nil { // no more data
			return dst.Close()
		}
		if end, err = src.Seek(start, unix.SEEK_HOLE); err != nil {
			return err
		}
		if _, err := io.Copy(io.NewOffsetWriter(dst, start), io.NewSectionReader(src, start, end-start)); err != nil {
			return err
		}
	}
}

func driver(tb testing.TB) *Driver {
	tb.Helper()
	d, err := New(tb.Context(), Config{
		Arch:  os.Getenv("FLINT_TEST_ARCH"),         // of the assets
		Accel: Accel(os.Getenv("FLINT_TEST_ACCEL")), // a host that is there for its KVM must not pass by falling back to software
		Log:   slog.New(slog.NewTextHandler(tb.Output(), nil)),
	})
	if err != nil {
		tb.Fatal(err)
	}
	a, status := d.Accel()
	tb.Logf("accelerator %s, KVM %s", a, status)
	return d
}

// output executes a command in m's guest and returns what it wrote.
func output(t *testing.T, m vm.Machine, args ...string) string {
	t.Helper()
	conn, err := m.Dial(patiently(t), vm.AgentPort)
	if err != nil {
		t.Fatal(err)
	}
	g, err := guest.Attach(patiently(t), conn, guest.Options{Heartbeat: vmtest.Patience(t)})
	if err != nil {
		t.Fatal(err)
	}
	defer g.Close()
	var out bytes.Buffer
	exit, err := g.Exec(patiently(t), guest.Command{Args: args, Dir: "/"}, guest.IO{Stdout: &out, Stderr: &out})
	if err != nil || exit.Code != 0 {
		t.Errorf("execute %q: %+v, %v", args, exit, err)
	}
	return out.String()
}

func TestRealVM(t *testing.T) {
	dir := assets(t)
	d, n := driver(t), 0
	if parent, err := openCgroups("/proc/self/mounts", fmt.Sprintf("flint-test-%d", os.Getpid())); err == nil {
		d.cgroups = parent // on some machines without limits, on some not at all
	}
	vmtest.Run(t, func(t *testing.T) (vm.Driver, vm.Spec) {
		n++
		return d, realSpec(t, dir, fmt.Sprintf("test-%d", n))
	})
}

// BenchmarkBoot measures from Boot to the agent's hello, and to the end of the VM, each as a median.
func BenchmarkBoot(b *testing.B) {
	dir := assets(b)
	d := driver(b)
	var running, hello, gone []time.Duration
	before := childCPU(b)
	for b.Loop() {
		s := realSpec(b, dir, "bench")
		start := time.Now()
		lap := func(into *[]time.Duration) { *into = append(*into, time.Since(start)) }
		m, err := d.Boot(b.Context(), s)
		if err != nil {
			b.Fatal(err)
		}
		lap(&running)
		ctx, cancel := context.WithTimeout(b.Context(), time.Minute)
		conn, err := m.Dial(ctx, vm.AgentPort)
		if err != nil {
			b.Fatal(err)
		}
		g, err := guest.Attach(ctx, conn, guest.Options{})
		if err != nil {
			b.Fatalf("%v, console %q", err, m.(vm.Console).Console())
		}
		lap(&hello)
		if err := g.Reboot(ctx); err != nil {
			b.Fatal(err)
		}
		if err := m.Wait(ctx); err != nil {
			b.Fatal(err)
		}
		lap(&gone)
		cancel()
		_ = g.Close()
		if err := m.Close(b.Context()); err != nil {
			b.Fatal(err)
		}
	}
	b.ReportMetric(float64((childCPU(b)-before).Milliseconds())/float64(b.N), "cpu-ms") // of a whole life, whatever else this machine does
	for name, laps := range map[string][]time.Duration{"running-ms": running, "hello-ms": hello, "gone-ms": gone} {
		slices.Sort(laps)
		b.ReportMetric(float64(laps[len(laps)/2].Microseconds())/1000, name)
	}
}

// childCPU returns the processor time of the children that have ended.
func childCPU(b *testing.B) time.Duration {
	var u unix.Rusage
	if err := unix.Getrusage(unix.RUSAGE_CHILDREN, &u); err != nil {
		b.Fatal(err)
	}
	return time.Duration(u.Utime.Nano() + u.Stime.Nano())
}
