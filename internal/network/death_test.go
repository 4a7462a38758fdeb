package network

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"os/exec"
	"slices"
	"testing"

	"golang.org/x/sync/errgroup"
	"golang.org/x/sys/unix"
)

// victimEnv makes TestVictim the process that TestKill kills.
const victimEnv = "FLINT_TEST_NETWORK_VICTIM"

// TestVictim opens a network where it is, attaches two guests, starts what stands for their VMMs, tells the first one's
// pid, and waits for its death.
func TestVictim(t *testing.T) {
	if os.Getenv(victimEnv) == "" {
		t.Skip("needs to be started by TestKill: it is the process to kill")
	}
	n, err := Open(t.Context(), config())
	ok(t, err)
	var pids []int
	for _, id := range []string{"lives", "dies"} {
		p, err := n.Attach(t.Context(), id)
		ok(t, err)
		vmm := exec.Command("cat")
		vmm.Stdin, vmm.ExtraFiles = os.Stdin, []*os.File{p.Tap()}
		ok(t, namespace{p.Namespace()}.do(vmm.Start))
		pids = append(pids, vmm.Process.Pid)
	}
	fmt.Println("pid", pids[0])
	ok(t, n.Serve(t.Context()))
}

// TestKill kills a process with SIGKILL that has a network, and takes the network over while a guest talks.
func TestKill(t *testing.T) {
	w := newWorld(t)
	before := state(t)
	exe, err := os.Executable()
	ok(t, err)
	stdin, live, err := os.Pipe() // the VMMs live until live is closed
	ok(t, err)
	defer live.Close()
	victim := exec.Command(exe, "-test.run=^TestVictim$", "-test.v")
	victim.Env = append(os.Environ(), victimEnv+"=1")
	victim.Stdin, victim.Stderr = stdin, t.Output()
	out, err := victim.StdoutPipe()
	ok(t, err)
	ok(t, victim.Start()) // in the namespace of this thread
	ok(t, stdin.Close())
	var pid int
	lines := bufio.NewScanner(out)
	for pid == 0 && lines.Scan() {
		_, _ = fmt.Sscanf(lines.Text(), "pid %d", &pid)
	}
	if pid == 0 {
		t.Fatalf("the process to kill told no pid: %v", errors.Join(victim.Process.Kill(), victim.Wait()))
	}
	tap := stealTap(t, pid)

	// What the guest was told, which nothing but the network could tell anew.
	addr := &Port{}
	n := &Network{cfg: config(), mtu: defaultMTU, ports: map[*Port]struct{}{}}
	n.pool, err = newPool(guests4, guests6)
	ok(t, err)
	n.enter(addr, 2)
	g := newGuestOn(t, addr, tap)
	talk := converse(t, g.namespace, w.internet, netip.AddrPortFrom(internet4, 99))
	ok(t, victim.Process.Kill())
	_ = victim.Wait() // it was killed
	talk.goesOn(t)

	cfg := config()
	cfg.Keep = []string{"lives"}
	next, err := Open(t.Context(), cfg)
	ok(t, err)
	talk.goesOn(t)
	p, err := next.Adopt(t.Context(), "lives")
	ok(t, err)
	if !slices.Equal(p.Address().Prefixes, addr.addr.Prefixes) || p.Address().MAC != addr.addr.MAC {
		t.Errorf("adopted at %+v, was at %+v", p.Address(), addr.addr)
	}
	talk.goesOn(t)
	if left, err := Leftovers("flint0"); err != nil || len(left) != 3 {
		t.Errorf("there are %q, %v; want bridge, table and one port", left, err)
	}
	ok(t, next.Close(context.Background()))
	sameState(t, before, state(t))
}

// stealTap takes a copy of the tap's descriptor from the process that stands for a VMM, whose first extra file it is.
func stealTap(t *testing.T, pid int) *os.File {
	t.Helper()
	vmm, err := unix.PidfdOpen(pid, 0)
	ok(t, err)
	defer unix.Close(vmm)
	fd, err := unix.PidfdGetfd(vmm, 3, 0)
	if errors.Is(err, unix.ENOSYS) || errors.Is(err, unix.EPERM) {
		t.Skipf("needs pidfd_getfd: %v", err)
	}
	ok(t, err)
	ok(t, unix.SetNonblock(fd, true))
	return os.NewFile(uintptr(fd), tunDevice)
}

// TestReplacedTableHasNoGap replaces the table again and again, while a guest makes new connections, which all must be
// translated, and a neighbour tries to send to the guest, which never may arrive.
func TestReplacedTableHasNoGap(t *testing.T) {
	w := newWorld(t)
	n := open(t, config())
	g := newGuest(t, attach(t, n, "one"))
	at := netip.AddrPortFrom(internet4, 80)
	greet(t, w.internet, at)
	ok(t, w.internet.do(func() error {
		configure(t, handle(t), "inet0", nil, []netip.Addr{host4})
		return nil
	}))
	done := make(chan struct{})
	var eg errgroup.Group
	eg.Go(func() error {
		for seen := 0; ; seen++ {
			select {
			case <-done:
				if seen == 0 {
					return errors.New("no connection was made meanwhile")
				}
				return nil
			default:
			}
			if got := mustReach(t, g.namespace, at); got != host4.String() {
				return fmt.Errorf("internet saw %q, want %s", got, host4)
			}
		}
	})
	for range 30 {
		ok(t, func() error {
			n.mu.Lock()
			defer n.mu.Unlock()
			return n.home.do(func() error { _, err := n.program(n.up); return err })
		}())
	}
	mustNotHear(t, g.namespace, netip.AddrPortFrom(g.port.Address().Prefixes[0].Addr(), 4242), w.internet)
	close(done)
	ok(t, eg.Wait())
}
