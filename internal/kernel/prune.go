package kernel

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"flint"
	"flint/internal/inuse"
)

// Names of what is not finished, beside where it will be.
const (
	workSuffix = ".work" // what is unpacked
	newSuffix  = ".new"  // what is finished next
	lockSuffix = ".lock"
	fetchLink  = ".fetch" // after workSuffix: a link to where apt downloads
	// fetchPrefix begins the name of a directory that apt downloads to, which is where temporary files are.
	fetchPrefix  = "flint-kernel-"
	initrdPrefix = "initrd-"
)

// Cached is one thing in the cache that can be removed by itself: a kernel with all that was made of it, or the initramfs
// of one agent.
type Cached struct {
	Path    string      `json:"path"`    // of the kernel's directory, or the initramfs
	Version string      `json:"version"` // of the kernel
	Source  string      `json:"source"`  // what the kernel was made from
	Size    flint.Bytes `json:"size"`    // on disk; a kernel's is with its initramfs
	Used    time.Time   `json:"last_used"`
	InUse   bool        `json:"in_use"` // by a process, this one included
}

// hold keeps the pack from every Prune and records that it was used now.
func (p *Pack) hold() error {
	dir := filepath.Dir(p.Kernel)
	for _, path := range []string{dir, p.Initrd} {
		f, err := inuse.Hold(path)
		if errors.Is(err, fs.ErrNotExist) {
			err = errPruned
		}
		if err != nil {
			_ = p.Close()
			p.held = nil // it may be held again
			return fmt.Errorf("hold kernel pack: %w", err)
		}
		p.held = append(p.held, f)
	}
	// Where the disk is read-only nothing is removed either.
	for _, path := range []string{filepath.Join(dir, entryFile), p.Initrd} {
		_ = os.Chtimes(path, time.Time{}, time.Now())
	}
	return nil
}

// Close lets Prune remove the pack's files. It is for all copies of the Pack, once.
func (p Pack) Close() error {
	var err error
	for _, f := range p.held {
		err = errors.Join(err, f.Close())
	}
	return err
}

// List returns what is cached in dir, the least recently used first.
func List(dir string) ([]Cached, error) {
	entries, err := os.ReadDir(dir)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if f := dirFault("list kernels", err); f != nil {
		return nil, f
	}
	if err != nil {
		return nil, fmt.Errorf("list kernels: %w", err)
	}
	var list []Cached
	var errs []error
	for _, e := range entries {
		if !e.IsDir() {
			continue // a lock
		}
		found, err := inspect(filepath.Join(dir, e.Name()))
		if err != nil && !errors.Is(err, fs.ErrNotExist) { // removed while we looked
			errs = append(errs, err)
			continue
		}
		list = append(list, found...)
	}
	slices.SortFunc(list, func(a, b Cached) int { return cmp.Or(a.Used.Compare(b.Used), strings.Compare(a.Path, b.Path)) })
	if len(errs) > 0 {
		return list, fmt.Errorf("list kernels: %w", errors.Join(errs...))
	}
	return list, nil
}

// inspect returns a kernel and its initramfs.
func inspect(dir string) ([]Cached, error) {
	if strings.HasSuffix(dir, newSuffix) || strings.HasSuffix(dir, workSuffix) {
		return nil, nil
	}
	entry, err := os.Stat(filepath.Join(dir, entryFile))
	if err != nil {
		return nil, err
	}
	e, whole := load(dir)
	if !whole {
		e.Version, e.From = "damaged", ""
	}
	files, err := os.ReadDir(dir)
	if err != nil {
		return nil, err
	}
	var list []Cached
	for _, f := range files {
		path := filepath.Join(dir, f.Name())
		if !strings.HasPrefix(f.Name(), initrdPrefix) || filepath.Ext(path) == newSuffix {
			continue
		}
		i := Cached{Path: path, Version: e.Version, Source: e.From}
		info, err := f.Info()
		if err != nil {
			return nil, err
		}
		i.Used, i.Size = info.ModTime(), onDisk(path)
		if i.InUse, err = isUsed(path); err != nil {
			return nil, err
		}
		list = append(list, i)
	}
	k := Cached{Path: dir, Version: e.Version, Source: e.From, Used: entry.ModTime(), Size: onDisk(dir)}
	if k.InUse, err = isUsed(dir); err != nil {
		return nil, err
	}
	return append(list, k), nil
}

func isUsed(path string) (bool, error) {
	f, err := take(path)
	if f == nil {
		return err == nil, err
	}
	return false, f.Close()
}

// take makes a kernel's directory or an initramfs ours alone, to remove it; nil where it is in use. Closing lets go of it.
func take(path string) (*os.File, error) {
	f, err := inuse.Seize(path)
	if f == nil || err != nil {
		return nil, err
	}
	info, err := f.Stat()
	if err != nil || !info.IsDir() {
		return f, err
	}
	for _, name := range []string{kernelFile, modulesFile} { // VMs have these open after their flint is gone
		open, err := inuse.Open(filepath.Join(path, name))
		if errors.Is(err, fs.ErrNotExist) {
			continue
		}
		if open || err != nil {
			return nil, errors.Join(err, f.Close())
		}
	}
	return f, nil
}

// Prune makes room in the cache: it removes what killed processes left half made, and then, until room more bytes are free,
// kernels and initramfs that nobody uses and that keep does not name, those not used for longest first. keep names them by
// their paths, or the path of any file of theirs. What has been removed is returned by its paths. What cannot be removed is
// said in the error and does not hinder the rest.
func Prune(ctx context.Context, c Config, keep []string, room flint.Bytes) (freed flint.Bytes, removed []string, err error) {
	p := newPreparer(c)
	freed, err = p.clearAbandoned()
	errs := []error{err}
	if room <= freed {
		return freed, nil, err
	}
	list, err := List(p.Dir)
	errs = append(errs, err)
	for _, i := range list {
		if freed >= room {
			break
		}
		if ctx.Err() != nil {
			errs = append(errs, context.Cause(ctx))
			break
		}
		if i.InUse || slices.ContainsFunc(keep, func(k string) bool { return k == i.Path || filepath.Dir(k) == i.Path }) {
			continue
		}
		size, gone, err := p.remove(i)
		if err != nil {
			errs = append(errs, fmt.Errorf("remove %s: %w", i.Path, err))
			continue
		}
		if gone {
			freed, removed = freed+size, append(removed, i.Path)
		}
	}
	return freed, removed, errors.Join(errs...)
}

// remove removes one thing unless somebody has begun to use it. It says whether it did, and what that freed.
func (p *preparer) remove(i Cached) (size flint.Bytes, gone bool, err error) {
	f, err := take(i.Path)
	if f == nil || err != nil {
		return 0, false, err
	}
	defer f.Close()
	size = onDisk(i.Path) // of a kernel less than it was, when its initramfs went before
	p.Log.Info("removing a kernel nobody uses", "path", i.Path, "kernel", i.Version, "size", size, "last_used", i.Used)
	info, err := f.Stat()
	if err != nil {
		return 0, false, err
	}
	dir := i.Path
	if !info.IsDir() {
		dir = filepath.Dir(i.Path)
	}
	unlock, free, err := tryLock(dir) // who has it makes something of the kernel, and is about to hold it
	if err != nil || !free {
		return 0, false, err
	}
	defer unlock()
	if !info.IsDir() {
		err := os.Remove(i.Path)
		return size, err == nil, err
	}
	// Under another name it is no kernel any more; a Prune goes on where this one is killed.
	away := i.Path + newSuffix
	if err := errors.Join(os.RemoveAll(away), os.Rename(i.Path, away)); err != nil {
		return 0, false, err
	}
	return size, true, os.RemoveAll(away)
}

// clearAbandoned removes what is half made and has no process that makes it: its lock tells.
func (p *preparer) clearAbandoned() (freed flint.Bytes, err error) {
	entries, err := os.ReadDir(p.Dir)
	if errors.Is(err, fs.ErrNotExist) {
		return 0, nil
	}
	if err != nil {
		return 0, fmt.Errorf("look for what interrupted builds left: %w", err)
	}
	packs := map[string]bool{}
	for _, e := range entries {
		if parts, _ := filepath.Glob(filepath.Join(p.Dir, e.Name(), initrdPrefix+"*"+newSuffix)); len(parts) > 0 {
			packs[filepath.Join(p.Dir, e.Name())] = true
		}
		for _, suffix := range []string{workSuffix, newSuffix, workSuffix + fetchLink, lockSuffix} {
			if name, ok := strings.CutSuffix(e.Name(), suffix); ok {
				packs[filepath.Join(p.Dir, name)] = true
			}
		}
	}
	var errs []error
	for pack := range packs {
		unlock, free, err := tryLock(pack)
		if err != nil || !free {
			errs = append(errs, err)
			continue
		}
		size, err := clearWork(pack)
		unlock()
		freed += size
		errs = append(errs, err)
		if size > 0 {
			p.Log.Info("removed what an interrupted build left", "path", pack, "size", size)
		}
	}
	return freed, errors.Join(errs...)
}

// clearWork removes what is half made of the pack in dir, or of another file that is made beside its place. Its lock is held.
func clearWork(dir string) (freed flint.Bytes, err error) {
	link := dir + workSuffix + fetchLink
	if fetch, lerr := os.Readlink(link); lerr == nil && strings.HasPrefix(filepath.Base(fetch), fetchPrefix) {
		freed += onDisk(fetch)
		err = os.RemoveAll(fetch)
	}
	parts, _ := filepath.Glob(filepath.Join(dir, initrdPrefix+"*"+newSuffix)) // the pattern is a good one
	for _, path := range append(parts, link, dir+workSuffix, dir+newSuffix) {
		freed += onDisk(path)
		err = errors.Join(err, os.RemoveAll(path))
	}
	return freed, err
}

// tryLock takes the lock under which the pack in dir is made; false where somebody has it.
func tryLock(dir string) (unlock func(), free bool, err error) {
	f, err := os.OpenFile(dir+lockSuffix, os.O_RDWR|os.O_CREATE, 0o644)
	if errors.Is(err, unix.EROFS) {
		return nil, false, nil // nothing can be removed
	}
	if err != nil {
		return nil, false, err
	}
	err = inuse.Lock(f, unix.LOCK_EX|unix.LOCK_NB)
	if err != nil || !inuse.IsAt(f, dir+lockSuffix) { // or another has removed it since
		if errors.Is(err, unix.EWOULDBLOCK) {
			err = nil
		}
		return nil, false, errors.Join(err, f.Close())
	}
	return func() { letGo(f, dir) }, true, nil
}

// onDisk is inuse.OnDisk; what cannot be looked at counts nothing.
func onDisk(path string) flint.Bytes {
	size, _ := inuse.OnDisk(path)
	return size
}
