// Package kernel makes kernel packs: what a VM boots before it sees its image.
//
// A pack is an uncompressed kernel, an initramfs with flint-agent as /init and the modules needed to boot, and a
// read-only image of all the other modules. It is made from a distribution's kernel package (fetched and verified by
// apt), from given .deb files, or from a given kernel with or without a module tree, without root, and kept in a cache under a key of
// its content. What is unpacked is bounded and parsed strictly. The package must not start a VM, know which VMM will
// boot the pack, or change the host it runs on beyond its cache directory.
package kernel

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"regexp"
	"runtime"

	"golang.org/x/sys/unix"

	"flint"
)

// Pack is a kernel ready to boot. Its files are world-readable, belong to the cache and must not be changed; no Prune removes
// them before Close, or the end of the process. After that they stay while a VMM has them open.
type Pack struct {
	Version string // as uname -r says in the guest
	Arch    string // GOARCH of kernel and agent
	Kernel  string // absolute path: an ELF vmlinux (amd64) or an Image (arm64)
	Initrd  string // absolute path: uncompressed cpio
	Modules string // absolute path: read-only ext4; its root is the content of /lib/modules/<Version>. Empty: there are none
	// Missing names the kernel options that docker, nftables or bridged networks want and the kernel lacks. Empty is
	// good, and also what a kernel without a known configuration gets (a warning is logged then).
	Missing []string

	held []*os.File // locks, one for all copies of a Pack
}

// Source says where the kernel comes from. At most one of Package, Debs, Vmlinuz and Pack may be given; the zero value means
// the distribution's own kernel for clouds.
//
// Vmlinuz without ModuleTree is a monolithic kernel, used as it is. What a guest needs to boot must be built in, which is
// checked by the configuration that the kernel carries or that lies beside it (<Vmlinuz>.config, or config-<version> for
// vmlinux-<version>), and else by the names of its drivers.
type Source struct {
	Package    string   // a kernel package or metapackage of the host's distribution
	Debs       []string // .deb files that together hold a kernel and its modules; the caller vouches for them
	Vmlinuz    string   // a kernel: bzImage, ELF vmlinux, arm64 Image, or one of them compressed
	ModuleTree string   // its modules: a directory …/lib/modules/<version>; empty: it has none
	Pack       string   // a pack that is cached: its version, or its id; see Find
	// Needs are options, less the CONFIG_, without which the VMM cannot boot the kernel or reach the agent: the Needs…
	// constants. A kernel that is known to lack one, as built in or as a module, is refused.
	Needs []string
}

// Config says where packs are kept and what goes into them.
type Config struct {
	Dir      string // the cache; made if it does not exist. Any number of processes may share it
	Agent    string // path of the flint-agent binary, static, for the kernel's architecture
	Log      *slog.Logger
	Progress flint.Progress
}

var packageName = regexp.MustCompile(`^[a-z0-9][a-z0-9+.-]+$`)

// validate reports contradictions before anything is done.
func (s Source) validate() error {
	given := 0
	for _, is := range []bool{s.Package != "", len(s.Debs) > 0, s.Vmlinuz != "" || s.ModuleTree != "", s.Pack != ""} {
		if is {
			given++
		}
	}
	bad := func(format string, args ...any) error {
		return &flint.Fault{
			Code: "kernel.source", What: "choose a kernel", Kind: flint.ErrUsage, Err: fmt.Errorf(format, args...),
			Fix: "name a package, .deb files, or a kernel, with its module tree if it has one; nothing at all means the distribution's kernel for clouds",
		}
	}
	switch {
	case given > 1:
		return bad("more than one source of the kernel is given")
	case s.Package != "" && !packageName.MatchString(s.Package):
		return bad("%q is not the name of a package", s.Package)
	case s.Vmlinuz == "" && s.ModuleTree != "":
		return bad("a module tree needs its kernel")
	}
	return nil
}

// Prepare returns the pack for the source, building what the cache lacks. With everything cached it only stats files
// and hashes the agent. Concurrent calls, also of several processes, build a pack once. Where the package can no longer
// be resolved or fetched and an earlier pack of it is cached, that one is returned and a warning logged.
// Errors are *flint.Fault with a code kernel.…, or the context's.
func Prepare(ctx context.Context, c Config, s Source) (Pack, error) {
	return newPreparer(c).prepare(ctx, s)
}

// preparer is Prepare with the outside world replaceable.
type preparer struct {
	Config
	arch string    // dpkg's and Go's name of the architecture; the same for those flint runs on
	run  runner    // runs apt and depmod
	apt  aptPlaces // what apt's answers depend on
}

func newPreparer(c Config) *preparer {
	if c.Log == nil {
		c.Log = slog.New(slog.DiscardHandler)
	}
	return &preparer{Config: c, arch: runtime.GOARCH, run: run, apt: systemApt()}
}

func (p *preparer) prepare(ctx context.Context, s Source) (Pack, error) {
	for try := 1; ; try++ {
		pack, err := p.obtain(ctx, s)
		if errors.Is(err, errPruned) && try < maxTries {
			continue
		}
		if f := spaceFault(err); f != nil {
			return Pack{}, f
		}
		return pack, err
	}
}

// errPruned says that a Prune was quicker than who wants the pack.
var errPruned = fmt.Errorf("another process removes it as soon as it is made: %w", fs.ErrNotExist)

// maxTries bounds how often a pack is made again that another process removes at once.
const maxTries = 10

// obtain finds or makes the pack of a source, and holds it.
func (p *preparer) obtain(ctx context.Context, s Source) (Pack, error) {
	if err := s.validate(); err != nil {
		return Pack{}, err
	}
	dir, err := filepath.Abs(p.Dir)
	if err == nil {
		err = os.MkdirAll(dir, 0o755)
	}
	if err != nil {
		return Pack{}, storeFault(err)
	}
	p.Dir = dir
	agent, err := readAgent(p.Agent)
	if err != nil {
		return Pack{}, err
	}
	e, err := p.kernel(ctx, s)
	if err != nil {
		return Pack{}, err
	}
	if err := e.lacks(s.Needs); err != nil {
		return Pack{}, err
	}
	if e.Arch != agent.arch {
		return Pack{}, agentFault(p.Agent, fmt.Errorf("it is for %s, the kernel for %s", agent.arch, e.Arch))
	}
	pack := Pack{
		Version: e.Version, Arch: e.Arch, Missing: e.Missing,
		Kernel: filepath.Join(e.dir, kernelFile), Initrd: filepath.Join(e.dir, initrdPrefix+agent.hash+".cpio"),
	}
	if !e.Monolithic {
		pack.Modules = filepath.Join(e.dir, modulesFile)
	}
	if err := p.complete(ctx, &pack, agent); err != nil {
		return Pack{}, err
	}
	return pack, nil
}

// complete holds a pack, and makes its initramfs if there is none. What is made is held before its lock is let go of, which Prune needs.
func (p *preparer) complete(ctx context.Context, pack *Pack, a agentBinary) error {
	if isWholeInitramfs(pack.Initrd) {
		if err := pack.hold(); !errors.Is(err, errPruned) {
			return err
		}
	}
	dir := filepath.Dir(pack.Kernel)
	unlock, err := p.lock(ctx, dir)
	if err != nil {
		return err
	}
	defer unlock()
	if _, there := load(dir); !there {
		return storeFault(errPruned)
	}
	if !isWholeInitramfs(pack.Initrd) { // else another was quicker
		if err := makeInitramfs(pack.Initrd, a); err != nil {
			return storeFault(err)
		}
	}
	return pack.hold()
}

// kernel returns the cached part of the pack that does not depend on the agent.
func (p *preparer) kernel(ctx context.Context, s Source) (entry, error) {
	switch {
	case s.Pack != "":
		return p.fromCache(s.Pack)
	case len(s.Debs) > 0 || s.Vmlinuz != "":
		o, err := givenOrigin(ctx, s)
		if err != nil {
			return entry{}, err
		}
		return p.ensure(ctx, o)
	default:
		return p.fromPackage(ctx, s.Package)
	}
}

// spaceFault is the fault of an error that a full or read-only disk gave; nil for every other, and for one that is it already.
func spaceFault(err error) *flint.Fault {
	var f *flint.Fault
	if errors.As(err, &f) && f.Code == "kernel.space" {
		return nil
	}
	return flint.SpaceFault("kernel.space", "make kernel pack", "the cache of kernels, or of temporary files", err)
}

// dirFault is the fault of an error that tells of a directory of the state directory that this user may not use, or that is none; nil
// for every other.
func dirFault(what string, err error) *flint.Fault {
	switch {
	case errors.Is(err, fs.ErrPermission):
		return &flint.Fault{Code: "state.dir", What: what, Kind: flint.ErrPermission, Err: err, Fix: "run as the user that flint runs as: root"}
	case errors.Is(err, unix.ENOTDIR):
		return &flint.Fault{Code: "state.dir", What: what, Err: err, Fix: "give a directory as state_dir (--state-dir)"}
	}
	return nil
}

// writable returns nil if this user may make and remove files in a directory.
func writable(dir string) error {
	if err := unix.Faccessat(unix.AT_FDCWD, dir, unix.W_OK, unix.AT_EACCESS); err != nil {
		return &fs.PathError{Op: "write to", Path: dir, Err: err}
	}
	return nil
}

func storeFault(err error) error {
	if f := dirFault("keep the kernel pack", err); f != nil {
		return f
	}
	return &flint.Fault{
		Code: "kernel.store", What: "keep the kernel pack", Err: err,
		Fix: "make sure that the cache directory is on a local disk with about 300 MiB free and belongs to the user flint runs as",
	}
}

func agentFault(path string, err error) error {
	return &flint.Fault{
		Code: "kernel.agent", What: "take " + path + " as the guest's agent", Err: err,
		Fix: "build it for the kernel's architecture with CGO_ENABLED=0 (make build does)",
	}
}
