package firecracker

import (
	"context"
	"debug/elf"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"time"

	"flint"
)

// Releases that brought something we use. See Firecracker's CHANGELOG.md.
const (
	oldestMinor    = 13
	reportingMinor = 14 // balloon: free_page_reporting
	mtuMinor       = 16 // network-interfaces: mtu
)

func atLeast(v flint.Version, minor int) bool { return v.Compare(flint.Version{1, minor}) >= 0 }

func supported(v flint.Version, path string) error {
	if atLeast(v, oldestMinor) {
		return nil
	}
	return &flint.Fault{
		Code: "firecracker.version", What: fmt.Sprintf("use Firecracker %s (%s)", v, path), Kind: flint.ErrConfig,
		Err: fmt.Errorf("flint needs 1.%d or newer", oldestMinor), Fix: "install a newer release; 1.16.1 is recommended",
	}
}

// findProgram returns the real path of a program: the jailer names directories after it.
func findProgram(name, path string) (string, error) {
	if path == "" {
		path = name
	}
	found, err := exec.LookPath(path)
	if err == nil {
		found, err = filepath.Abs(found)
	}
	if err == nil {
		found, err = filepath.EvalSymlinks(found)
	}
	if err != nil {
		return "", &flint.Fault{
			Code: "firecracker.missing", What: "find the program " + path, Kind: flint.ErrNotFound, Err: err,
			Fix: "install firecracker and jailer of one release in PATH, or set their paths in the configuration",
		}
	}
	return found, unexposed(found)
}

// unexposed makes sure that not everybody can change or replace a program that root is about to start. The doctor has the
// same rule.
func unexposed(program string) error {
	const others = 0o002
	for _, path := range []string{program, filepath.Dir(program)} {
		st, err := os.Stat(path)
		if err != nil {
			return fmt.Errorf("look at %s: %w", path, err)
		}
		if st.Mode().Perm()&others != 0 && !(st.IsDir() && st.Mode()&fs.ModeSticky != 0) {
			return &flint.Fault{
				Code: "firecracker.exposed", What: "run " + program, Kind: flint.ErrPermission,
				Err: fmt.Errorf("everyone can change %s, which root starts", program), Fix: "have it and its directory belong to root, and chmod o-w both",
			}
		}
	}
	return nil
}

// versionWithin bounds what takes milliseconds, on a machine that is itself emulated too.
const versionWithin = 15 * time.Second

// programVersion asks a program for its version.
func programVersion(ctx context.Context, path string) (flint.Version, error) {
	ctx, cancel := context.WithTimeout(ctx, versionWithin)
	defer cancel()
	cmd := exec.CommandContext(ctx, path, "--version")
	cmd.Env = []string{}
	cmd.WaitDelay = time.Second
	out, err := cmd.Output()
	if err == nil {
		if v, ok := flint.FindVersion(string(out[:min(len(out), 4096)])); ok {
			return v, nil
		}
		err = errors.New("it does not say")
	}
	return flint.Version{}, &flint.Fault{
		Code: "firecracker.version", What: "ask " + path + " for its version", Kind: flint.ErrConfig, Err: err,
		Fix: "make sure that it is a release of Firecracker (or its jailer) for this machine's architecture",
	}
}

// selfContained makes sure that a program runs where there is nothing but itself, as a VM's user.
func selfContained(path string) error {
	st, err := os.Stat(path)
	if err != nil {
		return fmt.Errorf("look at %s: %w", path, err)
	}
	if st.Mode()&0o001 == 0 {
		return &flint.Fault{
			Code: "firecracker.unreadable", What: "run " + path + " under the jailer", Kind: flint.ErrPermission,
			Err: fmt.Errorf("the VM's own user may not execute it: %w", fs.ErrPermission), Fix: "chmod a+rx " + path,
		}
	}
	program, err := elf.Open(path)
	if err == nil {
		for _, p := range program.Progs {
			if p.Type == elf.PT_INTERP {
				err = errors.New("it is linked dynamically, and its jail has no libraries")
			}
		}
		err = errors.Join(err, program.Close())
	}
	if err != nil {
		return &flint.Fault{
			Code: "firecracker.static", What: "run " + path + " under the jailer", Kind: flint.ErrConfig, Err: err,
			Fix: "install a release of Firecracker, which is linked statically, and name the program itself, no script around it",
		}
	}
	return nil
}
