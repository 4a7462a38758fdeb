package firecracker

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"syscall"

	"flint"
	"flint/internal/vm"
)

// Adopt implements vm.Adopter.
func (d *Driver) Adopt(ctx context.Context, s vm.Spec, pid int, start uint64) (vm.Machine, error) {
	if !filepath.IsLocal(s.ID) || filepath.Base(s.ID) != s.ID {
		return nil, fmt.Errorf("adopt VM %q: that is no ID", s.ID)
	}
	if err := d.claim(s.ID); err != nil {
		return nil, err
	}
	m := newMachine(s.ID, d.log.With("vm", s.ID), d.c.Serial)
	m.undo.Push("forget VM", func(context.Context) error { d.disclaim(s.ID); return nil })
	var home string
	p, err := adopt(pid, start)
	if err == nil {
		home, err = d.rejoin(s, m, p)
	}
	if err != nil {
		// Only what this process holds of it: descriptors and names.
		return nil, errors.Join(fmt.Errorf("adopt VM %s: %w", s.ID, err), m.undo.Run(context.WithoutCancel(ctx)))
	}
	keepers := m.undo.Take()
	d.ownLeftovers(s, m, home)
	m.undo.Push("close what was opened", keepers.Run)
	m.watch(p)
	d.log.Info("adopted a VM of an earlier process", "vm", s.ID, "pid", pid)
	return m, nil
}

// rejoin checks that the process is the VM's, and opens its sockets and pipes. It returns the VM's jail.
func (d *Driver) rejoin(s vm.Spec, m *machine, p *process) (home string, err error) {
	defer func() {
		if err != nil {
			p.close()
		}
	}()
	dir, link := s.Dir, "cwd"
	if !d.c.NoJail {
		uid, holder, err := d.reservation(s.ID)
		if err != nil {
			return "", err
		}
		m.uid, home = int(uid), filepath.Join(d.c.ChrootBase, holder)
		dir, link = filepath.Join(home, "root"), "root"
	}
	if err := sameFile(dir, fmt.Sprintf("/proc/%d/%s/.", p.pid, link)); err != nil {
		return "", err
	}
	if err := m.open(dir); err != nil {
		return "", err
	}
	return home, m.openPipes()
}

// reservation finds the user reserved for a VM.
func (d *Driver) reservation(id string) (uid uint32, holder string, err error) {
	reserved, err := d.uids.reservations()
	if err != nil {
		return 0, "", err
	}
	for uid, holder := range reserved {
		if filepath.IsLocal(holder) && filepath.Base(holder) == id {
			return uid, holder, nil
		}
	}
	return 0, "", fmt.Errorf("find its user: none is reserved: %w", flint.ErrNotFound)
}

// ownLeftovers makes m release what the process that booted it would have released.
func (d *Driver) ownLeftovers(s vm.Spec, m *machine, home string) {
	if d.c.NoJail {
		m.undo.Push("remove sockets and pipes", func(context.Context) error {
			var errs []error
			for _, name := range []string{apiSocket, vsockSocket, logPipe, metricsPipe, outPipe} {
				if err := os.Remove(filepath.Join(s.Dir, name)); err != nil && !errors.Is(err, os.ErrNotExist) {
					errs = append(errs, err)
				}
			}
			return errors.Join(errs...)
		})
		return
	}
	uid := uint32(m.uid)
	m.groups = d.groups
	m.undo.Push("give user back", func(context.Context) error { return d.uids.give(uid) })
	m.undo.Push("remove jail", func(context.Context) error { return os.RemoveAll(home) })
	m.undo.Push("remove cgroup", func(ctx context.Context) error { return d.groups.remove(ctx, s.ID) })
}

// sameFile returns flint.ErrNotFound unless both paths lead to one directory.
func sameFile(want, have string) error {
	var a, b syscall.Stat_t
	if err := syscall.Stat(want, &a); err != nil {
		return fmt.Errorf("look at %s: %w: %w", want, flint.ErrNotFound, err)
	}
	if err := syscall.Stat(have, &b); err != nil {
		return fmt.Errorf("look at %s: %w: %w", have, flint.ErrNotFound, err)
	}
	if a.Dev != b.Dev || a.Ino != b.Ino {
		return fmt.Errorf("the process is not in %s: %w", want, flint.ErrNotFound)
	}
	return nil
}

// Sweep implements vm.Sweeper.
func (d *Driver) Sweep(ctx context.Context) error {
	if d.c.NoJail {
		return nil // everything is in Spec.Dir
	}
	reserved, err := d.uids.reservations()
	if err != nil {
		return err
	}
	var errs []error
	for uid, holder := range reserved {
		if err := d.sweep(ctx, uid, holder); err != nil {
			errs = append(errs, fmt.Errorf("remove what VM %q left: %w", filepath.Base(holder), err))
		}
	}
	return errors.Join(errs...)
}

func (d *Driver) sweep(ctx context.Context, uid uint32, holder string) error {
	if holder == "" || !filepath.IsLocal(holder) || filepath.Dir(holder) == "." {
		return d.sweepUser(uid) // a crash came between the making of the file and its writing
	}
	id := filepath.Base(holder)
	if d.claim(id) != nil {
		return nil // it is one of this driver's machines
	}
	defer d.disclaim(id)
	if busy, err := runs(uid); busy || err != nil {
		return err
	}
	if err := errors.Join(d.groups.remove(ctx, id), os.RemoveAll(filepath.Join(d.c.ChrootBase, holder))); err != nil {
		return err
	}
	d.log.Info("removed what an earlier VM left", "vm", id, "uid", uid)
	return d.uids.give(uid)
}

func (d *Driver) sweepUser(uid uint32) error {
	if busy, err := runs(uid); busy || err != nil {
		return err
	}
	return d.uids.give(uid)
}
