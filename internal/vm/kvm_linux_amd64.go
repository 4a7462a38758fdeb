package vm

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"runtime"
	"sync/atomic"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"
)

// Numbers of the KVM API, from linux/kvm.h and asm/kvm.h for x86.
const (
	kvmGetAPIVersion       = 0xae00
	kvmCreateVM            = 0xae01
	kvmGetVCPUMmapSize     = 0xae04
	kvmCreateVCPU          = 0xae41
	kvmSetUserMemoryRegion = 0x4020ae46
	kvmRun                 = 0xae80
	kvmSetRegs             = 0x4090ae82
	kvmGetSregs            = 0x8138ae83
	kvmSetSregs            = 0x4138ae84

	kvmAPIVersion = 12
	kvmExitHalt   = 5

	// Offsets in struct kvm_run.
	runImmediateExit = 1
	runExitReason    = 8
)

// The guest loops probeRounds times through probeLoop iterations, 20 million in all: some 10 ms on a processor, tens of
// seconds where every instruction is emulated. One round must fit probeFirst, so that the common broken case is
// told quickly; all must fit probeAll, which leaves room for a host that is busy or nested itself; a thread that does not come back from its last signal is given up after probeKick.
const (
	probeLoop   = 1_000_000
	probeRounds = 20
	probeFirst  = 300 * time.Millisecond
	probeAll    = 2500 * time.Millisecond
	probeKick   = 200 * time.Millisecond
)

// ProbeKVM tells whether KVM works: it runs a loop in long mode, as a kernel would be run, under a deadline. A /dev/kvm
// that opens, or even creates VMs, proves nothing: some machines emulate ordinary guests one instruction at a time.
// It takes some 20 ms where KVM works, less than a second where it is broken in the common way, and never above three,
// or until ctx ends.
func ProbeKVM(ctx context.Context) KVMStatus {
	dev, err := os.OpenFile(kvmDevice, os.O_RDWR|unix.O_CLOEXEC, 0)
	switch {
	case errors.Is(err, fs.ErrNotExist), errors.Is(err, unix.ENODEV), errors.Is(err, unix.ENXIO):
		return KVMStatus{State: KVMAbsent}
	case errors.Is(err, fs.ErrPermission):
		return KVMStatus{KVMNoPermission, err.Error()}
	case err != nil:
		return KVMStatus{KVMBroken, err.Error()}
	}
	defer dev.Close()
	p, err := newProbe(int(dev.Fd()))
	if err != nil {
		return KVMStatus{KVMBroken, err.Error()}
	}
	return p.watch(ctx)
}

// probe is a VM with one processor.
type probe struct {
	vm, vcpu int
	mem, run []byte

	tid     atomic.Int32 // of the thread in loop, once it runs
	stopped atomic.Bool
	rounds  chan error // one message per finished round, room for all; closed when loop ends
}

func newProbe(kvm int) (_ *probe, err error) {
	p := &probe{vm: -1, vcpu: -1, rounds: make(chan error, probeRounds)}
	defer func() {
		if err != nil {
			p.release()
		}
	}()
	if v, err := ioctl(kvm, kvmGetAPIVersion, 0); err != nil || v != kvmAPIVersion {
		return nil, fmt.Errorf("ask for the KVM version: got %d, want %d: %w", v, kvmAPIVersion, err)
	}
	if p.vm, err = ioctl(kvm, kvmCreateVM, 0); err != nil {
		return nil, fmt.Errorf("create a virtual machine: %w", err)
	}
	if p.mem, err = unix.Mmap(-1, 0, probeMemory, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED|unix.MAP_ANONYMOUS); err != nil {
		return nil, fmt.Errorf("map guest memory: %w", err)
	}
	writeProbeGuest(p.mem)
	region := struct {
		slot, flags           uint32
		guestPhys, size, user uint64
	}{size: probeMemory, user: uint64(uintptr(unsafe.Pointer(&p.mem[0])))}
	if err = ioctlPtr(p.vm, kvmSetUserMemoryRegion, unsafe.Pointer(&region)); err != nil {
		return nil, fmt.Errorf("give memory to the virtual machine: %w", err)
	}
	if p.vcpu, err = ioctl(p.vm, kvmCreateVCPU, 0); err != nil {
		return nil, fmt.Errorf("create a virtual processor: %w", err)
	}
	size, err := ioctl(kvm, kvmGetVCPUMmapSize, 0)
	if err != nil || size < os.Getpagesize() {
		return nil, fmt.Errorf("ask for the size of a virtual processor (%d): %w", size, err)
	}
	if p.run, err = unix.Mmap(p.vcpu, 0, size, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED); err != nil {
		return nil, fmt.Errorf("map the virtual processor: %w", err)
	}
	return p, p.enterLongMode()
}

// Layout of the guest's memory, in bytes from 0. One 2 MiB page maps it all.
const (
	probeMemory = 0x5000
	probePML4   = 0x1000
	probePDPT   = 0x2000
	probePD     = 0x3000
	probeCode   = 0x4000
)

func writeProbeGuest(mem []byte) {
	const present, writable, large = 1, 2, 1 << 7
	binary.LittleEndian.PutUint64(mem[probePML4:], probePDPT|present|writable)
	binary.LittleEndian.PutUint64(mem[probePDPT:], probePD|present|writable)
	binary.LittleEndian.PutUint64(mem[probePD:], present|writable|large)
	code := append([]byte{0xb9}, binary.LittleEndian.AppendUint32(nil, probeLoop)...) // mov ecx, probeLoop
	code = append(code,
		0xff, 0xc9, // dec ecx
		0x75, 0xfc, // jnz to the dec
		0xf4,       // hlt
		0xeb, 0xf4, // jmp to the mov
	)
	copy(mem[probeCode:], code)
}

// enterLongMode sets the registers a 64-bit kernel would have at ring 0. Sizes and offsets are those of struct
// kvm_sregs and kvm_regs, which are fixed by the kernel's ABI.
func (p *probe) enterLongMode() error {
	var sregs [0x138]byte
	if err := ioctlPtr(p.vcpu, kvmGetSregs, unsafe.Pointer(&sregs)); err != nil {
		return fmt.Errorf("read the system registers: %w", err)
	}
	const segment = 24 // size of struct kvm_segment; cs ds es fs gs ss come first
	for i := range 6 {
		s := sregs[i*segment : (i+1)*segment]
		clear(s)
		binary.LittleEndian.PutUint32(s[8:], 0xffffffff) // limit
		binary.LittleEndian.PutUint16(s[12:], 0x10)      // selector
		s[14] = 3                                        // type: data, writable, accessed
		s[15], s[18], s[20] = 1, 1, 1                    // present, s, g
		s[17] = 1                                        // db
		if i == 0 {
			binary.LittleEndian.PutUint16(s[12:], 0x8)
			s[14], s[17], s[19] = 11, 0, 1 // type: code, read, accessed; no db; l
		}
	}
	const (
		offCR0, offCR3, offCR4, offEFER = 0xe0, 0xf0, 0xf8, 0x108
		cr0                             = 1<<31 | 1<<5 | 1<<4 | 1 // PG NE ET PE
		cr4                             = 1 << 5                  // PAE
		efer                            = 1<<10 | 1<<8            // LMA LME
	)
	binary.LittleEndian.PutUint64(sregs[offCR0:], cr0)
	binary.LittleEndian.PutUint64(sregs[offCR3:], probePML4)
	binary.LittleEndian.PutUint64(sregs[offCR4:], cr4)
	binary.LittleEndian.PutUint64(sregs[offEFER:], efer)
	if err := ioctlPtr(p.vcpu, kvmSetSregs, unsafe.Pointer(&sregs)); err != nil {
		return fmt.Errorf("set the system registers: %w", err)
	}
	var regs [0x90]byte
	const offRIP, offRFLAGS = 0x80, 0x88
	binary.LittleEndian.PutUint64(regs[offRIP:], probeCode)
	binary.LittleEndian.PutUint64(regs[offRFLAGS:], 2) // the bit that is always set
	if err := ioctlPtr(p.vcpu, kvmSetRegs, unsafe.Pointer(&regs)); err != nil {
		return fmt.Errorf("set the registers: %w", err)
	}
	return nil
}

// watch runs the rounds on a thread of their own and ends them when they take too long.
func (p *probe) watch(ctx context.Context) KVMStatus {
	go p.loop()
	status := p.observe(ctx)
	if !p.stop() {
		// Nothing can end that thread but the end of this process; what it uses stays allocated until then.
		return KVMStatus{KVMBroken, "a guest neither runs nor can be stopped"}
	}
	p.release()
	return status
}

// observe counts the rounds until the last, an error, or a deadline.
func (p *probe) observe(ctx context.Context) KVMStatus {
	first, all := time.NewTimer(probeFirst), time.NewTimer(probeAll)
	defer first.Stop()
	defer all.Stop()
	done := 0
	for {
		select {
		case err, more := <-p.rounds:
			if !more {
				return KVMStatus{State: KVMWorks}
			}
			if err != nil {
				return KVMStatus{KVMBroken, err.Error()}
			}
			done++
			first.Stop()
			continue
		case <-first.C:
		case <-all.C:
		case <-ctx.Done():
			return KVMStatus{KVMBroken, "probe ended early: " + ctx.Err().Error()}
		}
		return KVMStatus{KVMBroken, fmt.Sprintf("guests run far slower than a processor: %d of %d rounds of %d loops in time",
			done, probeRounds, probeLoop)}
	}
}

// loop runs the guest's rounds on one thread. It ends after the last, after an error, or after stop.
func (p *probe) loop() {
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	defer close(p.rounds)
	p.tid.Store(int32(unix.Gettid()))
	for range probeRounds {
		err := p.round()
		p.rounds <- err
		if err != nil {
			return
		}
	}
}

// round runs the guest until it halts.
func (p *probe) round() error {
	for !p.stopped.Load() {
		_, err := ioctl(p.vcpu, kvmRun, 0)
		reason := binary.LittleEndian.Uint32(p.run[runExitReason:])
		switch {
		case errors.Is(err, unix.EINTR): // some signal to the thread; the round goes on
		case err != nil:
			return fmt.Errorf("run a guest: %w", err)
		case reason != kvmExitHalt:
			return fmt.Errorf("run a guest: exit reason %d instead of a halt", reason)
		default:
			return nil
		}
	}
	return context.Canceled
}

// stop makes a running KVM_RUN return, and reports whether the loop ended.
func (p *probe) stop() bool {
	p.stopped.Store(true)
	// KVM reads the flag on every entry; together with the signal there is no moment at which the kick is lost.
	p.run[runImmediateExit] = 1
	give, kick := time.NewTimer(probeKick), time.NewTicker(10*time.Millisecond)
	defer give.Stop()
	defer kick.Stop()
	for {
		if tid := p.tid.Load(); tid != 0 {
			// SIGURG is what Go itself kicks threads with: its handler does nothing else.
			_ = unix.Tgkill(os.Getpid(), int(tid), unix.SIGURG)
		}
		select {
		case _, more := <-p.rounds:
			if !more {
				return true
			}
		case <-kick.C:
		case <-give.C:
			return false
		}
	}
}

// release gives everything back. The loop must have ended.
func (p *probe) release() {
	for _, m := range [][]byte{p.run, p.mem} {
		if m != nil {
			_ = unix.Munmap(m)
		}
	}
	for _, fd := range []int{p.vcpu, p.vm} {
		if fd >= 0 {
			_ = unix.Close(fd)
		}
	}
}

func ioctl(fd int, req, arg uintptr) (int, error) {
	r, _, errno := unix.Syscall(unix.SYS_IOCTL, uintptr(fd), req, arg)
	if errno != 0 {
		return -1, errno
	}
	return int(r), nil
}

func ioctlPtr(fd int, req uintptr, arg unsafe.Pointer) error {
	_, _, errno := unix.Syscall(unix.SYS_IOCTL, uintptr(fd), req, uintptr(arg))
	if errno != 0 {
		return errno
	}
	return nil
}
