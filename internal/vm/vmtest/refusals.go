package vmtest

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"flint"
	"flint/internal/vm"
)

func (s suite) cancelledBoot(t *testing.T) {
	d, spec := s.make(t)
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	nothingLeft(t, spec, func() {
		if m, err := d.Boot(ctx, spec); !errors.Is(err, context.Canceled) {
			t.Errorf("boot with a context that is over: %v, %v", m, err)
		}
	})
}

func (s suite) badSpec(t *testing.T) {
	d, good := s.make(t)
	absent := filepath.Join(good.Dir, "absent")
	for name, spoil := range map[string]func(*vm.Spec){
		"no id":            func(s *vm.Spec) { s.ID = "" },
		"id with options":  func(s *vm.Spec) { s.ID = "a,b=c" },
		"id too long":      func(s *vm.Spec) { s.ID = strings.Repeat("a", 64) },
		"no processor":     func(s *vm.Spec) { s.CPUs = 0 },
		"odd memory":       func(s *vm.Spec) { s.Memory = 512*flint.MiB + 1 },
		"little memory":    func(s *vm.Spec) { s.Memory = flint.MiB },
		"no kernel":        func(s *vm.Spec) { s.Kernel = absent },
		"relative kernel":  func(s *vm.Spec) { s.Kernel = "vmlinux" },
		"no initrd":        func(s *vm.Spec) { s.Initrd = "" },
		"no directory":     func(s *vm.Spec) { s.Dir = absent },
		"newline argument": func(s *vm.Spec) { s.Args = []string{"a\nb"} },
		"missing drive":    func(s *vm.Spec) { s.Drives = append(s.Drives, vm.Drive{ID: "extra", Path: absent}) },
		"drive id twice":   func(s *vm.Spec) { s.Drives = append(s.Drives, s.Drives[0]) },
		"drive id too long": func(s *vm.Spec) {
			s.Drives = append(s.Drives, vm.Drive{ID: strings.Repeat("a", 21), Path: s.Kernel, ReadOnly: true})
		},
		"drive id with options": func(s *vm.Spec) {
			s.Drives = append(s.Drives, vm.Drive{ID: "a,b=c", Path: s.Kernel, ReadOnly: true})
		},
		"MAC too short": func(s *vm.Spec) { s.NIC = &vm.NIC{MAC: []byte{2, 0}} },
	} {
		t.Run(name, func(t *testing.T) {
			spec := good
			spec.Args, spec.Drives = slices.Clone(good.Args), slices.Clone(good.Drives)
			if len(spec.Drives) == 0 && name == "drive id twice" {
				t.Skip("the spec has no drive")
			}
			spoil(&spec)
			nothingLeft(t, good, func() {
				if m, err := d.Boot(t.Context(), spec); err == nil {
					t.Errorf("it was taken")
					_ = m.Close(context.Background())
				}
			})
		})
	}
}

// nothingLeft checks that f leaves no file in the spec's directory, no descriptor and no child process.
func nothingLeft(t *testing.T, spec vm.Spec, f func()) {
	t.Helper()
	f() // once before, for what Go's own run time opens on first use
	before := holdings(t, spec)
	f()
	after := holdings(t, spec)
	for _, h := range before {
		if i := slices.Index(after, h); i >= 0 {
			after = slices.Delete(after, i, i+1)
		}
	}
	for _, h := range after {
		t.Errorf("%s is left", h)
	}
}

// holdings lists what this process has.
func holdings(t *testing.T, spec vm.Spec) []string {
	t.Helper()
	var all []string
	entries, err := os.ReadDir(spec.Dir)
	if err != nil {
		t.Fatal(err)
	}
	for _, e := range entries {
		all = append(all, "file "+e.Name())
	}
	fds, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		t.Logf("descriptors and children are not checked: %v", err)
		return all
	}
	for _, fd := range fds {
		if target, err := os.Readlink("/proc/self/fd/" + fd.Name()); err == nil { // not the one that reads the directory
			all = append(all, fmt.Sprintf("descriptor %s of %s", fd.Name(), target))
		}
	}
	threads, _ := filepath.Glob("/proc/self/task/*/children")
	for _, file := range threads {
		children, _ := os.ReadFile(file)
		for pid := range strings.FieldsSeq(string(children)) {
			all = append(all, "child process "+pid)
		}
	}
	return all
}
