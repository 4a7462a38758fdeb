package main

import (
	"encoding/json"
	"errors"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"flint"
	"flint/internal/app"
)

// stateWith makes a state directory whose image store has two images nobody uses, and a configuration whose pool was
// served by the older one.
func stateWith(t *testing.T) (state, cfg, wanted, other string) {
	t.Helper()
	state = t.TempDir()
	cfg = filepath.Join(state, "flint.yaml")
	wanted, other = strings.Repeat("a1", 32), strings.Repeat("b2", 32)
	images := filepath.Join(state, "images")
	old := time.Now().Add(-72 * time.Hour)
	err := errors.Join(os.MkdirAll(filepath.Join(images, "base"), 0o755), os.MkdirAll(filepath.Join(images, "record"), 0o700),
		os.WriteFile(filepath.Join(images, "base", wanted+".ext4"), make([]byte, 1<<16), 0o644),
		os.WriteFile(filepath.Join(images, "base", other+".ext4"), make([]byte, 1<<16), 0o644),
		os.Chtimes(filepath.Join(images, "base", wanted+".ext4"), old, old),
		os.WriteFile(filepath.Join(images, "record", "source-"+wanted+".ext4.json"), []byte(`["docker.io/acme/runner:1"]`), 0o600),
		os.WriteFile(cfg, []byte("schema_version: 1\nstate_dir: "+state+"\npools:\n  - {name: big, image: 'docker.io/acme/runner:1'}\n"), 0o600))
	if err != nil {
		t.Fatal(err)
	}
	return state, cfg, wanted, other
}

func flintSays(t *testing.T, want int, args ...string) string {
	t.Helper()
	var out, errs strings.Builder
	if code := run(args, strings.NewReader(""), &out, &errs); code != want {
		t.Fatalf("flint %s: exit %d, want %d\n%s%s", strings.Join(args, " "), code, want, &out, &errs)
	}
	return out.String()
}

// TestImagesOfAnotherUser asks as nobody for what root keeps.
func TestImagesOfAnotherUser(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("needs root: it asks as nobody")
	}
	state, _, wanted, _ := stateWith(t)
	flintSays(t, 0, "image", "ls", "--state-dir", state) // makes the rest of the store
	if err := errors.Join(os.Chmod(state, 0o755), os.Chmod(filepath.Dir(state), 0o755)); err != nil {
		t.Fatal(err)
	}
	for _, args := range [][]string{{"ls"}, {"prune"}, {"pull", "docker.io/acme/runner:1"}, {"inspect", wanted}, {"rm", wanted}} {
		refusedToNobody(t, append([]string{"image", "--state-dir", state}, args...)...)
	}
}

// refusedToNobody runs a command as nobody, on a thread of its own, and wants it to say that the state directory is another's.
func refusedToNobody(t *testing.T, args ...string) {
	t.Helper()
	done := make(chan struct{})
	go func() {
		defer close(done)
		runtime.LockOSThread() // for good: the thread ends with the goroutine
		if _, err := unix.SetfsuidRetUid(65534); err != nil {
			t.Error(err)
			return
		}
		var out, errs strings.Builder
		code := run(args, strings.NewReader(""), &out, &errs)
		if code != exitPermission || out.Len() > 0 || !strings.Contains(errs.String(), "[state.dir]") || !strings.Contains(errs.String(), "fix: run as the user") {
			t.Errorf("%q: exit %d\n%s%s", args, code, &out, &errs)
		}
	}()
	<-done
}

// TestStateThatIsNoDirectory: state_dir names a file.
func TestStateThatIsNoDirectory(t *testing.T) {
	file := filepath.Join(t.TempDir(), "file")
	if err := os.WriteFile(file, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	t.Setenv("FLINT_VM_AGENT", writeKernel(t, "of the agent", "")) // any static program
	t.Setenv("PATH", t.TempDir())                                  // nothing is fetched or built, should it not be refused
	for _, command := range []string{
		"image ls", "image pull docker.io/acme/runner:1", "image prune", "image rm x", "runner-software ls", "runner-software rm 2.1.0",
		"kernel ls", "kernel ls -v", "kernel ls --json", "kernel inspect 6.1", "kernel rm 6.1", "kernel pull", "kernel import x.deb", "kernel build",
	} {
		code, stdout, stderr := flintCommand(append(strings.Fields(command), "--state-dir", file)...)
		if code != 1 || stdout != "" || !strings.Contains(stderr, "[state.dir]") || !strings.Contains(stderr, "fix: give a directory") {
			t.Errorf("%s: exit %d\n%s%s", command, code, stdout, stderr)
		}
	}
}

func TestImageList(t *testing.T) {
	_, cfg, wanted, other := stateWith(t)
	table := flintSays(t, 0, "image", "ls", "--config", cfg)
	want := "" +
		"  digest        kind  source                    size  last used  in use  wanted by\n" +
		"  " + other[:12] + "  base  -                        64KiB        now  no      -\n" +
		"  " + wanted[:12] + "  base  docker.io/acme/runner:1  64KiB     3d ago  no      pool big\n"
	if table != want {
		t.Errorf("got\n%s\nwant\n%s", table, want)
	}
	var list []app.Stored
	if err := json.Unmarshal([]byte(flintSays(t, 0, "image", "ls", "--json", "--config", cfg)), &list); err != nil {
		t.Fatal(err)
	}
	if len(list) != 2 || list[1].Digest != "sha256:"+wanted || list[1].Wanted != "pool big" || list[1].Size != 64*flint.KiB || list[1].InUse {
		t.Errorf("got %+v", list)
	}
	empty := t.TempDir()
	if got := flintSays(t, 0, "image", "ls", "--config", cfg, "--state-dir", empty); got != "Nothing is kept.\n" {
		t.Errorf("got %q", got)
	}
	if got := flintSays(t, 0, "image", "ls", "--json", "--config", cfg, "--state-dir", empty); got != "[]\n" {
		t.Errorf("got %q", got)
	}
	if left, err := os.ReadDir(empty); err != nil || len(left) > 0 {
		t.Errorf("listing made %v, %v", left, err)
	}
	flintSays(t, exitUsage, "image", "ls", "more")
	flintSays(t, exitNotFound, "image", "ls", "--config", filepath.Join(empty, "none.yaml"))
}

// TestImageListWithKernelsAlone looks at a state directory in which nothing but kernels has been made.
func TestImageListWithKernelsAlone(t *testing.T) {
	state := t.TempDir()
	pack := filepath.Join(state, "kernels", "0123456789abcdef")
	if err := errors.Join(os.MkdirAll(pack, 0o755), os.WriteFile(filepath.Join(pack, "pack.json"), []byte("{}"), 0o644)); err != nil {
		t.Fatal(err)
	}
	if got := flintSays(t, 0, "image", "ls", "--state-dir", state); !strings.Contains(got, "0123456789abcdef") {
		t.Errorf("got %q", got)
	}
	if got := flintSays(t, 0, "image", "prune", "--all", "--state-dir", state); !strings.Contains(got, "removed "+pack) {
		t.Errorf("got %q", got)
	}
	flintSays(t, exitNotFound, "image", "inspect", "0123456789abcdef", "--state-dir", state)
	if got := flintSays(t, 0, "image", "prune", "--state-dir", t.TempDir()); got != "0B freed\n" {
		t.Errorf("got %q", got)
	}
}

func TestImageIsShownWithWhatIsInIt(t *testing.T) {
	now := time.Now()
	d := app.ImageDetails{Stored: app.Stored{Digest: "sha256:ab", Kind: "base", Source: []string{"docker.io/a", "docker.io/b"}, Size: flint.MiB, Used: now}}
	d.Contents = &app.ImageContents{OS: "Debian", Arch: "arm64", Libc: "glibc", Shell: true}
	d.Env = []string{"A=b\x1b[2J"}
	var out strings.Builder
	showImage(&out, d, now)
	want := "  digest       sha256:ab\n  kind         base\n  made of      docker.io/a\n               docker.io/b\n  size         1MiB\n  last used    now\n" +
		"  in use       no\n  system       Debian\n  machine      arm64\n  C library    glibc\n  has          a shell\n  environment  A=b[2J\n"
	if out.String() != want {
		t.Errorf("got\n%s\nwant\n%s", out.String(), want)
	}
}

func TestShortNames(t *testing.T) {
	for digest, want := range map[string]string{
		"sha256:" + strings.Repeat("a1", 32):            "a1a1a1a1a1a1",
		"19a371318413f0f4":                              "19a371318413f0f4",
		"19a371318413f0f4/initrd-13eb5bc602481da2.cpio": "19a371318413f0f4/13eb",
		"bookworm-amd64":                                "bookworm-amd64",
	} {
		if got := short(digest); got != want {
			t.Errorf("%s is called %s, want %s", digest, got, want)
		}
	}
}

func TestImagePrune(t *testing.T) {
	state, cfg, wanted, other := stateWith(t)
	vmm, err := os.Open(filepath.Join(state, "images", "base", other+".ext4")) // a VM has it open
	if err != nil {
		t.Fatal(err)
	}
	defer vmm.Close()
	if got := flintSays(t, 0, "image", "prune", "--config", cfg); got != "0B freed\n" {
		t.Errorf("got %q", got)
	}
	vmm.Close()
	if got := flintSays(t, 0, "image", "prune", "--config", cfg); got != "removed sha256:"+other+"\n64KiB freed\n" {
		t.Errorf("got %q", got)
	}
	var res struct {
		Freed   flint.Bytes
		Removed []string
	}
	if err := json.Unmarshal([]byte(flintSays(t, 0, "image", "prune", "--all", "--json", "--config", cfg)), &res); err != nil {
		t.Fatal(err)
	}
	if res.Freed != 64*flint.KiB || len(res.Removed) != 1 || res.Removed[0] != "sha256:"+wanted {
		t.Errorf("got %+v", res)
	}
	if got := flintSays(t, 0, "image", "prune", "--json", "--config", cfg); !strings.Contains(got, `"removed": []`) {
		t.Errorf("got %q", got)
	}
}

func TestImageInspectAndRemove(t *testing.T) {
	state, cfg, wanted, other := stateWith(t)
	record := `{"digest": "sha256:` + wanted + `", "size": "64KiB", "env": ["A=b", "C=d"], "user": "me", "cmd": ["/bin/x", "y"]}`
	if err := os.WriteFile(filepath.Join(state, "images", "record", strings.Repeat("0", 64)+".json"), []byte(record), 0o600); err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{wanted[:8], "sha256:" + wanted, "docker.io/acme/runner:1"} {
		got := strings.Join(strings.Fields(flintSays(t, 0, "image", "inspect", name, "--config", cfg)), " ")
		for _, want := range []string{"digest sha256:" + wanted, "made of docker.io/acme/runner:1", "size 64KiB", "in use no", "wanted by pool big", "user me", "command /bin/x y", "environment A=b C=d"} {
			if !strings.Contains(got, want) {
				t.Errorf("%s: %q is not in %q", name, want, got)
			}
		}
	}
	var d app.ImageDetails
	if err := json.Unmarshal([]byte(flintSays(t, 0, "image", "inspect", "--json", wanted[:8], "--config", cfg)), &d); err != nil {
		t.Fatal(err)
	}
	if d.Digest != "sha256:"+wanted || d.User != "me" || len(d.Env) != 2 {
		t.Errorf("got %+v", d)
	}
	flintSays(t, exitNotFound, "image", "inspect", "none", "--config", cfg)
	flintSays(t, exitUsage, "image", "inspect")
	flintSays(t, exitUsage, "image", "rm", "a", "b")
	flintSays(t, exitUsage, "image", "build", ".", "--build-arg", "nothing")
	flintSays(t, exitNotFound, "image", "pull", "./nowhere", "--config", cfg)

	vmm, err := os.Open(filepath.Join(state, "images", "base", other+".ext4")) // a VM has it open
	if err != nil {
		t.Fatal(err)
	}
	defer vmm.Close()
	flintSays(t, exitConflict, "image", "rm", other[:12], "--config", cfg)
	vmm.Close()
	if got := flintSays(t, 0, "image", "rm", other[:12], "--config", cfg); got != "removed sha256:"+other+", 64KiB freed\n" {
		t.Errorf("got %q", got)
	}
	flintSays(t, exitNotFound, "image", "rm", other[:12], "--config", cfg)
}

// TestDamagedImageIsNotInTheWay: what was set aside has the digest of the good one in its name.
func TestDamagedImageIsNotInTheWay(t *testing.T) {
	state, cfg, _, other := stateWith(t)
	damaged := other + ".ext4.damaged"
	if err := os.WriteFile(filepath.Join(state, "images", "base", damaged), make([]byte, 1<<12), 0o644); err != nil {
		t.Fatal(err)
	}
	if got := flintSays(t, 0, "image", "ls", "--config", cfg); !strings.Contains(got, "  damaged  ") || strings.Count(got, other[:12]) != 2 {
		t.Errorf("got\n%s", got)
	}
	for _, name := range []string{other, "sha256:" + other, other[:12], "sha256:" + damaged} {
		got := strings.Join(strings.Fields(flintSays(t, 0, "image", "inspect", name, "--config", cfg)), " ")
		if isGood := strings.HasPrefix(got, "digest sha256:"+other+" kind base"); isGood != !strings.HasSuffix(name, "damaged") {
			t.Errorf("%s is %q", name, got)
		}
	}
	flintSays(t, 0, "image", "rm", other[:12], "--config", cfg)
	if got := flintSays(t, 0, "image", "rm", other[:12], "--config", cfg); got != "removed sha256:"+damaged+", 4KiB freed\n" {
		t.Errorf("got %q", got)
	}
}

func TestImageListShowsFailures(t *testing.T) {
	state, cfg, wanted, _ := stateWith(t)
	// A registry that is not there: the pool's own reference is asked for again, in vain.
	ref := "127.0.0.1:1/acme/runner:1"
	if err := os.WriteFile(filepath.Join(state, "images", "record", "source-"+wanted+".ext4.json"), []byte(`["`+ref+`"]`), 0o600); err != nil {
		t.Fatal(err)
	}
	flintSays(t, exitFailed, "image", "pull", ref, "--config", cfg)
	if got := flintSays(t, 0, "image", "ls", "--config", cfg); !strings.Contains(got, "! "+wanted[:12]+" is not newer: now: ") || !strings.Contains(got, "connection refused") {
		t.Errorf("got\n%s", got)
	}
}
