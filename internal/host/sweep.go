package host

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"time"

	"golang.org/x/sys/unix"

	"flint"
)

// Sweep undoes what runners of an earlier process left behind: it reads every record, ends the VMM it names, removes the
// registration, and then the directory. Network ports are undone by opening the network. It is idempotent. A record
// that cannot be read is moved to the directory "damaged" beside the runners', never guessed at. Runners of this process are
// left alone.
func (h *Host) Sweep(ctx context.Context) error {
	if err := os.MkdirAll(h.c.Dir, 0o700); err != nil {
		return fmt.Errorf("make directory of runners: %w", err)
	}
	entries, err := os.ReadDir(h.c.Dir)
	if err != nil {
		return fmt.Errorf("list runners: %w", err)
	}
	var errs []error
	for _, e := range entries {
		if h.alive(e.Name()) {
			continue
		}
		if err := h.sweepOne(ctx, filepath.Join(h.c.Dir, e.Name())); err != nil {
			errs = append(errs, fmt.Errorf("undo runner %s: %w", e.Name(), err))
		}
	}
	return errors.Join(errs...)
}

// alive reports whether the runner is this process's own.
func (h *Host) alive(id string) bool {
	h.mu.Lock()
	defer h.mu.Unlock()
	return h.lives[id] != nil
}

func (h *Host) sweepOne(ctx context.Context, dir string) error {
	rec, err := readRecord(dir)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return os.RemoveAll(dir) // died before its record: it had nothing yet
	case err != nil:
		h.c.Log.Warn("a runner's record is set aside", "dir", dir, "err", err)
		aside := filepath.Join(filepath.Dir(h.c.Dir), "damaged")
		if err := os.MkdirAll(aside, 0o700); err != nil {
			return err
		}
		return os.Rename(dir, filepath.Join(aside, fmt.Sprintf("%s.%d", filepath.Base(dir), time.Now().UnixNano())))
	}
	h.c.Log.Info("undoing a runner of an earlier process", "runner", rec.Runner.ID, "phase", rec.Runner.Phase)
	if err := endProcess(ctx, rec.PID, rec.Start); err != nil {
		return fmt.Errorf("end its VMM: %w", err)
	}
	if rec.Register {
		if h.c.GitHub == nil {
			return errors.New("its registration can be removed only with access to GitHub")
		}
		if err := remove(ctx, h.c.GitHub, rec.Runner.ID, rec.GitHubID); err != nil {
			return fmt.Errorf("remove its registration: %w", err)
		}
	}
	return os.RemoveAll(dir)
}

// remove asks until GitHub no longer says that the runner has a job, for at most 10 seconds: the VM is gone, and GitHub
// is told so by its silence. The caller's record stays if that is not enough.
func remove(ctx context.Context, github Registrar, runner string, id int64) error {
	ctx, cancel := context.WithTimeout(ctx, 10*time.Second)
	defer cancel()
	for wait := 100 * time.Millisecond; ; wait *= 2 {
		err := github.Remove(ctx, runner, id)
		if !errors.Is(err, flint.ErrConflict) {
			return err
		}
		select {
		case <-time.After(wait):
		case <-ctx.Done():
			return err
		}
	}
}

// endProcess kills the process and waits until it is gone. Its start time makes sure that it is the one we mean: a
// process that is gone, or whose pid is another's by now, is no error.
func endProcess(ctx context.Context, pid int, start uint64) error {
	if pid <= 1 {
		return nil
	}
	fd, err := unix.PidfdOpen(pid, 0)
	if errors.Is(err, unix.ESRCH) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("open process %d: %w", pid, err)
	}
	defer unix.Close(fd)
	if s, err := startTime(pid); err != nil || s != start {
		return nil
	}
	if err := unix.PidfdSendSignal(fd, unix.SIGKILL, nil, 0); err != nil && !errors.Is(err, unix.ESRCH) {
		return fmt.Errorf("kill process %d: %w", pid, err)
	}
	for ctx.Err() == nil {
		n, err := unix.Poll([]unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}, 100)
		if n > 0 {
			return nil
		}
		if err != nil && !errors.Is(err, unix.EINTR) {
			return fmt.Errorf("wait for process %d: %w", pid, err)
		}
	}
	return fmt.Errorf("wait for process %d: %w", pid, ctx.Err())
}

// startTime reads field 22 of /proc/pid/stat (proc_pid_stat(5)). The second field may hold spaces and parentheses.
func startTime(pid int) (uint64, error) {
	b, err := os.ReadFile(filepath.Join("/proc", strconv.Itoa(pid), "stat"))
	if err != nil {
		return 0, err
	}
	fields := bytes.Fields(b[bytes.LastIndexByte(b, ')')+1:])
	if len(fields) < 20 {
		return 0, fmt.Errorf("process %d has a short stat line", pid)
	}
	return strconv.ParseUint(string(fields[19]), 10, 64)
}

// Leftovers lists what of past and present runners is still on this machine: their directories, and the VMMs their
// records name. It is the proof that nothing is left.
func (h *Host) Leftovers() ([]string, error) {
	entries, err := os.ReadDir(h.c.Dir)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("list runners: %w", err)
	}
	var left []string
	for _, e := range entries {
		dir := filepath.Join(h.c.Dir, e.Name())
		left = append(left, "directory "+dir)
		if rec, err := readRecord(dir); err == nil && rec.PID > 1 {
			if s, err := startTime(rec.PID); err == nil && s == rec.Start {
				left = append(left, fmt.Sprintf("process %d of %s", rec.PID, rec.Runner.ID))
			}
		}
	}
	return left, nil
}
