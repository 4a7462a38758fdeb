package vm

import (
	"os"
	"runtime"

	"golang.org/x/sys/unix"
)

// Apart runs fn on a thread that is thrown away afterwards, and returns when fn has: fn may move it into namespaces and
// a root that the rest of the program must never see, and start a process there. It is never the program's main thread,
// which cannot be thrown away: the runtime would park it where fn left it, with its namespaces and mounts alive, and
// with all of /proc/self speaking of them.
func Apart(fn func() error) error {
	done := make(chan error, 1)
	go func() {
		runtime.LockOSThread()
		if unix.Gettid() == os.Getpid() {
			// While this goroutine holds the main thread, the next one cannot get it.
			done <- Apart(fn)
			runtime.UnlockOSThread()
			return
		}
		done <- fn() // and never unlocked: the thread ends with this goroutine
	}()
	return <-done
}
