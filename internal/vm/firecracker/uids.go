package firecracker

import (
	"bufio"
	"errors"
	"fmt"
	"io/fs"
	"math"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"syscall"

	"flint"
)

// uidDir is the directory of the reservations in the chroot base: one file for each user that is taken, named after it,
// with the VM's jail in it, relative to the chroot base, and locked by whoever has the VM. So two processes of ours never
// give the same user to two VMs, and neither removes what the other still uses.
const uidDir = "uids"

// uidPool hands out user ids.
type uidPool struct {
	dir   string
	first uint32
	count uint32

	mu   sync.Mutex
	next uint32 // offset of the one to try first
}

func newUIDPool(r Range, dir string) (*uidPool, error) {
	if r == (Range{}) {
		r = Range{First: defaultFirstUID, Count: defaultUIDs}
	}
	if r.First == 0 || r.Count == 0 || r.First > math.MaxUint32-1-r.Count {
		return nil, uidFault(r, flint.ErrConfig, errors.New("it is empty, or begins with root, or ends beyond what there is"),
			"set firecracker.uid_first and firecracker.uid_count to user ids nothing else uses, such as 1000 from 1900000000")
	}
	if err := unused(r, "/etc"); err != nil {
		return nil, uidFault(r, flint.ErrConflict, err, "set firecracker.uid_first and firecracker.uid_count to a range nothing else uses")
	}
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, fmt.Errorf("make directory of reserved users: %w", err)
	}
	return &uidPool{dir: dir, first: r.First, count: r.Count}, nil
}

func uidFault(r Range, kind, err error, fix string) error {
	return &flint.Fault{
		Code: "firecracker.uids", What: fmt.Sprintf("use the users %d to %d for VMs", r.First, uint64(r.First)+uint64(r.Count)-1),
		Kind: kind, Err: err, Fix: fix,
	}
}

// maxLine bounds a line of /etc/group and its like, in bytes: a group may have many members.
const maxLine = 1 << 20

// unused checks that no account, no group and no range of subordinate ids overlaps r: each of its users is a group too.
func unused(r Range, etc string) error {
	for _, c := range []struct {
		name         string
		first, count int // columns
	}{{"passwd", 2, -1}, {"passwd", 3, -1}, {"group", 2, -1}, {"subuid", 1, 2}, {"subgid", 1, 2}} {
		if err := unusedIn(r, filepath.Join(etc, c.name), c.first, c.count); err != nil {
			return err
		}
	}
	return nil
}

func unusedIn(r Range, path string, firstColumn, countColumn int) error {
	f, err := os.Open(path)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	defer f.Close()
	lines := bufio.NewScanner(f)
	lines.Buffer(nil, maxLine)
	for lines.Scan() {
		fields := strings.Split(lines.Text(), ":")
		if len(fields) <= max(firstColumn, countColumn) {
			continue
		}
		first, err := strconv.ParseUint(fields[firstColumn], 10, 32)
		if err != nil {
			continue
		}
		count := uint64(1)
		if countColumn >= 0 {
			if count, err = strconv.ParseUint(fields[countColumn], 10, 32); err != nil {
				continue
			}
		}
		if first < uint64(r.First)+uint64(r.Count) && uint64(r.First) < first+count {
			return fmt.Errorf("%s gives %d to %s", path, first, fields[0])
		}
	}
	if err := lines.Err(); err != nil {
		return fmt.Errorf("read %s: %w", path, err)
	}
	return nil
}

// reservation is a user that is this process's to give to a VM. Its file is locked as long as this process has it; after
// this process's end the file stays, for the next one to hold or to remove.
type reservation struct {
	uid  uint32
	path string
	file *os.File
}

// take reserves a user no process runs as.
func (p *uidPool) take(holder string) (*reservation, error) {
	running, err := owners()
	if err != nil {
		return nil, err
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	for i := range p.count {
		offset := (p.next + i) % p.count
		uid := p.first + offset
		if running[uid] {
			continue
		}
		f, err := os.OpenFile(p.file(uid), os.O_RDWR|os.O_CREATE|os.O_EXCL, 0o600)
		if errors.Is(err, fs.ErrExist) {
			continue
		}
		if err != nil {
			return nil, fmt.Errorf("reserve user %d: %w", uid, err)
		}
		if !locked(f) { // whoever sweeps was faster, and removes it
			f.Close()
			continue
		}
		r := &reservation{uid, f.Name(), f}
		if _, err = f.WriteString(holder); err != nil {
			return nil, errors.Join(fmt.Errorf("reserve user %d: %w", uid, err), r.give())
		}
		p.next = (offset + 1) % p.count
		return r, nil
	}
	return nil, uidFault(Range{p.first, p.count}, nil, errors.New("all of them are taken"),
		"raise firecracker.uid_count above the number of VMs the host may have")
}

// hold takes over a reservation whose owner is gone. The error is flint.ErrConflict when a living process has it, and
// flint.ErrNotFound when there is none for this holder.
func (p *uidPool) hold(uid uint32, holder string) (*reservation, error) {
	f, err := os.OpenFile(p.file(uid), os.O_RDWR, 0)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, fmt.Errorf("hold user %d: it is not reserved: %w", uid, flint.ErrNotFound)
	}
	if err != nil {
		return nil, fmt.Errorf("hold user %d: %w", uid, err)
	}
	if !locked(f) {
		f.Close()
		return nil, fmt.Errorf("hold user %d: another process has it: %w", uid, flint.ErrConflict)
	}
	if is := p.holder(uid); is != holder {
		f.Close()
		return nil, fmt.Errorf("hold user %d: it is reserved for %q: %w", uid, is, flint.ErrNotFound)
	}
	return &reservation{uid, f.Name(), f}, nil
}

// locked takes the lock of a reservation's file. False: another has it, or the file has no name any more.
func locked(f *os.File) bool {
	var st syscall.Stat_t
	fd := int(f.Fd())
	return syscall.Flock(fd, syscall.LOCK_EX|syscall.LOCK_NB) == nil && syscall.Fstat(fd, &st) == nil && st.Nlink > 0
}

// give ends a reservation: the user is free. The name goes before the lock does, so it is ours that goes.
func (r *reservation) give() error {
	if _, err := r.file.Stat(); errors.Is(err, os.ErrClosed) {
		return nil // given already, or forgotten: then it is not ours any more
	}
	if err := os.Remove(r.path); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return errors.Join(err, r.forget())
	}
	return r.forget()
}

// forget lets go of a reservation, which stays.
func (r *reservation) forget() error {
	if err := r.file.Close(); !errors.Is(err, os.ErrClosed) {
		return err
	}
	return nil
}

func (p *uidPool) file(uid uint32) string {
	return filepath.Join(p.dir, strconv.FormatUint(uint64(uid), 10))
}

// holder returns whose reservation a user is, or "".
func (p *uidPool) holder(uid uint32) string {
	b, err := os.ReadFile(p.file(uid))
	if err != nil || len(b) > 512 {
		return ""
	}
	return string(b)
}

// reservations maps users to their holders.
func (p *uidPool) reservations() (map[uint32]string, error) {
	entries, err := os.ReadDir(p.dir)
	if err != nil {
		return nil, fmt.Errorf("list reserved users: %w", err)
	}
	all := map[uint32]string{}
	for _, e := range entries {
		if uid, err := strconv.ParseUint(e.Name(), 10, 32); err == nil {
			all[uint32(uid)] = p.holder(uint32(uid))
		}
	}
	return all, nil
}

// owners returns the users that have processes, those that wait to be collected included: a process's directory belongs
// to its effective user.
func owners() (map[uint32]bool, error) {
	entries, err := os.ReadDir("/proc")
	if err != nil {
		return nil, fmt.Errorf("list processes: %w", err)
	}
	running := map[uint32]bool{}
	var st syscall.Stat_t
	for _, e := range entries {
		if name := e.Name(); name[0] >= '1' && name[0] <= '9' && syscall.Stat("/proc/"+name, &st) == nil {
			running[st.Uid] = true
		}
	}
	return running, nil
}

// runs reports whether any process that is not merely waiting to be collected runs as the user.
func runs(uid uint32) (bool, error) {
	files, _ := filepath.Glob("/proc/[1-9]*/status") // the pattern is well formed
	if len(files) == 0 {
		return false, errors.New("list processes: /proc has none")
	}
	for _, file := range files {
		b, err := os.ReadFile(file)
		if err != nil {
			continue // it has ended
		}
		var zombie, its bool
		for line := range strings.Lines(string(b)) {
			switch f := strings.Fields(line); {
			case len(f) > 1 && f[0] == "State:":
				zombie = f[1] == "Z" || f[1] == "X"
			case len(f) > 1 && f[0] == "Uid:":
				its = f[1] == strconv.FormatUint(uint64(uid), 10)
			}
		}
		if its && !zombie {
			return true, nil
		}
	}
	return false, nil
}
