package firecracker

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"testing"

	"golang.org/x/sys/unix"

	"flint"
	"flint/internal/vm"
	"flint/internal/vm/firecracker/fctest"
)

// booted is what the helper process tells of the VM it booted.
type booted struct {
	PID   int
	Start uint64
}

// helperEnv makes the test binary a daemon that boots a VM and dies.
const helperEnv = "FLINT_TEST_BOOT_AND_DIE"

// bootAndDie is the daemon: its rig comes on standard input.
func bootAndDie() error {
	var in struct {
		Config Config
		Mounts string
		Spec   vm.Spec
	}
	if err := json.NewDecoder(os.Stdin).Decode(&in); err != nil {
		return err
	}
	d, err := newDriver(context.Background(), in.Config, cgroupFS{mounts: in.Mounts, remove: removeTree})
	if err != nil {
		return err
	}
	m, err := d.Boot(context.Background(), in.Spec)
	if err != nil {
		return err
	}
	var out booted
	out.PID, out.Start = m.(vm.Process).Process()
	return json.NewEncoder(os.Stdout).Encode(out)
}

// orphan boots a VM by a process that ends.
func (r *rig) orphan(s vm.Spec) booted {
	r.t.Helper()
	self, err := os.Executable()
	if err != nil {
		r.t.Fatal(err)
	}
	config := r.config
	config.Log = nil
	in, err := json.Marshal(map[string]any{"Config": config, "Mounts": r.fs.mounts, "Spec": s})
	if err != nil {
		r.t.Fatal(err)
	}
	cmd := exec.Command(self)
	cmd.Env = append(os.Environ(), helperEnv+"=1")
	cmd.Stdin, cmd.Stderr = bytes.NewReader(in), os.Stderr
	out, err := cmd.Output()
	if err != nil {
		r.t.Fatalf("boot by another process: %v", err)
	}
	var b booted
	if err := json.Unmarshal(out, &b); err != nil {
		r.t.Fatalf("%v: %s", err, out)
	}
	r.t.Cleanup(func() {
		if p, err := adopt(b.PID, b.Start); err == nil {
			_ = p.kill()
			_ = p.wait()
			p.close()
		}
	})
	return b
}

func TestAdopt(t *testing.T) {
	for _, jailed := range []bool{true, false} {
		t.Run(fmt.Sprintf("jailed %v", jailed), func(t *testing.T) {
			r := newBareRig(t, fctest.Options{})
			if jailed {
				r = newRig(t, fctest.Options{})
			}
			s := r.spec()
			b := r.orphan(s)
			if err := os.Remove(s.Drives[1].Path); err != nil { // as the host does
				t.Fatal(err)
			}
			mine, err := vm.ProcessStart(os.Getpid())
			if err != nil {
				t.Fatal(err)
			}
			d := r.driver()
			for name, wrong := range map[string]booted{
				"another start": {b.PID, b.Start + 1}, "no process": {1<<22 - 1, b.Start}, "no number": {0, 0},
				"another program": {os.Getpid(), mine},
			} {
				if m, err := d.Adopt(t.Context(), s, wrong.PID, wrong.Start); !errors.Is(err, flint.ErrNotFound) {
					t.Errorf("%s: adopted %v, %v", name, m, err)
				}
			}
			if err := d.Sweep(t.Context()); err != nil {
				t.Error(err)
			}
			m, err := d.Adopt(t.Context(), s, b.PID, b.Start)
			if err != nil {
				t.Fatalf("adopt: %v", err)
			}
			if _, err := d.Adopt(t.Context(), s, b.PID, b.Start); err == nil {
				t.Error("it was adopted twice")
			}
			if err := d.Sweep(t.Context()); err != nil {
				t.Error(err)
			}
			if out := output(t, attach(t, m), "echo", "still here"); out != "still here\n" {
				t.Errorf("the guest says %q", out)
			}
			if pid, start := m.(vm.Process).Process(); pid != b.PID || start != b.Start {
				t.Errorf("process %d, %d; want %+v", pid, start, b)
			}
			if peak := m.(vm.Usage).PeakMemory(); peak < flint.MiB {
				t.Errorf("peak memory %s", peak)
			}
			if err := m.Close(t.Context()); err != nil {
				t.Errorf("close: %v", err)
			}
			if err := m.Wait(patiently(t)); err != nil {
				t.Errorf("wait: %v", err)
			}
			if got := m.(vm.Metrics).Metrics(); got.BlockRead != 8<<20 {
				t.Errorf("counters %+v", got)
			}
			if err := os.WriteFile(filepath.Join(s.Dir, "scratch.ext4"), nil, 0o600); err != nil {
				t.Fatal(err)
			}
			r.clean()
		})
	}
}

// TestAdoptedEnd tells the ends of a machine whose exit status nobody has.
func TestAdoptedEnd(t *testing.T) {
	for name, c := range map[string]struct {
		end  func(*testing.T, vm.Machine, int)
		fine bool
	}{
		"reboot": {func(t *testing.T, m vm.Machine, _ int) {
			if err := attach(t, m).Reboot(t.Context()); err != nil {
				t.Error(err)
			}
		}, true},
		"killed": {func(t *testing.T, _ vm.Machine, pid int) {
			if err := unix.Kill(pid, unix.SIGKILL); err != nil {
				t.Error(err)
			}
		}, false},
	} {
		t.Run(name, func(t *testing.T) {
			r := newRig(t, fctest.Options{})
			s := r.spec()
			b := r.orphan(s)
			m, err := r.driver().Adopt(t.Context(), s, b.PID, b.Start)
			if err != nil {
				t.Fatal(err)
			}
			c.end(t, m, b.PID)
			if err := m.Wait(patiently(t)); (err == nil) != c.fine {
				t.Errorf("wait: %v", err)
			}
			if err := m.Close(t.Context()); err != nil {
				t.Error(err)
			}
			r.clean()
		})
	}
}
