package doctor

import (
	"context"
	"fmt"
	"slices"
	"strings"
)

// Kernel is what is known of the kernel that VMs boot.
type Kernel struct {
	Version string // empty: it is not kept yet
	Work    []Work
}

// Work is what a kernel has for one kind of work in jobs.
type Work struct {
	Name  string   // boot, docker, …; boot is the VM itself
	Lacks []string // options without which it does not work
	// Partly says that some of it does not work, Unknown that it cannot be told.
	Partly, Unknown bool
}

func (e *exam) kernelPack(context.Context) Finding {
	if e.Kernel.Version == "" {
		return skip("the VMs' kernel is not there yet; flint serve makes it when it starts, and so does flint kernel pull")
	}
	var fails, partly, unknown []string
	boots := true
	for _, w := range e.Kernel.Work {
		switch {
		case len(w.Lacks) > 0:
			fails = append(fails, fmt.Sprintf("%s (%s)", w.Name, strings.Join(w.Lacks, ", ")))
			boots = boots && w.Name != "boot"
		case w.Unknown:
			unknown = append(unknown, w.Name)
		case w.Partly:
			partly = append(partly, w.Name)
		}
	}
	const fix = "take another kernel: flint kernel pull fetches the distribution's, and kernel.pack chooses it; flint kernel inspect says more"
	switch {
	case !boots:
		return fail(fix, "%s lacks what VMs need: %s", e.Kernel.Version, strings.Join(fails, "; "))
	case len(fails) > 0:
		return warn(fix, "%s lacks what jobs need for %s", e.Kernel.Version, strings.Join(fails, "; "))
	case len(unknown) > 0:
		return skip("%s does not say how it was configured: it cannot be told whether it has all for %s", e.Kernel.Version, strings.Join(unknown, ", "))
	case len(partly) > 0:
		return pass("%s, with all but rare things for %s", e.Kernel.Version, strings.Join(partly, ", "))
	}
	return pass("%s, with all for %s", e.Kernel.Version, strings.Join(e.kinds(), ", "))
}

// kinds names the work of jobs.
func (e *exam) kinds() []string {
	var names []string
	for _, w := range e.Kernel.Work {
		names = append(names, w.Name)
	}
	return slices.DeleteFunc(names, func(n string) bool { return n == "boot" })
}

// Software is runner software that VMs run.
type Software struct {
	Version string
	Pool    string // that pins it; empty: all that pin none
	// Age and Left are in days: since its release, and until GitHub gives it no job unless it is the newest. nil: not known.
	Age, Left *int
	Soon      bool // Left is so little that one is warned
	Refused   bool // GitHub does not take this version, whatever its age
}

func (e *exam) runnerAge(context.Context) Finding {
	if len(e.Runners) == 0 {
		return skip("there is no runner software whose age is known; flint serve fetches GitHub's when it starts, unless runner.dir or runner.in_image is set")
	}
	var passed, unknown []string
	worst := Finding{Verdict: Pass}
	for _, s := range e.Runners {
		what, fix := s.Version, "flint runner-software pull, or import on a machine that does not reach GitHub"
		if s.Pool != "" {
			what, fix = s.Version+" of pool "+s.Pool, "set the pool's runner_version to a newer one, or take it out"
		}
		var f Finding
		switch {
		case s.Refused:
			f = fail(fix, "%s is older than any that GitHub registers", what)
		case s.Age == nil || s.Left == nil:
			unknown = append(unknown, what)
		case *s.Left <= 0:
			f = warn(fix, "%s is %d days old; GitHub gives it no job, unless it is the newest", what, *s.Age)
		case s.Soon:
			f = warn(fix, "%s is %d days old; in %d days GitHub gives it no job any more, unless it is the newest then", what, *s.Age, *s.Left)
		default:
			passed = append(passed, fmt.Sprintf("%s, %d days old, %d left", what, *s.Age, *s.Left))
		}
		if f.Verdict == Fail || f.Verdict == Warn && worst.Verdict != Fail {
			worst = f
		}
	}
	switch {
	case worst.Verdict != Pass:
		return worst
	case len(passed) == 0:
		return skip("the day of its release is not known: %s", strings.Join(unknown, "; "))
	}
	return pass("%s", strings.Join(passed, "; "))
}
