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
// with the VM's jail in it, relative to the chroot base. So two processes of ours never give the same user to two VMs.
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
			"set the range to user ids nothing else uses, such as 1000 from 1900000000")
	}
	if err := unused(r, "/etc/passwd", "/etc/subuid"); err != nil {
		return nil, uidFault(r, flint.ErrConflict, err, "set firecracker.uids to a range nothing else uses")
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

// unused checks that no account and no range of subordinate users overlaps r.
func unused(r Range, passwd, subuid string) error {
	for _, file := range []struct {
		path         string
		first, count int // columns
	}{{passwd, 2, -1}, {subuid, 1, 2}} {
		f, err := os.Open(file.path)
		if errors.Is(err, fs.ErrNotExist) {
			continue
		}
		if err != nil {
			return err
		}
		defer f.Close()
		lines := bufio.NewScanner(f)
		for lines.Scan() {
			fields := strings.Split(lines.Text(), ":")
			if len(fields) <= max(file.first, file.count) {
				continue
			}
			first, err := strconv.ParseUint(fields[file.first], 10, 32)
			if err != nil {
				continue
			}
			count := uint64(1)
			if file.count >= 0 {
				if count, err = strconv.ParseUint(fields[file.count], 10, 32); err != nil {
					continue
				}
			}
			if first < uint64(r.First)+uint64(r.Count) && uint64(r.First) < first+count {
				return fmt.Errorf("%s gives %d to %s", file.path, first, fields[0])
			}
		}
		if err := lines.Err(); err != nil {
			return fmt.Errorf("read %s: %w", file.path, err)
		}
	}
	return nil
}

// take reserves a user no process runs as.
func (p *uidPool) take(holder string) (uint32, error) {
	running, err := owners()
	if err != nil {
		return 0, err
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	for i := range p.count {
		offset := (p.next + i) % p.count
		uid := p.first + offset
		if running[uid] {
			continue
		}
		f, err := os.OpenFile(p.file(uid), os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
		if errors.Is(err, fs.ErrExist) {
			continue
		}
		if err != nil {
			return 0, fmt.Errorf("reserve user %d: %w", uid, err)
		}
		_, err = f.WriteString(holder)
		if err = errors.Join(err, f.Close()); err != nil {
			return 0, errors.Join(fmt.Errorf("reserve user %d: %w", uid, err), p.give(uid))
		}
		p.next = (offset + 1) % p.count
		return uid, nil
	}
	return 0, uidFault(Range{p.first, p.count}, nil, errors.New("all of them are taken"),
		"give firecracker.uids more users than the host may have VMs")
}

// give ends a reservation.
func (p *uidPool) give(uid uint32) error {
	err := os.Remove(p.file(uid))
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	return err
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
