package vm

import (
	"errors"
	"fmt"
	"os"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

func TestApart(t *testing.T) {
	var used []int
	want := errors.New("what fn says")
	for range 200 {
		err := Apart(func() error {
			used = append(used, unix.Gettid())
			return want
		})
		if !errors.Is(err, want) {
			t.Fatalf("got %v", err)
		}
	}
	tick, patience := time.NewTicker(time.Millisecond), time.After(time.Minute)
	defer tick.Stop()
	for _, tid := range used {
		if tid == os.Getpid() {
			t.Fatal("ran on the main thread")
		}
		for {
			if _, err := os.Stat(fmt.Sprintf("/proc/self/task/%d", tid)); err != nil {
				break
			}
			select {
			case <-tick.C:
			case <-patience:
				t.Fatalf("thread %d was not thrown away", tid)
			}
		}
	}
}
