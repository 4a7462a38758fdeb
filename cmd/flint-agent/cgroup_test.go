package main

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"
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
			"cgroup.subtree_control": "+pids", "flint/cgroup.subtree_control": "+pids", // the last one asked for
			"flint/memory.max":     tt.wantMemory, // together
			"flint/job/memory.max": tt.wantMemory, "flint/job/pids.max": tt.wantPIDs,
			"flint/docker/memory.max": tt.wantMemory, "flint/docker/pids.max": tt.wantPIDs,
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
	if _, err := confine(filepath.Join(root, "nothing"), 1<<30, 1000); err == nil || !strings.Contains(err.Error(), "enable cgroup controller memory") {
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
	// What a container's own limit refused is nothing of ours.
	for name, content := range map[string]string{"flint/job/pids.events": "max 3\nelse 9\n", "flint/docker/pids.events": "max 4\n", "flint/docker/pids.current": "249"} {
		if err := os.WriteFile(filepath.Join(root, name), []byte(content), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	c.look(time.Now())
	if n := c.refused(); n != 3 {
		t.Errorf("%d, want 3", n)
	}
	if err := os.WriteFile(filepath.Join(root, "flint/docker/pids.current"), []byte("250"), 0o600); err != nil {
		t.Fatal(err)
	}
	c.look(time.Now())
	if n := c.refused(); n != 4 {
		t.Errorf("%d with docker's full, want 4", n)
	}
}

func TestBomb(t *testing.T) {
	type stretch struct {
		every time.Duration // between two refusals; 0: none
		last  time.Duration
	}
	for name, tt := range map[string]struct {
		stretches []stretch
		after     time.Duration // 0: it is none
	}{
		"nothing":        {[]stretch{{0, time.Hour}}, 0},
		"a moment":       {[]stretch{{time.Second, 50 * time.Second}, {0, time.Hour}}, 0},
		"bomb":           {[]stretch{{time.Second, time.Hour}}, time.Minute},
		"slow bomb":      {[]stretch{{bombRests, time.Hour}}, time.Minute},
		"now and then":   {[]stretch{{bombRests + time.Second, time.Hour}}, 0},
		"after a rest":   {[]stretch{{time.Second, 50 * time.Second}, {0, 20 * time.Second}, {time.Second, 50 * time.Second}, {0, time.Hour}}, 0},
		"after a pause":  {[]stretch{{time.Second, 50 * time.Second}, {0, 4 * time.Second}, {time.Second, time.Hour}}, time.Minute},
		"one, and peace": {[]stretch{{time.Hour, time.Hour}, {0, time.Hour}}, 0},
	} {
		var b bomb
		var refused int64
		start := time.Now()
		now, off := start, time.Duration(0)
		for _, s := range tt.stretches {
			for begin := now; now.Sub(begin) < s.last && off == 0; now = now.Add(sampleEvery) {
				if s.every > 0 && now.Sub(begin)%s.every == 0 {
					refused++
				}
				if b.goesOff(now, refused) {
					off = now.Sub(start)
				}
			}
		}
		if tt.after == 0 && off != 0 || tt.after != 0 && (off < tt.after || off > tt.after+10*time.Second) {
			t.Errorf("%s: ended after %s, want %s", name, off, tt.after)
		}
	}
}

func TestFullCgroupIsKilled(t *testing.T) {
	root := t.TempDir()
	c, err := confine(root, 1<<30, 1000)
	if err != nil {
		t.Fatal(err)
	}
	defer c.jobs.Close()
	// A container that is a fork bomb: its processes are in a cgroup below.
	if err := os.WriteFile(filepath.Join(root, "flint/docker/pids.current"), []byte("250"), 0o600); err != nil {
		t.Fatal(err)
	}
	begin := time.Now()
	kill := filepath.Join(root, "flint/docker/cgroup.kill")
	for now := begin; now.Sub(begin) < bombAfter; now = now.Add(sampleEvery) {
		c.look(now)
	}
	if _, err := os.Stat(kill); err == nil {
		t.Error("it is killed early")
	}
	c.look(begin.Add(bombAfter + sampleEvery))
	if b, err := os.ReadFile(kill); err != nil || string(b) != "1" {
		t.Errorf("cgroup.kill is %q, %v", b, err)
	}
	if _, err := os.Stat(filepath.Join(root, "flint/job/cgroup.kill")); err == nil {
		t.Error("the other cgroup is killed, too")
	}
	if err := os.Remove(kill); err != nil {
		t.Fatal(err)
	}
	c.look(begin.Add(bombAfter + 2*sampleEvery))
	if _, err := os.Stat(kill); err == nil {
		t.Error("it is killed again at once")
	}
}
