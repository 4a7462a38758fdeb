package qemu

import (
	"os"
	"path/filepath"
	"slices"
	"syscall"
	"testing"
)

// TestOwnInstallation runs QEMUs that are installed outside the system's directories, and looks what of those they see.
func TestOwnInstallation(t *testing.T) {
	for name, c := range map[string]struct {
		binary string   // in the top directory
		sees   []string // there, beside the binary and what is above it
	}{
		"in a bin":         {"own/qemu/bin/fake-qemu", []string{"own/qemu/bin/other", "own/qemu/bin/lib", "own/qemu/lib", "own/qemu/lib64", "own/qemu/share"}},
		"in another place": {"own/build/fake-qemu", []string{"own/build/other", "own/build/lib"}},
	} {
		t.Run(name, func(t *testing.T) {
			d, s := fakeDriver(t, "reports")
			if !d.isolate {
				t.Skip("needs root: QEMU has no root directory of its own")
			}
			top := filepath.Dir(d.binary)
			dir := filepath.Dir(filepath.Join(top, c.binary))
			for _, made := range []string{
				"secret", "own/secret", filepath.Join(filepath.Dir(c.binary), "lib"), "own/qemu/lib", "own/qemu/share", "own/qemu/secret",
			} {
				if err := os.MkdirAll(filepath.Join(top, made), 0o755); err != nil {
					t.Fatal(err)
				}
			}
			if err := os.MkdirAll(dir, 0o755); err != nil {
				t.Fatal(err)
			}
			for _, err := range []error{
				os.Symlink("lib", filepath.Join(top, "own/qemu/lib64")),
				os.Rename(d.binary, filepath.Join(top, c.binary)),
				os.WriteFile(filepath.Join(dir, "other"), nil, 0o644),
			} {
				if err != nil {
					t.Fatal(err)
				}
			}
			d.binary = filepath.Join(top, c.binary)
			defer syscall.Umask(syscall.Umask(0o077)) // as a careful service has it
			m, err := d.Boot(patiently(t), s)
			if err != nil {
				t.Fatal(err)
			}
			defer m.Close(t.Context())
			want := []string{filepath.Join(top, c.binary)}
			for _, path := range c.sees {
				want = append(want, filepath.Join(top, path))
			}
			var got []string
			for _, path := range readReport(t, m).Near {
				// The directories that lead there are there of necessity.
				if rel, err := filepath.Rel(path, d.binary); err == nil && (rel == "." || rel[0] == '.') {
					got = append(got, path)
				}
			}
			slices.Sort(want)
			slices.Sort(got)
			if !slices.Equal(got, want) {
				t.Errorf("sees %q, want %q", got, want)
			}
		})
	}
}

func TestInstallation(t *testing.T) {
	for binary, want := range map[string][]string{
		"/opt/qemu/bin/qemu": {"/opt/qemu/bin", "/opt/qemu/lib", "/opt/qemu/lib64", "/opt/qemu/share"},
		"/opt/qemu":          {"/opt"},
		"/qemu":              nil,
		"/nix/store/0123456789abcdfg-qemu-9.0/bin/qemu": {"/nix/store"},
		"/nix/bin/qemu": {"/nix/bin", "/nix/lib", "/nix/lib64", "/nix/share"},
	} {
		if got := installation(binary); !slices.Equal(got, want) {
			t.Errorf("%s: %q, want %q", binary, got, want)
		}
	}
}
