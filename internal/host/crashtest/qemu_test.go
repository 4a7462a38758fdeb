package crashtest

import (
	"fmt"
	"os"
	"os/exec"
	"strings"
	"testing"
)

// qemuID is the runner of the test with real VMs.
func qemuID() string { return fmt.Sprintf("flint-real-%d", os.Getpid()) }

// TestRealVMs kills processes at a sample of the steps of a real VM under QEMU.
func TestRealVMs(t *testing.T) {
	assets := os.Getenv("FLINT_TEST_ASSETS")
	if assets == "" {
		t.Skip("needs a kernel, an initramfs and a base image: FLINT_TEST_ASSETS names no directory with them")
	}
	if _, err := exec.LookPath("qemu-system-x86_64"); err != nil {
		t.Skipf("needs QEMU: %v", err)
	}
	count := func(w *world) { w.Cut = atCount }
	at := func(step string) func(*world) { return func(w *world) { w.CutAt = step } }
	for name, tt := range map[string]struct {
		ways    []func(*world) // of the processes before the last one to end
		adopted bool           // by the last one
	}{
		"booted":     {[]func(*world){at("done: boot")}, false},
		"registered": {[]func(*world){at("record written: registered")}, true},
		"in the job": {[]func(*world){count}, true},
		"adopted":    {[]func(*world){count, at("done: adopt")}, true},
		"detached":   {[]func(*world){count, func(w *world) { w.Detach = true }}, true},
		"job over":   {[]func(*world){at("record written: finishing")}, true},
	} {
		t.Run(name, func(t *testing.T) {
			dir, err := os.MkdirTemp("", "crash") // short, for sockets
			if err != nil {
				t.Fatal(err)
			}
			t.Cleanup(func() { _ = os.RemoveAll(dir) })
			w := world{Dir: dir, Assets: assets}
			w.furnish(t)
			begin := qemuID()
			for i, way := range tt.ways {
				next := w
				way(&next)
				if steps, died := next.run(t, begin, next.Cut); !died && !next.Detach {
					t.Fatalf("process %d did not die: %q\n%s", i+1, steps, w.log())
				}
				begin = ""
			}
			steps, _ := w.run(t, "", 0)
			if said := strings.Contains(strings.Join(steps, "\n"), "adopted"); said != tt.adopted {
				t.Errorf("adopted %v: %q", said, steps)
			}
			w.check(t, qemuID())
			if tt.adopted {
				w.result(t, qemuID())
			}
			if t.Failed() {
				t.Log(w.log())
			}
		})
	}
}
