package image

import (
	"bufio"
	"compress/gzip"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"runtime"
	"strings"

	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/empty"
	"github.com/google/go-containerregistry/pkg/v1/layout"
	"github.com/google/go-containerregistry/pkg/v1/mutate"
	"github.com/google/go-containerregistry/pkg/v1/tarball"
	"github.com/google/go-containerregistry/pkg/v1/types"

	"flint"
	"flint/internal/tool"
)

// fallbackSuite is the Debian release DebianBase makes where the host is not Debian.
const fallbackSuite = "bookworm"

// suiteName is what a Debian suite may be called; it becomes an argument and a file name.
var suiteName = regexp.MustCompile(`^[a-z][a-z0-9-]{1,30}$`)

// DebianBase makes a minimal Debian root as an OCI layout and returns its reference, "oci:/absolute/path:latest", for
// use as a build argument in Want.BuildArgs or as Want.Ref. It serves where no registry can be reached: mmdebstrap
// fetches and verifies the packages from the mirrors it uses by itself. An empty suite means the host's own release on
// Debian, else bookworm. A suite once made is kept.
func (s *Store) DebianBase(ctx context.Context, suite string, p flint.Progress) (ref string, err error) {
	if suite == "" {
		suite = hostSuite("/etc/os-release")
	}
	if !suiteName.MatchString(suite) {
		return "", &flint.Fault{
			Code: "image.suite", What: fmt.Sprintf("make a Debian base: %q is not a suite's name", suite),
			Fix: "name a Debian release, such as bookworm", Kind: flint.ErrConfig,
		}
	}
	name := suite + "-" + runtime.GOARCH
	dir := s.path(debianDir, name)
	ref = ociPrefix + dir + ":latest"
	step := "make Debian base " + suite
	unlock, err := s.lock(ctx, "debian-"+name, p)
	if err != nil {
		return "", err
	}
	defer unlock()
	if isWhole(dir) {
		p.Step(step)("cached", nil)
		return ref, s.hold(dir)
	}
	done := p.Step(step)
	line := func(line string) { p.Report(flint.Milestone{Step: step, Line: line}) }
	err = s.whileRoom(ctx, s.dir, func(ctx context.Context) error { return s.bootstrap(ctx, suite, dir, line) })
	if err == nil {
		err = s.hold(dir)
	}
	if f := spaceFault(err, step); f != nil {
		err = f
	}
	if err != nil {
		done("", err)
		return "", err
	}
	done(ref, nil)
	return ref, nil
}

// isWhole reports whether a layout has every file that its image names, in its size: a crash of the machine may have cut
// them. Their content is checked by whoever reads them.
func isWhole(dir string) bool {
	img, err := layoutImage(dir, "")
	if err != nil {
		return false
	}
	m, err := img.Manifest()
	if err != nil {
		return false
	}
	for _, d := range append([]v1.Descriptor{m.Config}, m.Layers...) {
		info, err := os.Stat(filepath.Join(dir, "blobs", d.Digest.Algorithm, d.Digest.Hex))
		if err != nil || info.Size() != d.Size {
			return false
		}
	}
	return true
}

func (s *Store) bootstrap(ctx context.Context, suite, dir string, line func(string)) error {
	path, err := exec.LookPath("mmdebstrap")
	if err != nil {
		return &flint.Fault{
			Code: "image.mmdebstrap", What: "make a Debian base: mmdebstrap is not installed",
			Fix: "sudo apt-get install mmdebstrap", Kind: flint.ErrNotFound, Err: err,
		}
	}
	tmp, release, err := s.work()
	if err != nil {
		return err
	}
	defer release()
	// What mmdebstrap unpacks is not below tmp: apt fetches as a user of its own, who may not go there.
	run, leave, err := runIn(os.TempDir(), tmp)
	if err != nil {
		return err
	}
	defer leave()
	if err := os.Chmod(run, 0o711); err != nil {
		return fmt.Errorf("open run directory: %w", err)
	}
	archive := filepath.Join(tmp, "root.tar")
	mode := "--mode=unshare"
	if os.Geteuid() == 0 {
		mode = "--mode=root"
	}
	t := tool.Tool{
		Path: path, Args: []string{mode, "--variant=minbase", suite, archive}, Line: line,
		Env: []string{"SOURCE_DATE_EPOCH=0", "TMPDIR=" + run},
	}
	var failed *tool.Error
	err = t.Run(ctx)
	if errors.As(err, &failed) {
		err = tool.OutOfSpace(err)
	}
	if errors.As(err, &failed) && spaceFault(err, "") == nil {
		return &flint.Fault{
			Code: "image.mmdebstrap", What: "make a Debian base of " + suite,
			Fix: "check the suite's name and that this machine reaches a Debian mirror (sudo apt-get update)", Err: err,
		}
	}
	if err != nil {
		return err
	}
	made := filepath.Join(tmp, "layout")
	if err := layoutFromTar(archive, made); err != nil {
		return err
	}
	if err := os.RemoveAll(dir); err != nil {
		return fmt.Errorf("publish Debian base: %w", err)
	}
	if err := os.Rename(made, dir); err != nil {
		return fmt.Errorf("publish Debian base: %w", err)
	}
	return nil
}

// layoutFromTar writes an OCI layout whose one image, tagged latest, has the tar as its only layer.
func layoutFromTar(archive, dir string) error {
	l, err := tarball.LayerFromFile(archive, tarball.WithCompressionLevel(gzip.BestSpeed), tarball.WithMediaType(types.OCILayer))
	if err != nil {
		return fmt.Errorf("read layer: %w", err)
	}
	// buildah and podman find a tag only on manifests of OCI's own type.
	blank := mutate.ConfigMediaType(mutate.MediaType(empty.Image, types.OCIManifestSchema1), types.OCIConfigJSON)
	img, err := mutate.AppendLayers(blank, l)
	if err != nil {
		return fmt.Errorf("make image: %w", err)
	}
	config, err := img.ConfigFile()
	if err != nil {
		return fmt.Errorf("make image: %w", err)
	}
	config = config.DeepCopy()
	config.OS, config.Architecture = "linux", runtime.GOARCH
	config.Config.Cmd = []string{"/bin/bash"}
	config.Config.Env = []string{"PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"}
	if img, err = mutate.ConfigFile(img, config); err != nil {
		return fmt.Errorf("make image: %w", err)
	}
	to, err := layout.Write(dir, empty.Index)
	if err != nil {
		return fmt.Errorf("write layout: %w", err)
	}
	err = to.AppendImage(img, layout.WithAnnotations(map[string]string{refAnnotation: "latest"}),
		layout.WithPlatform(v1.Platform{OS: "linux", Architecture: runtime.GOARCH}))
	if err != nil {
		return fmt.Errorf("write layout: %w", err)
	}
	return nil
}

// hostSuite reads the release's code name from an os-release file, if that is Debian's.
func hostSuite(path string) string {
	f, err := os.Open(path)
	if err != nil {
		return fallbackSuite
	}
	defer f.Close()
	fields := map[string]string{}
	for lines := bufio.NewScanner(f); lines.Scan(); {
		if k, v, ok := strings.Cut(lines.Text(), "="); ok {
			fields[k] = strings.Trim(v, `"'`)
		}
	}
	if fields["ID"] != "debian" || !suiteName.MatchString(fields["VERSION_CODENAME"]) {
		return fallbackSuite
	}
	return fields["VERSION_CODENAME"]
}
