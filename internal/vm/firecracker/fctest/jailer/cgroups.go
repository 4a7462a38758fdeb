package main

import (
	"bufio"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
)

// joinCgroups makes the VM's group, sets what the arguments say and enters it: only in version 2, which is all we ask for.
func (j *jail) joinCgroups() error {
	parent, ok := j.args["parent-cgroup"]
	if !ok {
		parent = j.name
	}
	if j.args["cgroup-version"] != "2" {
		if len(j.cgroups) > 0 {
			return errors.New("this double knows cgroup v2 only")
		}
		return nil
	}
	root, err := j.hierarchy()
	if err != nil {
		return err
	}
	if len(j.cgroups) == 0 {
		// The trap: without a setting it enters the parent, if there is one.
		if procs := filepath.Join(root, parent, "cgroup.procs"); exists(filepath.Dir(procs)) {
			return enter(procs)
		}
		return nil
	}
	controllers, err := os.ReadFile(filepath.Join(root, "cgroup.controllers"))
	if err != nil {
		return err
	}
	group := filepath.Join(root, parent, j.args["id"])
	if err := os.MkdirAll(group, 0o755); err != nil {
		return fmt.Errorf("create directory %s: %w", group, err)
	}
	for _, set := range j.cgroups {
		controller, _, dotted := strings.Cut(set[0], ".")
		if !dotted || strings.Contains(set[0], "/") {
			return fmt.Errorf("cgroup invalid file: %s", set[0])
		}
		if !slices.Contains(strings.Fields(string(controllers)), controller) {
			return fmt.Errorf("controller %s is unavailable", controller)
		}
		if err := enable(root, filepath.Dir(group), controller); err != nil {
			return err
		}
		if err := os.WriteFile(filepath.Join(group, set[0]), []byte(set[1]+"\n"), 0o644); err != nil {
			return fmt.Errorf("write to cgroups file: %w", err)
		}
	}
	return enter(filepath.Join(group, "cgroup.procs"))
}

// hierarchy finds the first mount of cgroup v2.
func (j *jail) hierarchy() (string, error) {
	if j.o.Root != "" {
		return j.o.Root, nil
	}
	f, err := os.Open("/proc/mounts")
	if err != nil {
		return "", err
	}
	defer f.Close()
	for lines := bufio.NewScanner(f); lines.Scan(); {
		if fields := strings.Fields(lines.Text()); len(fields) > 2 && fields[2] == "cgroup2" {
			return fields[1], nil
		}
	}
	return "", errors.New("hierarchy not found: cgroupsv2 hierarchy missing")
}

// enable hands a controller down from the root to dir.
func enable(root, dir, controller string) error {
	if dir != root {
		if err := enable(root, filepath.Dir(dir), controller); err != nil {
			return err
		}
	}
	file := filepath.Join(dir, "cgroup.subtree_control")
	if !exists(file) {
		return nil
	}
	if err := os.WriteFile(file, []byte("+"+controller+"\n"), 0o644); err != nil {
		return fmt.Errorf("write to %s: %w", file, err)
	}
	return nil
}

// enter moves this process into a group, under the number it has in its own process namespace: there the kernel looks.
func enter(procs string) error {
	if err := os.WriteFile(procs, []byte(strconv.Itoa(os.Getpid())+"\n"), 0o644); err != nil {
		return fmt.Errorf("write to cgroups file: %w", err)
	}
	return nil
}

func exists(path string) bool {
	_, err := os.Stat(path)
	return !errors.Is(err, fs.ErrNotExist)
}
