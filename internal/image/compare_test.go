package image

import (
	"context"
	"fmt"
	"io/fs"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"

	"flint/internal/rootfs/rootfstest"
)

// setxattr is a program for RUN: it gives a file an attribute, whose value is in hexadecimal.
const setxattr = `package main

import (
	"encoding/hex"
	"os"
	"syscall"
)

func main() {
	value, err := hex.DecodeString(os.Args[3])
	if err == nil {
		err = syscall.Setxattr(os.Args[1], os.Args[2], value, 0)
	}
	if err != nil {
		panic(err)
	}
}
`

// hostile is a Dockerfile whose layers get in each other's way.
const hostile = `ARG BASE
FROM ${BASE}
COPY setxattr /usr/local/bin/setxattr
RUN mkdir -p /t/a/b /t/opaque/deep /t/sub /t/replaced && cd /t && echo 1 > a/b/f && ln a/b/f hard && ln a/b/f other && ln -s a/b link && ln -s /nowhere/at/all dangling \
 && ln -s a dirlink && echo old > opaque/old && echo old > opaque/deep/old && mkfifo pipe && mknod null c 1 3 && mknod disk b 259 70000 \
 && echo cap > cap && setxattr cap security.capability 0100000200040000000000000000000000000000 && setxattr cap user.note 6e6f7465 \
 && echo su > su && chown 1000:50 su && chmod 6755 su && chmod 1777 sub && truncate -s 10M sparse && echo end >> sparse \
 && touch -d '2001-02-03 04:05:06' a/b/f && touch -h -d '1999-12-31' link && echo n > $(printf 'n%.0s' $(seq 250)) && echo x > replaced/x && echo y > was-file \
 && echo kept > linked1 && ln linked1 linked2 && ln linked1 linked3 && ln linked1 'a name with spaces and ü'
RUN cd /t && rm -r opaque && mkdir opaque && echo new > opaque/new && mv a moved && rm hard && rm -r replaced && echo file > replaced && rm was-file && mkdir was-file \
 && echo in > was-file/in && rm dirlink && mkdir dirlink && echo 1 > dirlink/1 && rm linked1 && chmod 600 linked2 && rm -rf /usr/share/doc /usr/share/man
RUN cd /t && ln /usr/bin/env env && ln su su2 && rm -r moved/b && echo again > moved/b && mkdir moved/c && touch moved/c/.hidden && rm pipe && mkfifo pipe && chown 7:8 null
`

// compared are the images of TestSameAsTheBuilderShows: the directories of Dockerfiles, and the Debian below them. Large ones have one
// format each.
var compared = []struct {
	name, dir, suite string
	formats          []Format
}{
	{"hostile", "", "bookworm", []Format{Ext4, Erofs}},
	{"demo", "../../images/demo", "bookworm", []Format{Ext4}},
	{"systemd", "../../test/e2e/systemd", "bookworm", []Format{Ext4}},
	{"minimal", "../../images/minimal", "trixie", []Format{Erofs}},
}

// TestSameAsTheBuilderShows makes base images of real images, and compares every file with what buildah shows of the same image.
func TestSameAsTheBuilderShows(t *testing.T) {
	for _, c := range compared {
		t.Run(c.name, func(t *testing.T) {
			if c.dir != "" && os.Getenv("FLINT_TEST_IMAGES") == "" {
				t.Skip("needs FLINT_TEST_IMAGES=1, which make test-images sets: takes images that it builds, or builds them in minutes")
			}
			base := builderBase(t, c.suite)
			b := newBuildah(t)
			tag := ""
			if c.dir != "" {
				tag = b.kept(t, c.dir)
			}
			if tag == "" {
				if tag = "compared"; c.dir == "" {
					c.dir = hostileDir(t)
				}
				b.run(t, "bud", "--isolation", "chroot", "--cap-add", "CAP_MKNOD", "--layers", "--build-arg", "BASE=oci:"+base, "-t", tag, c.dir)
			}
			layout := filepath.Join(t.TempDir(), "layout")
			b.run(t, "push", "--disable-compression", tag, "oci:"+layout+":compared")
			shown := b.run(t, "mount", b.run(t, "from", "--pull-never", tag))
			for _, format := range c.formats {
				b := wantBase(t, testStore(t), Want{Ref: "oci:" + layout + ":compared", Format: format})
				rootfstest.Fsck(t, b.Path)
				ours, _ := rootfstest.Mount(t, b.Path, "ro")
				compareTrees(t, ours, shown)
			}
		})
	}
}

// builderBase is the image of that Debian that Dockerfiles build on, or skips the test.
func builderBase(t *testing.T, suite string) string {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("needs root: mounts file systems")
	}
	if _, err := exec.LookPath("buildah"); err != nil {
		t.Skip("needs buildah: sudo apt-get install buildah")
	}
	state := os.Getenv("FLINT_TEST_STATE")
	if state == "" {
		t.Skip("needs FLINT_TEST_STATE, which scripts/test.sh sets")
	}
	base := filepath.Join(state, "images", debianDir, suite+"-"+runtime.GOARCH)
	if _, err := os.Stat(base); err != nil {
		t.Skipf("needs a Debian base, which the assets of the tests make: %v", err)
	}
	return base
}

func hostileDir(t *testing.T) string {
	t.Helper()
	dir := dockerfileDir(t, hostile)
	goProgram(t, setxattr, filepath.Join(dir, "setxattr"))
	return dir
}

// buildah is the program, with a storage of the test's own. It also sees the images in the storage of the state directory, and
// writes nothing there.
type buildah struct{ storage, runs, keeps string }

func newBuildah(t *testing.T) *buildah {
	t.Helper()
	runs, err := os.MkdirTemp("/tmp", "flint") // the paths of its sockets must be short
	if err != nil {
		t.Fatal(err)
	}
	b := &buildah{t.TempDir(), runs, filepath.Join(os.Getenv("FLINT_TEST_STATE"), "images", builderDir, "storage")}
	t.Cleanup(func() {
		b.run(t, "umount", "--all")
		b.run(t, "rm", "--all")
		// The storage mounts its own directory on itself.
		mounts, err := mountsBelow(filepath.Dir(b.storage))
		if err != nil {
			t.Error(err)
		}
		for _, m := range slices.Backward(mounts) {
			if err := unix.Unmount(m, unix.MNT_DETACH); err != nil {
				t.Error(err)
			}
		}
		os.RemoveAll(runs)
	})
	return b
}

// command is buildah with these arguments.
func (b *buildah) command(args ...string) *exec.Cmd {
	own := []string{"--root", b.storage, "--runroot", b.runs}
	if _, err := os.Stat(filepath.Join(b.keeps, "overlay")); err == nil {
		own = append(own, "--storage-driver", "overlay", "--storage-opt", "overlay.imagestore="+b.keeps)
	}
	return exec.Command("buildah", append(own, args...)...)
}

func (b *buildah) run(t *testing.T, args ...string) string {
	t.Helper()
	cmd := b.command(args...)
	var errs strings.Builder
	cmd.Stderr = &errs
	out, err := cmd.Output()
	if err != nil {
		t.Fatalf("buildah %s: %v\n%s%s", args[0], err, out, &errs)
	}
	return strings.TrimSpace(string(out))
}

// kept is the name of what flint built of a directory's Dockerfile last, if it is here yet.
func (b *buildah) kept(t *testing.T, dir string) string {
	t.Helper()
	file, err := filepath.Abs(filepath.Join(dir, "Dockerfile"))
	if err != nil {
		t.Fatal(err)
	}
	tag := tagOf(file)
	if err := b.command("inspect", "--type", "image", tag).Run(); err != nil {
		return ""
	}
	return tag
}

// compareTrees compares all that a file system says of its files.
func compareTrees(t *testing.T, ours, theirs string) {
	t.Helper()
	a, b := describeTree(t, ours), describeTree(t, theirs)
	if len(a) < 1000 {
		t.Errorf("only %d files", len(a))
	}
	t.Logf("%d files", len(a))
	differ := 0
	for _, path := range slices.Sorted(maps.Keys(b)) {
		if a[path] != b[path] {
			if differ++; differ < 20 {
				t.Errorf("%s:\n ours     %s\n builder's %s", path, a[path], b[path])
			}
		}
	}
	for _, path := range slices.Sorted(maps.Keys(a)) {
		if _, ok := b[path]; !ok && path != "lost+found" {
			if differ++; differ < 20 {
				t.Errorf("%s is only in ours", path)
			}
		}
	}
	if differ > 0 {
		t.Errorf("%d files differ", differ)
	}
}

// describeTree says of every file below root: type, mode, owner, time, size, device, target, names, attributes, content.
func describeTree(t *testing.T, root string) map[string]string {
	t.Helper()
	files, names := map[string]string{}, map[uint64][]string{}
	err := filepath.WalkDir(root, func(path string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		rel, err := filepath.Rel(root, path)
		if err != nil {
			return err
		}
		var st syscall.Stat_t
		if err := syscall.Lstat(path, &st); err != nil {
			return err
		}
		if rel == "." {
			return nil // these layers say nothing of it, so everybody makes his own
		}
		// Layers hold whole seconds; what buildah made itself has more in its own storage.
		line := fmt.Sprintf("%o %d:%d @%d", st.Mode, st.Uid, st.Gid, st.Mtim.Sec)
		switch st.Mode & syscall.S_IFMT {
		case syscall.S_IFREG:
			digest, err := hashFile(context.Background(), path)
			if err != nil {
				return err
			}
			line += fmt.Sprintf(" %d bytes %s", st.Size, digest)
		case syscall.S_IFLNK:
			target, err := os.Readlink(path)
			if err != nil {
				return err
			}
			line += " -> " + target
		case syscall.S_IFCHR, syscall.S_IFBLK:
			line += fmt.Sprintf(" %d:%d", unix.Major(st.Rdev), unix.Minor(st.Rdev))
		}
		if !d.IsDir() {
			names[st.Ino] = append(names[st.Ino], rel)
		}
		files[rel] = line + rootfstest.Attributes(t, path)
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	// The number of links is not asked for: overlay's counts names that a layer hides.
	for _, group := range names {
		for _, name := range group {
			files[name] += fmt.Sprintf(" names %q", group)
		}
	}
	return files
}
