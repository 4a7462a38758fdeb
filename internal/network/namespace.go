package network

import (
	"context"
	"fmt"
	"net"
	"os"
	"runtime"

	"golang.org/x/sys/unix"
)

// namespace is an open descriptor of a network namespace. The namespace lives at least as long as it.
type namespace struct{ *os.File }

// currentNamespace opens the network namespace of the calling thread.
func currentNamespace() (namespace, error) {
	f, err := os.Open("/proc/thread-self/ns/net")
	if err != nil {
		return namespace{}, fmt.Errorf("open network namespace: %w", err)
	}
	return namespace{f}, nil
}

// do runs fn on a thread that is in the namespace, and returns when fn has. Sockets fn opens stay in the namespace.
func (ns namespace) do(fn func() error) error {
	return onThread(func() error {
		if err := unix.Setns(int(ns.Fd()), unix.CLONE_NEWNET); err != nil {
			return fmt.Errorf("enter network namespace: %w", err)
		}
		return fn()
	})
}

// newNamespace makes an anonymous network namespace and runs fn on a thread in it.
func newNamespace(fn func(namespace) error) error {
	return onThread(func() error {
		if err := unix.Unshare(unix.CLONE_NEWNET); err != nil {
			return fmt.Errorf("create network namespace: %w", err)
		}
		ns, err := currentNamespace()
		if err != nil {
			return err
		}
		return fn(ns)
	})
}

// onThread runs fn on a locked thread whose network namespace fn may change, and returns when fn has. The thread goes
// back to where it was; one that cannot is never used again, because the runtime ends a thread whose goroutine ends
// locked to it. It cannot end the main thread, so that one is not taken.
func onThread(fn func() error) error {
	done := make(chan error, 1)
	go func() {
		runtime.LockOSThread()
		if unix.Gettid() == os.Getpid() {
			// While this goroutine holds the main thread, the next one cannot get it.
			done <- onThread(fn)
			runtime.UnlockOSThread()
			return
		}
		before, err := currentNamespace()
		if err != nil {
			runtime.UnlockOSThread()
			done <- err
			return
		}
		err = fn()
		if unix.Setns(int(before.Fd()), unix.CLONE_NEWNET) == nil {
			runtime.UnlockOSThread()
		}
		before.Close()
		done <- err
	}()
	return <-done
}

// dialFunc is net.Dialer.DialContext's shape.
type dialFunc func(ctx context.Context, network, address string) (net.Conn, error)

// dialer returns a dial function whose sockets are in the namespace. In the process's own namespace, the case outside
// tests, it is the plain one.
func (ns namespace) dialer() dialFunc {
	var d net.Dialer
	if ns.isProcess() {
		return d.DialContext
	}
	return func(ctx context.Context, network, address string) (conn net.Conn, err error) {
		err = ns.do(func() (err error) {
			conn, err = d.DialContext(ctx, network, address)
			return err
		})
		return conn, err
	}
}

// isProcess reports whether this is the namespace of the threads that nobody moved. /proc/self would not do: it speaks
// of the main thread, which a caller of Open may have moved.
func (ns namespace) isProcess() bool {
	var process os.FileInfo
	err := onThread(func() (err error) {
		process, err = os.Stat("/proc/thread-self/ns/net")
		return err
	})
	if err != nil {
		return false
	}
	mine, err := ns.Stat()
	return err == nil && os.SameFile(mine, process)
}
