package network

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"flint"
)

// sysctlRoot is where the kernel shows the sysctls of the calling thread's network namespace.
const sysctlRoot = "/proc/sys/net/"

// change is one sysctl outside our own links that must have another value, and the value it had.
type change struct {
	path string // below sysctlRoot: ipv4/conf/eth0/forwarding
	old  string
	new  string
}

// Paths of the sysctls that decide about forwarding.
func forwarding4(link string) string { return "ipv4/conf/" + link + "/forwarding" }
func forwarding6(link string) string { return "ipv6/conf/" + link + "/forwarding" }
func forced6(link string) string     { return "ipv6/conf/" + link + "/force_forwarding" }
func acceptRA(link string) string    { return "ipv6/conf/" + link + "/accept_ra" }

// planSysctls says what must change so that packets are forwarded between our bridge and the uplinks. It changes
// nothing. IPv4 forwards per interface. IPv6 does since Linux 6.17 (force_forwarding); before, it is the whole host or
// nothing (forwardAll), and a host that forwards ignores router advertisements unless accept_ra is 2.
func planSysctls(uplinks []string, v6, forwardAll bool) ([]change, error) {
	var p planner
	for _, l := range uplinks {
		p.want(forwarding4(l), "0", "1")
	}
	if !v6 || p.value(forwarding6("all")) == "1" {
		return p.changes, p.err
	}
	if !forwardAll && p.value(forced6("all")) != "" {
		for _, l := range uplinks {
			p.want(forced6(l), "0", "1")
		}
		return p.changes, p.err
	}
	links, err := os.ReadDir(sysctlRoot + "ipv6/conf")
	if err != nil {
		return nil, fmt.Errorf("list IPv6 interfaces: %w", err)
	}
	for _, e := range links {
		l := e.Name()
		switch {
		case l == "all":
		case p.value(forwarding6(l)) == "1":
			// Turning forwarding off for all turns it off here too, so this is to be turned on again after that.
			p.changes = append(p.changes, change{forwarding6(l), "1", "0"})
		case l != "lo": // "default" is for the links to come
			p.want(acceptRA(l), "1", "2")
		}
	}
	p.want(forwarding6("all"), "0", "1")
	return p.changes, p.err
}

// planner collects changes and the first error.
type planner struct {
	changes []change
	err     error
}

// value reads a sysctl; one that does not exist is empty.
func (p *planner) value(path string) string {
	v, err := readSysctl(path)
	if err != nil && !errors.Is(err, fs.ErrNotExist) && p.err == nil {
		p.err = err
	}
	return v
}

// want notes a change if the sysctl is old now.
func (p *planner) want(path, old, new string) {
	if p.value(path) == old {
		p.changes = append(p.changes, change{path, old, new})
	}
}

// applySysctls does what was planned, in order.
func applySysctls(changes []change) error {
	for _, c := range changes {
		if c.new == "0" {
			continue // noted for the way back only
		}
		if err := setSysctl(c.path, c.new); err != nil {
			return err
		}
	}
	return nil
}

// restoreSysctls puts old values back, last change first, wherever the value is still ours.
func restoreSysctls(changes []change) error {
	var errs []error
	for _, c := range slices.Backward(changes) {
		now, err := readSysctl(c.path)
		switch {
		case errors.Is(err, fs.ErrNotExist): // the interface is gone
		case err != nil:
			errs = append(errs, err)
		case now == c.new:
			errs = append(errs, setSysctl(c.path, c.old))
		}
	}
	return errors.Join(errs...)
}

// bridgeSysctls makes our own bridge a router's leg, and deaf to guests that pose as routers. They end with the bridge.
// It reports whether one was not so yet.
func bridgeSysctls(name string, v6 bool) (changed bool, err error) {
	wanted := []change{{path: forwarding4(name), new: "1"}}
	if v6 {
		wanted = append(wanted,
			change{path: "ipv6/conf/" + name + "/disable_ipv6", new: "0"},
			change{path: acceptRA(name), new: "0"},
			change{path: forwarding6(name), new: "1"},
			change{path: forced6(name), new: "1"})
	}
	var errs []error
	for _, w := range wanted {
		now, err := readSysctl(w.path)
		if w.path == forced6(name) && errors.Is(err, fs.ErrNotExist) {
			continue // before Linux 6.17
		}
		changed = changed || err == nil && now != w.new
		errs = append(errs, setSysctl(w.path, w.new))
	}
	return changed, errors.Join(errs...)
}

// namespaceSysctls keeps the guest's namespace, which the calling thread is in, from having addresses of its own and
// from passing bridged frames through netfilter.
func namespaceSysctls() error {
	return errors.Join(
		ignoreMissing(setSysctl("ipv6/conf/default/disable_ipv6", "1")),
		ignoreMissing(setSysctl("bridge/bridge-nf-call-iptables", "0")),
		ignoreMissing(setSysctl("bridge/bridge-nf-call-ip6tables", "0")),
		ignoreMissing(setSysctl("bridge/bridge-nf-call-arptables", "0")))
}

// hostHasIPv6 reports whether IPv6 addresses can be used in the calling thread's namespace.
func hostHasIPv6() bool {
	v, err := readSysctl("ipv6/conf/all/disable_ipv6")
	return err == nil && v == "0"
}

func readSysctl(path string) (string, error) {
	b, err := os.ReadFile(filepath.Join(sysctlRoot, path))
	if err != nil {
		return "", fmt.Errorf("read sysctl: %w", err)
	}
	return strings.TrimSpace(string(b)), nil
}

// setSysctl writes a sysctl unless it has the value already.
func setSysctl(path, value string) error {
	now, err := readSysctl(path)
	if err != nil || now == value {
		return err
	}
	if err := os.WriteFile(filepath.Join(sysctlRoot, path), []byte(value), 0); err != nil {
		return &flint.Fault{
			Code: "network.sysctl", What: "set sysctl net/" + path + " to " + value, Kind: flint.ErrPermission, Err: err,
			Fix: "run on the host, outside any container: sysctl -w net/" + path + "=" + value,
		}
	}
	return nil
}

func ignoreMissing(err error) error {
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	return err
}
