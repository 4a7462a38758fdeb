package network

import (
	"context"
	"errors"
	"net"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"

	"golang.org/x/sync/errgroup"

	"flint"
)

// TestLockIsNoStrangers holds everything another user can hold, and opens a network all the same.
func TestLockIsNoStrangers(t *testing.T) {
	enterNamespace(t)
	for _, name := range []string{"@flint-network-flint0", "@flint0", "@flint"} {
		l, err := net.Listen("unix", name)
		ok(t, err)
		t.Cleanup(func() { l.Close() })
	}
	open(t, config())
	st, err := os.Stat(lockDir)
	ok(t, err)
	if st.Mode().Perm()&0o022 != 0 {
		t.Errorf("%s has mode %s", lockDir, st.Mode())
	}
}

func TestLock(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "flint")
	ns := here(t)
	lock, err := lockName(t.Context(), dir, "one", ns)
	ok(t, err)
	st, err := os.Stat(dir)
	ok(t, err)
	if st.Mode().Perm() != 0o700 {
		t.Errorf("directory has mode %s", st.Mode())
	}
	if st, err = lock.Stat(); err != nil || st.Mode().Perm() != 0o600 {
		t.Errorf("file has mode %s, %v", st.Mode(), err)
	}
	_, err = lockName(t.Context(), dir, "one", ns)
	if !errors.Is(err, flint.ErrConflict) || fault(err).Code != "network.busy" || !strings.Contains(err.Error(), "process "+strconv.Itoa(os.Getpid())+")") {
		t.Errorf("a second lock: %v", err)
	}
	other, err := lockName(t.Context(), dir, "two", ns)
	ok(t, err)
	ok(t, unlockName(other))

	ok(t, lock.Close()) // as when the process is killed
	again, err := lockName(t.Context(), dir, "one", ns)
	ok(t, err)
	ok(t, unlockName(again))
	left, err := os.ReadDir(dir)
	if err != nil || len(left) > 0 {
		t.Errorf("left: %v, %v", left, err)
	}
}

// TestLockIsExclusive has many take and drop one lock, whose file is removed and made anew all the time.
func TestLockIsExclusive(t *testing.T) {
	dir, ns := filepath.Join(t.TempDir(), "flint"), here(t)
	held := make(chan struct{}, 1)
	var g errgroup.Group
	for range 8 {
		g.Go(func() error {
			for taken := 0; taken < 50; {
				f, err := lockName(t.Context(), dir, "one", ns)
				if fault(err).Code == "network.busy" {
					continue
				}
				if err != nil {
					return err
				}
				select {
				case held <- struct{}{}:
				default:
					return errors.New("two have the lock")
				}
				taken++
				<-held
				if err := unlockName(f); err != nil {
					return err
				}
			}
			return nil
		})
	}
	ok(t, g.Wait())
}

func TestLockDirectoryOfOthers(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("needs root: gives a directory to another user")
	}
	for name, make := range map[string]func(dir string) error{
		"another user's": func(dir string) error { return errors.Join(os.Mkdir(dir, 0o755), os.Chown(dir, 65534, 65534)) },
		"anybody's":      func(dir string) error { return errors.Join(os.Mkdir(dir, 0o700), os.Chmod(dir, 0o777)) },
		"a link":         func(dir string) error { return os.Symlink(filepath.Dir(dir), dir) },
		"a file":         func(dir string) error { return os.WriteFile(dir, nil, 0o600) },
	} {
		dir := filepath.Join(t.TempDir(), "flint")
		ok(t, make(dir))
		if f, err := lockName(t.Context(), dir, "one", here(t)); fault(err).Code != "network.lock" {
			t.Errorf("%s: %v, %v", name, f, err)
		}
	}
}

// TestLockIsGoneWithTheNetwork looks for the file.
func TestLockIsGoneWithTheNetwork(t *testing.T) {
	enterNamespace(t)
	n, err := Open(t.Context(), config())
	ok(t, err)
	path := n.lock.Name()
	_, err = os.Stat(path)
	ok(t, err)
	ok(t, n.Close(context.Background()))
	if _, err := os.Stat(path); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("the lock stays: %v", err)
	}
}
