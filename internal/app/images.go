package app

import (
	"context"
	"errors"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"flint"
	"flint/internal/config"
	"flint/internal/image"
	"flint/internal/kernel"
	"flint/internal/runnersoft"
)

// Stored is one thing that is kept on disk for VMs and can be made again.
type Stored struct {
	Digest string      `json:"digest"` // a name where there is no digest
	Kind   string      `json:"kind"`   // base, drive, debian, pull, builder, damaged, kernel, initramfs
	Source []string    `json:"source"` // what it was made from, the newest last
	Size   flint.Bytes `json:"size"`   // on disk
	Used   time.Time   `json:"last_used"`
	InUse  bool        `json:"in_use"` // by a process
	// Failed is why it could not be had anew from its newest source when that was tried last; nil where it could.
	Failed *image.Failure `json:"failed,omitempty"`
	Wanted string         `json:"wanted,omitempty"` // what of the configuration it is for: a pool's name, runner.dir, runner software, kernel

	path string
}

// StoredImages lists what the state directory keeps for VMs, the least recently used first. It opens no network and needs
// no running flint.
func StoredImages(ctx context.Context, cfg config.Config, opt Options) ([]Stored, error) {
	store, err := openStore(cfg, opt)
	if err != nil {
		return nil, err
	}
	var images []image.Image
	if store != nil {
		images, err = store.List()
	}
	packs, kerr := kernel.List(filepath.Join(cfg.StateDir, "kernels"))
	list := make([]Stored, 0, len(images)+len(packs))
	for _, i := range images {
		s := Stored{Digest: i.Digest, Kind: string(i.Kind), Source: i.Source, Size: i.Size, Used: i.Used, InUse: i.InUse, path: i.Digest}
		if n := len(i.Source); n > 0 && i.Kind == image.KindBase {
			s.Failed = store.Failed(i.Source[n-1])
		}
		list = append(list, s)
	}
	for _, k := range packs {
		s := Stored{Digest: filepath.Base(k.Path), Kind: "kernel", Source: []string{k.Source}, Size: k.Size, Used: k.Used, InUse: k.InUse, path: k.Path}
		if info, err := os.Stat(k.Path); err == nil && !info.IsDir() {
			s.Kind = "initramfs"
			s.Digest = filepath.Base(filepath.Dir(k.Path)) + "/" + s.Digest
		}
		list = append(list, s)
	}
	slices.SortStableFunc(list, func(a, b Stored) int { return a.Used.Compare(b.Used) })
	want(ctx, cfg, list)
	return list, errors.Join(err, kerr)
}

// want says of what each part of the configuration was served by last that it is wanted. list is in the order of last use.
func want(ctx context.Context, cfg config.Config, list []Stored) {
	markLast := func(n int, what, kind string, is func(Stored) bool) {
		for i := range slices.Backward(list) {
			if n > 0 && list[i].Kind == kind && is(list[i]) {
				list[i].Wanted = strings.TrimPrefix(list[i].Wanted+", "+what, ", ")
				n--
			}
		}
	}
	mark := func(what, kind string, is func(Stored) bool) { markLast(1, what, kind, is) }
	from := func(source string) func(Stored) bool {
		return func(s Stored) bool { return slices.Contains(s.Source, source) }
	}
	for _, p := range cfg.Pools {
		// Which of them is whose, where pools have one Dockerfile and other arguments, the list does not tell.
		markLast(len(makings(cfg, p.Image, nil)), "pool "+p.Name, string(image.KindBase), from(p.Image))
		if dir, err := filepath.EvalSymlinks(p.Tools); err == nil && p.Tools != "" {
			mark("pool "+p.Name, string(image.KindDrive), from(dir))
		}
	}
	if dir, err := filepath.EvalSymlinks(cfg.Runner.Dir); err == nil && cfg.Runner.Dir != "" {
		mark("runner.dir", string(image.KindDrive), from(dir))
	}
	software := func(what string, s runnersoft.Software, err error) {
		if dir, serr := filepath.EvalSymlinks(s.Dir); err == nil && serr == nil {
			mark(what, string(image.KindDrive), from(dir))
		}
	}
	s, err := softwareOf(cfg, nil)
	software("runner software", s, err)
	for _, p := range cfg.Pools {
		if p.RunnerVersion != "" && keepsSoftware(cfg) {
			s, err := RunnerSoftware(cfg, nil).Get(p.RunnerVersion)
			software("runner software of "+p.Name, s, err)
		}
	}
	// Until the configured kernel has been made, the last that was used is the one to keep.
	is := func(Stored) bool { return true }
	if id, err := kernel.Chosen(ctx, kernelCache(cfg, Options{}), kernelSource(cfg.Kernel)); err == nil {
		is = func(s Stored) bool { first, _, _ := strings.Cut(s.Digest, "/"); return first == id }
	}
	mark("kernel", "kernel", is)
	mark("kernel", "initramfs", is)
}

// PruneImages removes what no process uses and, unless all is set, the configuration does not want. It returns how much of
// the disk that freed, and what it removed: digests and paths.
func PruneImages(ctx context.Context, cfg config.Config, opt Options, all bool) (freed flint.Bytes, removed []string, err error) {
	store, err := openStore(cfg, opt)
	if err != nil {
		return 0, nil, err
	}
	list, err := StoredImages(ctx, cfg, opt)
	if err != nil {
		return 0, nil, err
	}
	var keep []string
	for _, s := range list {
		if s.Wanted != "" && !all {
			keep = append(keep, s.path)
		}
	}
	const everything = flint.Bytes(1) << 62
	return collect(ctx, store, kernel.Config{Dir: filepath.Join(cfg.StateDir, "kernels"), Log: opt.Log}, keep, everything)
}

// openStore opens the image store; nil where there is none yet.
func openStore(cfg config.Config, opt Options) (*image.Store, error) {
	dir := filepath.Join(cfg.StateDir, "images")
	if _, err := os.Stat(dir); errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	return makeStore(cfg, opt.Log)
}

// makeStore opens the image store, and makes it where there is none yet.
func makeStore(cfg config.Config, log *slog.Logger) (*image.Store, error) {
	store, err := image.Open(filepath.Join(cfg.StateDir, "images"), log)
	switch {
	case errors.Is(err, fs.ErrPermission):
		return nil, &flint.Fault{
			Code: "state.dir", What: "use what is kept in " + cfg.StateDir, Kind: flint.ErrPermission, Err: err,
			Fix: "run as the user that flint runs as: root",
		}
	case errors.Is(err, unix.ENOTDIR):
		return nil, &flint.Fault{Code: "state.dir", What: "use what is kept in " + cfg.StateDir, Err: err, Fix: "give a directory as state_dir (--state-dir)"}
	}
	return store, err
}
