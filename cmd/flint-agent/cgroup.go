package main

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"sync/atomic"
	"time"
)

const (
	atCgroups = "/sys/fs/cgroup"
	// confined is the parent of jobsCgroup and dockerCgroup, which together have the memory of its limit. The agent itself is
	// elsewhere, so a job that takes all it can get leaves it memory, processes and half of the CPU: enough to say what
	// happened, and to end the VM.
	confined = "flint"
	// jobsCgroup holds what the host starts.
	jobsCgroup = confined + "/job"
	// dockerCgroup is where the Docker daemon that the agent starts puts its containers.
	dockerCgroup = confined + "/docker"
	// strayCgroup is where a Docker daemon without systemd that the agent tells nothing puts its containers: one that a job starts.
	strayCgroup = "docker"

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
	all  []*cgroup
	jobs *os.File // the first of them
}

// cgroup is one of them.
type cgroup struct {
	dir string
	// counts says that the kernel counts here, in pids.events, what this one's limit refused. Of processes in cgroups below, it
	// counts there before Linux 6.11, and since then here, but what the limits below refused, too.
	counts bool
	full   atomic.Int64 // how often it was seen with as many processes as it may have
	bomb   bomb
}

// confine makes the cgroups of jobs below root, which is a cgroup2 file system, on a machine that has so many bytes of memory
// available, and whose kernel allows so many processes. It returns them with an error, too, where they lack some of their limits.
func confine(root string, memory, processes int64) (*cgroups, error) {
	errs := []error{enableControllers(root, "cpu", "memory", "pids")}
	c := &cgroups{}
	spare := min(max(memory/spareShare, minSpare), maxSpare, memory/4)
	for _, name := range []string{confined, jobsCgroup, dockerCgroup, strayCgroup} {
		dir := filepath.Join(root, name)
		if err := except(os.Mkdir(dir, 0o755), os.ErrExist); err != nil {
			return nil, errors.Join(append(errs, fmt.Errorf("make cgroup: %w", err))...)
		}
		errs = append(errs, limitCgroup(dir, "memory.max", memory-spare))
		if name == confined {
			errs = append(errs, enableControllers(dir, "cpu", "memory", "pids"))
			continue
		}
		errs = append(errs, limitCgroup(dir, "pids.max", processes/processShare))
		c.all = append(c.all, &cgroup{dir: dir, counts: name == jobsCgroup})
	}
	f, err := os.Open(c.all[0].dir)
	if err != nil {
		return nil, errors.Join(append(errs, fmt.Errorf("open cgroup: %w", err))...)
	}
	c.jobs = f
	return c, errors.Join(errs...)
}

func limitCgroup(dir, file string, limit int64) error {
	if err := setCgroup(dir, file, strconv.FormatInt(limit, 10)); err != nil {
		return fmt.Errorf("limit cgroup: %w", err)
	}
	return nil
}

// enableControllers has the cgroups below one have these controllers, as far as the kernel has them. Under systemd they have
// them already; writing that again changes nothing.
func enableControllers(root string, controllers ...string) error {
	var errs []error
	for _, c := range controllers {
		if err := setCgroup(root, "cgroup.subtree_control", "+"+c); err != nil {
			errs = append(errs, fmt.Errorf("enable cgroup controller %s: %w", c, err))
		}
	}
	return errors.Join(errs...)
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

// look notes which cgroups are full, and kills all processes of those that are full of a fork bomb. It is called again and again.
func (c *cgroups) look(now time.Time) {
	if c == nil {
		return
	}
	for _, g := range c.all {
		if g.isFull() {
			g.full.Add(1)
		}
		if !g.bomb.goesOff(now, g.refused()) {
			continue
		}
		complain(fmt.Errorf("%s has been full of processes that start others for %s; all of them are killed", g.dir, bombAfter))
		if err := setCgroup(g.dir, "cgroup.kill", "1"); err != nil {
			complain(fmt.Errorf("end a fork bomb: %w", err))
		}
		g.bomb = bomb{refused: g.refused()}
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
	if available <= 0 {
		return errors.New("learn how much memory there is: the kernel does not say")
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

// refused grows as long as the kernel starts no processes because a cgroup has as many as it may have.
func (c *cgroups) refused() (n int64) {
	if c == nil {
		return 0
	}
	for _, g := range c.all {
		n += g.refused()
	}
	return n
}

// refused is cgroups.refused of one.
func (g *cgroup) refused() int64 {
	n := g.full.Load()
	if b, err := os.ReadFile(filepath.Join(g.dir, "pids.events")); err == nil && g.counts { // there is none before the first process
		n += counter(b, "max")
	}
	return n
}

// isFull reports whether the cgroup, with those below it, has as many processes as it may have.
func (g *cgroup) isFull() bool {
	now, err := readNumber(filepath.Join(g.dir, "pids.current"))
	most, merr := readNumber(filepath.Join(g.dir, "pids.max"))
	return err == nil && merr == nil && now >= most
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
