package guest

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"strings"
	"time"
	"unicode/utf8"
)

// Bounds on what control frames carry, for both halves. A frame bounds the whole; these bound its parts.
const (
	maxSteps     = 128
	maxFaults    = 32
	maxProcesses = 64 // an agent's, running or not yet collected
	maxName      = 256
	maxText      = 1024
	maxEntropy   = 4 << 10
	maxAddresses = 16
	maxArgs      = 1024
)

// greeting is what the host says first.
type greeting struct {
	Version int
}

// refusal answers a call the agent could not do.
type refusal struct {
	Error string
}

type signal struct {
	Signal string // "SIGTERM", ...
}

// empty is the answer of a call that has nothing to say.
type empty struct{}

// bounded is a control payload that knows its bounds.
type bounded interface{ check() error }

// decodeControl parses a control payload strictly: no unknown field, nothing behind it, every field within bounds.
func decodeControl(p []byte, v bounded) error {
	d := json.NewDecoder(bytes.NewReader(p))
	d.DisallowUnknownFields()
	if err := d.Decode(v); err != nil {
		return fmt.Errorf("decode %T: %w", v, err)
	}
	if _, err := d.Token(); !errors.Is(err, io.EOF) {
		return fmt.Errorf("decode %T: something follows it", v)
	}
	if err := v.check(); err != nil {
		return fmt.Errorf("check %T: %w", v, err)
	}
	return nil
}

// encodeControl is the inverse of decodeControl, with the same bounds.
func encodeControl(v bounded) ([]byte, error) {
	if err := v.check(); err != nil {
		return nil, fmt.Errorf("check %T: %w", v, err)
	}
	p, err := json.Marshal(v)
	if err != nil {
		return nil, fmt.Errorf("encode %T: %w", v, err)
	}
	if len(p) > maxPayload {
		return nil, fmt.Errorf("encode %T: %d bytes are more than the %d of a frame", v, len(p), maxPayload)
	}
	return p, nil
}

func text(what, s string, limit int) error {
	switch {
	case len(s) > limit:
		return fmt.Errorf("%s is longer than %d bytes", what, limit)
	case !utf8.ValidString(s):
		return fmt.Errorf("%s is not UTF-8", what)
	case strings.ContainsRune(s, 0):
		return fmt.Errorf("%s contains a zero byte", what)
	}
	return nil
}

func count(what string, n, limit int) error {
	if n > limit {
		return fmt.Errorf("%d %s are more than %d", n, what, limit)
	}
	return nil
}

func report(steps []Step, faults []string) error {
	errs := []error{count("steps", len(steps), maxSteps), count("faults", len(faults), maxFaults)}
	for _, s := range steps {
		errs = append(errs, text("step name", s.Name, maxName))
	}
	for _, f := range faults {
		errs = append(errs, text("fault", f, maxText))
	}
	return errors.Join(errs...)
}

func (*empty) check() error     { return nil }
func (*greeting) check() error  { return nil }
func (r *refusal) check() error { return text("error", r.Error, maxText) }

func (h *Hello) check() error {
	errs := []error{
		report(h.Steps, h.Faults), text("agent", h.Agent, maxName), text("boot", h.Boot, maxName), text("kernel", h.Kernel, maxName),
		text("architecture", h.Arch, maxName), text("init", h.Init, maxName), count("processes", len(h.Processes), maxProcesses),
	}
	for _, p := range h.Processes {
		errs = append(errs, text("process name", p.Name, maxName))
		if min(p.Stdin, p.Stdout, p.Stderr) < 0 || max(p.Stdin, p.Stdout, p.Stderr) > 1<<60 {
			errs = append(errs, fmt.Errorf("process %d has positions out of range", p.ID))
		}
	}
	return errors.Join(errs...)
}

func (c *Config) check() error {
	errs := []error{
		count("name servers", len(c.DNS), maxAddresses),
		count("bytes of entropy", len(c.Entropy), maxEntropy),
	}
	if !isHostname(c.Hostname, 63) {
		errs = append(errs, fmt.Errorf("host name %.80q has other characters than letters, digits, dots and hyphens, or not 1 to 63", c.Hostname))
	}
	if len(c.MachineID) != 32 || strings.Trim(c.MachineID, "0123456789abcdef") != "" {
		errs = append(errs, fmt.Errorf("machine id %.80q is not 32 lower-case hex digits", c.MachineID))
	}
	if c.Settle < 0 || c.Settle > time.Hour {
		errs = append(errs, fmt.Errorf("time to settle %v is not between 0 and an hour", c.Settle))
	}
	if c.Probe != "" && !isHostname(c.Probe, 253) {
		errs = append(errs, fmt.Errorf("probe name %.80q is not a domain name", c.Probe))
	}
	for _, a := range c.DNS {
		if !a.IsValid() {
			errs = append(errs, errors.New("a name server's address is empty"))
		}
	}
	if c.Interface != nil {
		errs = append(errs, c.Interface.check())
	}
	return errors.Join(errs...)
}

func (i *Interface) check() error {
	errs := []error{count("prefixes", len(i.Prefixes), maxAddresses), count("gateways", len(i.Gateways), maxAddresses)}
	if mac, err := net.ParseMAC(i.MAC); err != nil || len(mac) != 6 {
		errs = append(errs, fmt.Errorf("MAC address %.40q is not six octets", i.MAC))
	}
	if i.MTU != 0 && (i.MTU < 576 || i.MTU > 65535) {
		errs = append(errs, fmt.Errorf("MTU %d is not within 576 to 65535", i.MTU))
	}
	for _, p := range i.Prefixes {
		if !p.IsValid() {
			errs = append(errs, errors.New("a prefix is empty"))
		}
	}
	for _, g := range i.Gateways {
		if g == (netip.Addr{}) || g.Zone() != "" {
			errs = append(errs, fmt.Errorf("gateway %q is empty or has a zone", g))
		}
	}
	return errors.Join(errs...)
}

func isHostname(s string, limit int) bool {
	return s != "" && len(s) <= limit && s[0] != '-' && s[0] != '.' &&
		strings.Trim(s, "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789.-_") == ""
}

func (c *Configured) check() error { return report(c.Steps, c.Faults) }

func (c *Command) check() error {
	errs := []error{
		count("arguments", len(c.Args), maxArgs), count("environment variables", len(c.Env), maxArgs),
		text("name", c.Name, maxName), text("user", c.User, maxName), text("directory", c.Dir, 4<<10),
	}
	if len(c.Args) == 0 || c.Args[0] == "" {
		errs = append(errs, errors.New("there is no program to run"))
	}
	for _, a := range c.Args {
		errs = append(errs, text("argument", a, maxPayload))
	}
	for _, e := range c.Env {
		if k, _, ok := strings.Cut(e, "="); !ok || k == "" {
			errs = append(errs, fmt.Errorf("environment variable %.40q has no name or no =", e))
		}
		errs = append(errs, text("environment variable", e, maxPayload))
	}
	return errors.Join(errs...)
}

func (s *Size) check() error { return nil }

func (s *signal) check() error {
	switch s.Signal {
	case "SIGHUP", "SIGINT", "SIGQUIT", "SIGKILL", "SIGUSR1", "SIGUSR2", "SIGTERM", "SIGCONT", "SIGSTOP":
		return nil
	}
	return fmt.Errorf("signal %.40q is not one the agent sends", s.Signal)
}

func (e *Exit) check() error {
	if e.Code < 0 || e.Code > 255 {
		return fmt.Errorf("exit code %d is not within 0 to 255", e.Code)
	}
	return errors.Join(text("signal", e.Signal, maxName), text("error", e.Err, maxText))
}

func (s *Stats) check() error {
	if min(s.MemoryTotal, s.MemoryUsed, s.MemoryPeak, s.DiskTotal, s.DiskUsed, int64(s.Uptime)) < 0 || !(s.Load >= 0) {
		return errors.New("a figure is negative")
	}
	return nil
}

// clip makes what an agent reports keep within the bounds.
func clip(s string, limit int) string {
	s = strings.ReplaceAll(strings.ToValidUTF8(s, "\uFFFD"), "\x00", "")
	if len(s) > limit {
		s = strings.ToValidUTF8(s[:limit], "")
	}
	return s
}

func clipReport(steps []Step, faults []string) ([]Step, []string) {
	s := make([]Step, 0, min(len(steps), maxSteps))
	for _, x := range steps[:cap(s)] {
		s = append(s, Step{clip(x.Name, maxName), max(x.Took, 0)})
	}
	f := make([]string, 0, min(len(faults), maxFaults))
	for _, x := range faults[:cap(f)] {
		f = append(f, clip(x, maxText))
	}
	return s, f
}
