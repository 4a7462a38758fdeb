package main

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"time"
)

const (
	atCgroups = "/sys/fs/cgroup"
	// jobsCgroup holds what the host starts. The agent itself is elsewhere, so a job that takes all it can get leaves it memory,
	// processes and half of the CPU: enough to say what happened, and to end the VM.
	jobsCgroup = "flint"
	// dockerCgroup is where a Docker daemon without systemd puts its containers.
	dockerCgroup = "docker"

	// What is available and not the jobs': one part in so many, within these bounds in bytes, but never more than a quarter. Where
	// less is left, the kernel looks for memory for so long that the agent seems dead.
	spareShare         = 16
	minSpare, maxSpare = 16 << 20, 256 << 20
	// processShare is how many times as many processes as jobs may have the kernel would allow, of whom each takes some 0.2 MiB:
	// a job that starts ever more meets this limit before that of memory, and hears why.
	processShare = 4

	// A cgroup that is refused processes for so long, never having rested for longer than that, is a fork bomb, and ended.
	bombAfter = time.Minute
	bombRests = 5 * time.Second
)

// cgroups are those whose limits keep jobs from taking the whole guest.
type cgroups struct {
	dirs []string
	jobs *os.File // the first of dirs
}

// confine makes the cgroups of jobs below root, which is a cgroup2 file system, on a machine that has so many bytes of memory
// available, and whose kernel allows so many processes.
func confine(root string, memory, processes int64) (*cgroups, error) {
	// Under systemd these are enabled already; writing them again changes nothing.
	if err := setCgroup(root, "cgroup.subtree_control", "+cpu +memory +pids"); err != nil {
		return nil, fmt.Errorf("enable cgroup controllers: %w", err)
	}
	c := &cgroups{}
	spare := min(max(memory/spareShare, minSpare), maxSpare, memory/4)
	for _, name := range []string{jobsCgroup, dockerCgroup} {
		dir := filepath.Join(root, name)
		c.dirs = append(c.dirs, dir)
		if err := except(os.Mkdir(dir, 0o755), os.ErrExist); err != nil {
			return nil, fmt.Errorf("make cgroup: %w", err)
		}
		for file, limit := range map[string]int64{
			"memory.max": memory - spare,
			"pids.max":   processes / processShare,
		} {
			if err := setCgroup(dir, file, strconv.FormatInt(limit, 10)); err != nil {
				return nil, fmt.Errorf("limit cgroup: %w", err)
			}
		}
	}
	var err error
	if c.jobs, err = os.Open(c.dirs[0]); err != nil {
		return nil, fmt.Errorf("open cgroup: %w", err)
	}
	return c, nil
}

// bomb watches for processes that do nothing but start others.
type bomb struct {
	refused      int64     // as it was last
	since, again time.Time // when processes began to be refused, and were last
}

// goesOff reports whether the processes of a cgroup are one; refused is how many it was not given by now.
func (b *bomb) goesOff(now time.Time, refused int64) bool {
	if refused > b.refused {
		if now.Sub(b.again) > bombRests {
			b.since = now
		}
		b.again = now
	}
	b.refused = refused
	return now.Sub(b.again) <= bombRests && now.Sub(b.since) >= bombAfter
}

// defuse kills all processes of the cgroups that are full of a fork bomb. It is called again and again, with the same bombs: one for
// each cgroup.
func (c *cgroups) defuse(bombs []bomb) {
	for i, dir := range c.dirs {
		if !bombs[i].goesOff(time.Now(), refusedIn(dir)) {
			continue
		}
		complain(fmt.Errorf("%s has been full of processes that start others for %s; all of them are killed", dir, bombAfter))
		if err := setCgroup(dir, "cgroup.kill", "1"); err != nil {
			complain(fmt.Errorf("end a fork bomb: %w", err))
		}
		bombs[i] = bomb{}
	}
}

// setCgroup sets a file of a cgroup. The mode is for tests: the kernel has these files already.
func setCgroup(dir, file, value string) error {
	return os.WriteFile(filepath.Join(dir, file), []byte(value), 0o600)
}

// confineJobs has all that is started from now on live in a cgroup with limits.
func (s *system) confineJobs() error {
	_, available := s.sample()
	threads, err := readNumber("/proc/sys/kernel/threads-max")
	pids, perr := readNumber("/proc/sys/kernel/pid_max")
	if err := errors.Join(err, perr); err != nil {
		return fmt.Errorf("learn the kernel's limits: %w", err)
	}
	s.cgroups, err = confine(atCgroups, available, min(threads, pids))
	return err
}

func readNumber(file string) (int64, error) {
	b, err := os.ReadFile(file)
	if err != nil {
		return 0, err
	}
	n, err := strconv.ParseInt(string(bytes.TrimSpace(b)), 10, 64)
	if err != nil {
		return 0, fmt.Errorf("read %s: %w", file, err)
	}
	return n, nil
}

// refused returns how many processes the kernel did not start because a cgroup had as many as it may have.
func (c *cgroups) refused() (n int64) {
	if c == nil {
		return 0
	}
	for _, dir := range c.dirs {
		n += refusedIn(dir)
	}
	return n
}

func refusedIn(dir string) int64 {
	b, err := os.ReadFile(filepath.Join(dir, "pids.events"))
	if err != nil {
		return 0 // there is none before the first process
	}
	return counter(b, "max")
}

// counter returns the number behind a name in a file of the kernel's that has one of both in each line; 0 if it is not there.
func counter(file []byte, name string) int64 {
	for line := range bytes.Lines(file) {
		if v, ok := bytes.CutPrefix(line, []byte(name+" ")); ok {
			n, _ := strconv.ParseInt(string(bytes.TrimSpace(v)), 10, 64) // the kernel writes numbers
			return n
		}
	}
	return 0
}
