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
			if m.user != nil {
				err = errors.Join(err, m.user.forget())
			}
		}
	}()
	dir, link := s.Dir, "cwd"
	var uid uint32
	var holder string
	if !d.c.NoJail {
		if uid, holder, err = d.reserved(s.ID); err != nil {
			return "", err
		}
		home = filepath.Join(d.c.ChrootBase, holder)
		dir, link = filepath.Join(home, "root"), "root"
	}
	if err := sameFile(dir, fmt.Sprintf("/proc/%d/%s/.", p.pid, link)); err != nil {
		return "", err
	}
	if !d.c.NoJail {
		if m.user, err = d.uids.hold(uid, holder); err != nil {
			return "", err
		}
		m.uid = int(uid)
	}
	if err := m.open(dir); err != nil {
		return "", err
	}
	return home, m.openPipes()
}

// reserved finds the user reserved for a VM.
func (d *Driver) reserved(id string) (uid uint32, holder string, err error) {
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
	m.groups = d.groups
	m.undo.Push("give user back", m.giveUser)
	m.pushRemoval("remove jail", func(context.Context) error { return os.RemoveAll(home) })
	m.pushRemoval("remove cgroup", func(ctx context.Context) error { return d.groups.remove(ctx, s.ID) })
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

// sweep removes what is left of one reservation, if nobody has it: neither a process of ours, which may be booting the
// VM or ending it, nor the VMM itself.
func (d *Driver) sweep(ctx context.Context, uid uint32, holder string) error {
	user, err := d.uids.hold(uid, holder)
	if errors.Is(err, flint.ErrConflict) || errors.Is(err, flint.ErrNotFound) {
		return nil
	}
	if err != nil {
		return err
	}
	if busy, err := runs(uid); busy || err != nil {
		return errors.Join(err, user.forget())
	}
	if holder == "" || !filepath.IsLocal(holder) || filepath.Dir(holder) == "." {
		return user.give() // a crash came between the making of the file and its writing
	}
	if err := d.sweepJail(ctx, holder, uid); err != nil {
		return errors.Join(err, user.forget())
	}
	d.log.Info("removed what an earlier VM left", "vm", filepath.Base(holder), "uid", uid)
	return user.give()
}

// sweepJail removes a jail that user had, unless a later VM of the same name has it now.
func (d *Driver) sweepJail(ctx context.Context, holder string, user uint32) error {
	reserved, err := d.uids.reservations()
	if err != nil {
		return err
	}
	for uid, other := range reserved {
		if other == holder && uid != user {
			return nil // the last of its reservations to be swept takes it along
		}
	}
	return errors.Join(d.groups.remove(ctx, filepath.Base(holder)), os.RemoveAll(filepath.Join(d.c.ChrootBase, holder)))
}
