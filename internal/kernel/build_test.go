package kernel

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"flint"
)

// distribution puts programs before those of this machine: a distribution that has the source of a kernel, which takes no time
// to build.
func distribution(t *testing.T) string {
	t.Helper()
	dir := t.TempDir()
	for name, script := range map[string]string{
		"dpkg":       `case $1 in -L) echo "$SOURCES/usr/src/linux-source-6.99.tar.xz" ;; *) echo amd64 ;; esac`,
		"dpkg-query": `echo "installed 6.99.1-1"`,
		"apt-cache":  `case $1 in pkgnames) echo linux-source-6.99 ;; *) echo "  Candidate: 6.99.1-1" ;; esac`,
		"apt-get":    `echo "it would install $*" >&2; exit 1`,
		"df":         `echo Avail; echo 99999M`,
		"tar":        `while [ $# -gt 0 ]; do [ "$1" != -C ] || touch "$2/Makefile"; shift; done`,
		"objcopy":    `cp "$2" "$3"`,
		"make": `for a; do case $a in O=*) o=${a#O=} ;; KCONFIG_ALLCONFIG=*) cp "${a#*=}" "$o/.config" && exit ;; esac; done
echo "  CC      kernel/fork.o"; [ ! -e "$SOURCES/broken" ] || { echo "fork.c:1: error: No space left on device" >&2; exit 2; }
printf kernel >"$o/vmlinux"`,
	} {
		// The environment is filtered, so the place of the source is written into each.
		text := "#!/bin/bash\nSOURCES=" + dir + "\n" + script + "\n"
		if err := os.WriteFile(filepath.Join(dir, name), []byte(text), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	source := filepath.Join(dir, "usr/src/linux-source-6.99.tar.xz")
	if err := errors.Join(os.MkdirAll(filepath.Dir(source), 0o755), os.WriteFile(source, nil, 0o600)); err != nil {
		t.Fatal(err)
	}
	t.Setenv("PATH", dir+":"+os.Getenv("PATH"))
	return dir
}

func TestBuildFromSource(t *testing.T) {
	if newPreparer(Config{}).arch != "amd64" {
		t.Skip("needs an amd64 machine: the made up distribution is one's")
	}
	dir := distribution(t)
	out := filepath.Join(t.TempDir(), "out")
	var lines []string
	progress := func(m flint.Milestone) { lines = append(lines, m.Line+m.Detail) }
	said := func(want string) bool {
		return slices.ContainsFunc(lines, func(l string) bool { return strings.Contains(l, want) })
	}
	broken := filepath.Join(dir, "broken")
	if err := os.WriteFile(broken, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := BuildFromSource(t.Context(), Build{Dir: out, Jobs: 1}, progress); code(err) != "kernel.space" {
		t.Errorf("got %v", err)
	}
	if err := os.Remove(broken); err != nil {
		t.Fatal(err)
	}
	vmlinux, err := BuildFromSource(t.Context(), Build{Dir: out, Jobs: 1}, progress)
	if err != nil || vmlinux != filepath.Join(out, "vmlinux") || !said("CC      kernel/fork.o") || !said("building Linux 6.99.1-1") {
		t.Fatalf("got %q, %v\n%s", vmlinux, err, strings.Join(lines, "\n"))
	}
	config, err := os.ReadFile(vmlinux + ".config")
	if err != nil || readConfig(config)["WIREGUARD"] != "y" {
		t.Errorf("the configuration is not beside it: %v", err)
	}
	lines = nil
	if _, err := BuildFromSource(t.Context(), Build{Dir: out}, progress); err != nil || !said("is there: Linux 6.99.1-1") || said("CC ") {
		t.Errorf("it was built again: %v\n%s", err, strings.Join(lines, "\n"))
	}
	if _, err := BuildFromSource(t.Context(), Build{Dir: out, Series: "6.98"}, progress); code(err) != "kernel.build" || !strings.Contains(err.Error(), "linux-source-6.98") {
		t.Errorf("got %v", err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := BuildFromSource(ctx, Build{Dir: out}, nil); !errors.Is(err, context.Canceled) {
		t.Errorf("got %v", err)
	}
}
