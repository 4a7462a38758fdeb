package main

import (
	"bufio"
	"bytes"
	"errors"
	"fmt"
	"os"
	"path"
	"path/filepath"
	"strings"

	"golang.org/x/sys/unix"
)

// module is a line of the initramfs's /modules/order.
type module struct {
	File  string
	Group string // empty: always; serial, vsock: for that channel; late: after the host was answered
}

// parseOrder reads /modules/order: `<file.ko> [group]`, one per line, dependencies first.
func parseOrder(b []byte) ([]module, error) {
	var ms []module
	for line := range strings.Lines(string(b)) {
		f := strings.Fields(line)
		switch {
		case len(f) == 0 || strings.HasPrefix(f[0], "#"):
			continue
		case len(f) > 2 || f[0] != path.Base(f[0]) || !strings.HasSuffix(f[0], ".ko"):
			return nil, fmt.Errorf("module list line %q is not a file and an optional group", strings.TrimSpace(line))
		}
		m := module{File: f[0]}
		if len(f) == 2 {
			m.Group = f[1]
		}
		ms = append(ms, m)
	}
	return ms, nil
}

// wanted reports whether m is loaded at boot. Without a channel argument both channels' modules are.
func (m module) wanted(channel string) bool {
	switch m.Group {
	case "":
		return true
	case "serial", "vsock":
		return channel == "" || channel == m.Group
	}
	return false
}

// loadBootModules loads what dir's order file lists for the channel.
func loadBootModules(dir, channel string) ([]module, error) {
	b, err := os.ReadFile(filepath.Join(dir, "order"))
	if errors.Is(err, os.ErrNotExist) {
		return nil, nil // a kernel with all built in
	}
	if err != nil {
		return nil, fmt.Errorf("read module list: %w", err)
	}
	ms, err := parseOrder(b)
	if err != nil {
		return nil, err
	}
	var errs []error
	for _, m := range ms {
		if m.wanted(channel) {
			errs = append(errs, insertModule(filepath.Join(dir, m.File)))
		}
	}
	return ms, errors.Join(errs...)
}

// loadFormats loads the modules of the file systems that only some drives have: the groups that are named like them.
func loadFormats(dir string, ms []module, drives map[string]string) error {
	needed := map[string]bool{}
	for _, device := range drives {
		if format, err := fileSystem(device); err == nil { // its mount says what is wrong with it
			needed[format] = true
		}
	}
	var errs []error
	for _, m := range ms {
		if m.Group != "" && needed[m.Group] {
			errs = append(errs, insertModule(filepath.Join(dir, m.File)))
		}
	}
	return errors.Join(errs...)
}

// insertModule loads a module file. One that is loaded already is fine.
func insertModule(file string) error {
	f, err := os.Open(file)
	if err != nil {
		return fmt.Errorf("load module: %w", err)
	}
	defer f.Close()
	flags := 0
	if filepath.Ext(file) != ".ko" {
		flags = unix.MODULE_INIT_COMPRESSED_FILE // Linux 5.17 and newer unpack modules themselves, if they were built to
	}
	err = unix.FinitModule(int(f.Fd()), "", flags)
	if flags != 0 && (errors.Is(err, unix.EINVAL) || errors.Is(err, unix.EOPNOTSUPP)) {
		return fmt.Errorf("load module %s: this kernel does not unpack it; install kmod in the image: %w", filepath.Base(file), err)
	}
	if err != nil && !errors.Is(err, unix.EEXIST) {
		return fmt.Errorf("load module %s: %w", filepath.Base(file), err)
	}
	return nil
}

// modprobe stands in for kmod's in images without it: the kernel's helper is called as `modprobe -q -- <name>`, and dockerd
// calls `modprobe -va <name>…`. It returns the exit code.
func modprobe(args []string) int {
	names := modulesToProbe(args)
	var u unix.Utsname
	if err := unix.Uname(&u); err != nil || len(names) == 0 {
		return 1
	}
	dir := filepath.Join("/lib/modules", unix.ByteSliceToString(u.Release[:]))
	if _, err := os.Stat(dir); errors.Is(err, os.ErrNotExist) {
		return 1 // the kernel asks all the same, and often
	}
	code := 0
	for _, name := range names {
		if err := probeModule(dir, name, insertModule); err != nil {
			complain(err)
			code = 1
		}
	}
	return code
}

// modulesToProbe returns the modules that modprobe's arguments name: the first, or all with -a. What else comes after the
// first is parameters of it, which are not passed on.
func modulesToProbe(args []string) []string {
	var names []string
	all := false
	for _, a := range args {
		switch {
		case !strings.HasPrefix(a, "-"):
			names = append(names, a)
		case a == "--all", !strings.HasPrefix(a, "--") && strings.Contains(a, "a"):
			all = true
		}
	}
	if !all {
		names = names[:min(1, len(names))]
	}
	return names
}

// probeModule loads, by insert, the modules a name or alias stands for, each after those it depends on.
func probeModule(dir, name string, insert func(string) error) error {
	deps, err := os.ReadFile(filepath.Join(dir, "modules.dep"))
	if err != nil {
		return fmt.Errorf("read module dependencies: %w", err)
	}
	if files := dependencies(deps, name); files != nil {
		return insertAll(dir, files, insert)
	}
	aliases, err := os.ReadFile(filepath.Join(dir, "modules.alias"))
	if err != nil {
		return fmt.Errorf("read module aliases: %w", err)
	}
	// Several may stand for one alias, such as the same cipher for different processors: those that fit are enough.
	errs := []error{}
	loaded := false
	for _, m := range resolveAlias(aliases, name) {
		if files := dependencies(deps, m); files != nil {
			err := insertAll(dir, files, insert)
			errs = append(errs, err)
			loaded = loaded || err == nil
		}
	}
	switch {
	case loaded:
		return nil
	case len(errs) == 0:
		return fmt.Errorf("find module %s: none has that name or alias", name)
	}
	return errors.Join(errs...)
}

// insertAll loads a module, the last of the files, after those it depends on.
func insertAll(dir string, files []string, insert func(string) error) error {
	for _, f := range files {
		if err := insert(filepath.Join(dir, f)); err != nil {
			return err
		}
	}
	return nil
}

// dependencies returns the files to load for a module, in order, from the text of modules.dep; nil if it has none.
func dependencies(dep []byte, name string) []string {
	name = moduleName(name)
	for line := range bytes.Lines(dep) {
		file, rest, ok := strings.Cut(strings.TrimSpace(string(line)), ":")
		if !ok || moduleName(path.Base(file)) != name {
			continue
		}
		needs := strings.Fields(rest)
		files := make([]string, 0, len(needs)+1)
		for i := len(needs) - 1; i >= 0; i-- { // modules.dep lists the nearest first
			files = append(files, needs[i])
		}
		return append(files, file)
	}
	return nil
}

// moduleName strips the suffixes of a module's file and makes its hyphens underscores, as the kernel does.
func moduleName(file string) string {
	name, _, _ := strings.Cut(file, ".ko")
	return strings.ReplaceAll(name, "-", "_")
}

// resolveAlias returns the modules whose alias pattern matches name, from the text of modules.alias.
func resolveAlias(aliases []byte, name string) []string {
	var ms []string
	sc := bufio.NewScanner(bytes.NewReader(aliases))
	for sc.Scan() {
		f := strings.Fields(sc.Text())
		if len(f) != 3 || f[0] != "alias" {
			continue
		}
		if ok, err := path.Match(f[1], name); ok && err == nil || f[1] == name {
			ms = append(ms, f[2])
		}
	}
	return ms
}
