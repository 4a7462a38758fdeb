// The program firecracker is a double of Firecracker: its API is as strict as the real one's, its guest is the real agent
// of package guest, on the scripted system of vmtest, behind the real vsock handshake.
//
// It is for tests, and must not be mistaken for a virtual machine: nothing it "runs" is isolated from anything.
package main

import (
	"bytes"
	"errors"
	"fmt"
	"net"
	"os"
	"strings"
	"sync"
	"syscall"

	"flint/internal/vm"
	"flint/internal/vm/firecracker/fctest/double"
	"flint/internal/vm/vmtest"
)

// Exit codes of the real one.
const (
	exitOK        = 0
	exitGeneric   = 1
	exitArguments = 153
)

func main() {
	o, err := double.Read()
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		syscall.Exit(exitGeneric)
	}
	v := &vmm{o: o, id: "anonymous-instance", logFD: 1, metricsFD: -1, fake: &vmtest.Fake{}}
	v.fake.Exec = v.execute
	code, err := v.run(os.Args[1:])
	if err != nil {
		v.say("main", fmt.Sprintf("Firecracker exiting with error. exit_code=%d: %v", code, err))
		fmt.Fprintln(os.Stderr, "Error:", err)
	}
	syscall.Exit(code)
}

// vmm is one process and, once it is started, its guest.
type vmm struct {
	o    double.Options
	id   string
	fake *vmtest.Fake

	mu        sync.Mutex // held by every request: they are done one after the other
	logFD     int
	metricsFD int
	flushes   int
	config    config
	started   bool
	machine   vm.Machine
	vsock     net.Listener
	over      chan struct{} // closed when the guest has begun to end
}

// run is the whole life; it returns the exit code.
func (v *vmm) run(args []string) (int, error) {
	socket := "/run/firecracker.socket"
	for i := 0; i < len(args); i++ {
		name := args[i]
		switch name {
		case "--version":
			fmt.Printf("Firecracker v%s\n\n", v.o.Version)
			v.say("main", "Firecracker exiting successfully. exit_code=0")
			return exitOK, nil
		case "--id", "--api-sock", "--start-time-us", "--start-time-cpu-us", "--parent-cpu-time-us":
		default:
			return exitArguments, fmt.Errorf("arguments parsing error: found argument %q which wasn't expected", name)
		}
		if i++; i == len(args) {
			return exitArguments, fmt.Errorf("arguments parsing error: the argument %q requires a value, but none was supplied", name)
		}
		switch name {
		case "--id":
			v.id = args[i]
		case "--api-sock":
			socket = args[i]
		}
	}
	v.over = make(chan struct{})
	v.say("main", "Running Firecracker v"+v.o.Version)
	l, err := net.Listen("unix", socket)
	if err != nil {
		return exitGeneric, fmt.Errorf("open the API socket at %s, check that it is not already used: %w", socket, err)
	}
	go v.serve(l)
	<-v.over
	v.mu.Lock() // and never given back: nothing is answered any more
	v.flush()
	v.say("main", "Vmm is stopping.")
	// Releases of the real one have ended their API thread by a request to themselves, and panicked if that failed.
	self, err := net.Dial("unix", socket)
	if err != nil {
		return exitGeneric, fmt.Errorf("connect to own API socket: %w", err)
	}
	self.Close()
	v.say("main", "Firecracker exiting successfully. exit_code=0")
	return exitOK, nil
}

// say writes a line of the log. It never waits: a full pipe loses it.
func (v *vmm) say(thread, text string) {
	_, _ = syscall.Write(v.logFD, []byte(fmt.Sprintf("2026-01-01T00:00:00.000000000 [%s:%s:INFO] %s\n", v.id, thread, text)))
}

// flush writes a report of the metrics, whose counters begin anew in each.
func (v *vmm) flush() {
	if v.metricsFD < 0 {
		return
	}
	v.flushes++
	var rx, tx, read, write int
	if v.started && v.flushes == 1 {
		rx, tx, read, write = 2048, 1024, 8<<20, 1<<20
	}
	line := fmt.Sprintf(`{"utc_timestamp_ms":1,"api_server":{"process_startup_time_us":1},`+
		`"block":{"read_bytes":%d,"write_bytes":%d,"flush_count":1},"block_base":{"read_bytes":%d,"write_bytes":%d},`+
		`"net":{"rx_bytes_count":%d,"tx_bytes_count":%d},"net_eth0":{"rx_bytes_count":%d,"tx_bytes_count":%d}}`+"\n",
		read, write, read, write, rx, tx, rx, tx)
	_, _ = syscall.Write(v.metricsFD, []byte(line))
}

// hasSerial reports whether the guest's kernel writes to its serial console.
func (v *vmm) hasSerial() bool {
	args := strings.Fields(v.config.boot.Args)
	serial := false
	for _, a := range args {
		switch a {
		case "console=ttyS0":
			serial = true
		case "8250.nr_uarts=0":
			return false
		}
	}
	return serial
}

func (v *vmm) print(text string) {
	if v.hasSerial() {
		_, _ = syscall.Write(1, []byte(text))
	}
}

// isKernel checks what Firecracker's loader would: an ELF file for this kind of machine.
func isKernel(path string) error {
	f, err := os.Open(path)
	if err != nil {
		return err
	}
	defer f.Close()
	head := make([]byte, 64)
	n, _ := f.Read(head)
	if !bytes.HasPrefix(head[:n], []byte("\x7fELF")) && (n < 60 || string(head[56:60]) != "ARM\x64") {
		return errors.New("invalid magic number")
	}
	return nil
}
