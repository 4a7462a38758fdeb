package kernel

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"hash"
	"os"
	"path/filepath"
	"strings"

	"flint/internal/digest"
	"flint/internal/regular"
)

// origin is where a kernel's files come from.
type origin struct {
	name   string // for a person
	key    string // names the content: equal keys, equal packs
	unpack func(ctx context.Context, u *unpacked) error
	// monolithic says that there are no modules: unpack leaves a kernel, and perhaps its configuration.
	monolithic bool
}

// givenOrigin takes the files that a source names.
func givenOrigin(ctx context.Context, s Source) (origin, error) {
	switch {
	case len(s.Debs) > 0:
		return debsOrigin(ctx, s.Debs)
	case s.ModuleTree == "":
		return monolithicOrigin(ctx, s.Vmlinuz)
	}
	return filesOrigin(ctx, s.Vmlinuz, s.ModuleTree)
}

// debsOrigin takes given .deb files.
func debsOrigin(ctx context.Context, debs []string) (origin, error) {
	sum := sha256.New()
	for _, deb := range debs {
		h, err := digest.File(ctx, deb)
		if err != nil {
			return origin{}, unpackFault(deb, err)
		}
		fmt.Fprintf(sum, "deb %s\n", h)
	}
	return origin{
		name: filepath.Base(debs[0]),
		key:  hex.EncodeToString(sum.Sum(nil)),
		unpack: func(ctx context.Context, u *unpacked) error {
			for _, deb := range debs {
				if err := addDebFile(ctx, u, deb); err != nil {
					return unpackFault(deb, err)
				}
			}
			return nil
		},
	}, nil
}

func addDebFile(ctx context.Context, u *unpacked, deb string) error {
	f, err := regular.Open(deb)
	if err != nil {
		return err
	}
	defer f.Close()
	return u.addDeb(ctx, f)
}

// monolithicOrigin takes a given kernel that has no modules.
func monolithicOrigin(ctx context.Context, vmlinuz string) (origin, error) {
	name := filepath.Base(vmlinuz)
	_, version, _ := strings.Cut(name, "-") // if it is called vmlinux-<version>
	from := map[string]string{"boot/vmlinuz-given": vmlinuz}
	config := present(vmlinuz+".config", filepath.Join(filepath.Dir(vmlinuz), "config-"+version))
	if config != "" {
		from["boot/config-given"] = config
	}
	sum := sha256.New()
	fmt.Fprintln(sum, "monolithic 2") // counted up when more is found out about a kernel
	if err := hashInto(ctx, sum, vmlinuz, config); err != nil {
		return origin{}, err
	}
	return origin{
		name: vmlinuz, key: hex.EncodeToString(sum.Sum(nil)), monolithic: true,
		unpack: func(ctx context.Context, u *unpacked) error { return u.copyFiles(ctx, from) },
	}, nil
}

// present returns the first of the files that is there, or "".
func present(files ...string) string {
	for _, f := range files {
		if _, err := os.Stat(f); err == nil {
			return f
		}
	}
	return ""
}

// hashInto adds the contents of files to a key; an empty name adds nothing.
func hashInto(ctx context.Context, sum hash.Hash, files ...string) error {
	for _, f := range files {
		if f == "" {
			continue
		}
		h, err := digest.File(ctx, f)
		if err != nil {
			return unpackFault(f, err)
		}
		fmt.Fprintf(sum, "file %s\n", h)
	}
	return nil
}

// filesOrigin takes a given kernel and module tree, such as the host's own.
func filesOrigin(ctx context.Context, vmlinuz, tree string) (origin, error) {
	real, err := filepath.EvalSymlinks(tree)
	if err != nil {
		return origin{}, unpackFault(tree, regular.Cause(err))
	}
	version := filepath.Base(real)
	config := present(filepath.Join(filepath.Dir(vmlinuz), "config-"+version), filepath.Join(real, "config"))
	sum := sha256.New()
	if err := hashInto(ctx, sum, vmlinuz, config); err != nil {
		return origin{}, err
	}
	var files []string
	err = filepath.WalkDir(real, func(p string, d os.DirEntry, err error) error {
		if err != nil {
			return err
		}
		rel, err := filepath.Rel(real, p)
		if err != nil || !d.Type().IsRegular() || !wantedModuleFile(rel) {
			return err
		}
		info, err := d.Info()
		if err != nil {
			return err
		}
		files = append(files, rel)
		fmt.Fprintf(sum, "module %q %d %d\n", rel, info.Size(), info.ModTime().UnixNano())
		return nil
	})
	if err != nil {
		return origin{}, unpackFault(tree, err)
	}
	return origin{
		name: vmlinuz,
		key:  hex.EncodeToString(sum.Sum(nil)),
		unpack: func(ctx context.Context, u *unpacked) error {
			from := map[string]string{"boot/vmlinuz-" + version: vmlinuz}
			if config != "" {
				from["boot/config-"+version] = config
			}
			for _, f := range files {
				from["lib/modules/"+version+"/"+f] = filepath.Join(real, f)
			}
			return u.copyFiles(ctx, from)
		},
	}, nil
}

func (u *unpacked) copyFiles(ctx context.Context, from map[string]string) error {
	for to, src := range from {
		if err := ctx.Err(); err != nil {
			return err
		}
		err := func() error {
			f, err := regular.Open(src)
			if err != nil {
				return err
			}
			defer f.Close()
			info, err := f.Stat()
			if err != nil {
				return err
			}
			return u.add(to, info.Size(), f)
		}()
		if err != nil {
			return unpackFault(src, err)
		}
	}
	return nil
}
