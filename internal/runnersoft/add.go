package runnersoft

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"flint"
	"flint/internal/regular"
)

// Pull fetches a release and makes it current; the newest where version is empty. What is there already is not fetched again,
// and the newest release does not take the place of a newer one that was given as a file. When it fails, the store is as
// before, but for a part of the archive with which the next Pull goes on.
func (s *Store) Pull(ctx context.Context, version string, p flint.Progress) (Software, error) {
	return s.pull(ctx, version, true, p)
}

// Fetch returns a release, fetching it if it is not there, and leaves the current one what it is. Unless it is pinned, whatever
// makes another version current may remove it.
func (s *Store) Fetch(ctx context.Context, version string, p flint.Progress) (Software, error) {
	if have, err := s.Get(version); !errors.Is(err, flint.ErrNotFound) {
		return have, err
	}
	return s.pull(ctx, version, false, p)
}

func (s *Store) pull(ctx context.Context, version string, current bool, p flint.Progress) (Software, error) {
	if version = strings.TrimPrefix(version, "v"); version != "" && !isVersion(version) {
		return Software{}, versionFault(version)
	}
	r, err := s.lookUp(ctx, version)
	if err != nil {
		return Software{}, err
	}
	var got Software
	err = s.locked(func() error {
		if version == "" {
			if now, err := s.Current(); err == nil && compare(now.Version, r.version) > 0 {
				got = now
				return nil
			}
		}
		if have, err := s.Get(r.version); err == nil {
			got, err = s.take(have, r.published, current)
			return s.fault("keep runner software", err)
		}
		f, err := s.download(ctx, r, p)
		if err != nil {
			return err
		}
		defer f.Close()
		if got, err = s.add(ctx, f, incoming{r.version, r.published, current}, p); err != nil {
			return err
		}
		return s.fault("keep runner software", ignoreMissing(os.Remove(f.Name())))
	})
	return got, err
}

// incoming is what is known of an archive that is added to the store.
type incoming struct {
	version  string
	released time.Time // zero: not known
	current  bool      // it is to be the current one
}

// take makes a version current that is there, if it is to be, and notes its day where that was not known.
func (s *Store) take(have Software, released time.Time, current bool) (Software, error) {
	if have.Released.IsZero() && !released.IsZero() {
		fresh := s.path(tempPrefix + versionFile)
		if err := os.WriteFile(fresh, versionText(have.Version, released), 0o644); err != nil {
			return Software{}, err
		}
		if err := os.Rename(fresh, filepath.Join(have.Dir, versionFile)); err != nil {
			return Software{}, err
		}
	}
	if current {
		if err := s.makeCurrent(have.Version); err != nil {
			return Software{}, err
		}
	}
	return s.Get(have.Version)
}

// File is an archive that a person gives.
type File struct {
	Path     string    // actions-runner-linux-x64-2.335.0.tar.gz
	Version  string    // where the file's name does not say it
	Released time.Time // may be zero: then its age is not known
	SHA256   string    // hexadecimal, as the release's notes have it; empty: not verified
}

var archiveName = regexp.MustCompile(`^actions-runner-([a-z]+)-([a-z0-9]+)-([0-9.]+)\.tar\.gz$`)

// Import unpacks an archive and makes it current. One of the same version is replaced.
func (s *Store) Import(ctx context.Context, a File, p flint.Progress) (Software, error) {
	what := "import " + a.Path
	f, err := openArchive(a.Path)
	if err != nil {
		return Software{}, err
	}
	defer f.Close()
	version := strings.TrimPrefix(a.Version, "v")
	if m := archiveName.FindStringSubmatch(filepath.Base(a.Path)); m != nil {
		if m[1] != "linux" || m[2] != s.arch {
			return Software{}, &flint.Fault{
				Code: "runner.arch", What: what, Kind: flint.ErrConfig, Err: fmt.Errorf("it is for %s-%s, and this machine is linux-%s", m[1], m[2], s.arch),
				Fix: fmt.Sprintf("take actions-runner-linux-%s-….tar.gz", s.arch),
			}
		}
		if version == "" {
			version = m[3]
		}
	}
	if !isVersion(version) {
		return Software{}, versionFault(version)
	}
	if want := strings.ToLower(strings.TrimPrefix(a.SHA256, "sha256:")); want != "" {
		got, err := digestOf(ctx, f)
		if err != nil {
			return Software{}, fmt.Errorf("%s: %w", what, err)
		}
		if got != want {
			return Software{}, digestFault(what, got, want, "fetch the file again, and compare the digest with the release's notes")
		}
	}
	var got Software
	err = s.locked(func() (err error) {
		released := a.Released
		if have, err := s.Get(version); err == nil && released.IsZero() {
			released = have.Released
		}
		got, err = s.add(ctx, f, incoming{version, released, true}, p)
		return err
	})
	return got, err
}

// openArchive opens an archive that a person gives.
func openArchive(path string) (*os.File, error) {
	f, err := regular.Open(path)
	if err == nil {
		return f, nil
	}
	fault := &flint.Fault{
		Code: "runner.archive", What: "import " + path, Kind: flint.ErrConfig, Err: err, Fix: "name a release's .tar.gz from https://github.com/actions/runner/releases",
	}
	switch {
	case errors.Is(err, fs.ErrNotExist):
		fault.Kind = flint.ErrNotFound
	case errors.Is(err, fs.ErrPermission):
		fault.Kind, fault.Fix = flint.ErrPermission, "let the user flint runs as read it"
	}
	return nil, fault
}

func versionFault(version string) error {
	return &flint.Fault{
		Code: "runner.number", What: "tell the version of runner software", Kind: flint.ErrUsage,
		Err: fmt.Errorf("%.60q is no version", version), Fix: "name it as GitHub does: 2.335.0 (with --version, where a file's name does not say it)",
	}
}

// add unpacks an archive and makes it the current version, if it is to be. The store is locked.
func (s *Store) add(ctx context.Context, f *os.File, a incoming, p flint.Progress) (Software, error) {
	done := p.Step("unpack runner software " + a.version)
	got, err := s.addQuietly(ctx, f, a)
	done("", err)
	return got, err
}

func (s *Store) addQuietly(ctx context.Context, f *os.File, a incoming) (got Software, err error) {
	what := "unpack runner software " + a.version
	temp, err := os.MkdirTemp(s.cfg.Dir, tempPrefix)
	if err != nil {
		return got, s.fault(what, err)
	}
	defer func() { err = errors.Join(err, os.RemoveAll(temp)) }() // the version that was replaced, or what came of nothing
	if err = unpack(ctx, f, temp); err == nil {
		err = checkRunner(temp, s.arch)
	}
	if err != nil {
		if ctx.Err() != nil || flint.SpaceFault("", "", "", err) != nil {
			return got, s.fault(what, err)
		}
		return got, &flint.Fault{
			Code: "runner.archive", What: what, Kind: flint.ErrConfig, Err: err,
			Fix: "take a release's actions-runner-linux-" + s.arch + "-….tar.gz from https://github.com/actions/runner/releases, unchanged",
		}
	}
	if err = writeOurs(temp, a.version, a.released); err == nil {
		err = s.enter(temp, a)
	}
	if err != nil {
		return got, s.fault(what, err)
	}
	return s.Get(a.version)
}

// writeOurs adds what a runner.dir has beside the runner, and lets everybody read the directories, whatever the umask.
func writeOurs(dir, version string, released time.Time) error {
	if err := os.WriteFile(filepath.Join(dir, startFile), []byte(placeScript+launchScript), 0o755); err != nil {
		return err
	}
	if err := os.WriteFile(filepath.Join(dir, versionFile), versionText(version, released), 0o644); err != nil {
		return err
	}
	if err := errors.Join(os.Chmod(filepath.Join(dir, startFile), 0o755), os.Chmod(filepath.Join(dir, versionFile), 0o644)); err != nil {
		return err
	}
	return filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
		if err != nil || !d.IsDir() {
			return err
		}
		return os.Chmod(path, 0o755)
	})
}

// enter gives a complete directory its name and makes it current, if it is to be. A version of before is then at the directory's old name.
func (s *Store) enter(temp string, a incoming) error {
	if err := syncFiles(temp); err != nil {
		return err
	}
	final := s.path(a.version + "-" + s.arch)
	err := unix.Renameat2(unix.AT_FDCWD, temp, unix.AT_FDCWD, final, unix.RENAME_EXCHANGE)
	if errors.Is(err, unix.ENOENT) {
		err = os.Rename(temp, final)
	}
	if err != nil {
		return fmt.Errorf("name %s: %w", final, err)
	}
	if !a.current {
		return nil
	}
	return s.makeCurrent(a.version)
}

// makeCurrent makes a version current that is there, and removes those that are too many then.
func (s *Store) makeCurrent(version string) error {
	if err := s.point(version); err != nil {
		return err
	}
	return s.trim()
}

// syncFiles waits until what was written is on the disk: a name must not outlive a power cut that its files do not.
func syncFiles(dir string) error {
	d, err := os.Open(dir)
	if err != nil {
		return err
	}
	defer d.Close()
	if err := unix.Syncfs(int(d.Fd())); err != nil {
		return fmt.Errorf("sync %s: %w", dir, err)
	}
	return nil
}
