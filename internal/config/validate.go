package config

import (
	"errors"
	"fmt"
	"net"
	"net/url"
	"os"
	"path"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"time"

	"flint"
	"flint/internal/regular"
)

// problem is one thing that is wrong. key is what it concerns: pools[0].image; empty where that is not known.
type problem struct {
	key string
	err error
}

func (p *problem) Error() string { return p.err.Error() }
func (p *problem) Unwrap() error { return p.err }

// problems are all that are found. Some may be faults, with a fix of their own.
type problems []*problem

// add notes what is wrong with the value of a key.
func (p *problems) add(key, format string, args ...any) {
	*p = append(*p, &problem{key, fmt.Errorf("%s: %w", key, fmt.Errorf(format, args...))})
}

// oneOf notes a value that is none of a few words.
func (p *problems) oneOf(key, value string, words ...string) {
	if !slices.Contains(words, value) {
		p.add(key, "%q is none of %s", value, strings.Join(words, ", "))
	}
}

func (p *problems) positive(key string, d Duration) {
	if d <= 0 {
		p.add(key, "%s is not above zero", time.Duration(d))
	}
}

// consequent reports whether a problem is of a key that has one already: a key whose name is misspelt is not missing, too.
func (p problems) consequent(of *problem) bool {
	return slices.ContainsFunc(p, func(cause *problem) bool {
		rest, ok := strings.CutPrefix(of.key, cause.key)
		return ok && cause.key != "" && (rest == "" || rest[0] == '.' || rest[0] == '[')
	})
}

func (p problems) join() error {
	errs := make([]error, len(p))
	for i := range p {
		errs[i] = p[i]
	}
	return errors.Join(errs...)
}

// poolName is what GitHub takes as a scale set's name and a label, kept to what is also safe in file and host names.
var poolName = regexp.MustCompile(`^[a-zA-Z0-9][a-zA-Z0-9._-]{0,63}$`)

// notName is what is said of what poolName does not match.
const notName = "%q must be 1 to 64 letters, digits, dots, dashes or underscores and start with a letter or digit"

// reference has only what a reference to an image may be made of, whatever it begins with. What is one, the image room knows.
var reference = regexp.MustCompile(`^[a-zA-Z0-9\[][a-zA-Z0-9._:/@\[\]-]*$`)

// Validate returns every problem that can be seen without leaving the file.
func (c *Config) Validate() error { return c.validate().join() }

func (c *Config) validate() problems {
	var found problems
	if c.SchemaVersion != SchemaVersion {
		found.add("schema_version", "%d is not a version this flint reads; it reads %d", c.SchemaVersion, SchemaVersion)
	}
	found.oneOf("log_level", c.LogLevel, "debug", "info", "warn", "error")
	if c.Host.CPUs < 0 {
		found.add("host.cpus", "%d is below zero; leave it out for twice the machine's", c.Host.CPUs)
	}
	found.oneOf("host.on_stop", c.Host.OnStop, KeepOnStop, EndOnStop)
	found.oneOf("vm.accel", c.VM.Accel, "auto", "kvm", "tcg")
	found.oneOf("vm.driver", c.VM.Driver, "auto", "firecracker", "qemu")
	if f := c.Firecracker; f.UIDFirst < 1000 || f.UIDCount < 1 || uint64(f.UIDFirst)+uint64(f.UIDCount) > 1<<32-1 {
		found.add("firecracker", "uid_first %d and uid_count %d name no range of users above 999", f.UIDFirst, f.UIDCount)
	}
	found.positive("vm.boot_timeout", c.VM.BootTimeout)
	found.positive("vm.job_timeout", c.VM.JobTimeout)
	if n := len(c.Network.Bridge); n == 0 || n > 11 {
		found.add("network.bridge", "%q must have 1 to 11 bytes, so that the names made from it fit an interface's 15", c.Network.Bridge)
	}
	if p := c.Network.IPv4; !p.Addr().Is4() || p.Bits() > 29 || p.Bits() < 8 {
		found.add("network.ipv4", "%s is not an IPv4 prefix between /8 and /29", p)
	}
	if p := c.Network.IPv6; p.IsValid() && (!p.Addr().Is6() || p.Bits() > 120) {
		found.add("network.ipv6", "%s is not an IPv6 prefix of at most /120", p)
	}
	if c.Kernel.Modules != "" && c.Kernel.Vmlinuz == "" {
		found.add("kernel.modules", "modules need their kernel: give kernel.vmlinuz too")
	}
	if k := c.Kernel; k.Package != "" && k.Vmlinuz != "" || k.Pack != "" && (k.Package != "" || k.Vmlinuz != "") {
		found.add("kernel", "package, vmlinuz and pack exclude each other")
	}
	seen := map[string]bool{}
	for i, p := range c.Pools {
		at := fmt.Sprintf("pools[%d].", i)
		if seen[strings.ToLower(p.Name)] {
			found.add(at+"name", "%q is used twice", p.Name)
		}
		seen[strings.ToLower(p.Name)] = true
		p.validate(at, &found)
		p.VM.validate(at+"vm.", c.Host, &found)
		if p.Public && !c.Firecracker.Jail {
			found.add(at+"public", "strangers' jobs need the jail: remove firecracker.jail: false")
		}
	}
	return found
}

func (p Pool) validate(at string, found *problems) {
	if !poolName.MatchString(p.Name) {
		found.add(at+"name", notName, p.Name)
	}
	if p.Image == "" {
		found.add(at+"image", "is missing: give a Dockerfile's directory or an OCI reference")
	}
	if p.Root != "" {
		found.oneOf(at+"root", p.Root, DiskRoot, MemoryRoot)
	}
	if p.Format != "" {
		found.oneOf(at+"filesystem", p.Format, Ext4, Erofs)
	}
	if p.Pull != "" {
		found.oneOf(at+"pull", p.Pull, PullMissing, PullDaily, PullAlways)
	}
	for _, l := range p.Labels {
		if !poolName.MatchString(l) {
			found.add(at+"labels", notName, l)
		}
	}
	if l := p.Limits; l.DiskBandwidth < 0 || l.DiskOps < 0 || l.NetworkIn < 0 || l.NetworkOut < 0 {
		found.add(at+"limits", "a rate is below zero")
	}
	if p.Max < 1 {
		found.add(at+"max", "%d is less than 1; leave a pool out that shall run nothing", p.Max)
	}
}

func (s Shape) validate(at string, host Host, found *problems) {
	switch {
	case s.CPUs < 1 || s.CPUs > 256:
		found.add(at+"cpus", "%d is not between 1 and 256", s.CPUs)
	case host.CPUs > 0 && s.CPUs > host.CPUs:
		found.add(at+"cpus", "%d are more than host.cpus gives all VMs, which is %d: none would ever start", s.CPUs, host.CPUs)
	}
	switch {
	case s.Memory < 128*flint.MiB:
		found.add(at+"memory", "%s is less than 128MiB, in which no job starts", s.Memory)
	case host.Memory > 0 && s.Memory > host.Memory:
		found.add(at+"memory", "%s is more than host.memory gives all VMs, which is %s: none would ever start", s.Memory, host.Memory)
	}
	if s.Disk < 64*flint.MiB {
		found.add(at+"disk", "%s is less than 64MiB", s.Disk)
	}
}

// ValidateServe returns what is wrong for the coordinator, which needs more than a single VM does.
func (c *Config) ValidateServe() error { return c.validateServe().join() }

func (c *Config) validateServe() problems {
	var found problems
	if len(c.Pools) == 0 {
		found.add("pools", "at least one is needed")
	}
	found = append(found, c.validateAccounts()...)
	found = append(found, c.validateServing()...)
	c.validateRunner(&found)
	if host, port, err := net.SplitHostPort(c.Webhook.Listen); c.Webhooks() && (err != nil || port == "") {
		found.add("webhook.listen", "%q is not host:port, such as :8080 (host %q)", c.Webhook.Listen, host)
	}
	if c.Webhooks() && !strings.HasPrefix(c.Webhook.Path, "/") {
		found.add("webhook.path", "%q does not start with a slash", c.Webhook.Path)
	}
	return found
}

// validateRunner looks at the runner software, and at what pools say of it.
func (c *Config) validateRunner(found *problems) {
	switch in := c.Runner.InImage; {
	case c.Runner.Dir != "" && in != "":
		found.add("runner.in_image", "give runner.dir or runner.in_image, and not both")
	case in != "" && in != "auto" && !path.IsAbs(in):
		found.add("runner.in_image", "%q is neither an absolute path nor auto", in)
	}
	version := func(key, v string) {
		_, numbered := flint.ParseVersion(v)
		switch {
		case v == "":
		case !numbered:
			found.add(key, "%q is no release of GitHub's runner, such as 2.335.0", v)
		case c.Runner.Dir != "" || c.Runner.InImage != "":
			found.add(key, "is of GitHub's runner software that flint fetches; give it without runner.dir and runner.in_image")
		}
	}
	version("runner.version", c.Runner.Version)
	for i, p := range c.Pools {
		version(fmt.Sprintf("pools[%d].runner_version", i), p.RunnerVersion)
	}
	if at, err := url.Parse(c.Runner.Releases); c.Runner.Releases != "" && (err != nil || at.Host == "" || at.Scheme != "https" && at.Scheme != "http") {
		found.add("runner.releases", "%q is no address of a REST API, such as https://api.github.com", c.Runner.Releases)
	}
}

// CheckServe is ValidateServe and CheckFiles; its error is the fault of a configuration that cannot be used. where says what
// that one was made of.
func (c *Config) CheckServe(where string) error {
	if found := append(c.validateServe(), c.checkFiles()...); len(found) > 0 {
		return invalid(where, found)
	}
	return nil
}

// CheckFiles reads the secrets, and returns what is wrong with the files that are named, as far as looking at them tells.
func (c *Config) CheckFiles() error { return c.checkFiles().join() }

func (c *Config) checkFiles() problems {
	found := c.readSecrets()
	if dir := c.Runner.Dir; dir != "" {
		start := filepath.Join(dir, "start")
		if err := look(start, false); err != nil {
			found.add("runner.dir", "it has no program to start: %w", err)
		} else if info, err := os.Stat(start); err == nil && info.Mode()&0o111 == 0 {
			found.add("runner.dir", "%s is not executable", start)
		}
	}
	file := func(key, path string, orDir bool) {
		if path == "" {
			return
		}
		if err := look(path, orDir); err != nil {
			found.add(key, "%w", err)
		}
	}
	file("kernel.vmlinuz", c.Kernel.Vmlinuz, false)
	for i, p := range c.Pools {
		key := fmt.Sprintf("pools[%d].image", i)
		_, err := os.Stat(p.Image)
		switch {
		case p.Image == "" || hasFile(p.Image):
		case err == nil || filepath.IsAbs(p.Image):
			file(key, p.Image, true)
		case !reference.MatchString(p.Image):
			found.add(key, "%q is neither a file or directory that is there nor the name of an image", p.Image)
		}
		file(fmt.Sprintf("pools[%d].tool_cache", i), p.Tools, true)
	}
	return found
}

// look reports what keeps a path from being an ordinary file or, where it may be one, a directory.
func look(path string, orDir bool) error {
	if info, err := os.Stat(path); err == nil && orDir && info.IsDir() {
		return nil
	}
	if err := regular.Check(path); err != nil {
		return fmt.Errorf("%s: %w", path, err)
	}
	return nil
}
