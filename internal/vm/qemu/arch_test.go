package qemu

import (
	"errors"
	"runtime"
	"slices"
	"strings"
	"testing"

	"flint"
	"flint/internal/vm"
)

func TestForeignArchitecture(t *testing.T) {
	foreign := map[string]string{"amd64": "arm64", "arm64": "amd64"}[runtime.GOARCH]
	if foreign == "" {
		t.Skipf("needs a machine flint runs on, not %s", runtime.GOARCH)
	}
	d, err := New(t.Context(), Config{Binary: "/bin/true", Arch: foreign})
	if err != nil {
		t.Fatal(err)
	}
	if a, s := d.Accel(); a != TCG || s.State == vm.KVMWorks {
		t.Errorf("%s is run with %s, KVM %s", foreign, a, s)
	}
	var f *flint.Fault
	if _, err := New(t.Context(), Config{Binary: "/bin/true", Arch: foreign, Accel: KVM}); !errors.As(err, &f) || f.Code != "qemu.kvm" {
		t.Errorf("KVM for %s: %#v", foreign, err)
	}
	if _, err := New(t.Context(), Config{Binary: "/bin/true", Arch: "riscv64"}); !errors.As(err, &f) || f.Code != "qemu.arch" || !errors.Is(err, flint.ErrConfig) {
		t.Errorf("no machine: %#v", err)
	}
	if d, err := New(t.Context(), Config{Binary: "/bin/true", Accel: TCG}); err != nil || d.target.arch != runtime.GOARCH {
		t.Errorf("by itself it is for %s, %v", d.target.arch, err)
	}
}

func TestArgumentsOfArchitectures(t *testing.T) {
	for arch, c := range map[string]struct {
		has, lacks []string // of the command line, joined by spaces
		drives     []string // in the order of the command line
	}{
		"amd64": {
			has:    []string{"-machine microvm,acpi=on,", " console=ttyS0 ", " reboot=t ", " tsc_early_khz=1000000 tsc=reliable ", " noreplace-smp", "-bios /rom "},
			lacks:  []string{"ttyAMA0"},
			drives: []string{"base", "scratch", "runner"},
		},
		"arm64": {
			has:    []string{"-machine virt,", " console=ttyAMA0 ", " flint.drives=base,scratch,runner "},
			lacks:  []string{"ttyS0", "reboot=", "tsc", "8250", "noreplace-smp", "-bios"},
			drives: []string{"runner", "scratch", "base"}, // the guest counts from the end
		},
	} {
		t.Run(arch, func(t *testing.T) {
			d, err := New(t.Context(), Config{Binary: "/bin/true", Arch: arch, Accel: TCG})
			if err != nil {
				t.Fatal(err)
			}
			if d.firmware != "" && arch == "arm64" || d.tscKHz != 0 && arch == "arm64" {
				t.Errorf("firmware %q, time stamp counter of %d kHz", d.firmware, d.tscKHz)
			}
			if arch == "amd64" {
				d.firmware, d.tscKHz = "/rom", 1_000_000 // whatever this machine has
			}
			s := vm.Spec{ID: "x", CPUs: 1, Memory: 512 * flint.MiB, Drives: []vm.Drive{{ID: "base", ReadOnly: true}, {ID: "scratch"}, {ID: "runner", ReadOnly: true}}}
			args, err := d.arguments(s, handles{drives: []int{10, 11, 12}})
			if err != nil {
				t.Fatal(err)
			}
			line := strings.Join(args, " ")
			for _, want := range c.has {
				if !strings.Contains(line, want) {
					t.Errorf("lacks %q", want)
				}
			}
			for _, not := range c.lacks {
				if strings.Contains(line, not) {
					t.Errorf("has %q", not)
				}
			}
			var drives []string
			for i, a := range args {
				if _, serial, ok := strings.Cut(a, ",serial="); ok && args[i-1] == "-device" {
					drives = append(drives, serial)
				}
			}
			if !slices.Equal(drives, c.drives) || !strings.Contains(line, "-add-fd fd=11,set=1 ") {
				t.Errorf("drives %q in %s", drives, line)
			}
		})
	}
}
