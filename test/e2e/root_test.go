package e2e

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
)

// A root in memory, with tools beside it: one VM for both.
func TestRootInMemoryAndTools(t *testing.T) {
	r := newRig(t)
	tools := t.TempDir()
	tool := filepath.Join(tools, "node/22.1.0/x64/bin")
	if err := os.MkdirAll(tool, 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(tool, "node"), []byte("#!/bin/sh\necho v22.1.0\n"), 0o755); err != nil {
		t.Fatal(err)
	}
	var said strings.Builder
	cmd := r.flint(t.Context(), nil, r.run("--root", "memory", "--tool-cache", tools, "--memory", "400MiB", "--disk", "3GiB",
		"--user", "runner", "--", "sh", "-ec", `
		[ $(df -Pm / | awk 'NR == 2 {print $2}') -lt 200 ] && echo root is in memory
		[ $(df -Pm /work | awk 'NR == 2 {print $2}') -gt 2800 ] && echo work is on the disk
		[ $(df -Pm /var/lib/docker | awk 'NR == 2 {print $2}') -gt 2800 ] && echo docker is on the disk
		echo written > /home/runner/note && cat /home/runner/note
		$RUNNER_TOOL_CACHE/node/22.1.0/x64/bin/node
		mkdir -p $AGENT_TOOLSDIRECTORY/node/24.0.0 $AGENT_TOOLSDIRECTORY/go && echo more > $AGENT_TOOLSDIRECTORY/go/file && cd $RUNNER_TOOL_CACHE && ls node && ls go
		dd if=/dev/zero of=/home/runner/fill bs=1M || exit 5`)...)
	cmd.Stderr = &said
	out, err := cmd.Output()
	const want = "root is in memory\nwork is on the disk\ndocker is on the disk\nwritten\nv22.1.0\n22.1.0\n24.0.0\nfile\n"
	if code := exitCode(t, err); code != 5 || string(out) != want || !strings.Contains(said.String(), "[runner.root_full]") {
		t.Errorf("exit %d, output %q, want %q; the verdict is in\n%s", code, out, want, &said)
	}
	if entries, err := os.ReadDir(tools); err != nil || len(entries) != 1 {
		t.Errorf("the host's tools are now %v, %v", entries, err)
	}
	r.nothingLeft("run0")
}

// TestErofsBase boots the plainest image on a base image of erofs.
func TestErofsBase(t *testing.T) {
	r := newRig(t)
	layouts, err := filepath.Glob(filepath.Join(r.state, "images/debian/*"))
	if err != nil || len(layouts) == 0 {
		t.Skipf("needs a Debian base in %s, which the assets of the tests make", r.state)
	}
	out, err := r.flint(t.Context(), nil, "run", "--image", "oci:"+layouts[0], "--filesystem", "erofs", "--", "sh", "-ec", `
		grep -qw erofs /proc/filesystems && echo base is erofs
		[ -u /bin/su ] && echo modes are there
		[ $(stat -c %h /usr/bin/perl) = 2 ] && echo hard links are there
		echo written > /etc/motd && rm /etc/issue && mv /usr/bin/perl /usr/bin/pearl && pearl -e 'print "it is written over\n"'`).Output()
	const want = "base is erofs\nmodes are there\nhard links are there\nit is written over\n"
	if code := exitCode(t, err); code != 0 || string(out) != want {
		t.Errorf("exit %d, output %q, want %q", code, out, want)
	}
	if bases, err := filepath.Glob(filepath.Join(r.state, "images/base/*.erofs")); err != nil || len(bases) == 0 {
		t.Errorf("base images of erofs: %q, %v", bases, err)
	}
	r.nothingLeft("run0")
}
