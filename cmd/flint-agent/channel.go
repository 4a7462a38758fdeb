package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	"flint/internal/guest"

	"golang.org/x/sys/unix"
)

const (
	channelWithin = 10 * time.Second // for the channel's device to appear
	reopenWait    = 100 * time.Millisecond
)

// stream is a device or socket read and written through the runtime's poller.
type stream struct {
	file *os.File
	raw  syscall.RawConn
	// quiet: a read of nothing means that nobody is at the other end yet, not that it ended.
	quiet bool
}

func newStream(f *os.File, quiet bool) (*stream, error) {
	raw, err := f.SyscallConn()
	if err != nil {
		return nil, errors.Join(err, f.Close())
	}
	return &stream{f, raw, quiet}, nil
}

// Read waits for bytes. A virtio-serial port without a host gives none, and is always readable by poll's account, but
// wakes the poller when that changes; so the wait neither spins nor sleeps.
func (s *stream) Read(p []byte) (n int, err error) {
	if len(p) == 0 {
		return 0, nil
	}
	waitErr := s.raw.Read(func(fd uintptr) bool {
		for {
			n, err = unix.Read(int(fd), p)
			if !errors.Is(err, unix.EINTR) {
				break
			}
		}
		return !errors.Is(err, unix.EAGAIN) && (n > 0 || err != nil || !s.quiet)
	})
	switch {
	case waitErr != nil:
		return 0, waitErr
	case err != nil:
		return 0, err
	case n == 0:
		return 0, io.EOF
	}
	return n, nil
}

// Write waits until all of p is taken.
func (s *stream) Write(p []byte) (int, error) {
	total := 0
	for total < len(p) {
		var n int
		var err error
		waitErr := s.raw.Write(func(fd uintptr) bool {
			for {
				n, err = unix.Write(int(fd), p[total:])
				if !errors.Is(err, unix.EINTR) {
					break
				}
			}
			return !errors.Is(err, unix.EAGAIN)
		})
		if err := errors.Join(waitErr, err); err != nil {
			return total, err
		}
		total += n
	}
	return total, nil
}

// Close ends reads and writes under way.
func (s *stream) Close() error { return s.file.Close() }

// serialPort returns the device of the virtio-serial port with the name, or "" if there is none.
func serialPort(sys, name string) string {
	files, _ := filepath.Glob(filepath.Join(sys, "class/virtio-ports/*/name")) // the pattern is well formed
	for _, f := range files {
		b, err := os.ReadFile(f)
		if err == nil && strings.TrimSpace(string(b)) == name {
			return "/dev/" + filepath.Base(filepath.Dir(f))
		}
	}
	return ""
}

// talk serves hosts on the channel until ctx ends.
func talk(ctx context.Context, a *guest.Agent, channel string) error {
	switch channel {
	case "serial", "vsock", "":
	default:
		return fmt.Errorf("open channel: flint.channel=%s is neither serial nor vsock", channel)
	}
	if channel == "" {
		channel = "vsock"
		if serialPort("/sys", guest.SerialName) != "" {
			channel = "serial"
		}
	}
	if channel == "vsock" {
		return talkVsock(ctx, a)
	}
	return talkSerial(ctx, a)
}

// talkSerial serves on the virtio-serial port, which it opens anew when a session ended, so that nothing of the old one
// is left in it.
func talkSerial(ctx context.Context, a *guest.Agent) error {
	var device string
	bounded, cancel := context.WithTimeout(ctx, channelWithin)
	defer cancel()
	if err := retry(bounded, func() error {
		if device = serialPort("/sys", guest.SerialName); device == "" {
			return fmt.Errorf("find virtio-serial port %s: there is none", guest.SerialName)
		}
		return nil
	}); err != nil {
		return err
	}
	for ctx.Err() == nil {
		s, err := openPort(device)
		if err != nil {
			return err
		}
		if a.Serve(ctx, s) == nil {
			continue
		}
		select {
		case <-time.After(reopenWait):
		case <-ctx.Done():
		}
	}
	return ctx.Err()
}

func openPort(device string) (*stream, error) {
	f, err := os.OpenFile(device, os.O_RDWR|unix.O_NONBLOCK, 0)
	if err != nil {
		return nil, fmt.Errorf("open virtio-serial port: %w", err)
	}
	return newStream(f, true)
}

// talkVsock serves the newest of the connections to guest.Port.
func talkVsock(ctx context.Context, a *guest.Agent) error {
	fd, err := unix.Socket(unix.AF_VSOCK, unix.SOCK_STREAM|unix.SOCK_NONBLOCK|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return fmt.Errorf("open vsock: %w", err)
	}
	listener := os.NewFile(uintptr(fd), "vsock")
	defer listener.Close()
	if err := unix.Bind(fd, &unix.SockaddrVM{CID: unix.VMADDR_CID_ANY, Port: guest.Port}); err != nil {
		return fmt.Errorf("bind vsock port %d: %w", guest.Port, err)
	}
	if err := unix.Listen(fd, 8); err != nil {
		return fmt.Errorf("listen on vsock port %d: %w", guest.Port, err)
	}
	return acceptNewest(ctx, a, listener)
}

// acceptNewest serves each connection until the next one comes.
func acceptNewest(ctx context.Context, a *guest.Agent, listener *os.File) error {
	stop := context.AfterFunc(ctx, func() { listener.Close() })
	defer stop()
	raw, err := listener.SyscallConn()
	if err != nil {
		return err
	}
	var served chan struct{}
	end := func() {}
	defer func() {
		end()
		if served != nil {
			<-served
		}
	}()
	for {
		var conn int
		var acceptErr error
		if err := raw.Read(func(fd uintptr) bool {
			conn, _, acceptErr = unix.Accept4(int(fd), unix.SOCK_NONBLOCK|unix.SOCK_CLOEXEC)
			return !errors.Is(acceptErr, unix.EAGAIN)
		}); err != nil {
			return errors.Join(ctx.Err(), err)
		}
		switch {
		case errors.Is(acceptErr, unix.ECONNABORTED) || errors.Is(acceptErr, unix.EINTR):
			continue
		case acceptErr != nil:
			return fmt.Errorf("accept connection: %w", acceptErr)
		}
		s, err := newStream(os.NewFile(uintptr(conn), "host"), false)
		if err != nil {
			continue
		}
		end()
		if served != nil {
			<-served
		}
		session, cancel := context.WithCancel(ctx)
		end, served = cancel, make(chan struct{})
		go func(served chan struct{}) {
			defer close(served)
			_ = a.Serve(session, s) // why it ended is the host's to know
		}(served)
	}
}
