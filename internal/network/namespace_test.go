package network

import (
	"os"
	"testing"

	"golang.org/x/sys/unix"
)

func TestOnThreadSparesTheMainThread(t *testing.T) {
	for range 500 {
		ok(t, onThread(func() error {
			if unix.Gettid() == os.Getpid() {
				t.Error("runs on the main thread")
			}
			return nil
		}))
	}
}
