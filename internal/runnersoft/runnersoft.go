// Package runnersoft keeps GitHub's runner software: it fetches releases of actions/runner or takes them from files, verifies
// and unpacks them, and knows which one is current, how long GitHub takes it and what it needs of an image.
//
// What comes from the network or a file is hostile: its digest is verified before anything is unpacked, and unpacking is
// bounded and stays inside its directory. A version is there as a whole or not at all. The package must not know what is made
// of a version's directory, nor decide when a newer one is wanted.
package runnersoft

import (
	"context"
	_ "embed"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"net/http"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"flint"
)

// Config says where the software is kept and comes from.
type Config struct {
	Dir string // made when it is needed
	// API is the REST API that has the releases of actions/runner; empty: https://api.github.com.
	API       string
	Transport http.RoundTripper // nil: http.DefaultTransport, which heeds the proxy variables
	Pinned    []string          // versions that are never removed
	Log       *slog.Logger
}

// defaultAPI is where GitHub publishes its runner.
const defaultAPI = "https://api.github.com"

// Software is one version in the store.
type Software struct {
	Version  string      `json:"version"`
	Arch     string      `json:"arch"`              // as GitHub names it: x64, arm64
	Released time.Time   `json:"released,omitzero"` // a day; zero where it is not known
	Dir      string      `json:"dir"`               // with `start` and `version` at its top
	Size     flint.Bytes `json:"size"`              // of its files; only from List
	Current  bool        `json:"current"`
	Pinned   bool        `json:"pinned"`
}

// Store is a directory of versions. Processes may share it.
type Store struct {
	cfg   Config
	arch  string // empty: GitHub has no runner for this machine
	http  *http.Client
	pause time.Duration // before the second try of a download; doubles
	idle  time.Duration // longest silence of a download
}

const (
	currentLink  = "current"
	lockFile     = "lock"
	tempPrefix   = "tmp-"      // of what is being made
	partPrefix   = "download-" // of what is being fetched
	startFile    = "start"
	versionFile  = "version"
	listener     = "bin/Runner.Listener"
	keepVersions = 2 // the current one, and the newest of the others to go back to
)

// What starts the runner in a VM: in a place of its own, or where an image has it, and then the same.
var (
	//go:embed place.sh
	placeScript string
	//go:embed find.sh
	findScript string
	//go:embed launch.sh
	launchScript string
)

// InImage is the command that starts GitHub's runner where an image has it itself, in the first of these directories that has one; where
// none is named, of those that images usually have it in. Like the start of a runner.dir it reads the credential of flint.Registration
// from its standard input.
func InImage(dirs ...string) []string {
	if len(dirs) == 0 {
		dirs = []string{"/home/runner", "/actions-runner", "/opt/actions-runner", "/home/runner/actions-runner", "/runner"}
	}
	return append([]string{"/bin/sh", "-c", findScript + launchScript, "flint"}, dirs...)
}

// Open returns the store of a directory. It touches nothing.
func Open(c Config) *Store {
	if c.API == "" {
		c.API = defaultAPI
	}
	c.API = strings.TrimSuffix(c.API, "/")
	arch := map[string]string{"amd64": "x64", "arm64": "arm64"}[runtime.GOARCH]
	return &Store{cfg: c, arch: arch, http: client(c.Transport), pause: time.Second, idle: time.Minute}
}

// List returns the versions that are there, the newest first.
func (s *Store) List() ([]Software, error) {
	all, err := s.list()
	for i := range all {
		if all[i].Size, err = sizeOf(all[i].Dir); err != nil {
			return nil, fmt.Errorf("measure runner software: %w", err)
		}
	}
	return all, err
}

func (s *Store) list() ([]Software, error) {
	entries, err := os.ReadDir(s.cfg.Dir)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, dirFault(s.cfg.Dir, err)
	}
	link, err := os.Readlink(s.path(currentLink))
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, dirFault(s.cfg.Dir, err)
	}
	var all []Software
	for _, e := range entries {
		version, ok := strings.CutSuffix(e.Name(), "-"+s.arch)
		if !ok || !e.IsDir() || !isVersion(version) {
			continue
		}
		said, _ := Read(s.path(e.Name())) // where the file is damaged, the day is not known
		all = append(all, Software{
			Version: version, Arch: s.arch, Dir: s.path(e.Name()), Released: said.Released,
			Current: e.Name() == link, Pinned: slices.Contains(s.cfg.Pinned, version),
		})
	}
	slices.SortFunc(all, func(a, b Software) int { return compare(b.Version, a.Version) })
	return all, nil
}

// Current returns the version that is used unless another is pinned; flint.ErrNotFound where there is none.
func (s *Store) Current() (Software, error) {
	return s.find("find the current runner software", func(v Software) bool { return v.Current })
}

// Get returns a version; flint.ErrNotFound where it is not there.
func (s *Store) Get(version string) (Software, error) {
	return s.find("find runner software "+version, func(v Software) bool { return v.Version == version })
}

func (s *Store) find(what string, is func(Software) bool) (Software, error) {
	all, err := s.list()
	if err != nil {
		return Software{}, err
	}
	if i := slices.IndexFunc(all, is); i >= 0 {
		return all[i], nil
	}
	return Software{}, &flint.Fault{
		Code: "runner.none", What: what, Kind: flint.ErrNotFound, Err: errors.New("it is not in " + s.cfg.Dir),
		Fix: "fetch it with `flint runner-software pull`; or take it from a file with `flint runner-software import`",
	}
}

// Remove deletes versions. If the current one is among them, the newest that is left becomes current. A pinned one is refused.
func (s *Store) Remove(ctx context.Context, versions ...string) error {
	if i := slices.IndexFunc(versions, func(v string) bool { return slices.Contains(s.cfg.Pinned, v) }); i >= 0 {
		return &flint.Fault{
			Code: "runner.pinned", What: "remove runner software " + versions[i], Kind: flint.ErrConflict,
			Err: errors.New("runner.version of the configuration, or a pool's runner_version, is this one"), Fix: "take it out of the configuration first",
		}
	}
	for _, v := range versions {
		if _, err := s.Get(v); err != nil {
			return err
		}
	}
	return s.locked(func() error {
		all, err := s.list()
		if err != nil {
			return err
		}
		left := slices.DeleteFunc(slices.Clone(all), func(v Software) bool { return slices.Contains(versions, v.Version) })
		switch {
		case slices.ContainsFunc(left, func(v Software) bool { return v.Current }):
		case len(left) > 0:
			err = s.point(left[0].Version)
		default:
			err = ignoreMissing(os.Remove(s.path(currentLink)))
		}
		for _, v := range all {
			if err == nil && slices.Contains(versions, v.Version) {
				err = s.discard(v.Dir)
			}
		}
		return s.fault("remove runner software", err)
	})
}

// discard removes a version's directory, which has its name until nothing is to be seen of it.
func (s *Store) discard(dir string) error {
	away := s.path(tempPrefix + "gone-" + filepath.Base(dir))
	if err := os.RemoveAll(away); err != nil {
		return err
	}
	if err := os.Rename(dir, away); err != nil {
		return ignoreMissing(err)
	}
	return os.RemoveAll(away)
}

// point makes a version the current one.
func (s *Store) point(version string) error {
	link := s.path(tempPrefix + currentLink)
	if err := ignoreMissing(os.Remove(link)); err != nil {
		return err
	}
	if err := os.Symlink(version+"-"+s.arch, link); err != nil {
		return err
	}
	return os.Rename(link, s.path(currentLink))
}

// trim removes all but the current version, the pinned ones and the newest of the others.
func (s *Store) trim() error {
	all, err := s.list()
	if err != nil {
		return err
	}
	others := 0
	for _, v := range all {
		if v.Current || v.Pinned {
			continue
		}
		if others++; others < keepVersions {
			continue
		}
		if err := s.discard(v.Dir); err != nil {
			return fmt.Errorf("remove runner software %s: %w", v.Version, err)
		}
	}
	return nil
}

// locked runs f while no other process changes the store, and removes before what a killed one left half-made.
func (s *Store) locked(f func() error) error {
	if err := os.MkdirAll(s.cfg.Dir, 0o755); err != nil {
		return s.fault("keep runner software", dirFault(s.cfg.Dir, err))
	}
	lock, err := os.OpenFile(s.path(lockFile), os.O_CREATE|os.O_RDWR, 0o600)
	if err != nil {
		return s.fault("keep runner software", dirFault(s.cfg.Dir, err))
	}
	defer lock.Close()
	if err := unix.Flock(int(lock.Fd()), unix.LOCK_EX|unix.LOCK_NB); err != nil {
		return &flint.Fault{
			Code: "runner.busy", What: "change the runner software in " + s.cfg.Dir, Kind: flint.ErrConflict,
			Err: errors.New("another flint is at it"), Fix: "wait until it is done, and try again",
		}
	}
	stale, err := filepath.Glob(s.path(tempPrefix + "*"))
	if err != nil {
		return fmt.Errorf("keep runner software: %w", err)
	}
	for _, path := range stale {
		if err := os.RemoveAll(path); err != nil {
			return s.fault("keep runner software", err)
		}
	}
	return f()
}

func (s *Store) path(name ...string) string {
	return filepath.Join(append([]string{s.cfg.Dir}, name...)...)
}

// fault says of a full or read-only disk that it is one.
func (s *Store) fault(what string, err error) error {
	if err == nil {
		return nil
	}
	if f := flint.SpaceFault("runner.space", what, s.cfg.Dir, err); f != nil {
		return f
	}
	var f *flint.Fault
	if errors.As(err, &f) {
		return err
	}
	return fmt.Errorf("%s: %w", what, err)
}

func dirFault(dir string, err error) error {
	if errors.Is(err, fs.ErrPermission) {
		return &flint.Fault{
			Code: "state.dir", What: "use " + dir, Kind: flint.ErrPermission, Err: err, Fix: "run as the user that flint runs as: root",
		}
	}
	if errors.Is(err, unix.ENOTDIR) {
		return &flint.Fault{Code: "state.dir", What: "use " + dir, Err: err, Fix: "give a directory as state_dir (--state-dir)"}
	}
	return err
}

func ignoreMissing(err error) error {
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	return err
}

func sizeOf(dir string) (sum flint.Bytes, err error) {
	err = filepath.WalkDir(dir, func(_ string, d fs.DirEntry, err error) error {
		if err != nil || !d.Type().IsRegular() {
			return err
		}
		info, err := d.Info()
		if err == nil {
			sum += flint.Bytes(info.Size())
		}
		return err
	})
	return sum, ignoreMissing(err)
}
