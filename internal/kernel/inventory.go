package kernel

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"flint"
)

// Kept is a kernel pack of the cache.
type Kept struct {
	ID         string      `json:"id"`      // name of its directory
	Version    string      `json:"version"` // as uname -r says in the guest
	Arch       string      `json:"arch"`
	Source     string      `json:"source"`     // what it was made from
	Size       flint.Bytes `json:"size"`       // on disk
	Used       time.Time   `json:"last_used"`  // a pool, or a command
	InUse      bool        `json:"in_use"`     // by a process
	Monolithic bool        `json:"monolithic"` // it has no modules
	Path       string      `json:"path"`       // its directory
	Workloads  []Workload  `json:"workloads"`  // what it has for what jobs run
}

// Packs returns the whole packs that are cached in dir, the most recently used first.
func Packs(dir string) ([]Kept, error) {
	list, err := List(dir)
	var packs []Kept
	for _, c := range slices.Backward(list) {
		e, whole := load(c.Path)
		if !whole {
			continue // an initramfs, or damaged
		}
		f, ferr := e.facts()
		err = errors.Join(err, ferr)
		packs = append(packs, Kept{
			ID: filepath.Base(c.Path), Version: e.Version, Arch: e.Arch, Source: e.From, Size: c.Size, Used: c.Used, InUse: c.InUse,
			Monolithic: e.Monolithic, Path: c.Path, Workloads: f.report(),
		})
	}
	return packs, err
}

// facts reads what is known of a cached kernel's options.
func (e *entry) facts() (facts, error) {
	f := facts{monolithic: e.Monolithic, absent: e.Absent}
	config, err := os.ReadFile(filepath.Join(e.dir, configFile))
	if err == nil {
		f.config = readConfig(config)
	}
	names, nerr := os.ReadFile(filepath.Join(e.dir, namesFile))
	if nerr == nil {
		f.modules = nameSet(names)
	}
	for _, err := range []error{err, nerr} {
		if err != nil && !errors.Is(err, fs.ErrNotExist) {
			return f, fmt.Errorf("read what kernel %s has: %w", e.Version, err)
		}
	}
	return f, nil
}

// Find returns the pack that a person means: by its version, its id, or the beginning of that.
func Find(dir, name string) (Kept, error) {
	packs, err := Packs(dir)
	if err != nil {
		return Kept{}, err
	}
	const least = 4 // digits of an id that are taken for one
	var found []Kept
	for _, p := range packs {
		if p.ID == name {
			return p, nil
		}
		if p.Version == name || len(name) >= least && strings.HasPrefix(p.ID, name) {
			found = append(found, p)
		}
	}
	f := &flint.Fault{
		Code: "kernel.unknown", What: "find kernel " + name, Kind: flint.ErrNotFound, Err: errors.New("none of this version or id is in " + dir),
		Fix: "see flint kernel ls for what there is; flint kernel pull, import and build add to it",
	}
	switch len(found) {
	case 0:
		return Kept{}, f
	case 1:
		return found[0], nil
	}
	f.Kind, f.Err, f.Fix = flint.ErrConflict, fmt.Errorf("%d are meant by it: %s and %s", len(found), found[0].ID, found[1].ID), "name one by its id"
	return Kept{}, f
}

// Remove removes a pack that no process uses.
func Remove(ctx context.Context, c Config, pack Kept) error {
	if err := ctx.Err(); err != nil {
		return err
	}
	if f := dirFault("remove kernel "+pack.Version, writable(c.Dir)); f != nil {
		return f // who does not own a kernel's files cannot learn whether VMs have them open
	}
	_, gone, err := newPreparer(c).remove(Cached{Path: pack.Path, Version: pack.Version, Used: pack.Used})
	if err == nil && !gone {
		return &flint.Fault{
			Code: "kernel.used", What: "remove kernel " + pack.Version, Kind: flint.ErrConflict, Err: errors.New("a flint or a VM uses it"),
			Fix: "configure another kernel, restart flint, and let the VMs end that have this one",
		}
	}
	if err != nil {
		return fmt.Errorf("remove kernel %s: %w", pack.Version, err)
	}
	return nil
}

// Chosen returns the id of the pack that Prepare would return for a source without asking apt, as far as it is cached.
func Chosen(ctx context.Context, c Config, s Source) (id string, err error) {
	if err := s.validate(); err != nil {
		return "", err
	}
	p := newPreparer(c)
	if s.Pack != "" {
		pack, err := Find(p.Dir, s.Pack)
		return pack.ID, err
	}
	var key string
	if len(s.Debs) == 0 && s.Vmlinuz == "" {
		name, err := p.packageName(s.Package)
		if err != nil {
			return "", err
		}
		key = recall(p.memory(name)).Key
	} else {
		o, err := givenOrigin(ctx, s)
		if err != nil {
			return "", err
		}
		key = o.key
	}
	if e, ok := load(p.entryDir(key)); ok && key != "" {
		return filepath.Base(e.dir), nil
	}
	return "", &flint.Fault{
		Code: "kernel.unknown", What: "find the configured kernel", Kind: flint.ErrNotFound, Err: errors.New("it has not been made yet"),
		Fix: "flint serve makes it when it starts; so does flint kernel pull, or import",
	}
}

// fromCache returns a pack that is there under a name.
func (p *preparer) fromCache(name string) (entry, error) {
	pack, err := Find(p.Dir, name)
	if err != nil {
		return entry{}, err
	}
	e, ok := load(pack.Path)
	if !ok {
		return entry{}, storeFault(fmt.Errorf("read %s: %w", pack.Path, fs.ErrNotExist)) // removed in between
	}
	return e, nil
}

// OwnKernel returns the source of the kernel that a machine runs, whose release uname -r tells, below its root directory.
func OwnKernel(root, release string) (Source, error) {
	kernel := present(
		filepath.Join(root, "boot/vmlinuz-"+release),
		filepath.Join(root, "usr/lib/modules", release, "vmlinuz"), filepath.Join(root, "lib/modules", release, "vmlinuz"),
	)
	tree := present(filepath.Join(root, "lib/modules", release), filepath.Join(root, "usr/lib/modules", release))
	if kernel == "" || tree == "" {
		return Source{}, &flint.Fault{
			Code: "kernel.host", What: "take this machine's own kernel, " + release, Kind: flint.ErrNotFound,
			Err: errors.New("its file is not in /boot, or its modules are not in /lib/modules, as with many rented machines and containers"),
			Fix: "use the distribution's: flint kernel pull; or name the files: flint kernel import --vmlinuz FILE --modules DIR",
		}
	}
	return Source{Vmlinuz: kernel, ModuleTree: tree}, nil
}
