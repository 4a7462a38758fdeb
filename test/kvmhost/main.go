// Command kvmhost runs a script on a Debian host with a working /dev/kvm, on a machine that has none.
//
// The host is a guest of QEMU, which emulates an AMD processor with its virtualisation in software: slow and exact, so it is
// for checking what works and never for timing. It has no network unless it is given one. Everything it writes is discarded;
// what comes back is the script's output and exit code. The program must not know flint: it is the place where flint's drivers, units and
// packages are tried as on a production host.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"os/signal"
	"path"
	"path/filepath"
	"runtime"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// Exit codes other than the script's, as timeout(1) and env(1) have them.
const (
	exitTimeout = 124
	exitOwn     = 125 // no host, or no word from it
	exitSignal  = 130
)

const usage = `usage: test/kvmhost/run [flags] SCRIPT [ARGUMENT…]

Runs SCRIPT (a file that begins with #!, or a static program) as root on a Debian host with a working /dev/kvm,
which is emulated, and exits with its exit code. The working directory is /job, where --add puts files. Exit code 124: time is up. 125: the host could not be made or fell silent twice.

`

// addition is a file or directory for the job's directory.
type addition struct{ from, to string }

// options are the command line.
type options struct {
	cache   string
	qemu    string        // the emulator
	timeout time.Duration // for all of a run of the host
	silence time.Duration // without a sign of life, after which the host counts as frozen
	memory  string
	cpus    int
	systemd bool
	network bool
	reboots bool
	add     []addition
	script  string
	args    []string
}

func main() {
	runtime.LockOSThread() // the emulator's life depends on the thread that started it
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	opt, err := parse(os.Args[1:], os.Stderr)
	if errors.Is(err, flag.ErrHelp) {
		return
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, "kvmhost:", err)
		os.Exit(2)
	}
	code, err := run(ctx, opt, os.Stdout, os.Stderr)
	if err != nil {
		fmt.Fprintln(os.Stderr, "kvmhost:", err)
	}
	stop()
	os.Exit(code)
}

func parse(args []string, help io.Writer) (options, error) {
	o := options{qemu: "qemu-system-x86_64"}
	f := flag.NewFlagSet("kvmhost", flag.ContinueOnError)
	f.SetOutput(help)
	f.Usage = func() {
		fmt.Fprint(help, usage)
		f.PrintDefaults()
	}
	f.StringVar(&o.cache, "cache", "build/kvmhost", "where the host's image is kept")
	f.DurationVar(&o.timeout, "timeout", 15*time.Minute, "time the host has, its own start included")
	f.DurationVar(&o.silence, "silence", 90*time.Second, "a host without a sign of life for this long is frozen; it is started once more")
	f.StringVar(&o.memory, "memory", "3G", "the host's memory")
	f.IntVar(&o.cpus, "cpus", 1, "the host's processors; with more than one it freezes now and then")
	f.BoolVar(&o.systemd, "systemd", false, "boot all of systemd, and run the script as a unit")
	f.BoolVar(&o.network, "network", false, "give the host a network interface behind NAT; it reaches this machine's loopback at "+gateway)
	f.BoolVar(&o.reboots, "reboots", false, "a reboot of the host does not end it: the script is started again, with all that was written")
	f.Func("add", "`FILE[:PATH]` to put at PATH below /job; without PATH under its own name; again for more", func(v string) error {
		a, err := parseAddition(v)
		o.add = append(o.add, a)
		return err
	})
	if err := f.Parse(args); err != nil {
		return o, err
	}
	if f.NArg() == 0 {
		return o, errors.New("no script is named; see --help")
	}
	if o.timeout <= 0 || o.silence <= 0 || o.cpus < 1 {
		return o, errors.New("--timeout, --silence and --cpus must be above zero")
	}
	o.script, o.args = f.Arg(0), f.Args()[1:]
	return o, runnable(o.script)
}

// parseAddition reads FILE[:PATH]. A file whose name has a colon needs a PATH.
func parseAddition(v string) (addition, error) {
	from, to := v, ""
	if i := strings.LastIndexByte(v, ':'); i >= 0 {
		from, to = v[:i], v[i+1:]
	}
	if to == "" {
		to = filepath.Base(from)
	}
	to = path.Clean(to)
	if from == "" || !filepath.IsLocal(to) || to == "." || strings.HasPrefix(to+"/", privateDir+"/") {
		return addition{}, fmt.Errorf("%q does not name a place below /job", v)
	}
	if _, err := os.Stat(from); err != nil {
		return addition{}, err
	}
	return addition{from, to}, nil
}

// runnable tells a script that the host could not start before minutes are spent on it.
func runnable(script string) error {
	f, err := os.Open(script)
	if err != nil {
		return err
	}
	defer f.Close()
	var head [4]byte
	if _, err := io.ReadFull(f, head[:]); err != nil {
		return fmt.Errorf("read %s: %w", script, err)
	}
	if string(head[:2]) != "#!" && string(head[:]) != "\x7fELF" {
		return fmt.Errorf("%s neither begins with #! nor is a program", script)
	}
	return nil
}

// run makes what is missing, boots the host, and returns the exit code.
func run(ctx context.Context, o options, out, log io.Writer) (int, error) {
	code, err := prepareAndBoot(ctx, o, out, log)
	switch {
	case err == nil:
		return code, nil
	case ctx.Err() != nil:
		return exitSignal, err
	case errors.Is(err, errTime):
		return exitTimeout, err
	}
	return exitOwn, err
}

func prepareAndBoot(ctx context.Context, o options, out, log io.Writer) (int, error) {
	say := func(format string, args ...any) { fmt.Fprintf(log, "kvmhost: "+format+"\n", args...) }
	img, err := ensureImage(ctx, o.cache, log, say)
	if err != nil {
		return 0, err
	}
	dir, done, err := scratchDir(o.cache)
	if err != nil {
		return 0, err
	}
	defer done()
	job, err := makeJob(ctx, o, dir)
	if err != nil {
		return 0, err
	}
	return bootTwice(ctx, o, img, job, out, log)
}

// scratchDir makes a directory of our own in the cache, and removes those of runs that were killed: a directory is locked as
// long as its run lives.
func scratchDir(cache string) (dir string, done func(), err error) {
	old, err := filepath.Glob(filepath.Join(cache, scratchPrefix+"*"))
	if err != nil {
		return "", nil, err
	}
	for _, name := range old {
		// A younger one may not be locked yet.
		if info, err := os.Stat(name); err != nil || time.Since(info.ModTime()) < time.Minute {
			continue
		}
		if f := tryLock(name); f != nil {
			_ = errors.Join(os.RemoveAll(name), f.Close()) // another user's, perhaps
		}
	}
	if dir, err = os.MkdirTemp(cache, scratchPrefix); err != nil {
		return "", nil, err
	}
	f := tryLock(dir)
	if f == nil {
		return "", nil, errors.Join(fmt.Errorf("lock %s", dir), os.RemoveAll(dir))
	}
	return dir, func() { _ = errors.Join(os.RemoveAll(dir), f.Close()) }, nil
}

const scratchPrefix = "run-"

// tryLock locks a directory until the file it returns is closed; nil if it cannot.
func tryLock(dir string) *os.File {
	f, err := os.Open(dir)
	if err != nil {
		return nil
	}
	if unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB) != nil {
		_ = f.Close()
		return nil
	}
	return f
}

// bootTwice boots the host, and once more if it froze the first time. Both drives are as they were then.
func bootTwice(ctx context.Context, o options, img image, job string, out, log io.Writer) (int, error) {
	for again := false; ; again = true {
		h := host{options: o, image: img, job: job, out: out}
		code, err := h.run(ctx)
		if errors.Is(err, errSilent) && !again {
			fmt.Fprintf(log, "kvmhost: %v, as emulated clocks sometimes do; starting it once more\n", err)
			continue
		}
		if err != nil {
			fmt.Fprint(log, h.lastWords())
		}
		return code, err
	}
}
