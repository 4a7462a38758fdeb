package app

import (
	"context"
	"errors"
	"fmt"
	"path/filepath"

	"golang.org/x/sys/unix"

	"flint"
	"flint/internal/config"
	"flint/internal/kernel"
)

// KernelSource is where a kernel comes from.
type KernelSource = kernel.Source

// KernelBuild is a kernel to be built from source. Its Dir is the state directory's unless it is given.
type KernelBuild = kernel.Build

// KernelWorkload is what a kernel has for one kind of work in jobs.
type KernelWorkload = kernel.Workload

// The verdicts on a KernelWorkload.
const (
	KernelWorks   = kernel.Works
	KernelPartly  = kernel.Partly
	KernelFails   = kernel.Fails
	KernelUnknown = kernel.Unknown
)

// KeptKernel is a kernel pack of the state directory.
type KeptKernel struct {
	kernel.Kept
	Chosen bool     `json:"chosen"` // by the configuration
	Pools  []string `json:"pools"`  // whose VMs boot it; none unless it is chosen
}

// kernelSource is the kernel that a configuration asks for.
func kernelSource(k config.Kernel) kernel.Source {
	return kernel.Source{Package: k.Package, Vmlinuz: k.Vmlinuz, ModuleTree: k.Modules, Pack: k.Pack}
}

// kernelCache says where a configuration's flint keeps its kernels. It has no agent.
func kernelCache(cfg config.Config, opt Options) kernel.Config {
	return kernel.Config{Dir: filepath.Join(cfg.StateDir, "kernels"), Log: opt.Log, Progress: opt.Progress}
}

// AddKernel makes a kernel pack from a source and keeps it. It needs no running flint.
func AddKernel(ctx context.Context, cfg config.Config, opt Options, s KernelSource) (KeptKernel, error) {
	c := kernelCache(cfg, opt)
	var err error
	if c.Agent, err = agentPath(cfg.VM.Agent); err != nil {
		return KeptKernel{}, err
	}
	pack, err := kernel.Prepare(ctx, c, s)
	if err != nil {
		return KeptKernel{}, err
	}
	kept, err := FindKernel(ctx, cfg, opt, filepath.Base(filepath.Dir(pack.Kernel)))
	return kept, errors.Join(err, pack.Close())
}

// BuildKernel builds a kernel from the distribution's source and keeps a pack of it.
func BuildKernel(ctx context.Context, cfg config.Config, opt Options, b KernelBuild) (KeptKernel, error) {
	if b.Dir == "" {
		b.Dir = filepath.Join(cfg.StateDir, "kernel-source")
	}
	vmlinux, err := kernel.BuildFromSource(ctx, b, opt.Progress)
	if err != nil {
		return KeptKernel{}, err
	}
	return AddKernel(ctx, cfg, opt, KernelSource{Vmlinuz: vmlinux})
}

// OwnKernel is the kernel this machine runs.
func OwnKernel() (KernelSource, error) {
	var name unix.Utsname
	if err := unix.Uname(&name); err != nil {
		return KernelSource{}, fmt.Errorf("ask for this machine's kernel: %w", err)
	}
	return kernel.OwnKernel("/", unix.ByteSliceToString(name.Release[:]))
}

// ListKernels lists the kernel packs that are kept, the most recently used first.
func ListKernels(ctx context.Context, cfg config.Config, opt Options) ([]KeptKernel, error) {
	c := kernelCache(cfg, opt)
	packs, err := kernel.Packs(c.Dir)
	chosen, cerr := kernel.Chosen(ctx, c, kernelSource(cfg.Kernel))
	if cerr != nil {
		opt.Log.Debug("the configured kernel is not among those that are kept", "err", cerr)
	}
	list := make([]KeptKernel, 0, len(packs))
	for _, p := range packs {
		k := KeptKernel{Kept: p, Chosen: p.ID == chosen, Pools: []string{}}
		for _, pool := range cfg.Pools {
			if k.Chosen {
				k.Pools = append(k.Pools, pool.Name)
			}
		}
		list = append(list, k)
	}
	return list, err
}

// FindKernel returns the pack of a version or id; where that is empty, the one that the configuration chooses.
func FindKernel(ctx context.Context, cfg config.Config, opt Options, name string) (KeptKernel, error) {
	c := kernelCache(cfg, opt)
	var err error
	if name == "" {
		if name, err = kernel.Chosen(ctx, c, kernelSource(cfg.Kernel)); err != nil {
			return KeptKernel{}, err
		}
	}
	found, err := kernel.Find(c.Dir, name)
	if err != nil {
		return KeptKernel{}, err
	}
	list, err := ListKernels(ctx, cfg, opt)
	for _, k := range list {
		if k.ID == found.ID {
			return k, err
		}
	}
	return KeptKernel{Kept: found}, err
}

// RemoveKernel removes a pack that nobody uses and kernel.pack of the configuration does not name. It returns which one it was.
func RemoveKernel(ctx context.Context, cfg config.Config, opt Options, name string) (KeptKernel, error) {
	k, err := FindKernel(ctx, cfg, opt, name)
	if err != nil {
		return k, err
	}
	if k.Chosen && cfg.Kernel.Pack != "" {
		return k, &flint.Fault{
			Code: "kernel.used", What: "remove kernel " + k.Version, Kind: flint.ErrConflict,
			Err: errors.New("kernel.pack of the configuration is this one"), Fix: "take it out of the configuration first",
		}
	}
	return k, kernel.Remove(ctx, kernelCache(cfg, opt), k.Kept)
}
