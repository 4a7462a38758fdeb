package inuse

import (
	"context"
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"runtime"
	"testing"

	"golang.org/x/sys/unix"
)

func TestWhatIsHeldCannotBeSeized(t *testing.T) {
	dir := t.TempDir()
	file := filepath.Join(dir, "file")
	if err := os.WriteFile(file, []byte("x"), 0o600); err != nil {
		t.Fatal(err)
	}
	for _, path := range []string{file, dir} {
		one, err := Hold(path)
		if err != nil {
			t.Fatal(err)
		}
		two, err := Hold(path)
		if err != nil {
			t.Fatalf("%s: a second user: %v", path, err)
		}
		one.Close()
		if f, err := Seize(path); f != nil || err != nil {
			t.Errorf("%s: seized (%v) although held", path, err)
		}
		two.Close()
		f, err := Seize(path)
		if f == nil || err != nil {
			t.Fatalf("%s: not seized although free: %v", path, err)
		}
		if again, err := Seize(path); again != nil || err != nil {
			t.Errorf("%s: seized twice (%v)", path, err)
		}
		f.Close()
	}
}

func TestWhatIsOpenCannotBeSeized(t *testing.T) {
	file := filepath.Join(t.TempDir(), "file")
	if err := os.WriteFile(file, []byte("x"), 0o600); err != nil {
		t.Fatal(err)
	}
	if is, err := Open(file); is || err != nil {
		t.Errorf("open: %v, %v", is, err)
	}
	for _, how := range []int{os.O_RDONLY, os.O_RDWR} {
		vmm, err := os.OpenFile(file, how, 0)
		if err != nil {
			t.Fatal(err)
		}
		if f, err := Seize(file); f != nil || err != nil {
			t.Errorf("seized (%v) although open", err)
		}
		if is, err := Open(file); !is || err != nil {
			t.Errorf("open: %v, %v", is, err)
		}
		vmm.Close()
	}
	if f, err := Seize(file); f == nil || err != nil {
		t.Errorf("not seized although closed: %v", err)
	}
}

// TestHoldIsOfWhatIsThere has a holder wait for one who replaces the file: it gets the new one.
func TestHoldIsOfWhatIsThere(t *testing.T) {
	dir := t.TempDir()
	file, next := filepath.Join(dir, "file"), filepath.Join(dir, "next")
	for _, p := range []string{file, next} {
		if err := os.WriteFile(p, []byte(p), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	taken, err := Seize(file)
	if taken == nil {
		t.Fatal(err)
	}
	held := make(chan error)
	go func() {
		f, err := Hold(file)
		if err == nil {
			var b [512]byte
			n, rerr := f.Read(b[:])
			if err = errors.Join(rerr, f.Close()); string(b[:n]) != next {
				err = errors.New("holds " + string(b[:n]))
			}
		}
		held <- err
	}()
	if err := errors.Join(os.Rename(next, file), taken.Close()); err != nil {
		t.Fatal(err)
	}
	if err := <-held; err != nil {
		t.Error(err)
	}
	if err := os.Remove(file); err != nil {
		t.Fatal(err)
	}
	if _, err := Hold(file); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("got %v", err)
	}
	if f, err := Seize(file); f != nil || err != nil {
		t.Errorf("seized what is not there: %v", err)
	}
}

// TestWhatIsAnothersCountsAsOpen: without the right to take leases on the files of others nothing can be said of them.
func TestWhatIsAnothersCountsAsOpen(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("needs root: to give a file to another user")
	}
	file := filepath.Join(t.TempDir(), "file")
	if err := os.WriteFile(file, []byte("x"), 0o644); err != nil {
		t.Fatal(err)
	}
	if err := os.Chown(file, 65534, 65534); err != nil {
		t.Fatal(err)
	}
	type answer struct {
		open bool
		err  error
	}
	got := make(chan answer)
	go func() {
		runtime.LockOSThread() // for good: the thread ends with the goroutine, and so does what it lacks
		head := unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}
		var sets [2]unix.CapUserData
		err := unix.Capget(&head, &sets[0])
		if err == nil {
			sets[0].Effective &^= 1 << unix.CAP_LEASE
			err = unix.Capset(&head, &sets[0])
		}
		if err != nil {
			got <- answer{err: err}
			return
		}
		open, err := Open(file)
		got <- answer{open, err}
	}()
	if a := <-got; !a.open || a.err != nil {
		t.Errorf("open: %v, %v", a.open, a.err)
	}
}

// TestWait: one after the other has the lock, and who waits says so once.
func TestWait(t *testing.T) {
	path := filepath.Join(t.TempDir(), "lock")
	untold := func() { t.Error("it waits for nobody") }
	first, err := Wait(t.Context(), path, untold)
	if err != nil {
		t.Fatal(err)
	}
	told := 0
	ctx, cancel := context.WithCancelCause(t.Context())
	gone := errors.New("nobody waits any more")
	if _, err := Wait(ctx, path, func() { told++; cancel(gone) }); !errors.Is(err, gone) {
		t.Errorf("while another has it: %v", err)
	}
	second, err := Wait(t.Context(), path, func() { told++; first.Close() })
	if err != nil || told != 2 {
		t.Fatalf("%v, told %d times", err, told)
	}
	// One that was removed meanwhile is not what others find.
	third, err := Wait(t.Context(), path, func() {
		if err := errors.Join(os.Remove(path), second.Close()); err != nil {
			t.Error(err)
		}
	})
	if err != nil || !IsAt(third, path) {
		t.Fatalf("it has a lock that nobody finds: %v", err)
	}
	defer third.Close()
	if _, err := Wait(t.Context(), filepath.Join(path, "no directory"), untold); err == nil {
		t.Error("there is no such file")
	}
}
