package regular

import (
	"bytes"
	"errors"
	"io"
	"io/fs"
	"net"
	"os"
	"os/signal"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"flint"
)

// others makes one of everything that is no ordinary file, by what is said of it.
func others(t *testing.T) map[string]string {
	t.Helper()
	dir := t.TempDir()
	at := func(name string) string { return filepath.Join(dir, name) }
	t.Chdir(dir) // the path of a socket is short
	l, err := net.Listen("unix", "socket")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { l.Close() })
	err = errors.Join(unix.Mkfifo(at("pipe"), 0o600), os.Symlink("pipe", at("link")), os.Symlink("loop", at("loop")))
	if err != nil {
		t.Fatal(err)
	}
	return map[string]string{
		at("pipe"):   "it is no ordinary file but a pipe",
		at("link"):   "it is no ordinary file but a pipe",
		at("socket"): "it is no ordinary file but a socket",
		dir:          "it is no ordinary file but a directory",
		"/dev/zero":  "it is no ordinary file but a device",
		at("loop"):   "too many levels of symbolic links",
		at("none"):   "no such file or directory",
	}
}

// TestOthers must not wait: what hangs is killed with the whole test.
func TestOthers(t *testing.T) {
	for path, want := range others(t) {
		for name, do := range map[string]func() error{
			"Check": func() error { return Check(path) },
			"Open":  func() error { _, err := Open(path); return err },
			"Read":  func() error { _, err := Read(path, flint.MiB); return err },
		} {
			err := do()
			if err == nil || err.Error() != want {
				t.Errorf("%s of %s: %v, want %s", name, path, err, want)
			}
			if errors.Is(err, ErrOther) != strings.Contains(want, "ordinary") || errors.Is(err, fs.ErrNotExist) != strings.Contains(want, "no such") {
				t.Errorf("%s of %s: the error is not told apart: %v", name, path, err)
			}
		}
	}
}

func TestOrdinary(t *testing.T) {
	dir := t.TempDir()
	path, link, content := filepath.Join(dir, "file"), filepath.Join(dir, "link"), []byte("0123456789")
	if err := errors.Join(os.WriteFile(path, content, 0o600), os.Symlink("file", link)); err != nil {
		t.Fatal(err)
	}
	for _, path := range []string{path, link} {
		if err := Check(path); err != nil {
			t.Error(err)
		}
		f, err := Open(path)
		if err != nil {
			t.Fatal(err)
		}
		b, err := io.ReadAll(f)
		if err = errors.Join(err, f.Close()); err != nil || !bytes.Equal(b, content) {
			t.Errorf("%s read: %q, %v", path, b, err)
		}
		if b, err := Read(path, 10); err != nil || !bytes.Equal(b, content) {
			t.Errorf("%s read: %q, %v", path, b, err)
		}
		if _, err := Read(path, 9); err == nil || err.Error() != "it has more than 9B" {
			t.Errorf("a file of 10 bytes where 9 may be: %v", err)
		}
	}
}

// TestLeasedFile: a server of files may have a lease, which opening without waiting would meet as an error.
func TestLeasedFile(t *testing.T) {
	path := filepath.Join(t.TempDir(), "file")
	if err := os.WriteFile(path, []byte("text"), 0o600); err != nil {
		t.Fatal(err)
	}
	holder, err := os.OpenFile(path, os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer holder.Close()
	if _, err := unix.FcntlInt(holder.Fd(), unix.F_SETLEASE, unix.F_WRLCK); err != nil {
		t.Skipf("needs a file system with leases: %v", err)
	}
	broken := make(chan os.Signal, 1)
	signal.Notify(broken, unix.SIGIO)
	defer signal.Stop(broken)
	given := make(chan struct{})
	go func() {
		defer close(given)
		<-broken
		_, _ = unix.FcntlInt(holder.Fd(), unix.F_SETLEASE, unix.F_UNLCK) // else the kernel does, later
	}()
	if b, err := Read(path, flint.MiB); err != nil || string(b) != "text" {
		t.Errorf("%q, %v", b, err)
	}
	<-given // opening asked for it, whatever came of it
}
