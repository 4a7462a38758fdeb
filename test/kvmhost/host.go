package main

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"
)

var (
	errSilent = errors.New("the host fell silent")
	errTime   = errors.New("time is up")
)

// gateway is the host's only neighbour, QEMU's user-mode network, when it has a network. Its own address is 10.0.2.15/24.
const gateway = "10.0.2.2"

// endGrace is what the host has between the script's exit code and its own end.
const endGrace = 10 * time.Second

// wordGrace is what its last word has after its end, from a pipe.
const wordGrace = time.Second

// cmdline boots the host. Without nohz and highres its emulated timers lose an interrupt less often.
const cmdline = "console=ttyS0 root=/dev/nvme0n1 rw panic=-1 mitigations=off nohz=off highres=off loglevel=4 " +
	`init=/bin/sh -- -c "mount -t devtmpfs dev /dev && mount /dev/nvme1n1 /job && exec sh /job/.kvmhost/init"`

// host is one run of the emulated machine. Its three serial ports are its console, the script's output, and our own words.
type host struct {
	options
	image   image
	job     string // the drive that is /job
	out     io.Writer
	console tail
	errors  tail // of QEMU
}

func (h *host) arguments() []string {
	a := []string{
		"-machine", "q35", "-accel", "tcg", "-cpu", "EPYC,+svm", "-smp", strconv.Itoa(h.cpus), "-m", h.memory,
		"-no-user-config", "-nodefaults", "-display", "none",
		"-kernel", h.image.kernel, "-append", cmdline,
		"-drive", "file=" + h.image.root + ",if=none,id=d0,format=raw,snapshot=on,cache=unsafe", "-device", "nvme,drive=d0,serial=root",
		"-drive", "file=" + h.job + ",if=none,id=d1,format=raw,snapshot=on,cache=unsafe", "-device", "nvme,drive=d1,serial=job",
		"-device", "virtio-rng-pci",
	}
	if !h.reboots {
		a = append(a, "-no-reboot")
	}
	if h.network {
		a = append(a, "-netdev", "user,id=n0", "-device", "virtio-net-pci,netdev=n0")
	}
	for port := range 3 {
		a = append(a, "-chardev", fmt.Sprintf("file,id=port%d,path=/proc/self/fd/%d", port, 3+port), "-serial", fmt.Sprintf("chardev:port%d", port))
	}
	return a
}

// run boots the host and returns the script's exit code.
func (h *host) run(ctx context.Context) (int, error) {
	ctx, cancel := context.WithTimeoutCause(ctx, h.timeout, fmt.Errorf("%w after %s", errTime, h.timeout))
	defer cancel()
	// Not CommandContext: why it ends is decided here.
	cmd := exec.Command(h.qemu, h.arguments()...)
	cmd.Stderr = &h.errors
	// Ctrl-C is ours to handle; and the emulator ends with us, however we end (main keeps the thread that is its parent).
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true, Pdeathsig: syscall.SIGKILL}
	var readers [3]*os.File
	for i := range readers {
		r, w, err := os.Pipe()
		if err != nil {
			return 0, err
		}
		defer r.Close()
		defer w.Close()
		readers[i], cmd.ExtraFiles = r, append(cmd.ExtraFiles, w)
	}
	if err := cmd.Start(); err != nil {
		return 0, err
	}
	for _, w := range cmd.ExtraFiles {
		w.Close() // so that the readers see QEMU's end
	}
	signs, exit := make(chan struct{}, 1), make(chan int, 1)
	var ports sync.WaitGroup
	ports.Go(func() { _, _ = io.Copy(io.MultiWriter(&h.console, life(signs)), readers[0]) })
	ports.Go(func() { _, _ = io.Copy(io.MultiWriter(h.out, life(signs)), readers[1]) })
	ports.Go(func() { listen(io.TeeReader(readers[2], life(signs)), exit) })
	ended := make(chan error, 1)
	ports.Go(func() { ended <- cmd.Wait() })
	code, err := h.watch(ctx, signs, exit, ended)
	_ = cmd.Process.Kill() // it may have ended by itself
	ports.Wait()
	return code, err
}

// watch returns when the host has said how the script ended, or will not.
func (h *host) watch(ctx context.Context, signs <-chan struct{}, exit <-chan int, ended <-chan error) (int, error) {
	silence := time.NewTimer(h.silence)
	defer silence.Stop()
	for {
		select {
		case <-signs:
			silence.Reset(h.silence)
		case code := <-exit:
			grace := time.NewTimer(endGrace)
			defer grace.Stop()
			select { // for the last of its output
			case <-ended:
			case <-grace.C:
			}
			return code, nil
		case err := <-ended:
			grace := time.NewTimer(wordGrace)
			defer grace.Stop()
			select { // for its last word, which may still be on its way
			case code := <-exit:
				return code, nil
			case <-grace.C:
			}
			return 0, fmt.Errorf("the host ended before the script did: QEMU: %v%s", err, h.complaint())
		case <-silence.C:
			return 0, fmt.Errorf("%w for %s", errSilent, h.silence)
		case <-ctx.Done():
			return 0, context.Cause(ctx)
		}
	}
}

// listen reads our own words until the script's exit code, and then to the end.
func listen(r io.Reader, exit chan<- int) {
	lines := bufio.NewScanner(r)
	for lines.Scan() {
		if word, found := strings.CutPrefix(strings.TrimSpace(lines.Text()), "exit "); found {
			if code, err := strconv.ParseUint(word, 10, 8); err == nil {
				exit <- int(code)
				break
			}
		}
	}
	_, _ = io.Copy(io.Discard, r)
}

// life tells of everything written to it.
type life chan<- struct{}

func (l life) Write(p []byte) (int, error) {
	select {
	case l <- struct{}{}:
	default:
	}
	return len(p), nil
}

// lastWords is the end of the host's console, for a person.
func (h *host) lastWords() string {
	text := strings.TrimSpace(strings.ReplaceAll(h.console.String(), "\r", ""))
	if text == "" {
		return ""
	}
	return "kvmhost: the end of the host's console:\n    " + strings.ReplaceAll(text, "\n", "\n    ") + "\n"
}

// complaint is what QEMU said, less what it always says.
func (h *host) complaint() string {
	var said []string
	for line := range strings.Lines(h.errors.String()) {
		if line = strings.TrimSpace(line); line != "" && !strings.Contains(line, "TCG doesn't support requested feature") {
			said = append(said, line)
		}
	}
	if len(said) == 0 {
		return ""
	}
	return ": " + strings.Join(said, "; ")
}

// tail keeps the end of what is written to it.
type tail struct {
	mu  sync.Mutex
	buf []byte
}

const tailKept = 4 << 10

func (t *tail) Write(p []byte) (int, error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.buf = append(t.buf, p...)
	if over := len(t.buf) - tailKept; over > 0 {
		t.buf = bytes.Clone(t.buf[over:])
	}
	return len(p), nil
}

func (t *tail) String() string {
	t.mu.Lock()
	defer t.mu.Unlock()
	return string(t.buf)
}
