// Package config turns a file, the environment and flags into one typed, validated Config.
//
// The file is YAML and strict: an unknown key is an error with its line, column and the nearest known key. Every
// problem is reported, not just the first. The package opens no socket and starts nothing; it must not know how the
// values are used, only what makes them valid.
package config

import (
	_ "embed"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"gopkg.in/yaml.v3"

	"flint"
)

// Example is the smallest useful file, shown by `flint config example` and in the documentation.
//
//go:embed example.yaml
var Example string

// SchemaVersion is the only version of the file this build reads.
const SchemaVersion = 1

// Config is everything flint can be told. Zero values have been replaced by defaults once Load returns it.
type Config struct {
	SchemaVersion int         `yaml:"schema_version"`
	StateDir      string      `yaml:"state_dir"` // records, images, kernels; private to flint
	LogLevel      string      `yaml:"log_level"` // debug, info, warn, error
	GitHub        GitHub      `yaml:"github"`
	Accounts      []GitHub    `yaml:"accounts"` // more of them, each with a name
	Webhook       Webhook     `yaml:"webhook"`
	API           API         `yaml:"api"`
	Pools         []Pool      `yaml:"pools"`
	Host          Host        `yaml:"host"`
	VM            VM          `yaml:"vm"`
	Firecracker   Firecracker `yaml:"firecracker"`
	Network       Network     `yaml:"network"`
	Kernel        Kernel      `yaml:"kernel"`
	Runner        Runner      `yaml:"runner"`
}

// Pool is one kind of runner.
type Pool struct {
	Name   string            `yaml:"name"`
	Image  string            `yaml:"image"`
	Args   map[string]string `yaml:"build_args"` // for an image that is a Dockerfile
	Pull   string            `yaml:"pull"`       // when the image is had anew: PullMissing, PullDaily or PullAlways
	VM     Shape             `yaml:"vm"`
	Max    int               `yaml:"max"`
	Group  string            `yaml:"group"`
	Root   string            `yaml:"root"`       // where what is written to the root goes: DiskRoot or MemoryRoot
	Tools  string            `yaml:"tool_cache"` // a directory, or a file system in a file, that its jobs find as actions' tool cache
	Format string            `yaml:"filesystem"` // of its base image: Ext4 or Erofs
	Limits Limits            `yaml:"limits"`
	Public bool              `yaml:"public"` // the pool serves public repositories, so strangers can start jobs in it

	Account   string   `yaml:"account"`    // name of the account it serves; the one under github when empty
	Labels    []string `yaml:"labels"`     // what runs-on says; the pool's name when empty
	RerunLost bool     `yaml:"rerun_lost"` // a job whose VM died is run again, once
	// RunnerVersion is the release of GitHub's runner that its VMs run; Runner's when empty.
	RunnerVersion string `yaml:"runner_version"`
}

// What Pool.Pull may be.
const (
	PullMissing = "missing" // when it is not here; also when it is empty
	PullDaily   = "daily"   // when what is here is a day old
	PullAlways  = "always"  // whenever it is prepared
)

// What Pool.Root may be.
const (
	DiskRoot   = "disk"   // also when it is empty
	MemoryRoot = "memory" // but for the work directory, /tmp and docker's
)

// What Pool.Format may be.
const (
	Ext4  = "ext4" // also when it is empty
	Erofs = "erofs"
)

// Webhook says where GitHub's webhooks arrive. Nothing listens unless an account's mode is webhooks.
type Webhook struct {
	Listen string `yaml:"listen"` // host:port, by plain HTTP: put a proxy with TLS in front of it
	Path   string `yaml:"path"`
}

// API says where the commands that ask a running flint find it.
type API struct {
	Socket string `yaml:"socket"` // path of a unix socket; serve/api.sock in state_dir when empty
}

// Limits hold each VM of a pool to rates, each per second; 0 does not limit. Firecracker enforces them, QEMU does not.
type Limits struct {
	DiskBandwidth flint.Bytes `yaml:"disk_bandwidth"` // read and written, for each drive by itself
	DiskOps       int64       `yaml:"disk_ops"`
	NetworkIn     flint.Bytes `yaml:"network_in"` // to the guest
	NetworkOut    flint.Bytes `yaml:"network_out"`
}

// Shape is the size of a pool's VMs.
type Shape struct {
	CPUs   int         `yaml:"cpus"`
	Memory flint.Bytes `yaml:"memory"`
	Disk   flint.Bytes `yaml:"disk"`
}

// Host says how much of this machine the VMs may have.
type Host struct {
	Name   string      `yaml:"name"`   // of this machine among others; its host name when empty
	CPUs   int         `yaml:"cpus"`   // virtual CPUs over all VMs; twice the machine's when 0
	Memory flint.Bytes `yaml:"memory"` // guest memory and VMM overhead over all VMs; nine tenths of the machine's when 0
	// MinFree is what stays free on the disk of state_dir: below it no VM starts, below twice as much unused images go.
	MinFree Free `yaml:"min_free"`
	// OnStop says what becomes of the VMs when flint is told to stop.
	OnStop string `yaml:"on_stop"`
}

// What Host.OnStop may be.
const (
	KeepOnStop = "keep" // they go on, and the next start goes on with them
	EndOnStop  = "end"
)

// VM says what runs the VMs.
type VM struct {
	Driver      string   `yaml:"driver"`       // auto, firecracker or qemu
	Accel       string   `yaml:"accel"`        // of QEMU: auto, kvm or tcg
	QEMU        string   `yaml:"qemu"`         // path of qemu-system-*; looked up when empty
	Agent       string   `yaml:"agent"`        // path of flint-agent; beside the flint program when empty
	BootTimeout Duration `yaml:"boot_timeout"` // from the start of the VMM until the VM is ready for its work, an image's systemd included
	JobTimeout  Duration `yaml:"job_timeout"`  // longest life of a runner; GitHub's own limit is 5 days
}

// Firecracker says where Firecracker and its jailer are, and what the jails are made of.
type Firecracker struct {
	Binary       string `yaml:"binary"`      // looked up in PATH when empty
	Jailer       string `yaml:"jailer"`      // looked up in PATH when empty
	ChrootBase   string `yaml:"chroot_base"` // on the file system of state_dir; "jail" in state_dir when empty
	UIDFirst     uint32 `yaml:"uid_first"`   // users reserved for VMs, one each
	UIDCount     uint32 `yaml:"uid_count"`
	ParentCgroup string `yaml:"parent_cgroup"` // relative to the root of cgroup v2
	Serial       bool   `yaml:"serial"`        // a serial console for the guest: tells panics apart, costs boot time
	Jail         bool   `yaml:"jail"`          // false runs Firecracker without its jailer: for trusted jobs only
}

// Network says which addresses the VMs get.
type Network struct {
	Bridge string       `yaml:"bridge"` // name of the bridge and of the nftables table, at most 11 bytes
	IPv4   netip.Prefix `yaml:"ipv4"`
	IPv6   netip.Prefix `yaml:"ipv6"`
}

// Kernel says where the guests' kernel comes from: the distribution's cloud kernel unless files are given.
type Kernel struct {
	Package string `yaml:"package"`
	Vmlinuz string `yaml:"vmlinuz"`
	Modules string `yaml:"modules"` // …/lib/modules/<version>; empty with Vmlinuz given: that kernel has all built in
	Pack    string `yaml:"pack"`    // version or id of one that is kept: flint kernel ls
}

// Runner says which runner software the VMs run.
type Runner struct {
	Dir string `yaml:"dir"` // a directory with an executable `start`, see docs/reference.md; GitHub's own when empty
	// InImage is where the images themselves hold GitHub's runner software, instead of Dir: an absolute path, or auto.
	InImage string `yaml:"in_image"`
	// Version is the release of GitHub's runner that is used; the newest, refreshed daily, when empty.
	Version string `yaml:"version"`
	// Releases is the REST API of the server that GitHub's runner is fetched from; github.com's when empty.
	Releases string `yaml:"releases"`
}

// Duration is a time span with units in its text form: 90s, 6h.
type Duration time.Duration

// UnmarshalText implements encoding.TextUnmarshaler.
func (d *Duration) UnmarshalText(b []byte) error {
	v, err := time.ParseDuration(string(b))
	if err != nil {
		return fmt.Errorf("duration %q is not a number with a unit, such as 90s or 6h", b)
	}
	*d = Duration(v)
	return nil
}

// Default is what a file that says nothing means.
func Default() Config {
	return Config{
		SchemaVersion: SchemaVersion,
		StateDir:      "/var/lib/flint",
		LogLevel:      "info",
		GitHub:        NewGitHub(),
		Webhook:       Webhook{Listen: ":8080", Path: "/webhook"},
		Host:          Host{MinFree: Free{Percent: 5}, OnStop: KeepOnStop},
		VM:            VM{Driver: "auto", Accel: "auto", BootTimeout: Duration(time.Minute), JobTimeout: Duration(6 * time.Hour)},
		Firecracker:   Firecracker{UIDFirst: 1900000000, UIDCount: 1000, ParentCgroup: "flint", Jail: true},
		Network: Network{
			Bridge: "flint0",
			IPv4:   netip.MustParsePrefix("10.213.0.0/20"),
			IPv6:   netip.MustParsePrefix("fd4f:6c69:6e74::/64"),
		},
	}
}

// NewPool returns a pool with the defaults of whatever a file does not say.
func NewPool(name, image string) Pool {
	return Pool{Name: name, Image: image, Max: 1, Root: DiskRoot, Format: Ext4, Pull: PullDaily, VM: Shape{CPUs: 2, Memory: 4 * flint.GiB, Disk: 20 * flint.GiB}}
}

// UnmarshalYAML implements yaml.Unmarshaler: it decodes above the defaults.
func (p *Pool) UnmarshalYAML(n *yaml.Node) error {
	type plain Pool
	*p = NewPool("", "")
	return n.Decode((*plain)(p))
}

// complete makes paths absolute and fills the host's name.
func (c *Config) complete(dir string) {
	for i := range c.Pools {
		p := &c.Pools[i]
		p.Image = fromDir(dir, p.Image)
		if p.Tools != "" && !filepath.IsAbs(p.Tools) {
			p.Tools = filepath.Join(dir, p.Tools)
		}
	}
	paths := []*string{
		&c.StateDir, &c.Runner.Dir, &c.Kernel.Vmlinuz, &c.Kernel.Modules, &c.VM.QEMU, &c.VM.Agent,
		&c.Firecracker.Binary, &c.Firecracker.Jailer, &c.Firecracker.ChrootBase, &c.API.Socket,
	}
	for _, g := range c.All() {
		for _, s := range g.secrets() {
			paths = append(paths, s.file)
		}
	}
	for _, path := range paths {
		if *path != "" && !filepath.IsAbs(*path) {
			*path = filepath.Join(dir, *path)
		}
	}
	if c.API.Socket == "" {
		c.API.Socket = filepath.Join(c.StateDir, "serve", "api.sock")
	}
	if c.Host.Name == "" {
		if name, err := os.Hostname(); err == nil {
			c.Host.Name = name
		}
	}
}

// inFiles are what references to images in files begin with; the path follows.
func inFiles() []string { return []string{"oci:", "docker-archive:", "oci-archive:"} }

// hasFile reports whether a reference says that the image is in a file.
func hasFile(ref string) bool {
	return slices.ContainsFunc(inFiles(), func(transport string) bool { return strings.HasPrefix(ref, transport) })
}

// besideFile has the images that are named by a relative path which is there, seen from the file's directory, named as such a path:
// what is meant must not depend on where flint is started, nor be asked of a registry.
func (c *Config) besideFile(dir string) {
	for i := range c.Pools {
		image := c.Pools[i].Image
		if image == "" || filepath.IsAbs(image) || hasFile(image) {
			continue
		}
		if _, err := os.Stat(filepath.Join(dir, image)); err == nil {
			c.Pools[i].Image = "./" + image
		}
	}
}

// fromDir makes a reference to an image relative to dir, where it begins as a relative path does.
func fromDir(dir, ref string) string {
	for _, transport := range append(inFiles(), "") {
		path, ok := strings.CutPrefix(ref, transport)
		if ok && (strings.HasPrefix(path, "./") || strings.HasPrefix(path, "../")) {
			return transport + filepath.Join(dir, path)
		}
	}
	return ref
}

// FlintPools returns the pools as the rest of flint knows them.
func (c *Config) FlintPools() []flint.Pool {
	pools := make([]flint.Pool, len(c.Pools))
	for i, p := range c.Pools {
		pools[i] = flint.Pool{
			Name: p.Name, Image: p.Image, Shape: flint.Shape(p.VM), Max: p.Max, Group: p.Group,
			Account: p.Account, Labels: c.labels(p),
		}
		if g := c.account(p.Account); g != nil {
			pools[i].Scope = g.Scope()
		}
	}
	return pools
}
