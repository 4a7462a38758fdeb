package main

import (
	"os"
	"os/signal"
	"syscall"

	"golang.org/x/sys/unix"
)

// catchSignals takes every signal that can be taken, so that none ends PID 1, with which the kernel would end: the Go
// runtime, left alone, exits on most. SIGCHLD is the reaper's; SIGURG is the runtime's, and harmless. They are not
// ignored, because what the agent starts would inherit that.
func catchSignals() <-chan os.Signal {
	c := make(chan os.Signal, 16) // some may come while one is obeyed
	var all []os.Signal
	for s := syscall.Signal(1); s <= 64; s++ { // to SIGRTMAX, see signal(7)
		if s != unix.SIGCHLD && s != unix.SIGURG && s != unix.SIGKILL && s != unix.SIGSTOP {
			all = append(all, s)
		}
	}
	signal.Notify(c, all...)
	return c
}

// endsInit reports whether a signal is how one asks an init to end the machine: busybox's halt, poweroff and reboot send
// SIGUSR1, SIGUSR2 and SIGTERM; the kernel's ctrl-alt-del is SIGINT, a power failure SIGPWR. For a VM all are the same.
func endsInit(s os.Signal) bool {
	switch s {
	case unix.SIGTERM, unix.SIGINT, unix.SIGUSR1, unix.SIGUSR2, unix.SIGPWR:
		return true
	}
	return false
}

// obey calls end for each signal that asks for it, until stop is closed.
func obey(signals <-chan os.Signal, stop <-chan struct{}, end func()) {
	for {
		select {
		case s := <-signals:
			if endsInit(s) {
				end()
			}
		case <-stop:
			return
		}
	}
}
