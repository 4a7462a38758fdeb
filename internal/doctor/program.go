package doctor

import (
	"context"
	"debug/elf"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"

	"flint"
)

// program is what there is to know of an executable.
type program struct {
	name    string // what was looked for
	path    string // the real one; empty if there is none
	missing error  // why there is none
	exposed bool   // everyone can replace or change it; then it has not been run
	owner   uint32 // of it or else of its directory: a user other than root and this one, who can replace it; or 0
	release flint.Version
	unknown error // why the release is not known
	static  bool
	elf     error // why that is not known
}

func (p program) found() bool { return p.path != "" }

// absence says why a program was not found.
func (p program) absence() string {
	if errors.Is(p.missing, exec.ErrNotFound) {
		return "there is no " + p.name + " in PATH"
	}
	return p.name + " cannot be used: " + p.missing.Error()
}

// find looks a program up and asks it what it is. Path may be empty.
func (e *exam) find(ctx context.Context, path, name string) program {
	if path != "" {
		name = path
	}
	p := program{name: name}
	found, err := e.LookPath(name)
	if err == nil {
		found, err = e.Real(found)
	}
	if err == nil {
		err = e.ordinary(found)
	}
	if err != nil {
		p.missing = err
		return p
	}
	p.path = found
	if p.exposed = e.exposed(found); p.exposed {
		return p
	}
	p.owner = e.owner(found)
	p.static, p.elf = e.static(found)
	text, err := e.Version(ctx, found)
	if err != nil {
		p.unknown = err
		return p
	}
	var ok bool
	if p.release, ok = flint.FindVersion(text); !ok {
		p.unknown = errors.New(found + " does not say its version")
	}
	return p
}

// exposed reports whether everyone may write the file or its directory. A directory with the sticky bit keeps others from
// replacing what is in it.
func (s System) exposed(file string) bool {
	const others = 0o002
	if info, err := s.stat(file); err == nil && info.Mode().Perm()&others != 0 {
		return true
	}
	info, err := s.stat(filepath.Dir(file))
	return err == nil && info.Mode().Perm()&others != 0 && info.Mode()&fs.ModeSticky == 0
}

// ordinary refuses what is no ordinary file: a pipe may have all that a program has, and whoever opens it waits.
func (s System) ordinary(file string) error {
	info, err := s.stat(file)
	if err == nil && !info.Mode().IsRegular() {
		err = errors.New("it is no ordinary file")
	}
	return err
}

// executable reports whether everyone may execute a file.
func (s System) executable(file string) bool {
	info, err := s.stat(file)
	return err == nil && info.Mode().Perm()&0o001 != 0
}

// owner returns the user other than root and this one that a file or its directory belongs to, or 0.
func (s System) owner(file string) uint32 {
	for _, name := range []string{file, filepath.Dir(file)} {
		if info, err := s.stat(name); err == nil {
			if st, ok := info.Sys().(*syscall.Stat_t); ok && st.Uid != 0 && int(st.Uid) != s.User {
				return st.Uid
			}
		}
	}
	return 0
}

// static reports whether an executable is complete in itself: it names no interpreter to load libraries with.
func (s System) static(file string) (bool, error) {
	f, err := s.open(file)
	if err != nil {
		return false, err
	}
	defer f.Close()
	at, ok := f.(io.ReaderAt)
	if !ok {
		return false, errors.New("it cannot be read at will")
	}
	x, err := elf.NewFile(at)
	if err != nil {
		return false, fmt.Errorf("read it as a program: %w", err)
	}
	for _, p := range x.Progs {
		if p.Type == elf.PT_INTERP {
			return false, nil
		}
	}
	return true, nil
}

// Of Firecracker: the oldest release flint drives, the one to install, and a limit of both.
const (
	oldestMinor = 13
	recommended = "1.16.1"
	maxCPUs     = 32 // of a guest
)

const installFirecracker = "install firecracker and jailer " + recommended + " from one release archive of github.com/firecracker-microvm/firecracker"

func (e *exam) noFirecracker() Finding {
	switch {
	case e.Driver == "qemu":
		return skip("VMs run under QEMU: vm.driver is qemu")
	case e.Accel == "tcg":
		return skip("VMs run under QEMU: vm.accel is tcg")
	}
	return skip("VMs run under QEMU: Firecracker is not installed")
}

func (e *exam) firecrackerBinary(context.Context) Finding {
	if e.firecracker == unused {
		return e.noFirecracker()
	}
	return e.judgeFirecracker().of(e.firecracker)
}

func (e *exam) judgeFirecracker() Finding {
	p := e.fcProgram
	f := e.examine(p, "firecracker.binary")
	switch {
	case f.Verdict == Fail:
		return f
	case p.release.Compare(flint.Version{1, oldestMinor}) < 0:
		return fail(installFirecracker, "%s is %s; flint needs 1.%d or newer", p.path, p.release, oldestMinor)
	case !e.NoJail && !strings.Contains(filepath.Base(p.path), "firecracker"):
		return fail("rename it to firecracker", "the jailer refuses %s: its name lacks the word firecracker", p.path)
	case !e.NoJail && p.elf == nil && !p.static:
		return fail(installFirecracker, "%s needs shared libraries, which there are none of in its jail", p.path)
	case !e.NoJail && p.elf != nil:
		return fail(installFirecracker+", and name the program itself, no script around it", "%s cannot run alone in its jail: %v", p.path, p.elf)
	case !e.NoJail && !e.executable(p.path):
		return fail("chmod a+rx "+p.path, "the users of VMs cannot execute %s", p.path)
	}
	for _, pool := range e.Pools {
		if pool.Shape.CPUs > maxCPUs {
			return fail("lower the pool's vm.cpus", "a VM of pool %s has %d CPUs, but a Firecracker guest at most %d", pool.Name, pool.Shape.CPUs, maxCPUs)
		}
	}
	if f.Verdict == Pass && p.release.Compare(flint.Version{1, 16}) < 0 {
		return pass("%s; %s is recommended", f.Text, recommended)
	}
	return f
}

// examine finds what would keep any of the two programs from being used.
func (e *exam) examine(p program, key string) Finding {
	without := ""
	if e.Driver == "auto" && e.firecracker == required {
		without = "; or set vm.driver: qemu, to do without Firecracker"
	}
	switch {
	case !p.found():
		return fail(installFirecracker+", or set "+key+without, "%s", p.absence())
	case p.exposed:
		return fail("have it and its directory belong to root, and chmod o-w both", "everyone can change %s, which root starts", p.path)
	case p.unknown != nil:
		return fail("install a release for this machine's architecture"+without, "%s cannot be used: %v", p.path, p.unknown)
	case p.owner != 0:
		return warn(fmt.Sprintf("chown root: %s %s", filepath.Dir(p.path), p.path), "user %d can change %s, which root starts", p.owner, p.path)
	}
	return pass("%s is %s", p.path, p.release)
}

func (e *exam) firecrackerJailer(context.Context) Finding {
	switch {
	case e.firecracker == unused:
		return e.noFirecracker()
	case e.NoJail:
		return warn("remove firecracker.jail: false; run no strangers' jobs until then",
			"off: a guest that breaks out of Firecracker has all that flint may do")
	}
	return e.judgeJailer().of(e.firecracker)
}

func (e *exam) judgeJailer() Finding {
	p := e.fcJailer
	f := e.examine(p, "firecracker.jailer")
	switch {
	case f.Verdict == Fail:
		return f
	case e.fcProgram.found() && e.fcProgram.unknown == nil && !e.fcProgram.exposed && p.release != e.fcProgram.release:
		return fail("install both from one release archive", "%s is %s, but Firecracker is %s", p.path, p.release, e.fcProgram.release)
	case p.elf == nil && !p.static:
		return warn(installFirecracker, "%s is %s, but not a static program as releases are", p.path, p.release)
	case p.elf != nil:
		return warn(installFirecracker, "%s is %s, but no program of the usual kind: %v", p.path, p.release, p.elf)
	}
	if f.Verdict != Pass || !e.fcProgram.found() {
		return f
	}
	return pass("%s is %s, as Firecracker is", p.path, p.release)
}

// qemuProgram returns QEMU's name for this architecture, and the Debian package that has it.
func (e *exam) qemuProgram() (name, packaged string) {
	if e.Arch == "arm64" {
		return "qemu-system-aarch64", "qemu-system-arm"
	}
	return "qemu-system-x86_64", "qemu-system-x86"
}

func (e *exam) qemuBinary(ctx context.Context) Finding {
	if e.qemu == unused {
		return skip("VMs run under Firecracker")
	}
	name, packaged := e.qemuProgram()
	fix := "apt-get install " + packaged
	p := e.find(ctx, e.QEMU, name)
	switch {
	case !p.found():
		if e.QEMU != "" {
			fix += ", or mend vm.qemu"
		}
		return fail(fix, "%s", p.absence())
	case p.exposed:
		return fail("have it and its directory belong to root, and chmod o-w both",
			"everyone can change %s, which root starts", p.path)
	case p.unknown != nil:
		return fail("apt-get install --reinstall "+packaged, "%s cannot be used: %v", p.path, p.unknown)
	case p.release.Compare(flint.Version{5, 2}) < 0: // the first whose microvm machine has ACPI
		return fail("use a distribution with QEMU 5.2 or newer", "%s is %s; flint needs 5.2 or newer", p.path, p.release)
	}
	return pass("%s is %s", p.path, p.release)
}

func (e *exam) depmod(context.Context) Finding {
	if e.Monolithic {
		return skip("the VMs' kernel has no modules left to sort")
	}
	path, err := e.LookPath("depmod")
	if err != nil {
		return fail("apt-get install kmod", "depmod is not installed, which sorts the modules of the VMs' kernel")
	}
	return pass("%s", path)
}

// dockerSockets are where docker's daemon listens unless told otherwise.
var dockerSockets = [...]string{"/run/docker.sock", "/var/run/docker.sock"}

func (e *exam) builder(context.Context) Finding {
	var have []string
	deaf := false
	for _, name := range []string{"docker", "podman", "buildah"} {
		if _, err := e.LookPath(name); err != nil {
			continue
		}
		if name == "docker" && !e.exists(dockerSockets[0]) && !e.exists(dockerSockets[1]) {
			deaf = true
			continue
		}
		have = append(have, name)
	}
	const fix = "apt-get install buildah"
	need := possible
	if e.Dockerfile {
		need = required
	}
	switch {
	case len(have) > 0:
		return pass("%s", strings.Join(have, ", "))
	case deaf:
		return warn("start docker's daemon, or "+fix, "docker is installed, but its daemon does not listen at %s; images cannot be built from Dockerfiles", dockerSockets[0])
	}
	return fail(fix, "none of docker, podman, buildah is installed; images cannot be built from Dockerfiles").of(need)
}
