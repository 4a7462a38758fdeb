package network

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"

	"golang.org/x/sys/unix"

	"flint"
)

// lockDir is where the locks are. No other user may write there, or they could keep a network from being opened.
const lockDir = "/run/flint"

// lockName makes sure that no two live processes use one name in one network namespace: it locks a file in dir that is
// named after both and holds this process's pid. The kernel drops the lock with the process. Names of two namespaces do
// not meet, and processes in two mount namespaces do not see each other.
func lockName(ctx context.Context, dir, name string, ns namespace) (*os.File, error) {
	if err := lockDirectory(dir); err != nil {
		return nil, err
	}
	st, err := ns.Stat()
	if err != nil {
		return nil, fmt.Errorf("look at network namespace: %w", err)
	}
	path := filepath.Join(dir, fmt.Sprintf("network-%s-%d", name, st.Sys().(*syscall.Stat_t).Ino))
	for ctx.Err() == nil {
		f, err := os.OpenFile(path, os.O_RDWR|os.O_CREATE|unix.O_NOFOLLOW, 0o600)
		if err != nil {
			return nil, lockFault(dir, err, "check "+path)
		}
		won, err := tryLock(f, path, name)
		if won {
			return f, nil
		}
		if cerr := f.Close(); cerr != nil {
			err = errors.Join(err, cerr)
		}
		if err != nil {
			return nil, err
		}
	}
	return nil, ctx.Err()
}

// tryLock locks f and puts our pid into it. It reports false without an error when f was removed by its last owner,
// after we had opened it.
func tryLock(f *os.File, path, name string) (won bool, err error) {
	switch err := unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB); {
	case errors.Is(err, unix.EWOULDBLOCK):
		return false, busy(name, f)
	case err != nil:
		return false, fmt.Errorf("lock %s: %w", path, err)
	}
	mine, err := f.Stat()
	if err != nil {
		return false, fmt.Errorf("look at lock: %w", err)
	}
	if there, err := os.Lstat(path); err != nil || !os.SameFile(mine, there) {
		return false, ignoreMissing(err)
	}
	if err := f.Truncate(0); err != nil {
		return false, fmt.Errorf("write pid to lock: %w", err)
	}
	if _, err := f.WriteAt(fmt.Appendln(nil, os.Getpid()), 0); err != nil {
		return false, fmt.Errorf("write pid to lock: %w", err)
	}
	return true, nil
}

// unlockName removes the lock while it is held, so that nothing stays and nobody's lock is removed.
func unlockName(f *os.File) error {
	return errors.Join(ignoreMissing(os.Remove(f.Name())), f.Close())
}

// lockDirectory makes the directory, or makes sure that nobody but us and root can write to the one there is.
func lockDirectory(dir string) error {
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return lockFault(dir, err, "run flint as root, or give its service RuntimeDirectory="+filepath.Base(dir))
	}
	st, err := os.Lstat(dir)
	if err != nil {
		return lockFault(dir, err, "check the directory")
	}
	uid := int(st.Sys().(*syscall.Stat_t).Uid)
	if !st.IsDir() || uid != 0 && uid != os.Geteuid() || st.Mode().Perm()&0o022 != 0 {
		return lockFault(dir, errors.New("it is not a directory that only its owner, root or flint's user, can write to"), "remove it; flint makes it anew")
	}
	return nil
}

// busy is the fault of a name that a live process has. The pid it put into the file goes into the text.
func busy(name string, f *os.File) error {
	owner := "another running flint"
	b, _ := io.ReadAll(io.NewSectionReader(f, 0, 16))
	if pid, err := strconv.Atoi(strings.TrimSpace(string(b))); err == nil && pid > 0 {
		owner = fmt.Sprintf("%s (process %d)", owner, pid)
	}
	return &flint.Fault{
		Code: "network.busy", What: "open network " + name, Kind: flint.ErrConflict,
		Err: errors.New(owner + " uses a network of this name"),
		Fix: "stop the other flint, or give this one another network name and other subnets",
	}
}

func lockFault(dir string, err error, fix string) error {
	return &flint.Fault{Code: "network.lock", What: "lock network name in " + dir, Kind: flint.ErrPermission, Err: err, Fix: fix}
}
