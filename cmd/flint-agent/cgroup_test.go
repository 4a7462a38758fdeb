package main

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
)

func TestConfine(t *testing.T) {
	const mib = 1 << 20
	for _, tt := range []struct {
		memory, processes    int64
		wantMemory, wantPIDs string
	}{
		{20 * mib, 400, "15728640", "100"},       // a quarter is left
		{160 * mib, 1600, "150994944", "400"},    // 16 MiB
		{1024 * mib, 8000, "1006632960", "2000"}, // one part in 16
		{64 << 30, 32768, "68451041280", "8192"}, // 256 MiB
	} {
		root := t.TempDir()
		c, err := confine(root, tt.memory, tt.processes)
		if err != nil {
			t.Fatal(err)
		}
		defer c.jobs.Close()
		for file, want := range map[string]string{
			"cgroup.subtree_control": "+cpu +memory +pids",
			"flint/memory.max":       tt.wantMemory, "flint/pids.max": tt.wantPIDs,
			"docker/memory.max": tt.wantMemory, "docker/pids.max": tt.wantPIDs,
		} {
			b, err := os.ReadFile(filepath.Join(root, file))
			if err != nil || string(b) != want {
				t.Errorf("with %d bytes and %d processes, %s is %q, %v; want %q", tt.memory, tt.processes, file, b, err, want)
			}
		}
	}
}

func TestConfineAgainAndWithout(t *testing.T) {
	root := t.TempDir()
	for range 2 { // an agent that systemd starts again finds them
		c, err := confine(root, 1<<30, 1000)
		if err != nil {
			t.Fatal(err)
		}
		c.jobs.Close()
	}
	if _, err := confine(filepath.Join(root, "nothing"), 1<<30, 1000); err == nil || !strings.Contains(err.Error(), "enable cgroup controllers") {
		t.Errorf("without cgroups: %v", err)
	}
}

func TestRefusedProcessesAreCounted(t *testing.T) {
	var none *cgroups
	if n := none.refused(); n != 0 {
		t.Errorf("without cgroups %d", n)
	}
	root := t.TempDir()
	c, err := confine(root, 1<<30, 1000)
	if err != nil {
		t.Fatal(err)
	}
	defer c.jobs.Close()
	if n := c.refused(); n != 0 {
		t.Errorf("without files %d", n)
	}
	for name, content := range map[string]string{"flint": "max 3\n", "docker": "max 4\nelse 9\n"} {
		if err := os.WriteFile(filepath.Join(root, name, "pids.events"), []byte(content), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	if n := c.refused(); n != 7 {
		t.Errorf("%d, want 7", n)
	}
}
