package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"sync"
	"syscall"
	"time"

	"flint/internal/guest"

	"golang.org/x/sys/unix"
)

// serveAsInit serves as PID 1 of an image without an init of its own, which the signals were sent to. It returns only an
// error.
func serveAsInit(ctx context.Context, st state, signals <-chan os.Signal) error {
	if err := setUpLoopback(); err != nil {
		complain(err)
		st.Hello.Faults = append(st.Hello.Faults, err.Error())
	}
	// What jobs get; the kernel's own are too few for dockerd. The hard limit is the kernel's fs.nr_open.
	if err := syscall.Setrlimit(syscall.RLIMIT_NOFILE, &syscall.Rlimit{Cur: 65536, Max: 1048576}); err != nil {
		complain(fmt.Errorf("raise limit of open files: %w", err))
	}
	return serveSystem(ctx, st, signals)
}

// serveUnderInit serves as a service of the image's init, with what PID 1 left behind.
func serveUnderInit(ctx context.Context) error {
	b, err := os.ReadFile(filepath.Join(runDir, "state.json"))
	if err != nil {
		return fmt.Errorf("read what PID 1 left: %w", err)
	}
	var st state
	if err := json.Unmarshal(b, &st); err != nil {
		return fmt.Errorf("read what PID 1 left: %w", err)
	}
	return serveSystem(ctx, st, nil)
}

// serveSystem serves hosts. As PID 1 it has signals to obey.
func serveSystem(ctx context.Context, st state, signals <-chan os.Signal) error {
	sys := newSystem(signals != nil)
	if !sys.init {
		sys.up = upFile
	}
	sys.shielded = true
	setOOMScore(shieldedScore)
	stop := make(chan struct{})
	var tasks sync.WaitGroup
	tasks.Go(func() { sys.reaper.run(stop) })
	tasks.Go(func() { sys.watch(stop) })
	tasks.Go(func() {
		obey(signals, stop, func() {
			if err := sys.Reboot(); err != nil {
				complain(err)
			}
		})
	})
	if sys.init {
		d, err := sys.findDocker()
		if err != nil {
			complain(err)
			st.Hello.Faults = append(st.Hello.Faults, err.Error())
		}
		if d != nil {
			tasks.Go(func() { sys.keepDocker(d, stop) })
		}
	}
	err := serve(ctx, st, sys)
	close(stop)
	tasks.Wait()
	return err
}

// serve talks to hosts for sys until the channel fails or ctx ends.
func serve(ctx context.Context, st state, sys guest.System) error {
	var now unix.Timespec
	if err := unix.ClockGettime(unix.CLOCK_BOOTTIME, &now); err == nil {
		st.Hello.Uptime = time.Duration(now.Nano())
	}
	a := guest.NewAgent(sys, st.Hello, newLog())
	err := talk(ctx, a, st.Channel)
	return errors.Join(err, a.Close())
}
