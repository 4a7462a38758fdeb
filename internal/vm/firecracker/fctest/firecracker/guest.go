package main

import (
	"context"
	"fmt"
	"io"
	"net"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	"flint"
	"flint/internal/guest"
	"flint/internal/vm"
	"flint/internal/vm/vmtest"
)

// begin starts the guest. The caller holds v.mu.
func (v *vmm) begin() error {
	s := vm.Spec{
		ID: v.id, Kernel: absolute(v.config.boot.Kernel), Initrd: absolute(v.config.boot.Initrd), Dir: "/",
		CPUs: v.config.machine.CPUs, Memory: flint.Bytes(v.config.machine.MemoryMiB) * flint.MiB,
	}
	m, err := v.fake.Boot(context.Background(), s)
	if err != nil {
		return err
	}
	v.machine, v.started = m, true
	served := make(chan struct{})
	go func() {
		defer close(served)
		if v.vsock != nil {
			v.acceptVsock(v.vsock)
		}
	}()
	v.print("Linux version 6.12 (double)\r\n")
	go func() {
		_ = m.Wait(context.Background())
		if v.vsock != nil {
			v.vsock.Close()
		}
		// The guest's last words are on their way; a connection nobody asked anything on is not waited for long.
		select {
		case <-served:
		case <-time.After(lastWords):
		}
		close(v.over)
	}()
	return nil
}

const lastWords = 3 * time.Second

// acceptVsock serves the host's connections to the guest. It returns when all have ended.
func (v *vmm) acceptVsock(l net.Listener) {
	var all sync.WaitGroup
	defer all.Wait()
	for {
		conn, err := l.Accept()
		if err != nil {
			return
		}
		all.Go(func() { v.shake(conn) })
	}
}

// shake does the handshake of a connection and joins it to the agent. A port nobody listens on hangs up.
func (v *vmm) shake(conn net.Conn) {
	if v.o.Deaf {
		return
	}
	port, err := readConnect(conn)
	if err != nil || v.o.Mute || port != guest.Port {
		conn.Close()
		return
	}
	agent, err := v.machine.Dial(context.Background(), port)
	if err != nil {
		conn.Close()
		return
	}
	if _, err := fmt.Fprintf(conn, "OK %d\n", 1<<30+time.Now().Nanosecond()%1000); err != nil {
		conn.Close()
		agent.Close()
		return
	}
	join(conn, agent)
}

// join copies between host and agent. What the agent said last reaches the host, whatever the host says meanwhile.
func join(host, agent net.Conn) {
	var both sync.WaitGroup
	both.Go(func() {
		_, _ = io.Copy(agent, host)
		agent.Close()
	})
	both.Go(func() {
		_, _ = io.Copy(host, agent)
		host.Close()
	})
	both.Wait()
}

// readConnect reads `CONNECT port` and not a byte more.
func readConnect(conn net.Conn) (uint32, error) {
	var line []byte
	for b := make([]byte, 1); len(line) < 32; line = append(line, b[0]) {
		if _, err := conn.Read(b); err != nil {
			return 0, err
		}
		if b[0] == '\n' {
			break
		}
	}
	number, ok := strings.CutPrefix(string(line), "CONNECT ")
	if !ok {
		return 0, fmt.Errorf("%q is no request", line)
	}
	port, err := strconv.ParseUint(number, 10, 32)
	return uint32(port), err
}

// execute is the guest's shell: vmtest's, and the crash of the conformance suite.
func (v *vmm) execute(ctx context.Context, c guest.Command, stdin io.Reader, stdout, stderr io.Writer) guest.Exit {
	if slices.Contains(c.Args, "echo c >/proc/sysrq-trigger") {
		v.print("Kernel panic - not syncing: sysrq triggered crash\r\n")
		v.fake.Crash(v.id)
		<-ctx.Done()
		return guest.Exit{}
	}
	return vmtest.Shell(ctx, c, stdin, stdout, stderr)
}
