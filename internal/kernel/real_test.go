package kernel

import (
	"bufio"
	"bytes"
	"errors"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/Microsoft/hcsshim/ext4/tar2ext4"
	"github.com/cavaliergopher/cpio"

	"flint"
	"flint/internal/tool"
)

// TestRealPackage makes a pack of the distribution's real kernel package and looks at it with the tools of others.
func TestRealPackage(t *testing.T) {
	for _, name := range []string{"apt-get", "apt-cache", "depmod", "e2fsck"} {
		if _, err := tool.Find(name); err != nil {
			t.Skipf("needs %s", name)
		}
	}
	osRelease, err := os.ReadFile("/etc/os-release")
	if err != nil {
		t.Skip("needs a Debian or Ubuntu: there is no /etc/os-release")
	}
	p := newPreparer(Config{Dir: t.TempDir(), Agent: buildAgent(t), Log: nil})
	name := cloudPackage(osRelease, p.arch)
	if name == "" {
		t.Skip("needs a Debian or Ubuntu: no other distribution's kernel package is known")
	}
	if _, err := p.run(t.Context(), "", "apt-cache", "show", "--", name); err != nil {
		t.Skipf("needs apt's lists with %s: run apt-get update", name)
	}
	if raceDetector {
		withoutRaceDetector(t)
		return
	}
	pack, err := p.prepare(t.Context(), Source{})
	if err != nil {
		t.Fatal(err)
	}
	if pack.Version == "" || pack.Arch != p.arch || len(pack.Missing) != 0 {
		t.Errorf("got %+v", pack)
	}
	files := initramfsFiles(t, pack.Initrd)
	checkRealOrder(t, files)
	if want := "\x7fELF"; !strings.HasPrefix(files["init"], want) {
		t.Error("/init is not the agent")
	}
	sized(t, pack.Kernel, 20<<20, 200<<20)
	sized(t, pack.Initrd, 1<<20, 20<<20)
	sized(t, pack.Modules, 20<<20, 1<<30)
	checkModulesImage(t, pack.Modules)
	// Without its modules it reaches neither its drives nor the host.
	var fault *flint.Fault
	if _, err := p.prepare(t.Context(), Source{Vmlinuz: pack.Kernel}); !errors.As(err, &fault) || fault.Code != "kernel.lacks" {
		t.Errorf("without its modules: %v", err)
	}
	if _, err := tool.Find("cpio"); err == nil {
		out, err := exec.Command("sh", "-c", `cpio -t <"$1"`, "sh", pack.Initrd).Output()
		if err != nil || !bytes.Contains(out, []byte("modules/order\n")) {
			t.Errorf("cpio -t: %v\n%s", err, out)
		}
	}
}

// TestRealMonolithic looks at the kernel that make kernel builds, if it has.
func TestRealMonolithic(t *testing.T) {
	vmlinux := os.Getenv("FLINT_TEST_MONOLITHIC")
	if vmlinux == "" {
		t.Skip("needs a kernel from source: FLINT_TEST_MONOLITHIC names none, and make kernel has not built one")
	}
	p := newPreparer(Config{Dir: t.TempDir(), Agent: buildAgent(t), Log: nil})
	pack, err := p.prepare(t.Context(), Source{Vmlinuz: vmlinux, Needs: []string{NeedsPVH, NeedsACPI, NeedsSerial, NeedsVsock}})
	if err != nil {
		t.Fatal(err)
	}
	if len(pack.Missing) != 0 || pack.Modules != "" || !strings.HasSuffix(pack.Version, "-flint") {
		t.Errorf("got %+v", pack)
	}
	b, err := os.ReadFile(pack.Kernel)
	if err != nil {
		t.Fatal(err)
	}
	beside, err := os.ReadFile(vmlinux + ".config")
	if err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(embeddedConfig(b), beside) {
		t.Error("the configuration it carries is not the one beside it")
	}
	if missing := missingDrivers(b); len(missing) != 0 {
		t.Errorf("by their names these drivers are missing: %q", missing)
	}
}

// withoutRaceDetector runs the same test in a process of its own, because unpacking xz takes ten times as long under
// the race detector, which the tests with small packages have already satisfied.
func withoutRaceDetector(t *testing.T) {
	out, err := exec.CommandContext(t.Context(), "go", "test", "-count=1", "-v", "-run", "^"+t.Name()+"$", ".").CombinedOutput()
	t.Logf("%s", out)
	if err != nil || !bytes.Contains(out, []byte("--- PASS: "+t.Name())) {
		t.Errorf("run it without the race detector: %v", err)
	}
}

// buildAgent builds a static stand-in for the agent.
func buildAgent(t *testing.T) string {
	t.Helper()
	dir := t.TempDir()
	src, out := filepath.Join(dir, "main.go"), filepath.Join(dir, "agent")
	if err := os.WriteFile(src, []byte("package main\n\nfunc main() {}\n"), 0o644); err != nil {
		t.Fatal(err)
	}
	cmd := exec.CommandContext(t.Context(), "go", "build", "-trimpath", "-ldflags=-s -w", "-o", out, src)
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
	if b, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("build agent: %v\n%s", err, b)
	}
	return out
}

func initramfsFiles(t *testing.T, path string) map[string]string {
	t.Helper()
	f, err := os.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	files := map[string]string{}
	r := cpio.NewReader(bufio.NewReader(f))
	for {
		h, err := r.Next()
		if errors.Is(err, io.EOF) {
			return files
		}
		if err != nil {
			t.Fatal(err)
		}
		b, err := io.ReadAll(r)
		if err != nil {
			t.Fatal(err)
		}
		files[h.Name] = string(b)
	}
}

// checkRealOrder fails unless every line of /modules/order names an uncompressed module of the initramfs, and every
// module is in a line.
func checkRealOrder(t *testing.T, files map[string]string) {
	t.Helper()
	listed := 0
	for line := range strings.Lines(files["modules/order"]) {
		listed++
		file, group, _ := strings.Cut(strings.TrimSpace(line), " ")
		if !strings.HasPrefix(files["modules/"+file], "\x7fELF") {
			t.Errorf("%s is not in the initramfs", file)
		}
		if group != "" && group != groupSerial && group != groupVsock && group != groupErofs && group != groupLate {
			t.Errorf("%s has group %q", file, group)
		}
	}
	modules := 0
	for name := range files {
		if strings.HasSuffix(name, ".ko") {
			modules++
		}
	}
	if listed != modules {
		t.Errorf("%d modules are listed, %d are there", listed, modules)
	}
	t.Logf("modules/order:\n%s", files["modules/order"])
}

func sized(t *testing.T, path string, least, most int64) {
	t.Helper()
	info, err := os.Stat(path)
	if err != nil || info.Size() < least || info.Size() > most {
		t.Errorf("%s: %v, %d bytes", path, err, info.Size())
	}
	t.Logf("%s has %d bytes", filepath.Base(path), info.Size())
}

func checkModulesImage(t *testing.T, path string) {
	t.Helper()
	f, err := os.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if _, _, err := tar2ext4.Ext4FileSystemSize(f); err != nil {
		t.Error(err)
	}
	fsck, err := tool.Find("e2fsck")
	if err != nil {
		t.Fatal(err)
	}
	if out, err := exec.CommandContext(t.Context(), fsck, "-f", "-n", path).CombinedOutput(); err != nil {
		t.Errorf("e2fsck: %v\n%s", err, out)
	}
	debugfs, err := tool.Find("debugfs")
	if err != nil {
		return
	}
	out, err := exec.CommandContext(t.Context(), debugfs, "-R", "stat /modules.dep.bin", path).CombinedOutput()
	if err != nil || !bytes.Contains(out, []byte("Type: regular")) {
		t.Errorf("modules.dep.bin is not at the image's root: %v\n%s", err, out)
	}
}
