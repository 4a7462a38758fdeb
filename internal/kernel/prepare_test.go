package kernel

import (
	"bytes"
	"context"
	"crypto/sha256"
	"debug/elf"
	"encoding/hex"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"

	"flint"
)

// apt is a distribution's archive, and the depmod that goes with it, as our runner sees them.
type apt struct {
	mu      sync.Mutex
	show    map[string]string // answers of apt-cache show
	debs    map[string][]byte // what apt-get download of package:arch=version leaves
	modules map[string][]string
	absent  []string // programs that are not installed
	offline bool
	calls   []string
}

func (a *apt) run(ctx context.Context, dir, name string, args ...string) ([]byte, error) {
	a.mu.Lock()
	defer a.mu.Unlock()
	if err := ctx.Err(); err != nil {
		return nil, err
	}
	if slices.Contains(a.absent, name) {
		return nil, fmt.Errorf("find %s: %w", name, exec.ErrNotFound)
	}
	a.calls = append(a.calls, name+" "+args[0])
	switch name {
	case "apt-cache":
		if out, ok := a.show[args[len(args)-1]]; ok {
			return []byte(out), nil
		}
		return nil, errors.New("E: No packages found")
	case "apt-get":
		if a.offline {
			return nil, errors.New("E: Failed to fetch: could not connect")
		}
		for _, pkg := range args[slices.Index(args, "--")+1:] {
			deb, ok := a.debs[pkg]
			if !ok {
				return nil, fmt.Errorf("E: no %s", pkg)
			}
			if err := os.WriteFile(filepath.Join(dir, strings.ReplaceAll(pkg, ":", "_")+".deb"), deb, 0o644); err != nil {
				return nil, err
			}
		}
		return nil, nil
	case "depmod":
		if args[0] == "--version" {
			return []byte("kmod version 0"), nil
		}
		return nil, a.depmod(filepath.Join(dir, "usr/lib/modules", args[len(args)-1]))
	}
	return nil, fmt.Errorf("unexpected call of %s", name)
}

// depmod writes modules.dep for the modules that the tree and the archive's list have in common.
func (a *apt) depmod(tree string) error {
	needs := map[string][]string{}
	for p, n := range a.modules {
		needs[moduleName(p)] = n
	}
	found := map[string][]string{}
	err := filepath.WalkDir(tree, func(p string, _ os.DirEntry, err error) error {
		rel, _ := filepath.Rel(tree, p)
		if n, known := needs[moduleName(rel)]; known {
			found[rel] = n
		}
		return err
	})
	return errors.Join(err, os.WriteFile(filepath.Join(tree, "modules.dep"), depFile(found), 0o644))
}

// took returns the calls since it was last asked.
func (a *apt) took() []string {
	a.mu.Lock()
	defer a.mu.Unlock()
	calls := a.calls
	a.calls = nil
	return calls
}

// offer puts a package into the archive, with a .deb where it has one.
func (a *apt) offer(name, version, depends string, deb []byte) {
	sum := sha256.Sum256(deb)
	a.show[name] = fmt.Sprintf("Package: %s\nVersion: %s\nArchitecture: amd64\nDepends: %s\nDescription: first\n second: line\n"+
		"SHA256: %s\n\nPackage: %s\nVersion: 0~older\n", name, version, depends, hex.EncodeToString(sum[:]), name)
	a.debs[name+":amd64="+version] = deb
}

// world is a machine to prepare packs on.
type world struct {
	*apt
	dir   string
	lists string
	log   lockedBuffer
}

func newWorld(t testing.TB) *world {
	t.Helper()
	w := &world{apt: &apt{show: map[string]string{}, debs: map[string][]byte{}, modules: testModules()}, dir: t.TempDir()}
	w.lists = filepath.Join(t.TempDir(), "lists")
	w.write(t, w.lists, "1")
	w.write(t, filepath.Join(w.dir, "os-release"), "NAME=\"Debian GNU/Linux\"\nID=debian\n")
	w.write(t, filepath.Join(w.dir, "agent"), string(makeELF(elf.EM_X86_64, false, "agent one")))
	w.offer("linux-image-cloud-amd64", "6.99.1-7", "linux-image-"+testRelease+" (= 6.99.1-7)", []byte("nothing in it"))
	w.offer("linux-image-"+testRelease, "6.99.1-7", "kmod, linux-base (>= 4.3~), initramfs-tools | linux-initramfs-tool",
		kernelDeb(t, testRelease, testModules()))
	return w
}

func (w *world) write(t testing.TB, path, content string) {
	t.Helper()
	if err := os.WriteFile(path, []byte(content), 0o644); err != nil {
		t.Fatal(err)
	}
}

// preparer is one of a new process.
func (w *world) preparer() *preparer {
	p := newPreparer(Config{
		Dir: filepath.Join(w.dir, "cache"), Agent: filepath.Join(w.dir, "agent"), Log: slog.New(slog.NewTextHandler(&w.log, nil)),
	})
	p.arch, p.run = "amd64", w.run
	p.apt = aptPlaces{paths: []string{w.lists}, osRelease: filepath.Join(w.dir, "os-release")}
	return p
}

func (w *world) prepare(t testing.TB, s Source) Pack {
	t.Helper()
	pack, err := w.preparer().prepare(t.Context(), s)
	if err != nil {
		t.Fatal(err)
	}
	return pack
}

// fails runs prepare and checks the fault it ends in.
func (w *world) fails(t *testing.T, s Source, code, want string) *flint.Fault {
	t.Helper()
	_, err := w.preparer().prepare(t.Context(), s)
	var f *flint.Fault
	if !errors.As(err, &f) || f.Code != code || !strings.Contains(f.Error(), want) {
		t.Fatalf("got %v, want %s with %q", err, code, want)
	}
	if f.Fix == "" {
		t.Errorf("%s says no fix", code)
	}
	return f
}

func TestPrepareFromPackage(t *testing.T) {
	w := newWorld(t)
	pack := w.prepare(t, Source{})
	if pack.Version != testRelease || pack.Arch != "amd64" {
		t.Errorf("got %+v", pack)
	}
	if !slices.Contains(pack.Missing, "BRIDGE") || slices.Contains(pack.Missing, "VETH") {
		t.Errorf("missing: %q", pack.Missing)
	}
	kernel, err := os.ReadFile(pack.Kernel)
	if err != nil || !bytes.Equal(kernel, makeKernel(testRelease)) {
		t.Errorf("the kernel is not the package's (%v)", err)
	}
	initrd, err := os.ReadFile(pack.Initrd)
	if err != nil || !bytes.Contains(initrd, []byte("agent one")) || !bytes.Contains(initrd, []byte("\x7fELF module overlay.ko")) {
		t.Errorf("the initramfs lacks the agent, or a module that was compressed (%v)", err)
	}
	for _, path := range []string{pack.Kernel, pack.Initrd, pack.Modules} {
		info, err := os.Stat(path)
		if err != nil || info.Mode().Perm()&0o444 != 0o444 || !filepath.IsAbs(path) {
			t.Errorf("%s: %v %v", path, info.Mode(), err)
		}
	}
	left, err := filepath.Glob(filepath.Join(w.dir, "cache", "*.[nw]*"))
	if err != nil || len(left) != 0 {
		t.Errorf("left behind: %q", left)
	}
	if calls := w.took(); !slices.Equal(calls, []string{
		"apt-cache show", "apt-cache show", "depmod --version", "apt-get download", "depmod -C",
	}) {
		t.Errorf("calls: %q", calls)
	}
}

func TestPrepareAgainDoesNothing(t *testing.T) {
	w := newWorld(t)
	first := w.prepare(t, Source{})
	w.took()
	if again := w.prepare(t, Source{}); again.Kernel != first.Kernel || again.Initrd != first.Initrd || !slices.Equal(again.Missing, first.Missing) {
		t.Errorf("got %+v after %+v", again, first)
	}
	w.write(t, filepath.Join(w.dir, "agent"), string(makeELF(elf.EM_X86_64, false, "agent two")))
	if other := w.prepare(t, Source{}); other.Kernel != first.Kernel || other.Initrd == first.Initrd {
		t.Errorf("with another agent: got %+v after %+v", other, first)
	}
	if calls := w.took(); len(calls) != 0 {
		t.Errorf("calls: %q", calls)
	}
	w.write(t, w.lists, "changed, but not for the kernel")
	w.prepare(t, Source{})
	if calls := w.took(); !slices.Equal(calls, []string{"apt-cache show", "apt-cache show"}) {
		t.Errorf("calls after apt-get update: %q", calls)
	}
}

func TestPrepareNewVersion(t *testing.T) {
	w := newWorld(t)
	first := w.prepare(t, Source{})
	const release = "6.99.2-8-cloud-amd64"
	w.offer("linux-image-cloud-amd64", "6.99.2-1", "linux-image-"+release+" (= 6.99.2-1)", []byte("nothing in it"))
	w.offer("linux-image-"+release, "6.99.2-1", "kmod", kernelDeb(t, release, testModules()))
	w.write(t, w.lists, "updated")
	w.offline = true
	if got := w.prepare(t, Source{}); got.Version != testRelease {
		t.Errorf("offline: got %+v", got)
	}
	if !strings.Contains(w.log.String(), "going on with the one from before") {
		t.Errorf("the log does not say that it is an old kernel: %s", w.log.String())
	}
	w.offline = false
	second := w.prepare(t, Source{})
	if second.Version != release || second.Kernel == first.Kernel {
		t.Errorf("got %+v", second)
	}
	if _, err := os.Stat(first.Kernel); err != nil {
		t.Errorf("the old pack may still be in use: %v", err)
	}
}

func TestPrepareOfflineWithoutLists(t *testing.T) {
	w := newWorld(t)
	first := w.prepare(t, Source{})
	w.show, w.offline = nil, true
	w.write(t, w.lists, "")
	if got := w.prepare(t, Source{}); got.Kernel != first.Kernel {
		t.Errorf("got %+v", got)
	}
}

func TestPackageFaults(t *testing.T) {
	t.Run("lists empty", func(t *testing.T) {
		w := newWorld(t)
		w.show = nil
		if f := w.fails(t, Source{}, "kernel.package", "no such package"); !strings.Contains(f.Fix, "apt-get update") {
			t.Errorf("fix: %s", f.Fix)
		}
	})
	t.Run("no apt", func(t *testing.T) {
		w := newWorld(t)
		w.absent = []string{"apt-cache"}
		w.fails(t, Source{}, "kernel.package", "apt-cache")
	})
	t.Run("unknown distribution", func(t *testing.T) {
		w := newWorld(t)
		w.write(t, filepath.Join(w.dir, "os-release"), "ID=fedora\n")
		w.fails(t, Source{}, "kernel.package", "of this distribution")
	})
	t.Run("no kernel in it", func(t *testing.T) {
		w := newWorld(t)
		w.offer("bash", "5", "base-files", nil)
		if f := w.fails(t, Source{Package: "bash"}, "kernel.package", "holds a kernel"); !strings.Contains(f.Fix, "package of kernels") {
			t.Errorf("fix: %s", f.Fix)
		}
	})
	t.Run("installed only", func(t *testing.T) {
		w := newWorld(t)
		name := "linux-image-" + testRelease
		before, _, _ := strings.Cut(w.show[name], "SHA256:")
		w.show[name] = before
		w.fails(t, Source{}, "kernel.package", "in no archive")
	})
	t.Run("tampered", func(t *testing.T) {
		w := newWorld(t)
		for name, deb := range w.debs {
			w.debs[name] = append(deb, 0)
		}
		w.fails(t, Source{}, "kernel.package", "SHA-256")
	})
	t.Run("no depmod", func(t *testing.T) {
		w := newWorld(t)
		w.absent = []string{"depmod"}
		if f := w.fails(t, Source{}, "kernel.depmod", "depmod"); !strings.Contains(f.Fix, "kmod") {
			t.Errorf("fix: %s", f.Fix)
		}
		if slices.Contains(w.took(), "apt-get download") {
			t.Error("the package was fetched for nothing")
		}
	})
	t.Run("module missing", func(t *testing.T) {
		w := newWorld(t)
		delete(w.modules, "kernel/fs/overlayfs/overlay.ko")
		if f := w.fails(t, Source{}, "kernel.module", "overlay"); f.Kind != flint.ErrConfig {
			t.Errorf("it is a fault of kind %v", f.Kind)
		}
	})
	t.Run("modules of another kernel", func(t *testing.T) {
		w := newWorld(t)
		deb := filepath.Join(w.dir, "odd.deb")
		w.write(t, deb, string(makeDeb(t, "", []debFile{
			{name: "boot/vmlinuz-1", data: makeKernel("6.5-other")},
			{name: "lib/modules/6.6/kernel/a.ko"},
		})))
		if f := w.fails(t, Source{Debs: []string{deb}}, "kernel.format", "calls itself 6.5-other"); f.Kind != flint.ErrConfig {
			t.Errorf("it is a fault of kind %v", f.Kind)
		}
	})
	t.Run("not a kernel package", func(t *testing.T) {
		w := newWorld(t)
		deb := filepath.Join(w.dir, "odd.deb")
		w.write(t, deb, string(makeDeb(t, "gzip", []debFile{{name: "bin/sh"}})))
		if f := w.fails(t, Source{Debs: []string{deb}}, "kernel.unpack", "holds no kernel"); f.Kind != flint.ErrConfig {
			t.Errorf("it is a fault of kind %v", f.Kind)
		}
		if f := w.fails(t, Source{Debs: []string{deb + ".gone"}}, "kernel.unpack", "no such file"); !errors.Is(f, flint.ErrNotFound) {
			t.Errorf("a file that is not there is a fault of kind %v", f.Kind)
		}
	})
}

func TestSourceFaults(t *testing.T) {
	w := newWorld(t)
	for want, s := range map[string]Source{
		"more than one": {Package: "linux-image-amd64", Debs: []string{"x.deb"}},
		"not the name":  {Package: "-o=Dpkg::Options"},
		"its kernel":    {ModuleTree: "/lib/modules/6.1"},
	} {
		if f := w.fails(t, s, "kernel.source", want); !errors.Is(f, flint.ErrUsage) {
			t.Errorf("%s: it is no fault of usage", want)
		}
	}
}

func TestAgentFaults(t *testing.T) {
	w := newWorld(t)
	agent := filepath.Join(w.dir, "agent")
	w.write(t, agent, "#!/bin/sh\n")
	w.fails(t, Source{}, "kernel.agent", "agent")
	w.write(t, agent, string(makeELF(elf.EM_AARCH64, false, "")))
	w.fails(t, Source{}, "kernel.agent", "it is for arm64, the kernel for amd64")
	dynamic := makeELF(elf.EM_X86_64, false, "")
	dynamic[64] = byte(elf.PT_INTERP) // the first program header's type
	w.write(t, agent, string(dynamic))
	w.fails(t, Source{}, "kernel.agent", "not static")
	if err := os.Remove(agent); err != nil {
		t.Fatal(err)
	}
	w.fails(t, Source{}, "kernel.agent", "no such file")
}

func TestPrepareFromFiles(t *testing.T) {
	w := newWorld(t)
	boot, tree := t.TempDir(), filepath.Join(t.TempDir(), "lib", "modules", testRelease)
	vmlinuz := filepath.Join(boot, "vmlinuz-"+testRelease)
	w.write(t, vmlinuz, string(makeKernel(testRelease)))
	w.write(t, filepath.Join(boot, "config-"+testRelease), "CONFIG_VETH=m\n")
	for p := range testModules() {
		if err := os.MkdirAll(filepath.Join(tree, filepath.Dir(p)), 0o755); err != nil {
			t.Fatal(err)
		}
		w.write(t, filepath.Join(tree, p), "\x7fELF")
	}
	w.write(t, filepath.Join(tree, "modules.builtin"), "kernel/fs/ext4/ext4.ko\n")
	w.write(t, filepath.Join(tree, "modules.dep"), "the host's own, not used")
	if err := os.Symlink("/usr/src", filepath.Join(tree, "build")); err != nil {
		t.Fatal(err)
	}
	s := Source{Vmlinuz: vmlinuz, ModuleTree: tree}
	first := w.prepare(t, s)
	if first.Version != testRelease || slices.Contains(first.Missing, "VETH") || !slices.Contains(first.Missing, "BRIDGE") {
		t.Errorf("got %+v", first)
	}
	w.took()
	if again := w.prepare(t, s); again.Kernel != first.Kernel || len(w.took()) != 0 {
		t.Errorf("it was made again: %+v", again)
	}
	w.write(t, filepath.Join(tree, "kernel/fs/overlayfs/overlay.ko"), "\x7fELF changed")
	if changed := w.prepare(t, s); changed.Kernel == first.Kernel {
		t.Error("a changed module goes unnoticed")
	}
}

func TestPrepareTogetherBuildsOnce(t *testing.T) {
	w := newWorld(t)
	deb := filepath.Join(w.dir, "kernel.deb")
	w.write(t, deb, string(w.debs["linux-image-"+testRelease+":amd64=6.99.1-7"]))
	var wg sync.WaitGroup
	packs := make([]Pack, 4)
	for i := range packs {
		p := w.preparer()
		wg.Go(func() {
			var err error
			if packs[i], err = p.prepare(t.Context(), Source{Debs: []string{deb}}); err != nil {
				t.Error(err)
			}
		})
	}
	wg.Wait()
	for _, p := range packs {
		if p.Initrd != packs[0].Initrd || p.Initrd == "" {
			t.Errorf("got %+v and %+v", p, packs[0])
		}
	}
	if calls := w.took(); len(calls) != 2 {
		t.Errorf("calls: %q", calls)
	}
}

func TestDamagedAndHalfMadePacksAreMadeAgain(t *testing.T) {
	w := newWorld(t)
	pack := w.prepare(t, Source{})
	dir := filepath.Dir(pack.Kernel)
	for name, damage := range map[string]func() error{
		"kernel cut short": func() error { return os.Truncate(pack.Kernel, 10) },
		"record gone":      func() error { return os.Remove(filepath.Join(dir, entryFile)) },
		"modules gone":     func() error { return os.Remove(pack.Modules) },
		"half made":        func() error { return os.Rename(dir, dir+".new") },
		"work left over":   func() error { return os.Rename(dir, dir+".work") },
	} {
		w.took()
		if err := damage(); err != nil {
			t.Fatal(err)
		}
		again := w.prepare(t, Source{})
		if again.Kernel != pack.Kernel || !slices.Contains(w.took(), "apt-get download") {
			t.Errorf("%s: not made again", name)
		}
		if b, err := os.ReadFile(again.Kernel); err != nil || !bytes.Equal(b, makeKernel(testRelease)) {
			t.Errorf("%s: wrong kernel (%v)", name, err)
		}
	}
}

func TestPrepareEndsWithItsContext(t *testing.T) {
	w := newWorld(t)
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := w.preparer().prepare(ctx, Source{}); !errors.Is(err, context.Canceled) {
		t.Errorf("got %v", err)
	}
	// Waiting for another who builds ends too.
	pack := w.prepare(t, Source{})
	unlock, err := w.preparer().lock(t.Context(), filepath.Dir(pack.Kernel))
	if err != nil {
		t.Fatal(err)
	}
	defer unlock()
	if _, err := w.preparer().lock(ctx, filepath.Dir(pack.Kernel)); !errors.Is(err, context.Canceled) {
		t.Errorf("got %v", err)
	}
}

func TestStanza(t *testing.T) {
	s := stanza([]byte("\nPackage: a\nDepends: linux-image-6.1 (= 1:2), bb:any | linux-modules-6.1(>= 3) ,\n cc\nDescription: x\n y: z\n\nPackage: second\n"))
	if s["Package"] != "a" || s["Description"] != "x y: z" {
		t.Errorf("got %q", s)
	}
	want := [][]string{{"linux-image-6.1"}, {"bb", "linux-modules-6.1"}, {"cc"}}
	if got := s.depends(); !slices.EqualFunc(got, want, slices.Equal) {
		t.Errorf("got %q, want %q", got, want)
	}
}

func TestCarriesKernel(t *testing.T) {
	for name, want := range map[string]bool{
		"linux-image-6.1.0-56-cloud-amd64":         true,
		"linux-image-6.12.48+deb13-cloud-arm64":    true,
		"linux-image-unsigned-6.8.0-31-generic":    true,
		"linux-modules-6.8.0-31-generic":           true,
		"linux-modules-extra-6.8.0-31-generic":     true,
		"linux-binary-6.19-cloud-amd64":            true,
		"linux-base-6.19-cloud-amd64":              true,
		"linux-image-cloud-amd64":                  false,
		"linux-image-virtual":                      false,
		"linux-base":                               false,
		"linux-headers-6.1.0-56-cloud-amd64":       false,
		"linux-initramfs-tool":                     false,
		"some-linux-image-6.1.0-56-cloud-amd64":    false,
		"linux-image-extra-virtual-hwe-24.04-edge": false,
	} {
		if carriesKernel.MatchString(name) != want {
			t.Errorf("%s: want %v", name, want)
		}
	}
}

func TestRun(t *testing.T) {
	t.Setenv("FLINT_SECRET", "hush")
	out, err := run(t.Context(), t.TempDir(), "env")
	if err != nil || strings.Contains(string(out), "hush") || !strings.Contains(string(out), "LC_ALL=C\n") {
		t.Errorf("got %q, %v", out, err)
	}
	if _, err := run(t.Context(), "", "sh", "-c", "echo reason >&2; exit 3"); err == nil || !strings.Contains(err.Error(), "reason") {
		t.Errorf("got %v", err)
	}
	if _, err := run(t.Context(), "", "no-such-program-anywhere"); !errors.Is(err, exec.ErrNotFound) {
		t.Errorf("got %v", err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := run(ctx, "", "sleep", "60"); !errors.Is(err, context.Canceled) {
		t.Errorf("got %v", err)
	}
}

// BenchmarkPrepareCached is what every start of the daemon pays beside hashing the agent, which is tiny here.
func BenchmarkPrepareCached(b *testing.B) {
	w := newWorld(b)
	w.prepare(b, Source{})
	for b.Loop() {
		w.prepare(b, Source{})
	}
}

// lockedBuffer is a log that several preparers write to at the same time.
type lockedBuffer struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (l *lockedBuffer) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.Write(p)
}

func (l *lockedBuffer) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.String()
}
