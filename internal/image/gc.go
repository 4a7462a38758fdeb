package image

import (
	"bytes"
	"cmp"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"flint"
	"flint/internal/inuse"
)

// Image is one thing a store keeps.
type Image struct {
	Digest string      `json:"digest"`           // "sha256:…"; a name where there is none
	Kind   Kind        `json:"kind"`             // what it is
	Source []string    `json:"source,omitempty"` // what it was asked for by, the newest last, at most maxSources
	Size   flint.Bytes `json:"size"`             // on disk
	Used   time.Time   `json:"last_used"`        // by whichever process, by the clock of that time
	InUse  bool        `json:"in_use"`           // by a process, ours included

	path string
}

// Kind tells the things a store keeps apart.
type Kind string

// The kinds of things in a store.
const (
	KindBase    Kind = "base"    // a base image
	KindDrive   Kind = "drive"   // a runner drive
	KindDebian  Kind = "debian"  // a base for builds, made by DebianBase
	KindPull    Kind = "pull"    // an image whose download was interrupted, or is under way
	KindBuilder Kind = "builder" // the layers podman or buildah keep for the next build
	KindDamaged Kind = "damaged" // a base image or a drive that was set aside; its name is no digest, but begins as one
)

// maxSources bounds how many names of one image are remembered.
const maxSources = 8

// List returns what the store keeps, the least recently used first.
func (s *Store) List() ([]Image, error) {
	var all []Image
	var errs []error
	for kind, dir := range map[Kind]string{KindBase: baseDir, KindDrive: driveDir, KindDebian: debianDir, KindPull: pullDir} {
		entries, err := os.ReadDir(s.path(dir))
		if err != nil {
			errs = append(errs, err)
			continue
		}
		for _, e := range entries {
			i := Image{Kind: kind, Digest: digestOf(kind, e.Name()), path: s.path(dir, e.Name())}
			if strings.HasSuffix(e.Name(), damagedSuffix) {
				i.Kind = KindDamaged
			}
			all = append(all, i)
		}
	}
	if left, err := os.ReadDir(s.path(builderDir)); err == nil && len(left) > 0 {
		all = append(all, Image{Kind: KindBuilder, Digest: "build cache", path: s.path(builderDir)})
	}
	list := all[:0]
	for _, i := range all {
		err := s.inspect(&i)
		if errors.Is(err, fs.ErrNotExist) {
			continue // removed while we looked
		}
		if err != nil {
			errs = append(errs, err)
			continue
		}
		list = append(list, i)
	}
	slices.SortFunc(list, func(a, b Image) int {
		return cmp.Or(a.Used.Compare(b.Used), strings.Compare(a.path, b.path))
	})
	if len(errs) > 0 {
		return list, fmt.Errorf("list images: %w", errors.Join(errs...))
	}
	return list, nil
}

func digestOf(kind Kind, file string) string {
	if kind == KindDebian || kind == KindPull {
		return file
	}
	return "sha256:" + strings.TrimSuffix(strings.TrimSuffix(file, "."+string(Ext4)), "."+string(Erofs))
}

// inspect fills what looking at an image tells.
func (s *Store) inspect(i *Image) error {
	info, err := os.Lstat(i.path)
	if err != nil {
		return err
	}
	i.Used = info.ModTime()
	if i.Size, err = inuse.OnDisk(i.path); err != nil {
		return err
	}
	s.recall(sourceKey(i.path), &i.Source)
	release, free, err := s.take(*i)
	if err != nil {
		return err
	}
	i.InUse = !free
	if free {
		release()
	}
	return nil
}

// take makes an image ours alone, to remove it; false where it is in use.
func (s *Store) take(i Image) (release func(), free bool, err error) {
	path := i.path
	if i.Kind == KindBuilder {
		path = s.path(lockDir, builderLock)
	}
	f, err := inuse.Seize(path)
	if f != nil {
		return func() { f.Close() }, true, nil
	}
	if _, lerr := os.Lstat(path); i.Kind == KindBuilder && errors.Is(lerr, fs.ErrNotExist) {
		return func() {}, true, nil // no lock: nothing was ever built here
	}
	return nil, false, err
}

// GC makes room. It removes what killed processes left half made, what is remembered and not needed, and then, until room more bytes are free, images that
// nobody uses and that keep does not name, those not used for longest first. keep names them by digest or by path.
//
// Safe from it is what another process had from Base or Drive and lives, what any process has open, and what this process
// had and GC was not told to keep before: it may be about to be used. What cannot be removed is said in the error and
// does not hinder the rest.
func (s *Store) GC(ctx context.Context, keep []string, room flint.Bytes) (freed flint.Bytes, removed []string, err error) {
	freed = s.sweep()
	s.tidy()
	kept := func(path string) bool {
		return slices.ContainsFunc(keep, func(k string) bool {
			return k != "" && (k == path || isNamed(path, k))
		})
	}
	s.letGo(kept)
	if room <= freed {
		return freed, nil, nil
	}
	list, err := s.List()
	errs := []error{err}
	for _, i := range list {
		if freed >= room {
			break
		}
		if ctx.Err() != nil {
			errs = append(errs, context.Cause(ctx))
			break
		}
		if i.InUse || kept(i.path) {
			continue
		}
		gone, err := s.remove(i)
		if err != nil {
			errs = append(errs, fmt.Errorf("remove %s: %w", i.Digest, err))
			continue
		}
		if gone {
			freed, removed = freed+i.Size, append(removed, i.Digest)
		}
	}
	return freed, removed, errors.Join(errs...)
}

// Remove removes what List calls so, unless somebody uses it; false: somebody does, or nothing is called so.
func (s *Store) Remove(digest string) (gone bool, err error) {
	list, err := s.List()
	if err != nil {
		return false, err
	}
	for _, i := range list {
		if i.Digest == digest {
			return s.remove(i)
		}
	}
	return false, nil
}

// remove removes one image unless somebody has begun to use it.
func (s *Store) remove(i Image) (gone bool, err error) {
	release, free, err := s.take(i)
	if err != nil || !free {
		return false, err
	}
	defer release()
	s.log.Info("removing what nobody uses", "image", i.Digest, "kind", i.Kind, "size", i.Size, "last_used", i.Used)
	if i.Kind == KindBuilder {
		return true, s.clearBuilder()
	}
	// What remembers it goes first: it would be ignored without the image, but stay for ever.
	s.forget(i)
	if i.Kind == KindDebian || i.Kind == KindPull {
		// Off its name at once, so that nobody finds half of it.
		tmp, done, err := s.work()
		if err != nil {
			return false, err
		}
		defer done()
		return true, os.Rename(i.path, filepath.Join(tmp, "removed"))
	}
	return true, os.Remove(i.path)
}

// forget removes the records that name an image.
func (s *Store) forget(i Image) {
	_ = os.Remove(s.path(recordDir, sourceKey(i.path)+".json"))
	if i.Kind == KindDebian || i.Kind == KindPull {
		return
	}
	entries, err := os.ReadDir(s.path(recordDir))
	if err != nil {
		s.log.Warn("read records of the image store", "err", err)
		return
	}
	for _, e := range entries {
		path := s.path(recordDir, e.Name())
		if b, err := os.ReadFile(path); err == nil && bytes.Contains(b, []byte(i.Digest)) {
			_ = os.Remove(path)
		}
	}
}

// clearBuilder empties the storage of podman or buildah, whose lock is held. They mount parts of it on itself.
func (s *Store) clearBuilder() error {
	dir := s.path(builderDir)
	mounts, err := mountsBelow(dir)
	if err != nil {
		return err
	}
	for _, m := range slices.Backward(mounts) {
		if err := unix.Unmount(m, unix.MNT_DETACH|unix.UMOUNT_NOFOLLOW); err != nil {
			return fmt.Errorf("unmount %s: %w", m, err)
		}
	}
	entries, err := os.ReadDir(dir)
	if err != nil {
		return err
	}
	for _, e := range entries {
		err = errors.Join(err, os.RemoveAll(filepath.Join(dir, e.Name())))
	}
	return err
}

// mountsBelow lists what is mounted below dir, in the order it was. The form is that of proc(5), /proc/pid/mountinfo.
func mountsBelow(dir string) ([]string, error) {
	if real, err := filepath.EvalSymlinks(dir); err == nil {
		dir = real
	}
	b, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		return nil, err
	}
	var found []string
	unescape := strings.NewReplacer(`\040`, " ", `\011`, "\t", `\012`, "\n", `\134`, `\`)
	for line := range strings.Lines(string(b)) {
		if fields := strings.Fields(line); len(fields) > 4 {
			if at := unescape.Replace(fields[4]); strings.HasPrefix(at, dir+"/") {
				found = append(found, at)
			}
		}
	}
	return found, nil
}

// sourceKey names the record of what an image was asked for by.
func sourceKey(path string) string { return "source-" + filepath.Base(path) }

// noteSource remembers that ref gave the image at path.
func (s *Store) noteSource(path, ref string) {
	var known []string
	s.recall(sourceKey(path), &known)
	if len(known) > 0 && known[len(known)-1] == ref {
		return
	}
	known = append(slices.DeleteFunc(known, func(k string) bool { return k == ref }), ref)
	s.note(sourceKey(path), known[max(0, len(known)-maxSources):])
}
