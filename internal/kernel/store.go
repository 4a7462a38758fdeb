package kernel

import (
	"bytes"
	"context"
	"crypto/sha256"
	"debug/elf"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"

	"flint/internal/inuse"
	"flint/internal/regular"
)

// Names in a pack's directory.
const (
	kernelFile  = "vmlinux"
	modulesFile = "modules.ext4"
	bootDir     = "boot"    // boot modules and their order, of which an initramfs is made for each agent
	configFile  = "config"  // the kernel's configuration, where it is known
	namesFile   = "modules" // the names of its modules and of those built in, a line each, where it has any
	entryFile   = "pack.json"
)

// layout is part of every key: a change of what a pack holds makes old ones unknown instead of wrong.
const layout = "flint kernel pack 2"

// entry is a cached kernel: all of a pack but the initramfs. Its directory appears with all its files in it.
type entry struct {
	Version string           `json:"version"`
	Arch    string           `json:"arch"`
	Missing []string         `json:"missing,omitempty"`
	Absent  []string         `json:"absent,omitempty"` // options it lacks by another sign than its configuration
	From    string           `json:"from"`             // for a person who looks into the cache
	Sizes   map[string]int64 `json:"sizes"`            // bytes of each file, to notice damage
	// Monolithic says that there is no modules image.
	Monolithic bool `json:"monolithic,omitempty"`

	dir string
}

// files lists what must be there for the entry to be whole.
func (e *entry) files() []string {
	if e.Monolithic {
		return []string{kernelFile, bootDir + "/" + orderFile}
	}
	return []string{kernelFile, modulesFile, bootDir + "/" + orderFile}
}

// load returns the cached kernel in dir, and whether it is there and whole.
func load(dir string) (entry, bool) {
	e := entry{dir: dir}
	b, err := os.ReadFile(filepath.Join(dir, entryFile))
	if err != nil || json.Unmarshal(b, &e) != nil || e.Version == "" {
		return entry{}, false
	}
	for _, f := range e.files() {
		if _, ok := e.Sizes[f]; !ok {
			return entry{}, false
		}
	}
	for f, size := range e.Sizes {
		info, err := os.Lstat(filepath.Join(dir, f))
		if err != nil || info.Size() != size {
			return entry{}, false
		}
	}
	return e, true
}

func (p *preparer) entryDir(key string) string {
	sum := sha256.Sum256([]byte(layout + "\n" + key))
	return filepath.Join(p.Dir, hex.EncodeToString(sum[:8]))
}

// ensure returns the cached kernel of an origin, making it if there is none.
func (p *preparer) ensure(ctx context.Context, o origin) (entry, error) {
	dir := p.entryDir(o.key)
	if e, ok := load(dir); ok {
		p.Progress.Step("make kernel pack from "+o.name)("cached: "+e.Version, nil)
		return e, nil
	}
	unlock, err := p.lock(ctx, dir)
	if err != nil {
		return entry{}, err
	}
	defer unlock()
	if e, ok := load(dir); ok {
		return e, nil // another was quicker
	}
	end := p.Progress.Step("make kernel pack from " + o.name)
	e, err := p.build(ctx, o, dir)
	if err != nil {
		if ctx.Err() != nil {
			err = ctx.Err() // whatever it broke off
		}
		end("", err)
		return entry{}, err
	}
	end(e.Version, nil)
	return e, nil
}

// build makes the kernel in a directory beside its place and moves it there. The lock is held.
func (p *preparer) build(ctx context.Context, o origin, dir string) (entry, error) {
	if !o.monolithic {
		if err := p.needDepmod(ctx); err != nil {
			return entry{}, err
		}
	}
	work, done := dir+workSuffix, dir+newSuffix
	if _, err := clearWork(dir); err != nil { // left by one who died
		return entry{}, storeFault(err)
	}
	if err := os.RemoveAll(dir); err != nil { // damaged
		return entry{}, storeFault(err)
	}
	for _, d := range []string{work, done} {
		if err := os.Mkdir(d, 0o755); err != nil {
			return entry{}, storeFault(err)
		}
		defer os.RemoveAll(d)
	}
	root, err := os.OpenRoot(work)
	if err != nil {
		return entry{}, storeFault(err)
	}
	defer root.Close()
	e, err := p.assemble(ctx, o, root, done)
	if err != nil {
		return entry{}, err
	}
	if err := publish(done, dir); err != nil {
		return entry{}, storeFault(err)
	}
	e.dir = dir
	return e, nil
}

// assemble unpacks an origin into root and makes all files of a cached kernel in the directory to.
func (p *preparer) assemble(ctx context.Context, o origin, root *os.Root, to string) (entry, error) {
	u := &unpacked{root: root}
	if err := o.unpack(ctx, u); err != nil {
		return entry{}, err
	}
	if !u.kernel || u.version == "" && !o.monolithic {
		return entry{}, unpackFault(o.name, errors.New("it holds no kernel, or no modules"))
	}
	kernel, err := p.saveKernel(u, o.name, to)
	if err != nil {
		return entry{}, err
	}
	e := entry{Version: u.version, Arch: kernel.arch, From: o.name, Monolithic: o.monolithic}
	if o.monolithic {
		e.Version = kernel.release
	}
	out, err := os.OpenRoot(to)
	if err != nil {
		return entry{}, storeFault(err)
	}
	defer out.Close()
	if err := p.saveModules(ctx, o, u, out); err != nil {
		return entry{}, err
	}
	f, err := p.facts(u, kernel, e, out)
	if err != nil {
		return entry{}, err
	}
	e.Absent, e.Missing = f.absent, p.missing(f, kernel, e)
	return e, e.save(out)
}

// saveModules makes the boot modules and the modules image. A monolithic kernel has none of the former, and no image.
func (p *preparer) saveModules(ctx context.Context, o origin, u *unpacked, out *os.Root) error {
	tree := workTree + "/" + u.version
	var order []bootModule
	var err error
	if !o.monolithic {
		if order, err = p.indexModules(ctx, u); err != nil {
			return err
		}
	}
	if err := saveBootModules(u.root, tree, out, order); err != nil {
		return unpackFault(o.name, err)
	}
	if o.monolithic {
		return nil
	}
	modules, err := u.root.OpenRoot(tree)
	if err != nil {
		return storeFault(err)
	}
	defer modules.Close()
	return saveModulesImage(ctx, out, modules.FS())
}

// saveKernel unpacks the kernel and checks that it and the modules belong together.
func (p *preparer) saveKernel(u *unpacked, name, to string) (image, error) {
	if u.version != "" {
		name = "of version " + u.version
	}
	file, err := u.root.ReadFile(workKernel)
	if err != nil {
		return image{}, storeFault(err)
	}
	kernel, err := unpackKernel(file)
	switch {
	case err != nil:
		return image{}, formatFault(name, err)
	case u.version == "" && kernel.release == "":
		return image{}, formatFault(name, errors.New("it does not say its version, as every Linux kernel does"))
	case u.version != "" && kernel.release != "" && kernel.release != u.version:
		return image{}, formatFault(name, fmt.Errorf("it calls itself %s: its modules would not fit", kernel.release))
	}
	if err := os.WriteFile(filepath.Join(to, kernelFile), kernel.data, 0o644); err != nil {
		return image{}, storeFault(err)
	}
	return kernel, nil
}

// facts finds out what is known of the kernel's options and keeps that in the directory to.
func (p *preparer) facts(u *unpacked, kernel image, e entry, to *os.Root) (facts, error) {
	f := facts{monolithic: e.Monolithic}
	config := embeddedConfig(kernel.data) // the one that cannot be another kernel's
	if config == nil {
		config, _ = u.root.ReadFile(workConfig) // none is no error
	}
	if config != nil {
		f.config = readConfig(config)
		if err := to.WriteFile(configFile, config, 0o644); err != nil {
			return f, storeFault(err)
		}
	}
	if !e.Monolithic {
		names, err := moduleNames(u.root, workTree+"/"+u.version)
		if err != nil {
			return f, unpackFault("the modules of kernel "+u.version, err)
		}
		f.modules = nameSet(names)
		if err := to.WriteFile(namesFile, names, 0o644); err != nil {
			return f, storeFault(err)
		}
	}
	if config == nil {
		p.Log.Warn("kernel configuration not found: cannot tell all that jobs would miss", "kernel", e.Version)
	}
	if config == nil && e.Monolithic {
		f.absent = missingDrivers(kernel.data)
	}
	return f, nil
}

// missing names what the kernel lacks.
func (p *preparer) missing(f facts, kernel image, e entry) []string {
	missing := lacked(f.report())
	if !kernel.pvh {
		missing = append(missing, "PVH")
	}
	if len(missing) > 0 {
		p.Log.Warn("kernel lacks options that jobs may want", "kernel", e.Version, "missing", missing)
	}
	return missing
}

// indexModules runs depmod and returns the boot modules in load order.
func (p *preparer) indexModules(ctx context.Context, u *unpacked) ([]bootModule, error) {
	// kmod may be built to look for modules in usr/lib.
	if err := errors.Join(u.root.Mkdir("usr", 0o755), u.root.Symlink("../lib", "usr/lib")); err != nil {
		return nil, storeFault(err)
	}
	if err := p.depmod(ctx, u.root.Name(), u.version); err != nil {
		return nil, err
	}
	tree := workTree + "/" + u.version
	dep, err := u.root.ReadFile(tree + "/modules.dep")
	if err != nil {
		return nil, unpackFault("the modules of kernel "+u.version, err)
	}
	builtin, err := u.root.ReadFile(tree + "/modules.builtin")
	if err != nil {
		return nil, unpackFault("the modules of kernel "+u.version, err)
	}
	table, err := parseModules(dep, builtin)
	if err != nil {
		return nil, unpackFault("the modules of kernel "+u.version, err)
	}
	return table.order(bootSet())
}

func saveModulesImage(ctx context.Context, out *os.Root, tree fs.FS) error {
	if err := ctx.Err(); err != nil {
		return err
	}
	f, err := out.OpenFile(modulesFile, os.O_RDWR|os.O_CREATE|os.O_EXCL, 0o644)
	if err != nil {
		return storeFault(err)
	}
	if err := errors.Join(writeModulesImage(f, tree), f.Close()); err != nil {
		return storeFault(fmt.Errorf("write modules image: %w", err))
	}
	return nil
}

// save records the entry, its files' sizes with it.
func (e *entry) save(out *os.Root) error {
	e.Sizes = map[string]int64{}
	err := fs.WalkDir(out.FS(), ".", func(p string, d fs.DirEntry, err error) error {
		if err != nil || d.IsDir() {
			return err
		}
		info, err := d.Info()
		if err == nil {
			e.Sizes[p] = info.Size()
		}
		return err
	})
	if err != nil {
		return storeFault(err)
	}
	b, err := json.MarshalIndent(e, "", "\t")
	if err == nil {
		err = out.WriteFile(entryFile, append(b, '\n'), 0o644)
	}
	if err != nil {
		return storeFault(err)
	}
	return nil
}

// publish makes a file or a directory readable for all, whatever the umask, and moves it to its place when all of it is
// on disk.
func publish(from, to string) error {
	err := filepath.WalkDir(from, func(p string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		mode := fs.FileMode(0o644)
		if d.IsDir() {
			mode = 0o755
		}
		if err := os.Chmod(p, mode); err != nil {
			return err
		}
		return syncPath(p)
	})
	if err != nil {
		return err
	}
	if err := os.Rename(from, to); err != nil {
		return err
	}
	return syncPath(filepath.Dir(to))
}

func syncPath(p string) error {
	f, err := os.Open(p)
	if err != nil {
		return err
	}
	return errors.Join(f.Sync(), f.Close())
}

// lock takes the exclusive lock of a cached kernel and returns its release.
func (p *preparer) lock(ctx context.Context, dir string) (func(), error) {
	var waited func(string, error)
	f, err := inuse.Wait(ctx, dir+lockSuffix, func() { waited = p.Progress.Step("wait for other work on the kernel") })
	if waited != nil {
		waited("", err)
	}
	if err != nil && ctx.Err() != nil {
		return nil, ctx.Err()
	}
	if err != nil {
		return nil, storeFault(err)
	}
	return func() { letGo(f, dir) }, nil
}

// letGo releases the lock of the pack in dir, whose file goes where no pack came of it.
func letGo(f *os.File, dir string) {
	if _, err := os.Lstat(dir); errors.Is(err, fs.ErrNotExist) {
		_ = os.Remove(dir + lockSuffix) // Prune tries again
	}
	_ = f.Close() // releases the lock
}

// agentBinary is the agent and what names it.
type agentBinary struct {
	data []byte
	arch string
	hash string
}

// maxAgent bounds the agent, which lies in the guest's memory.
const maxAgent = 64 << 20

func readAgent(path string) (agentBinary, error) {
	data, err := regular.Read(path, maxAgent)
	if err != nil {
		return agentBinary{}, agentFault(path, err)
	}
	f, err := elf.NewFile(bytes.NewReader(data))
	if err != nil {
		return agentBinary{}, agentFault(path, err)
	}
	arch := map[elf.Machine]string{elf.EM_X86_64: "amd64", elf.EM_AARCH64: "arm64"}[f.Machine]
	if arch == "" {
		return agentBinary{}, agentFault(path, fmt.Errorf("it is for %v", f.Machine))
	}
	for _, p := range f.Progs {
		if p.Type == elf.PT_INTERP {
			return agentBinary{}, agentFault(path, errors.New("it is not static: the initramfs has no libraries"))
		}
	}
	sum := sha256.Sum256(data)
	return agentBinary{data, arch, hex.EncodeToString(sum[:8])}, nil
}

// makeInitramfs makes the initramfs of a kernel, in whose directory path is, and an agent. The kernel's lock is held.
func makeInitramfs(path string, a agentBinary) error {
	part := path + newSuffix
	f, err := os.OpenFile(part, os.O_WRONLY|os.O_CREATE|os.O_TRUNC, 0o644)
	if err != nil {
		return err
	}
	defer os.Remove(part)
	err = writeInitramfs(f, a.data, os.DirFS(filepath.Join(filepath.Dir(path), bootDir)))
	if err := errors.Join(err, f.Close()); err != nil {
		return fmt.Errorf("write initramfs: %w", err)
	}
	return publish(part, path)
}
