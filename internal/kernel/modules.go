package kernel

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path"
	"slices"
	"strings"

	"flint"
)

// Groups of boot modules, as /modules/order in the initramfs names them. A module without a group is always loaded.
const (
	groupSerial = "serial" // needed where the agent's channel is a virtio-serial port (flint.channel=serial)
	groupVsock  = "vsock"  // needed where it is a vsock (flint.channel=vsock)
	groupErofs  = "erofs"  // for drives with that file system
	groupLate   = "late"   // not needed to boot: loaded once the agent has answered
)

// want is a module the guest needs before it sees its modules image.
type want struct {
	name     string
	group    string
	optional bool   // the guest boots without it
	with     string // wanted only where this one is a module
}

// bootSet is what the guest needs to reach its drives, its network and the host.
func bootSet() []want {
	return []want{
		{name: "virtio_mmio"},
		{name: "virtio_blk"},
		{name: "virtio_net"},
		{name: "overlay"},
		{name: "ext4"},
		{name: "crc32c_generic", optional: true, with: "ext4"}, // ext4 asks for it by name at mount: no dependency says so
		{name: "erofs", group: groupErofs, optional: true},
		{name: "virtio_console", group: groupSerial},
		{name: "vmw_vsock_virtio_transport", group: groupVsock},
		{name: "virtio_rng", group: groupLate, optional: true},
	}
}

// bootModule is a module of the initramfs.
type bootModule struct {
	path  string // in the module tree
	group string
}

// file is the module's name in the initramfs.
func (m bootModule) file() string {
	base := path.Base(m.path)
	return base[:strings.Index(base, ".ko")] + ".ko"
}

// moduleTable is what depmod and the kernel's build say about a module tree.
type moduleTable struct {
	paths   map[string]string   // by name
	deps    map[string][]string // names of those a module needs, by name
	builtin map[string]bool
}

// parseModules reads modules.dep and modules.builtin.
func parseModules(dep, builtin []byte) (moduleTable, error) {
	t := moduleTable{paths: map[string]string{}, deps: map[string][]string{}, builtin: map[string]bool{}}
	for line := range strings.Lines(string(builtin)) {
		if name := moduleName(strings.TrimSpace(line)); name != "" {
			t.builtin[name] = true
		}
	}
	for line := range strings.Lines(string(dep)) {
		if strings.TrimSpace(line) == "" {
			continue
		}
		file, needs, ok := strings.Cut(line, ":")
		name := moduleName(file)
		if !ok || name == "" || path.Clean("/"+file) != "/"+file {
			return moduleTable{}, fmt.Errorf("read modules.dep: line %.80q is not a module and what it needs", line)
		}
		if _, known := t.paths[name]; known {
			continue // depmod lists the one that counts first
		}
		t.paths[name] = file
		for _, n := range strings.Fields(needs) {
			if n = moduleName(n); n == "" {
				return moduleTable{}, fmt.Errorf("read modules.dep: %s needs something that is no module", file)
			}
			t.deps[name] = append(t.deps[name], n)
		}
	}
	return t, nil
}

// order returns the modules of the set and all they need, each after what it needs. One that two groups need, or one
// and none, has no group.
func (t moduleTable) order(set []want) ([]bootModule, error) {
	groups := map[string]string{}
	var names []string
	onWay := map[string]bool{}
	var visit func(name, group string) error
	visit = func(name, group string) error {
		if onWay[name] {
			return fmt.Errorf("order modules: %s needs itself", name)
		}
		_, loadable := t.paths[name]
		if !loadable && !t.builtin[name] {
			return &flint.Fault{
				Code: "kernel.module", What: "find module " + name + " of the kernel", Kind: flint.ErrConfig,
				Err: errors.New("it is neither built in nor a module"),
				Fix: "use a kernel that has it; the distribution's kernel for clouds does",
			}
		}
		had, again := groups[name]
		if !loadable || again && (had == group || had == "") {
			return nil
		}
		if again {
			group = ""
		}
		groups[name] = group
		onWay[name] = true
		for _, need := range t.deps[name] {
			if err := visit(need, group); err != nil {
				return err
			}
		}
		delete(onWay, name)
		if !again {
			names = append(names, name)
		}
		return nil
	}
	for _, w := range set {
		if w.with != "" && t.paths[w.with] == "" {
			continue
		}
		if w.optional && t.paths[w.name] == "" {
			continue
		}
		if err := visit(w.name, w.group); err != nil {
			return nil, err
		}
	}
	out := make([]bootModule, len(names))
	for i, n := range names {
		out[i] = bootModule{t.paths[n], groups[n]}
	}
	return out, nil
}

// depmod writes modules.dep and its like for an unpacked kernel, whose root is the directory dir.
func (p *preparer) depmod(ctx context.Context, dir, version string) error {
	// An empty configuration keeps the host's /etc/depmod.d out of the guest.
	conf := dir + "/depmod.d"
	if err := os.Mkdir(conf, 0o755); err != nil {
		return storeFault(err)
	}
	_, err := p.run(ctx, dir, "depmod", "-C", conf, "-b", dir, version)
	return depmodFault(ctx, "index the modules of kernel "+version, err)
}

// needDepmod fails where depmod is missing, before anything is fetched for nothing.
func (p *preparer) needDepmod(ctx context.Context) error {
	_, err := p.run(ctx, p.Dir, "depmod", "--version")
	return depmodFault(ctx, "index the modules of a kernel", err)
}

func depmodFault(ctx context.Context, what string, err error) error {
	if err == nil || ctx.Err() != nil {
		return err
	}
	f := &flint.Fault{Code: "kernel.depmod", What: what, Err: err, Fix: "use a kernel whose module tree is whole"}
	if errors.Is(err, exec.ErrNotFound) {
		f.Fix = "install depmod (Debian and Ubuntu: apt-get install kmod)"
	}
	return f
}

var moduleSuffixes = []string{".ko", ".ko.xz", ".ko.zst", ".ko.gz"}

// moduleNames lists the names of the modules of a tree that depmod has indexed, and of those built into its kernel, a line each.
func moduleNames(root *os.Root, tree string) ([]byte, error) {
	var names []string
	for _, file := range []string{"modules.dep", "modules.builtin"} {
		b, err := root.ReadFile(tree + "/" + file)
		if err != nil {
			return nil, err
		}
		for line := range strings.Lines(string(b)) {
			line, _, _ = strings.Cut(line, ":")
			if name := moduleName(strings.TrimSpace(line)); name != "" {
				names = append(names, name+"\n")
			}
		}
	}
	slices.Sort(names)
	return []byte(strings.Join(slices.Compact(names), "")), nil
}

// nameSet is the set of a file's lines.
func nameSet(lines []byte) map[string]bool {
	set := map[string]bool{}
	for name := range strings.FieldsSeq(string(lines)) {
		set[name] = true
	}
	return set
}

// moduleName returns the name a module's file gives it, as the kernel writes it, or "" if the file is no module.
func moduleName(file string) string {
	base := path.Base(file)
	for _, s := range moduleSuffixes {
		if name, ok := strings.CutSuffix(base, s); ok && name != "" {
			return strings.ReplaceAll(name, "-", "_")
		}
	}
	return ""
}

// readModule returns a module, decompressed.
func readModule(root *os.Root, name string) ([]byte, error) {
	b, err := root.ReadFile(name)
	if err != nil {
		return nil, err
	}
	if bytes.HasPrefix(b, []byte("\x7fELF")) {
		return b, nil
	}
	return decompress(b, 256<<20)
}
