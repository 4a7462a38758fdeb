package network

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"syscall"
	"testing"

	"github.com/vishvananda/netlink"
)

var errInjected = errors.New("injected")

// script lets one call fail, the one whose turn it is, and counts all.
type script struct {
	fail, calls int
	failed      string
}

func (s *script) at(call string) error {
	s.calls++
	if s.calls != s.fail {
		return nil
	}
	s.failed = call
	return errInjected
}

// everyFault runs a deed once for each call into the kernel it makes, and lets that call fail. The deed says in what world
// it was done, so that what it leaves can be looked at.
func everyFault(t *testing.T, deed func(t *testing.T, s *script)) {
	t.Helper()
	for i := 1; ; i++ {
		s := &script{fail: i}
		deed(t, s)
		if s.failed == "" {
			if i < 5 {
				t.Errorf("there were only %d calls to fail", s.calls)
			}
			t.Logf("%d calls failed, each in its turn", i-1)
			return
		}
		if t.Failed() {
			t.Fatalf("when call %d, %q, failed", i, s.failed)
		}
	}
}

// descriptors lists what this process has open, by number, of which sockets and namespaces that leak would be some.
func descriptors(t *testing.T) []string {
	t.Helper()
	all, err := os.ReadDir("/proc/self/fd")
	ok(t, err)
	var open []string
	for _, e := range all {
		if to, err := os.Readlink("/proc/self/fd/" + e.Name()); err == nil { // else it was the directory's own
			open = append(open, to)
		}
	}
	return open
}

// leaked checks that nothing is open that was not before.
func leaked(t *testing.T, before []string) {
	t.Helper()
	rest := slices.Clone(before)
	for _, now := range descriptors(t) {
		if i := slices.Index(rest, now); i >= 0 {
			rest = slices.Delete(rest, i, i+1)
		} else {
			t.Errorf("%s is open", now)
		}
	}
}

// locks counts the locks of networks in this namespace: others on this machine come and go.
func locks(t *testing.T) int {
	t.Helper()
	st, err := os.Stat("/proc/thread-self/ns/net")
	ok(t, err)
	all, err := filepath.Glob(fmt.Sprintf("%s/network-*-%d", lockDir, st.Sys().(*syscall.Stat_t).Ino))
	ok(t, err)
	return len(all)
}

// failsOnce checks an error against what was injected.
func failsOnce(t *testing.T, s *script, err error) {
	t.Helper()
	if (s.failed != "") != errors.Is(err, errInjected) {
		t.Errorf("after %q failed: %v", s.failed, err)
	}
}

func TestOpenReleasesOnEveryFault(t *testing.T) {
	newWorld(t)
	n, err := Open(t.Context(), config())
	ok(t, err)
	ok(t, n.Close(context.Background()))
	before, held := state(t), locks(t)
	everyFault(t, func(t *testing.T, s *script) {
		fds := descriptors(t)
		cfg := config()
		cfg.faults = s.at
		n, err := Open(t.Context(), cfg)
		failsOnce(t, s, err)
		s.fail = 0
		if err == nil {
			ok(t, n.Close(context.Background()))
		}
		leaked(t, fds)
		sameState(t, before, state(t))
		if now := locks(t); now != held {
			t.Errorf("%d locks, were %d", now, held)
		}
	})
}

func TestAttachReleasesOnEveryFault(t *testing.T) {
	newWorld(t)
	var s *script
	cfg := config()
	cfg.faults = func(call string) error {
		if s == nil {
			return nil
		}
		return s.at(call)
	}
	n, err := Open(t.Context(), cfg) // not served: that would open and close descriptors of its own
	ok(t, err)
	t.Cleanup(func() { ok(t, n.Close(context.Background())) })
	p, err := n.Attach(t.Context(), "one")
	ok(t, err)
	ok(t, p.Close(context.Background()))
	before := state(t)
	everyFault(t, func(t *testing.T, next *script) {
		s = next
		fds := descriptors(t)
		p, err := n.Attach(t.Context(), "one")
		failsOnce(t, s, err)
		s = nil
		if err == nil {
			ok(t, p.Close(context.Background()))
		}
		leaked(t, fds)
		sameState(t, before, state(t))
		if len(n.ports) > 0 || len(n.pool.used) > 0 {
			t.Errorf("ports %v, addresses %v", n.ports, n.pool.used)
		}
	})
}

// TestCloseGoesOnAfterEveryFault has one call of Close fail: all else is gone, the error says so, and the rest goes when the
// network is opened next.
func TestCloseGoesOnAfterEveryFault(t *testing.T) {
	newWorld(t)
	n, err := Open(t.Context(), config())
	ok(t, err)
	ok(t, n.Close(context.Background()))
	before := state(t)
	everyFault(t, func(t *testing.T, s *script) {
		closing := false
		cfg := config()
		cfg.faults = func(call string) error {
			if !closing {
				return nil
			}
			return s.at(call)
		}
		fds := descriptors(t)
		n, err := Open(t.Context(), cfg)
		ok(t, err)
		for range 2 {
			_, err := n.Attach(t.Context(), "one")
			ok(t, err)
		}
		closing = true
		failsOnce(t, s, n.Close(context.Background()))
		leaked(t, fds)
		left, err := Leftovers("flint0")
		if ok(t, err); len(left) > 1 {
			t.Errorf("one fault left %q", left)
		}
		n, err = Open(t.Context(), config())
		ok(t, err)
		ok(t, n.Close(context.Background()))
		sameState(t, before, state(t))
	})
}

// TestKeptGuestsSurviveEveryFault has one call of Open with guests to keep fail, or one of Adopt: the guests' connections go
// on, and the next try succeeds.
func TestKeptGuestsSurviveEveryFault(t *testing.T) {
	w := newWorld(t)
	n, err := Open(t.Context(), config())
	ok(t, err)
	for _, id := range []string{"one", "two"} {
		p, err := n.Attach(t.Context(), id)
		ok(t, err)
		inhabit(t, p)
	}
	three, err := n.Attach(t.Context(), "three")
	ok(t, err)
	g := newVM(t, three)
	talk := converse(t, g.namespace, w.internet, netip.AddrPortFrom(internet4, 99))
	ok(t, n.Leave(context.Background()))
	everyFault(t, func(t *testing.T, s *script) {
		fds := descriptors(t)
		cfg := config()
		cfg.Keep, cfg.faults = []string{"one", "three"}, s.at
		n, err := Open(t.Context(), cfg)
		if failed := s.failed; err == nil && failed == "" {
			p, aerr := n.Adopt(t.Context(), "three")
			failsOnce(t, s, aerr)
			if aerr != nil { // a fault of ours is no damage of the port's
				p, aerr = n.Adopt(t.Context(), "three")
				ok(t, aerr)
			}
			if p.Address().Prefixes[0] != three.Address().Prefixes[0] {
				t.Errorf("adopted at %s", p.Address().Prefixes[0])
			}
		} else {
			failsOnce(t, s, err)
		}
		talk.goesOn(t)
		if n != nil {
			ok(t, n.Leave(context.Background()))
		}
		leaked(t, fds)
	})
	cfg := config()
	cfg.Keep = []string{"one", "three"}
	n = open(t, cfg)
	for _, id := range cfg.Keep {
		if _, err := n.Adopt(t.Context(), id); err != nil {
			t.Error(err)
		}
	}
}

// TestCheckSurvivesEveryFault has one call of Check fail while everything is amiss: the next Check mends the rest.
func TestCheckSurvivesEveryFault(t *testing.T) {
	w := newWorld(t)
	var s *script
	cfg := config()
	cfg.faults = func(call string) error {
		if s == nil {
			return nil
		}
		return s.at(call)
	}
	n, err := Open(t.Context(), cfg) // not served: that would open and close descriptors of its own
	ok(t, err)
	t.Cleanup(func() { ok(t, n.Close(context.Background())) })
	p, err := n.Attach(t.Context(), "one")
	ok(t, err)
	g := newGuest(t, p)
	talk := converse(t, g.namespace, w.internet, netip.AddrPortFrom(internet4, 99))
	everyFault(t, func(t *testing.T, next *script) {
		vandalize(t)
		deleteLink(t, "flint0-2")
		s = next
		fds := descriptors(t)
		failsOnce(t, s, n.Check(t.Context()))
		s = nil
		ok(t, n.Check(t.Context()))
		leaked(t, fds)
		talk.goesOn(t)
	})
}

// Lists that other programs' changes interrupt are asked for again, but not for ever.
func TestInterruptedListsAreAskedForAgain(t *testing.T) {
	for interrupted, want := range map[int]error{0: nil, 3: nil, dumps: netlink.ErrDumpInterrupted} {
		asked := 0
		list, err := whole(nil, "list", func() ([]int, error) {
			if asked++; asked <= interrupted {
				return []int{1}, netlink.ErrDumpInterrupted
			}
			return []int{1, 2}, nil
		})
		if !errors.Is(err, want) || err == nil && len(list) != 2 || asked != min(interrupted+1, dumps) {
			t.Errorf("interrupted %d times: %v, %v after %d", interrupted, list, err, asked)
		}
	}
}
