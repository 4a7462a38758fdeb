package e2e

import (
	"context"
	"fmt"
	"io"
	"log"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/google/go-containerregistry/pkg/registry"

	"flint/internal/githubsim"
)

// shipped returns the file system of an image in images/, which make test-images builds.
func (r *rig) shipped(name string) string {
	r.t.Helper()
	if os.Getenv("FLINT_TEST_IMAGES") == "" {
		r.t.Skip("needs the shipped images, which make test-images builds")
	}
	file := filepath.Join(r.assets, "image-"+name+".ext4")
	if _, err := os.Stat(file); err != nil {
		r.t.Fatal(err)
	}
	return file
}

// copyFile makes an executable copy.
func copyFile(t *testing.T, from, to string) {
	t.Helper()
	b, err := os.ReadFile(from)
	if err == nil {
		err = os.WriteFile(to, b, 0o755)
	}
	if err != nil {
		t.Fatal(err)
	}
}

// busybox is a static one: all that an image needs.
func busybox(t *testing.T) string {
	t.Helper()
	path, err := exec.LookPath("busybox")
	if err != nil {
		t.Fatal(err)
	}
	return path
}

// dockerJob says in each line which of the jobs it is of.
const dockerJob = `  NAME:
    runs-on: NAME
    steps:
      - run: echo "NAME is $(id -un) $(id -u), root by sudo is $(sudo id -u), process 1 is $(cat /proc/1/comm)"
      - run: df -k --output=size / /tmp /var/lib/docker | sed '1d; s/ *\(.*\)/NAME has \1 KiB/'
      - run: /opt/flint/runner/try.sh ADDR 2>&1 | sed 's/^/NAME /'
`

// TestImagesRunDockerInJobs runs a real runner in both shipped images: one whose systemd starts docker, and one whose agent does.
func TestImagesRunDockerInJobs(t *testing.T) {
	r := newRig(t)
	images := map[string]string{"runner": r.shipped("runner"), "minimal": r.shipped("minimal")}
	i := r.internet()
	dir := t.TempDir()
	software := i.software(dir, "#!/bin/sh\nSSL_CERT_FILE=$(dirname \"$0\")/cert.pem exec \"$(dirname \"$0\")/start.real\"\n")
	copyFile(t, "docker/try.sh", filepath.Join(software, "try.sh"))
	copyFile(t, busybox(t), filepath.Join(software, "busybox"))
	pools, jobs := "", ""
	for name, image := range images {
		pools += fmt.Sprintf("  - {name: %s, image: %s, vm: {cpus: 1, memory: 1GiB, disk: 6GiB}, max: 1}\n", name, image)
		jobs += strings.NewReplacer("NAME", name, "ADDR", strings.TrimPrefix(i.addr, "https://")).Replace(dockerJob)
	}
	file := i.configure(dir, software, "vm: {boot_timeout: 10m}\nhost: {on_stop: end}\npools:\n"+pools)
	wf, err := githubsim.ParseWorkflow("ci.yml", []byte("on: push\njobs:\n"+jobs))
	if err != nil {
		t.Fatal(err)
	}
	run, err := i.sim.Submit(wf, githubsim.Trigger{})
	if err != nil {
		t.Fatal(err)
	}
	cmd, out := r.flint(context.Background(), nil, "serve", "--config", file), newWatched()
	cmd.Env = append(cmd.Env, "SSL_CERT_FILE="+filepath.Join(software, "cert.pem"))
	cmd.Stdout, cmd.Stderr = out, out
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 25*time.Minute)
	defer cancel()
	if conclusion, err := run.Wait(ctx); err != nil || conclusion != githubsim.Success {
		t.Errorf("the run ended as %q, %v\n%s", conclusion, err, out)
	}
	if err := cmd.Process.Signal(syscall.SIGTERM); err != nil {
		t.Fatal(err)
	}
	if code := exitCode(t, cmd.Wait()); code != 0 {
		t.Errorf("exit %d\n%s", code, out)
	}
	said := i.log()
	t.Logf("%s", said)
	for name, init := range map[string]string{"runner": "systemd", "minimal": "init"} {
		for _, want := range []string{"is runner 1001, root by sudo is 0, process 1 is " + init, "docker does all that was asked of it"} {
			if !strings.Contains(said, name+" "+want+"\n") && !strings.HasSuffix(said, name+" "+want) {
				t.Errorf("%s does not say %q", name, want)
			}
		}
		promised(t, 3, 6<<20, regexp.MustCompile(name+` has (\d+) KiB`).FindAllStringSubmatch(said, -1))
	}
	r.command("ip", "-n", r.netns, "link", "del", "up0")
	r.nothingLeft("serve")
}

// promised checks that the job saw so many file systems, each of the size it was promised, less what ext4 needs for itself.
func promised(t *testing.T, count, kib int, seen [][]string) {
	t.Helper()
	if len(seen) != count {
		t.Errorf("saw %d file systems, want %d: %v", len(seen), count, seen)
	}
	for _, m := range seen {
		if n, err := strconv.Atoi(m[1]); err != nil || n > kib || n < kib*95/100 {
			t.Errorf("a disk has %s KiB, promised were %d", m[1], kib)
		}
	}
}

// sources makes one small image and gives it in every form that flint takes.
func (r *rig) sources(dir string) map[string]string {
	r.t.Helper()
	build := filepath.Join(dir, "tiny")
	if err := os.MkdirAll(build, 0o755); err != nil {
		r.t.Fatal(err)
	}
	copyFile(r.t, busybox(r.t), filepath.Join(build, "busybox"))
	content := "FROM scratch\nCOPY busybox /bin/busybox\nRUN [\"/bin/busybox\", \"--install\", \"-s\", \"/bin\"]\nENV MADE_BY=buildah\nWORKDIR /src\n"
	if err := os.WriteFile(filepath.Join(build, "Dockerfile"), []byte(content), 0o644); err != nil {
		r.t.Fatal(err)
	}
	// A registry on the host that flint runs on.
	l := listenIn(r.t, r.netns, "127.0.0.1:0")
	server := &http.Server{
		Handler: registry.New(registry.Logger(log.New(io.Discard, "", 0))), ReadHeaderTimeout: time.Minute,
	}
	go server.Serve(l)
	r.t.Cleanup(func() { _ = server.Close() })
	reference := l.Addr().String() + "/acme/tiny:1"

	buildah := func(args ...string) {
		args = append([]string{"netns", "exec", r.netns, "buildah", "--storage-driver", "vfs", "--root", dir + "/storage", "--runroot", dir + "/run"}, args...)
		r.command("ip", args...)
	}
	buildah("build", "--isolation", "chroot", "--tag", "localhost/tiny:1", build)
	buildah("push", "localhost/tiny:1", "oci:"+dir+"/layout:1")
	buildah("push", "localhost/tiny:1", "docker-archive:"+dir+"/tiny.tar:acme/tiny:1")
	buildah("push", "localhost/tiny:1", "oci-archive:"+dir+"/tiny.oci.tar:1")
	conf := fmt.Sprintf("[storage]\ndriver = \"vfs\"\nrunroot = %q\ngraphroot = %q\n", dir+"/run", dir+"/storage")
	if err := os.WriteFile(dir+"/storage.conf", []byte(conf), 0o600); err != nil {
		r.t.Fatal(err)
	}
	buildah("push", "--tls-verify=false", "localhost/tiny:1", "docker://"+reference)
	ext4 := filepath.Join(dir, "made", "tiny.ext4")
	if out, err := r.flint(r.t.Context(), nil, "image", "build", "--output", ext4, dir+"/layout").CombinedOutput(); err != nil {
		r.t.Fatalf("%v\n%s", err, out)
	}
	return map[string]string{
		"Dockerfile": build, "layout": dir + "/layout", "archive": dir + "/tiny.tar", "reference": reference, "file": ext4,
		"OCI archive": "oci-archive:" + dir + "/tiny.oci.tar", "storage": "containers-storage:localhost/tiny:1", "storage.conf": dir + "/storage.conf",
	}
}

// TestImagesOfEverySource boots an image of each source, three of one at the same time, with roots on disk and in memory.
func TestImagesOfEverySource(t *testing.T) {
	r := newRig(t)
	r.shipped("minimal") // or skip
	sources := r.sources(t.TempDir())
	for _, tt := range []struct {
		name, image string
		flags       []string
		disk        int    // KiB
		madeBy      string // the image's ENV
		dir         string // and WORKDIR
		vms         int
		storage     string // where podman and buildah keep images, if not in their usual place
	}{
		{name: "Dockerfile, three at once", image: sources["Dockerfile"], vms: 3, madeBy: "buildah", dir: "/src"},
		{name: "OCI layout, root in memory", image: sources["layout"], flags: []string{"--root", "memory"}, vms: 1, madeBy: "buildah", dir: "/src"},
		{name: "archive, larger disk", image: sources["archive"], flags: []string{"--disk", "7GiB"}, vms: 1, madeBy: "buildah", dir: "/src"},
		{name: "registry", image: sources["reference"], vms: 1, madeBy: "buildah", dir: "/src"},
		{name: "file", image: sources["file"], vms: 1, dir: "/work"}, // a file has neither
		{name: "OCI archive", image: sources["OCI archive"], vms: 1, madeBy: "buildah", dir: "/src"},
		{name: "buildah's storage", image: sources["storage"], storage: sources["storage.conf"], vms: 1, madeBy: "buildah", dir: "/src"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			if tt.storage != "" {
				t.Setenv("CONTAINERS_STORAGE_CONF", tt.storage)
			}
			args := append([]string{"run", "-i", "--image", tt.image}, tt.flags...)
			args = append(args, "--", "sh", "-c", `set -e; test ! -e /only-one; echo mine >/only-one
				df -k / /tmp | while read -r a n b; do [ "$n" = 1K-blocks ] || echo "has $n KiB"; done
				grep -o '^[a-z]* / [a-z0-9]*' /proc/mounts | tail -n1; echo "made by $MADE_BY in $PWD"; cat`)
			r.together(t, args, tt.vms, func(out string) {
				if !strings.Contains(out, "made by "+tt.madeBy+" in "+tt.dir+"\n") {
					t.Errorf("the image's ENV and WORKDIR are not there:\n%s", out)
				}
				sizes := regexp.MustCompile(`has (\d+) KiB`).FindAllStringSubmatch(out, -1)
				switch {
				case len(sizes) != 2:
					t.Errorf("it saw other file systems than two:\n%s", out)
				case tt.flags == nil:
					promised(t, 2, 4<<20, sizes)
				case tt.flags[0] == "--disk":
					promised(t, 2, 7<<20, sizes)
				default: // half of the memory; the disk is as it was promised
					promised(t, 1, 4<<20, sizes[1:])
					if n, err := strconv.Atoi(sizes[0][1]); err != nil || n > 256<<10 {
						t.Errorf("the root in memory has %s KiB", sizes[0][1])
					}
				}
			})
		})
	}
	for n := range 3 {
		r.nothingLeft(fmt.Sprint("run", n))
	}
}

// together runs so many commands, each in a VM of its own, and ends none before all of them have said something.
func (r *rig) together(t *testing.T, args []string, n int, check func(out string)) {
	t.Helper()
	type vm struct {
		cmd   *exec.Cmd
		stdin io.WriteCloser
		out   *watched
	}
	var vms []vm
	for range n {
		v := vm{cmd: r.flint(t.Context(), nil, args...), out: newWatched()}
		v.cmd.Stdout, v.cmd.Stderr = v.out, v.out
		var err error
		if v.stdin, err = v.cmd.StdinPipe(); err != nil {
			t.Fatal(err)
		}
		if err := v.cmd.Start(); err != nil {
			t.Fatal(err)
		}
		vms = append(vms, v)
	}
	for _, v := range vms {
		v.out.until(t, "made by .*\n")
	}
	for _, v := range vms {
		if _, err := io.WriteString(v.stdin, "over\n"); err != nil {
			t.Error(err)
		}
		if err := v.stdin.Close(); err != nil {
			t.Error(err)
		}
		if code := exitCode(t, v.cmd.Wait()); code != 0 || !strings.HasSuffix(v.out.String(), "over\n") {
			t.Errorf("exit %d\n%s", code, v.out)
		}
		check(v.out.String())
	}
}
