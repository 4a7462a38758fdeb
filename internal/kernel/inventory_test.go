package kernel

import (
	"errors"
	"os"
	"path/filepath"
	"testing"

	"flint"
)

func code(err error) string {
	var f *flint.Fault
	if !errors.As(err, &f) {
		return ""
	}
	return f.Code
}

func TestInventory(t *testing.T) {
	w := newWorld(t)
	cache := w.cache()
	if id, err := Chosen(t.Context(), cache, Source{Vmlinuz: filepath.Join(w.dir, "none")}); id != "" || code(err) != "kernel.unpack" {
		t.Errorf("got %q, %v", id, err)
	}
	given := filepath.Join(w.dir, "vmlinux-6.99.2")
	w.write(t, given, string(makeKernel("6.99.2")))
	w.write(t, filepath.Join(w.dir, "config-6.99.2"), everyBuiltIn())
	first := w.prepare(t, Source{Vmlinuz: given})
	if err := first.Close(); err != nil {
		t.Fatal(err)
	}
	second := w.prepare(t, Source{})
	packs, err := Packs(cache.Dir)
	if err != nil || len(packs) != 2 || packs[0].Version != testRelease || packs[1].Version != "6.99.2" {
		t.Fatalf("got %+v, %v", packs, err)
	}
	used, idle := packs[0], packs[1]
	if !used.InUse || idle.InUse || used.Monolithic || !idle.Monolithic || used.Size == 0 || used.Path != filepath.Dir(second.Kernel) {
		t.Errorf("got %+v", packs)
	}
	if find(t, idle.Workloads, "docker").Verdict != Works || find(t, used.Workloads, "docker").Verdict != Fails {
		t.Errorf("got %+v", packs)
	}
	for name, want := range map[string]string{testRelease: used.ID, "6.99.2": idle.ID, used.ID: used.ID, idle.ID[:5]: idle.ID} {
		if got, err := Find(cache.Dir, name); err != nil || got.ID != want {
			t.Errorf("%s: got %s, %v", name, got.ID, err)
		}
	}
	for _, name := range []string{"6.99.3", idle.ID[:3], "../" + idle.ID} {
		if _, err := Find(cache.Dir, name); code(err) != "kernel.unknown" || !errors.Is(err, flint.ErrNotFound) {
			t.Errorf("%s: %v", name, err)
		}
	}
	p := w.preparer()
	if name, err := p.packageName(""); err != nil || recall(p.memory(name)).Key == "" {
		t.Errorf("nothing is remembered of %q, %v", name, err)
	}
	again := w.prepare(t, Source{Pack: "6.99.2"})
	if again.Kernel != first.Kernel || again.Modules != "" {
		t.Errorf("by its version: %+v", again)
	}
	w.fails(t, Source{Pack: "6.99.3"}, "kernel.unknown", "6.99.3")
	w.fails(t, Source{Pack: "6.99.2", Package: "linux-image-x"}, "kernel.source", "more than one")
	if err := Remove(t.Context(), cache, idle); code(err) != "kernel.used" || !errors.Is(err, flint.ErrConflict) {
		t.Errorf("in use: %v", err)
	}
	if err := again.Close(); err != nil {
		t.Fatal(err)
	}
	if err := Remove(t.Context(), cache, idle); err != nil {
		t.Fatal(err)
	}
	wantGone(t, idle.Path)
	if id, err := Chosen(t.Context(), cache, Source{Vmlinuz: given}); id != "" || code(err) != "kernel.unknown" {
		t.Errorf("removed, yet chosen: %q, %v", id, err)
	}
}

// everyBuiltIn is everyOption of a kernel without modules.
func everyBuiltIn() string {
	config := ""
	for option := range readConfig([]byte(everyOption())) {
		config += "CONFIG_" + option + "=y\n"
	}
	return config
}

// TestTwoPacksOfOneVersion: which one is meant is said, not guessed.
func TestTwoPacksOfOneVersion(t *testing.T) {
	w := newWorld(t)
	given := filepath.Join(w.dir, "vmlinux")
	w.write(t, given, string(makeKernel(testRelease)))
	w.prepare(t, Source{Vmlinuz: given})
	w.prepare(t, Source{})
	_, err := Find(w.cache().Dir, testRelease)
	if code(err) != "kernel.unknown" || !errors.Is(err, flint.ErrConflict) {
		t.Errorf("got %v", err)
	}
}

func TestOwnKernel(t *testing.T) {
	const release = "6.8.0-31-generic"
	for name, tt := range map[string]struct {
		files []string
		want  Source
	}{
		"Debian and Ubuntu": {
			[]string{"boot/vmlinuz-" + release, "lib/modules/" + release + "/modules.builtin"},
			Source{Vmlinuz: "boot/vmlinuz-" + release, ModuleTree: "lib/modules/" + release},
		},
		"beside its modules": {
			[]string{"usr/lib/modules/" + release + "/vmlinuz"},
			Source{Vmlinuz: "usr/lib/modules/" + release + "/vmlinuz", ModuleTree: "usr/lib/modules/" + release},
		},
		"no modules": {files: []string{"boot/vmlinuz-" + release}},
		"no kernel":  {files: []string{"lib/modules/" + release + "/modules.builtin"}},
		"another":    {files: []string{"boot/vmlinuz-6.8.0-30-generic", "lib/modules/6.8.0-30-generic/modules.builtin"}},
	} {
		t.Run(name, func(t *testing.T) {
			root := t.TempDir()
			for _, f := range tt.files {
				if err := os.MkdirAll(filepath.Join(root, filepath.Dir(f)), 0o755); err != nil {
					t.Fatal(err)
				}
				if err := os.WriteFile(filepath.Join(root, f), nil, 0o644); err != nil {
					t.Fatal(err)
				}
			}
			got, err := OwnKernel(root, release)
			if tt.want.Vmlinuz == "" {
				if code(err) != "kernel.host" {
					t.Errorf("got %+v, %v", got, err)
				}
				return
			}
			if err != nil || got.Vmlinuz != filepath.Join(root, tt.want.Vmlinuz) || got.ModuleTree != filepath.Join(root, tt.want.ModuleTree) {
				t.Errorf("got %+v, %v", got, err)
			}
		})
	}
}
