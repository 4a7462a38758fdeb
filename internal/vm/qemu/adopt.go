package qemu

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"time"

	"flint"
	"flint/internal/vm"
)

// answerWithin bounds the wait for an adopted QEMU's monitor. One that runs answers at once. One that is stopped, or
// whose monitor another process has, is adopted all the same, to be ended by force if need be.
const answerWithin = time.Second

// Adopt implements vm.Adopter. The console begins with the adoption. How the VM ends is known from QEMU's monitor only,
// because the exit status is for the process's parent: see the machine's Wait.
func (d *Driver) Adopt(ctx context.Context, s vm.Spec, pid int, start uint64) (vm.Machine, error) {
	fail := func(err error) (vm.Machine, error) { return nil, fmt.Errorf("adopt VM %s: %w", s.ID, err) }
	if err := ctx.Err(); err != nil {
		return fail(err)
	}
	p, err := take(s.ID, pid, start)
	if err != nil {
		return fail(err)
	}
	m := newMachine(s)
	m.proc = p
	if err := m.connect(ctx); err != nil {
		if p.held.Ended() {
			err = errors.Join(flint.ErrNotFound, err)
		}
		m.disconnect()
		p.close()
		return fail(err)
	}
	m.cgroups = d.cgroups
	m.sockets = socketNames()
	m.qmp.ending = func() { m.sample() }
	m.sample()
	m.watch()
	slow := time.NewTimer(answerWithin)
	defer slow.Stop()
	select {
	case <-m.qmp.ready:
	case <-m.done:
		if !m.qmp.answered() {
			m.disconnect()
			return fail(fmt.Errorf("hear from its monitor: the process has ended: %w", flint.ErrNotFound))
		}
	case <-slow.C:
		d.log.Warn("the monitor of a QEMU of an earlier process does not answer", "vm", s.ID, "pid", pid, "after", answerWithin)
	case <-ctx.Done():
		p.close() // which ends the watch
		m.disconnect()
		<-m.done
		return fail(ctx.Err())
	}
	if d.cgroups != nil {
		d.cgroups.adopt(s.ID)
	}
	d.log.Info("adopted a VM of an earlier process", "vm", s.ID, "pid", pid)
	return m, nil
}

// take takes hold of the process if it is the QEMU of that VM. The error is flint.ErrNotFound if it is not.
func take(id string, pid int, start uint64) (*process, error) {
	held, err := vm.OpenProcess(pid, start)
	if err != nil {
		return nil, err
	}
	cmdline, err := os.ReadFile(fmt.Sprintf("/proc/%d/cmdline", pid))
	switch {
	case err != nil && !held.Ended():
		return nil, errors.Join(fmt.Errorf("see what process %d is: %w", pid, err), held.Close())
	case err != nil || !named(cmdline, id) || held.Ended(): // asked last: so the command line is that process's
		return nil, errors.Join(fmt.Errorf("find QEMU: process %d is not that VM's: %w", pid, flint.ErrNotFound), held.Close())
	}
	return &process{pid: pid, start: start, held: held}, nil
}

// named reports whether a command line, as /proc shows it, is one of ours for this VM (see arguments).
func named(cmdline []byte, id string) bool {
	args := bytes.Split(cmdline, []byte{0})
	return id != "" && len(args) > 3 && string(args[1]) == "-name" && string(args[2]) == id
}
