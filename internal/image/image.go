// Package image makes the disks a VM starts with: base images from Dockerfiles, OCI images and Debian suites, the
// read-only drive with the runner software, and the empty scratch disk.
//
// A base image is one ext4 or erofs file named by the digest of its content, made without root and without mounting anything,
// shared read-only by all VMs. This package finds or makes the layers, and keeps what came of them; rootfs makes the file system.
// Archives, layouts and what registries say are hostile input: they are bounded and strictly parsed. The package must not know VMs,
// GitHub or the network, must not keep anything outside its own directory, and must not let a type of the container libraries out.
package image

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"hash"
	"io/fs"
	"log/slog"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"flint"
	"flint/internal/inuse"
	"flint/internal/rootfs"
)

// Store is a directory that holds images, what was needed to make them, and what is remembered about them. Several
// processes may use one at the same time: each thing is made once, under a lock, and appears whole or not at all.
//
// What Base, Drive and DebianBase return stays until this process ends, or until GC is told that it is not needed.
type Store struct {
	dir string
	log *slog.Logger

	pause   time.Duration // before a failed download is tried again, at first
	silence time.Duration // of a registry until a request is given up
	longest time.Duration // that making an image may take
	spare   spare

	writing chan struct{} // takes the one that writes a base image: that may need much memory

	mu   sync.Mutex
	held map[string]*hold // by path; what this process uses
}

// defaultLimit is the largest flattened image made when Want.Limit is 0.
const defaultLimit = 64 * flint.GiB

// Base is a base image: a read-only root file system.
type Base struct {
	Digest string      `json:"digest"`         // "sha256:…" of the content; names the file, unless an .ext4 file is used as it is
	Path   string      `json:"path"`           // the ext4 or erofs file, readable by all
	Size   flint.Bytes `json:"size"`           // of the file
	Env    []string    `json:"env,omitempty"`  // KEY=value, as the image says
	User   string      `json:"user,omitempty"` // user[:group], names or numbers
	Dir    string      `json:"dir,omitempty"`  // working directory
	Cmd    []string    `json:"cmd,omitempty"`  // entrypoint and command

	// Stale is why this is what the reference gave last, and nothing newer; nil where it is what was wanted. See Want.OrLast.
	Stale error `json:"-"`
}

// Want says which image.
type Want struct {
	// Ref is, in the order tried: what begins with one of skopeo's transports (docker://, docker-daemon:, containers-storage:,
	// docker-archive:, oci-archive:, oci:); a directory with a Dockerfile (or Containerfile) or such a file itself; an OCI layout
	// directory, with an optional :tag; a docker or OCI archive; an ext4 or erofs file, used as it is; a reference to an image in a registry.
	Ref       string
	BuildArgs map[string]string // for a Dockerfile; the value "oci:/absolute/path:tag" names a local image
	Limit     flint.Bytes       // of the flattened image; 0: 64 GiB
	Format    Format            // of the base image; empty: Ext4. A file that is used as it is has its own
	Progress  flint.Progress

	Pull Pull // when it is had anew, though it gave something before
	// BaseIsHere has a Dockerfile built on the base that the builder keeps, whatever Pull says: no registry may have it.
	BaseIsHere bool
	// OrLast is for who would rather go on with what Ref gave last than fail.
	OrLast bool
}

// version goes into every cache key of w.
func (w Want) version() string { return w.Format.Version() }

// Format is a file system that a base image can be.
type Format = rootfs.Format

// The formats of base images.
const (
	Ext4  = rootfs.Ext4
	Erofs = rootfs.Erofs
)

// The directories of a store.
const (
	baseDir    = "base"       // <digest>.ext4 or .erofs, readable by all
	driveDir   = "drive"      // <digest>.ext4, readable by all
	recordDir  = "record"     // <key>.json: what an input gave
	lockDir    = "lock"       // <key>: held while it is made; workLock, builderLock
	tmpDir     = "tmp"        // one directory per work in progress, locked by its owner
	debianDir  = "debian"     // OCI layouts made by DebianBase
	pullDir    = "pull"       // <digest>: OCI layouts that are being downloaded
	builderDir = "containers" // storage of buildah or podman
)

// Open opens the store in dir, making what is missing, and removes what killed processes left half made.
func Open(dir string, log *slog.Logger) (*Store, error) {
	dir, err := filepath.Abs(dir)
	if err != nil {
		return nil, fmt.Errorf("open image store: %w", err)
	}
	s := &Store{dir: dir, log: log, pause: firstPause, silence: longestSilence, longest: longestMaking, writing: make(chan struct{}, 1), held: map[string]*hold{}}
	for _, d := range []struct {
		name string
		mode os.FileMode
	}{
		{"", 0o755},
		{baseDir, 0o755},
		{driveDir, 0o755},
		{debianDir, 0o755},
		{recordDir, 0o700},
		{lockDir, 0o700},
		{tmpDir, 0o700},
		{pullDir, 0o700},
		{builderDir, 0o700},
	} {
		if err := makeDir(s.path(d.name), d.mode); err != nil {
			if f := spaceFault(err, "open the image store"); f != nil {
				return nil, f
			}
			return nil, fmt.Errorf("open image store: %w", err)
		}
	}
	unlock, err := s.workers()
	if errors.Is(err, fs.ErrPermission) {
		return nil, fmt.Errorf("open image store: %w", err) // it is another user's
	}
	if err == nil {
		unlock()
	}
	s.sweep()
	return s, nil
}

// makeDir makes a directory with exactly that mode, whatever the umask, and leaves one that is there as it is.
func makeDir(path string, mode os.FileMode) error {
	if info, err := os.Stat(path); err == nil && info.IsDir() {
		return nil
	}
	if err := os.MkdirAll(path, mode); err != nil {
		return err
	}
	return os.Chmod(path, mode)
}

// path is a path inside the store.
func (s *Store) path(elem ...string) string {
	return filepath.Join(append([]string{s.dir}, elem...)...)
}

// Locks with names of their own; all others are named by a digest.
const (
	workLock    = "work"    // while work directories are made and locked, or looked through
	builderLock = "builder" // while podman or buildah use their storage
)

// sweep removes the work directories whose owners are gone, and returns how much of the disk that freed. The lock on each
// tells: it is taken before anybody else may look.
func (s *Store) sweep() (freed flint.Bytes) {
	dead, err := s.abandoned()
	if err != nil {
		s.log.Warn("look for what interrupted builds left", "err", err)
	}
	for _, f := range dead {
		size, _ := inuse.OnDisk(f.Name())
		s.log.Info("removing what an interrupted build left", "path", f.Name(), "size", size)
		// A build's run directory has to be elsewhere; see withStorage.
		if run, err := os.Readlink(filepath.Join(f.Name(), runLink)); err == nil && isRun(run) {
			err = os.RemoveAll(run)
			if err != nil {
				s.log.Warn("remove run directory", "err", err)
			}
		}
		if err := os.RemoveAll(f.Name()); err != nil {
			s.log.Warn("remove leftover", "err", err)
		} else {
			freed += size
		}
		f.Close()
	}
	return freed
}

// abandoned takes the locks of work directories that have no owner.
func (s *Store) abandoned() (dead []*os.File, err error) {
	unlock, err := s.workers()
	if errors.Is(err, unix.EROFS) {
		return nil, nil // nothing can be removed either
	}
	if err != nil {
		return nil, err
	}
	defer unlock()
	entries, err := os.ReadDir(s.path(tmpDir))
	if err != nil {
		return nil, err
	}
	for _, e := range entries {
		f, err := os.Open(s.path(tmpDir, e.Name()))
		if err != nil {
			continue
		}
		if inuse.Lock(f, unix.LOCK_EX|unix.LOCK_NB) != nil {
			f.Close()
			continue
		}
		dead = append(dead, f)
	}
	return dead, nil
}

// workers keeps others from making work directories, and from looking through them, for a moment.
func (s *Store) workers() (unlock func(), err error) {
	f, err := os.OpenFile(s.path(lockDir, workLock), os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		return nil, err
	}
	if err := inuse.Lock(f, unix.LOCK_EX); err != nil {
		f.Close()
		return nil, err
	}
	return func() { f.Close() }, nil
}

// work makes a private directory for work in progress. Call release when done; nothing in the directory survives it.
func (s *Store) work() (dir string, release func(), err error) {
	unlock, err := s.workers()
	if err != nil {
		return "", nil, fmt.Errorf("make work directory: %w", err)
	}
	defer unlock()
	dir, err = os.MkdirTemp(s.path(tmpDir), "")
	if err != nil {
		return "", nil, fmt.Errorf("make work directory: %w", err)
	}
	remove := func() {
		if err := os.RemoveAll(dir); err != nil {
			s.log.Warn("remove work directory", "err", err)
		}
	}
	f, err := os.Open(dir)
	if err == nil {
		err = inuse.Lock(f, unix.LOCK_SH)
	}
	if err != nil {
		remove()
		return "", nil, fmt.Errorf("lock work directory: %w", err)
	}
	return dir, func() { remove(); f.Close() }, nil
}

// lock takes the lock of a key and waits for it as long as ctx lasts; that it waits is a step of p. Locks hold between processes too,
// and end with the process that holds them.
func (s *Store) lock(ctx context.Context, key string, p flint.Progress) (unlock func(), err error) {
	var waited func(string, error)
	f, err := inuse.Wait(ctx, s.path(lockDir, key), func() { waited = p.Step("wait for other work on images") })
	if err != nil {
		err = fmt.Errorf("wait for other work on images: %w", err)
	}
	if waited != nil {
		waited("", err)
	}
	if err != nil {
		return nil, err
	}
	return func() { f.Close() }, nil
}

// keyOf names an input: the digest of its parts, each with its length.
func keyOf(parts ...string) string {
	h := sha256.New()
	for _, p := range parts {
		fmt.Fprintf(h, "%d:%s,", len(p), p)
	}
	return hexSum(h)
}

func hexSum(h hash.Hash) string { return hex.EncodeToString(h.Sum(nil)) }

// sortedArgs lists build arguments as key, value, key, value in the order of the keys.
func sortedArgs(args map[string]string) []string {
	var list []string
	for _, k := range slices.Sorted(maps.Keys(args)) {
		list = append(list, k, args[k])
	}
	return list
}

// recall reads what was remembered under a key; false when there is nothing usable.
func (s *Store) recall(key string, v any) bool {
	b, err := os.ReadFile(s.path(recordDir, key+".json"))
	if err != nil {
		return false
	}
	if err := json.Unmarshal(b, v); err != nil {
		s.log.Warn("ignoring an unreadable record of the image store", "key", key, "err", err)
		return false
	}
	return true
}

// note remembers v under a key. What cannot be remembered, on a full disk as a rule, is worked out again next time.
func (s *Store) note(key string, v any) {
	if err := s.remember(key, v); err != nil {
		s.log.Warn("the image store cannot remember what it has", "err", err)
	}
}

// remember writes a record in place of an older one: whole and on disk, or not at all.
func (s *Store) remember(key string, v any) error {
	b, err := json.Marshal(v)
	if err != nil {
		return fmt.Errorf("encode record: %w", err)
	}
	tmp, release, err := s.work()
	if err != nil {
		return fmt.Errorf("write record: %w", err)
	}
	defer release()
	path := filepath.Join(tmp, "record")
	if err := writeFile(path, bytes.NewReader(b)); err != nil {
		return fmt.Errorf("write record: %w", err)
	}
	if err := os.Rename(path, s.path(recordDir, key+".json")); err != nil {
		return fmt.Errorf("write record: %w", err)
	}
	return nil
}

// BasePath returns where a base image is that the store keeps.
func (s *Store) BasePath(digest string) (string, bool) {
	for _, format := range []Format{Ext4, Erofs} {
		if file := s.path(baseDir, fileName(digest, format)); isRegular(file) {
			return file, true
		}
	}
	return "", false
}

// recallBase reads a remembered base image and checks that its file is still there.
func (s *Store) recallBase(key string) (Base, bool) {
	var b Base
	if !s.recall(key, &b) {
		return Base{}, false
	}
	path, ok := s.BasePath(b.Digest)
	if !ok {
		return Base{}, false
	}
	info, err := os.Stat(path)
	if err != nil || info.Size() != int64(b.Size) {
		return Base{}, false
	}
	b.Path = path
	return b, true
}
