package kernel

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"os/user"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"

	"flint"
)

// archive is a .deb as apt's signed lists describe it.
type archive struct {
	Package string `json:"package"`
	Version string `json:"version"`
	Arch    string `json:"arch"`
	SHA256  string `json:"sha256"`
}

// resolution remembers what a package name stood for, so that apt is asked again only when its lists have changed.
type resolution struct {
	Stamp    string    `json:"stamp"`    // of all that apt's answer depends on
	Archives []archive `json:"archives"` // what to unpack
	Key      string    `json:"key"`      // of the last pack made of this package; empty: none yet
}

// aptPlaces are the files apt's answers depend on.
type aptPlaces struct {
	paths     []string // directories and files
	osRelease string
}

func systemApt() aptPlaces {
	return aptPlaces{paths: []string{"/etc/apt", "/var/lib/apt/lists", "/var/lib/dpkg/status"}, osRelease: "/etc/os-release"}
}

// stamp names the state of apt's lists and configuration by the names, sizes and times of their files.
func (a aptPlaces) stamp() string {
	sum := sha256.New()
	for _, root := range a.paths {
		// What cannot be read changes nothing that this user's apt would see.
		_ = filepath.WalkDir(root, func(p string, d os.DirEntry, err error) error {
			if err != nil {
				return filepath.SkipDir
			}
			if d.IsDir() {
				if name := d.Name(); p != root && (name == "partial" || name == "auxfiles") {
					return filepath.SkipDir
				}
				return nil
			}
			if info, err := d.Info(); err == nil && d.Name() != "lock" {
				fmt.Fprintf(sum, "%q %d %d\n", p, info.Size(), info.ModTime().UnixNano())
			}
			return nil
		})
	}
	return hex.EncodeToString(sum.Sum(nil)[:16])
}

// cloudPackage returns the name of the distribution's kernel for clouds.
func cloudPackage(osRelease []byte, arch string) string {
	var ids []string
	for line := range strings.Lines(string(osRelease)) {
		if k, v, ok := strings.Cut(strings.TrimSpace(line), "="); ok && (k == "ID" || k == "ID_LIKE") {
			ids = append(ids, strings.Fields(strings.Trim(v, `"'`))...)
		}
	}
	switch {
	case slices.Contains(ids, "ubuntu"): // before Debian: Ubuntu is like it
		return "linux-image-virtual"
	case slices.Contains(ids, "debian"):
		return "linux-image-cloud-" + arch
	}
	return ""
}

func packageFault(name string, err error) error {
	f := &flint.Fault{Code: "kernel.package", What: "fetch kernel package " + name, Err: err}
	switch {
	case errors.Is(err, exec.ErrNotFound):
		f.Fix = "give .deb files, or a kernel and its module tree: only Debian, Ubuntu and their like have apt"
	case errors.Is(err, errUnknownPackage):
		f.Fix, f.Kind = "run apt-get update (as root), and check the package's name", flint.ErrNotFound
	case errors.Is(err, errNoKernel):
		f.Fix = "name a package of kernels, such as linux-image-cloud-amd64"
	default:
		f.Fix = "check the network and apt's sources (apt-get update), or give .deb files, or a kernel and its module tree"
	}
	return f
}

var (
	errUnknownPackage = errors.New("apt knows no such package")
	errNoKernel       = errors.New("neither it nor what it depends on holds a kernel")
)

// fromPackage returns the cached kernel of a distribution's package, making it if there is none.
func (p *preparer) fromPackage(ctx context.Context, name string) (entry, error) {
	name, err := p.packageName(name)
	if err != nil {
		return entry{}, err
	}
	memory := p.memory(name)
	known := recall(memory)
	r := resolution{Stamp: p.apt.stamp(), Archives: known.Archives, Key: known.Key}
	if known.Stamp != r.Stamp || len(known.Archives) == 0 {
		r.Archives, err = p.resolve(ctx, name)
	}
	var e entry
	if err == nil {
		o := p.archivesOrigin(name, r.Archives)
		r.Key = o.key
		e, err = p.ensure(ctx, o)
	}
	if err != nil {
		return p.earlier(ctx, name, known, err)
	}
	if r.Stamp != known.Stamp || r.Key != known.Key {
		if err := p.remember(ctx, memory, r); err != nil {
			p.Log.Warn("cannot remember what the kernel package stands for: apt is asked again next time", "package", name, "err", err)
		}
	}
	return e, nil
}

// packageName returns the name, or that of the distribution's kernel for clouds where it is empty.
func (p *preparer) packageName(name string) (string, error) {
	if name != "" {
		return name, nil
	}
	b, err := os.ReadFile(p.apt.osRelease)
	if err != nil && !errors.Is(err, os.ErrNotExist) {
		return "", packageFault("of this distribution", err)
	}
	if name = cloudPackage(b, p.arch); name == "" {
		return "", packageFault("of this distribution", fmt.Errorf("know its name: %w", exec.ErrNotFound))
	}
	return name, nil
}

// memory is where is kept what a package stood for.
func (p *preparer) memory(name string) string { return filepath.Join(p.Dir, "package-"+name+".json") }

// earlier returns the pack made before of the same package where it is only apt, the network or the disk that failed.
func (p *preparer) earlier(ctx context.Context, name string, known resolution, cause error) (entry, error) {
	var f *flint.Fault
	full := spaceFault(cause) != nil
	if ctx.Err() != nil || known.Key == "" || !full && (!errors.As(cause, &f) || f.Code != "kernel.package") {
		return entry{}, cause
	}
	e, ok := load(p.entryDir(known.Key))
	if !ok {
		return entry{}, cause
	}
	p.Log.Warn("kernel package cannot be fetched or unpacked: going on with the one from before", "package", name, "kernel", e.Version, "error", cause)
	return e, nil
}

// recall reads a resolution; one that is absent or damaged is the same as none.
func recall(name string) resolution {
	var r resolution
	b, err := os.ReadFile(name)
	if err != nil || json.Unmarshal(b, &r) != nil {
		return resolution{}
	}
	return r
}

// remember writes a resolution: whole and on disk, or not at all.
func (p *preparer) remember(ctx context.Context, name string, r resolution) error {
	b, err := json.MarshalIndent(r, "", "\t")
	if err != nil {
		return err
	}
	unlock, err := p.lock(ctx, name)
	if err != nil {
		return err
	}
	defer unlock()
	part := name + newSuffix
	defer os.Remove(part)
	if err := os.WriteFile(part, append(b, '\n'), 0o644); err != nil {
		return err
	}
	return publish(part, name)
}

// carriesKernel matches the packages that hold a kernel's files, not those that only depend on them.
var carriesKernel = regexp.MustCompile(`^linux-(?:image|modules|modules-extra|binary|base)(?:-unsigned)?-[0-9]`)

// resolve asks apt which archives a kernel package stands for: itself or what it depends on, and their modules.
func (p *preparer) resolve(ctx context.Context, name string) ([]archive, error) {
	var found []archive
	queue := []string{name}
	for i := 0; i < len(queue); i++ {
		if i == 8 {
			return nil, packageFault(name, errors.New("it depends on more than eight kernel packages"))
		}
		out, err := p.run(ctx, p.Dir, "apt-cache", "show", "--no-all-versions", "--", queue[i])
		if ctx.Err() != nil {
			return nil, ctx.Err()
		}
		if err != nil && !errors.Is(err, exec.ErrNotFound) {
			err = fmt.Errorf("%w (%s): %w", errUnknownPackage, queue[i], err)
		}
		if err != nil {
			return nil, packageFault(name, err)
		}
		s := stanza(out)
		if carriesKernel.MatchString(queue[i]) {
			a, err := s.archive(queue[i])
			if err != nil {
				return nil, packageFault(name, err)
			}
			found = append(found, a)
		}
		for _, alternatives := range s.depends() {
			if d := carrier(alternatives, queue); d != "" {
				queue = append(queue, d)
			}
		}
	}
	if len(found) == 0 {
		return nil, packageFault(name, errNoKernel)
	}
	return found, nil
}

// fields is a paragraph of apt's.
type fields map[string]string

// stanza reads the first paragraph of apt's output.
func stanza(b []byte) fields {
	s, last := fields{}, ""
	for line := range strings.Lines(string(b)) {
		line = strings.TrimRight(line, "\r\n")
		if strings.TrimSpace(line) == "" {
			if len(s) > 0 {
				break
			}
			continue
		}
		if line[0] == ' ' || line[0] == '\t' {
			s[last] += " " + strings.TrimSpace(line)
			continue
		}
		if k, v, ok := strings.Cut(line, ":"); ok {
			last = k
			s[k] = strings.TrimSpace(v)
		}
	}
	return s
}

var (
	sha256Name = regexp.MustCompile(`^[0-9a-f]{64}$`)
	debVersion = regexp.MustCompile(`^[0-9][0-9A-Za-z.+:~-]*$`)
	debArch    = regexp.MustCompile(`^[a-z0-9-]+$`)
)

func (s fields) archive(name string) (archive, error) {
	a := archive{s["Package"], s["Version"], s["Architecture"], s["SHA256"]}
	switch {
	case a.Package != name || !debVersion.MatchString(a.Version) || !debArch.MatchString(a.Arch):
		return a, fmt.Errorf("%w: %s is described as %q %q for %q", errUnknownPackage, name, a.Package, a.Version, a.Arch)
	case !sha256Name.MatchString(a.SHA256):
		return a, fmt.Errorf("%w: version %s of %s is installed, but in no archive", errUnknownPackage, a.Version, name)
	}
	return a, nil
}

// depends returns the names of the packages that must be installed before and with it. Of each inner list one is enough.
func (s fields) depends() [][]string {
	var all [][]string
	for group := range strings.SplitSeq(s["Pre-Depends"]+","+s["Depends"], ",") {
		var names []string
		for d := range strings.SplitSeq(group, "|") {
			name, _, _ := strings.Cut(strings.TrimSpace(d), " ")
			name, _, _ = strings.Cut(name, ":")
			name, _, _ = strings.Cut(name, "(")
			if packageName.MatchString(name) {
				names = append(names, name)
			}
		}
		if len(names) > 0 {
			all = append(all, names)
		}
	}
	return all
}

// carrier returns which of alternative packages to take for what it holds of a kernel; none where one of them is taken already.
// Ubuntu's modules need their kernel signed or unsigned, and two packages with the same kernel are one too many.
func carrier(alternatives, taken []string) string {
	if slices.ContainsFunc(alternatives, func(d string) bool { return slices.Contains(taken, d) }) {
		return ""
	}
	if i := slices.IndexFunc(alternatives, carriesKernel.MatchString); i >= 0 {
		return alternatives[i]
	}
	return ""
}

// archivesOrigin takes .deb files that apt fetches. Their content is known beforehand from the signed lists.
func (p *preparer) archivesOrigin(name string, archives []archive) origin {
	key := ""
	for _, a := range archives {
		key += "deb " + a.SHA256 + "\n"
	}
	label := archives[0].Package + " " + archives[0].Version
	return origin{name: label, key: key, unpack: func(ctx context.Context, u *unpacked) error {
		return p.fetch(ctx, u.root.Name(), name, archives, func(deb string) error {
			if err := addDebFile(ctx, u, deb); err != nil {
				return unpackFault(filepath.Base(deb), err)
			}
			return nil
		})
	}}
}

// fetch has apt download the archives, checks them and hands each, as a file that only we can write, to use. The directory
// work is that of the pack to be, whose lock is held.
func (p *preparer) fetch(ctx context.Context, work, name string, archives []archive, use func(deb string) error) error {
	dir, err := os.MkdirTemp("", fetchPrefix)
	if err != nil {
		return storeFault(err)
	}
	defer os.RemoveAll(dir)
	link := work + fetchLink // for Prune, should this process be killed
	if err := os.Symlink(dir, link); err != nil {
		return storeFault(err)
	}
	defer os.Remove(link)
	drop, ours := filepath.Join(dir, "apt"), filepath.Join(dir, "checked")
	if err := errors.Join(os.Mkdir(drop, 0o755), os.Mkdir(ours, 0o700), openToApt(dir, drop)); err != nil {
		return storeFault(err)
	}
	args := []string{"download", "-qq", "-o", "APT::Get::AllowUnauthenticated=false", "-o", "Acquire::Retries=3", "--"}
	for _, a := range archives {
		args = append(args, a.Package+":"+a.Arch+"="+a.Version)
	}
	end := p.Progress.Step("fetch kernel package " + archives[0].Package + " " + archives[0].Version)
	if _, err := p.run(ctx, drop, "apt-get", args...); err != nil {
		if ctx.Err() == nil {
			err = packageFault(name, err)
		}
		end("", err)
		return err
	}
	checked, err := takeDebs(drop, ours, archives)
	if err != nil {
		err = packageFault(name, err)
		end("", err)
		return err
	}
	end(strconv.Itoa(len(checked))+" verified", nil)
	for _, deb := range checked {
		if err := use(deb); err != nil {
			return err
		}
	}
	return nil
}

// openToApt lets the user apt becomes to download, when root runs it, write into drop.
func openToApt(dir, drop string) error {
	if os.Geteuid() != 0 {
		return nil
	}
	u, err := user.Lookup("_apt")
	if err != nil {
		return nil // then apt stays root
	}
	uid, err := strconv.Atoi(u.Uid)
	if err != nil {
		return err
	}
	return errors.Join(os.Chmod(dir, 0o711), os.Chown(drop, uid, -1))
}

// takeDebs copies what apt left in drop to the directory ours and checks the copies against the lists: the user apt
// runs as could still write to the originals.
func takeDebs(drop, ours string, archives []archive) ([]string, error) {
	left, err := filepath.Glob(filepath.Join(drop, "*.deb"))
	if err != nil {
		return nil, err
	}
	got := map[string]string{} // by hash
	for i, from := range left {
		to := filepath.Join(ours, strconv.Itoa(i)+".deb")
		h, err := copyHashed(from, to)
		if err != nil {
			return nil, err
		}
		got[h] = to
	}
	var debs []string
	for _, a := range archives {
		deb, ok := got[a.SHA256]
		if !ok {
			return nil, fmt.Errorf("apt left no file with the SHA-256 its lists give for %s %s", a.Package, a.Version)
		}
		debs = append(debs, deb)
	}
	return debs, nil
}

// copyHashed copies a file of at most 2 GiB and returns the SHA-256 of what it wrote, in hexadecimal.
func copyHashed(from, to string) (string, error) {
	src, err := os.Open(from)
	if err != nil {
		return "", err
	}
	defer src.Close()
	dst, err := os.OpenFile(to, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return "", err
	}
	sum := sha256.New()
	_, err = io.Copy(io.MultiWriter(dst, sum), io.LimitReader(src, 2<<30))
	return hex.EncodeToString(sum.Sum(nil)), errors.Join(err, dst.Close())
}
