package app

import (
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"flint"
	"flint/internal/config"
	"flint/internal/github"
	"flint/internal/host"
	"flint/internal/image"
)

// dockerfileRig is an App with one pool, a, whose image is the Dockerfile in dir. Its docker makes images whose only file is
// what the Dockerfile says in RUN, and whose environment is what it says in ENV.
// In bin it notes each build as a line of builds, that one was on a fresh base as pulled, and builds nothing while slow is there.
func dockerfileRig(t *testing.T) (a *App, dir, bin string) {
	t.Helper()
	bin = t.TempDir()
	const builder = `#!/bin/sh
PATH=/usr/bin:/bin
cd BIN || exit 1
case "$1" in
buildx) exit 1 ;;
build)
	for last; do :; done
	while grep -q HANGS "$last/Dockerfile"; do echo hanging; sleep 60; done
	if [ -e slow ]; then touch building; while [ -e slow ]; do sleep 0.02; done; fi
	grep -q BROKEN "$last/Dockerfile" && { echo 'unknown instruction: BROKEN' >&2; exit 1; }
	echo built >>builds
	case " $* " in *" --pull "*) touch pulled ;; esac
	sed -n 's/^RUN //p' "$last/Dockerfile" >made
	sed -n 's/^ENV \(.*\)/"\1"/p' "$last/Dockerfile" >env ;;
save)
	rm -rf i && mkdir i && tar --mtime=@0 -cf i/layer.tar made
	printf '{"config":{"Env":[%s]},"rootfs":{"type":"layers","diff_ids":["sha256:%s"]}}' "$(cat env)" "$(sha256sum i/layer.tar | cut -d' ' -f1)" >i/config.json
	echo '[{"Config":"config.json","Layers":["layer.tar"]}]' >i/manifest.json
	tar -C i --format=ustar -cf "$3" manifest.json config.json layer.tar ;;
esac
`
	dir = t.TempDir()
	putProgram(t, bin, "docker", strings.Replace(builder, "BIN", bin, 1))
	t.Setenv("PATH", bin)
	put(t, dir, "Dockerfile", "FROM scratch\n")
	cfg := config.Default()
	cfg.StateDir = t.TempDir()
	cfg.Host.MinFree = littleFree
	store, err := image.Open(filepath.Join(cfg.StateDir, "images"), slog.New(slog.DiscardHandler))
	if err != nil {
		t.Fatal(err)
	}
	cfg.Pools = []config.Pool{config.NewPool("a", dir)}
	cfg.Runner.Dir = t.TempDir() // GitHub's runner could not run in these images
	putProgram(t, cfg.Runner.Dir, "start", "#!/bin/sh\n")
	a = &App{
		cfg: cfg, log: slog.New(slog.DiscardHandler), store: store, supply: map[string]host.Supply{}, github: &github.Client{},
		demand: newSources(), opt: Options{Log: slog.New(slog.DiscardHandler)},
	}
	a.reloading.open(cfg)
	return a, dir, bin
}

// renew has a's pools looked at, and waits.
func renew(t *testing.T, a *App, why renewal) {
	t.Helper()
	a.preparations.tasks.Wait() // what has just told its end, too
	a.renewPools(t.Context(), why)
	a.preparations.tasks.Wait()
}

// put writes a file below a directory.
func put(t *testing.T, root, name, content string) {
	t.Helper()
	path := filepath.Join(root, name)
	if err := errors.Join(os.MkdirAll(filepath.Dir(path), 0o755), os.WriteFile(path, []byte(content+"\n"), 0o644)); err != nil {
		t.Fatal(err)
	}
}

func putProgram(t *testing.T, dir, name, text string) {
	t.Helper()
	put(t, dir, name, text)
	if err := os.Chmod(filepath.Join(dir, name), 0o755); err != nil {
		t.Fatal(err)
	}
}

// TestImageOfAChangedDockerfile has a running flint look again at a Dockerfile that is changed, then broken, then mended.
func TestImageOfAChangedDockerfile(t *testing.T) {
	a, dir, _ := dockerfileRig(t)
	if err := a.preparePool(t.Context(), a.cfg.Pools[0]); err != nil {
		t.Fatal(err)
	}
	first := a.Supplies()["a"].Base
	look := func() string { renew(t, a, hourly); return a.Supplies()["a"].Base }
	if look() != first {
		t.Error("the image of an unchanged Dockerfile is another one")
	}
	put(t, dir, "Dockerfile", "FROM scratch\nBROKEN\n")
	if look() != first {
		t.Error("the last good image is not used")
	}
	if why := a.stale["a"]; why.Code != "image.stale" || !strings.Contains(why.Text, "unknown instruction: BROKEN") {
		t.Errorf("said %+v", why)
	}
	if f := a.store.Failed(dir); f == nil || !strings.Contains(f.Why, "BROKEN") {
		t.Errorf("remembered %+v", f)
	}
	put(t, dir, "Dockerfile", "FROM scratch\nRUN x\n")
	if look() == first {
		t.Error("the mended Dockerfile was not built")
	}
	if why := a.stale["a"]; !why.IsZero() {
		t.Errorf("still said: %+v", why)
	}
}

// TestSupersededImagesCanGo has pools get ever newer images and runner software; all but the last are free to be removed.
func TestSupersededImagesCanGo(t *testing.T) {
	a, dir, _ := dockerfileRig(t)
	ctx := t.Context()
	if err := a.preparePool(ctx, a.cfg.Pools[0]); err != nil {
		t.Fatal(err)
	}
	for n := range 3 {
		put(t, dir, "Dockerfile", fmt.Sprintf("FROM scratch\nRUN %d\n", n))
		renew(t, a, hourly)
		putProgram(t, a.cfg.Runner.Dir, "start", fmt.Sprintf("#!/bin/sh\n# %d\n", n))
		if _, err := a.useRunner(ctx, a.cfg.Runner.Dir); err != nil {
			t.Fatal(err)
		}
	}
	_, removed, err := a.store.GC(ctx, a.needed(), 1<<50)
	if err != nil || len(removed) != 6 {
		t.Errorf("removed %d of 3 images and 3 drives that nothing is made of: %v, %v", len(removed), removed, err)
	}
	for _, path := range []string{a.Supplies()["a"].Base, a.Supplies()["a"].Runner} {
		if _, err := os.Stat(path); err != nil {
			t.Error(err)
		}
	}
}

func TestChangedEnvironmentReachesVMs(t *testing.T) {
	a, dir, _ := dockerfileRig(t)
	if err := a.preparePool(t.Context(), a.cfg.Pools[0]); err != nil {
		t.Fatal(err)
	}
	first := a.Supplies()["a"]
	put(t, dir, "Dockerfile", "FROM scratch\nENV x=1\n")
	renew(t, a, hourly)
	if now := a.Supplies()["a"]; now.Base != first.Base || !slices.Equal(now.Env, []string{"x=1"}) {
		t.Errorf("VMs have %+v, and had %+v", now, first)
	}
}

// TestWhatChangesDuringABuildStays has a new image built while something else changes what VMs are made of.
func TestWhatChangesDuringABuildStays(t *testing.T) {
	reload := func(a *App, change func(*config.Config)) {
		cfg := a.current()
		cfg.Pools = slices.Clone(cfg.Pools)
		change(&cfg)
		a.reloading.cfg.Store(&cfg)
		a.reshape(cfg)
	}
	for name, tt := range map[string]struct {
		change func(t *testing.T, a *App)
		is     func(now, first host.Supply) bool
	}{
		"shape": {
			func(_ *testing.T, a *App) { reload(a, func(c *config.Config) { c.Pools[0].VM.Memory = 3 * flint.GiB }) },
			func(now, first host.Supply) bool { return now.Base != first.Base && now.Shape.Memory == 3*flint.GiB },
		},
		"image": {
			func(_ *testing.T, a *App) { reload(a, func(c *config.Config) { c.Pools[0].Image = "other" }) },
			func(now, first host.Supply) bool { return now.Base == first.Base },
		},
		"pool is gone": {
			func(_ *testing.T, a *App) {
				reload(a, func(c *config.Config) { c.Pools = nil })
				a.mu.Lock()
				defer a.mu.Unlock()
				delete(a.supply, "a")
			},
			func(now, _ host.Supply) bool { return now.Base == "" },
		},
		"file system": {
			func(_ *testing.T, a *App) {
				reload(a, func(c *config.Config) { c.Pools[0].Format = string(image.Erofs) })
			},
			func(now, first host.Supply) bool { return now.Base == first.Base },
		},
	} {
		t.Run(name, func(t *testing.T) {
			a, dir, bin := dockerfileRig(t)
			if err := a.preparePool(t.Context(), a.cfg.Pools[0]); err != nil {
				t.Fatal(err)
			}
			first := a.Supplies()["a"]
			put(t, dir, "Dockerfile", "FROM scratch\nRUN x\n")
			put(t, bin, "slow", "")
			done := make(chan struct{})
			go func() { defer close(done); renew(t, a, hourly) }()
			eventually(t, "it builds", func() bool { _, err := os.Stat(filepath.Join(bin, "building")); return err == nil })
			tt.change(t, a)
			if err := os.Remove(filepath.Join(bin, "slow")); err != nil {
				t.Error(err)
			}
			<-done
			if now := a.Supplies()["a"]; !tt.is(now, first) {
				t.Errorf("VMs have %+v, and had %+v", now, first)
			}
		})
	}
}

// TestRunnerThatComesWhileToolsAreMade: VMs get it, though the pool's tools take longer.
func TestRunnerThatComesWhileToolsAreMade(t *testing.T) {
	a, _, _ := dockerfileRig(t)
	a.cfg.Pools[0].Tools = t.TempDir()
	put(t, a.cfg.Pools[0].Tools, "node", "x")
	if err := a.prepareRunner(t.Context()); err != nil {
		t.Fatal(err)
	}
	old := a.runnerDrive
	putProgram(t, a.cfg.Runner.Dir, "start", "#!/bin/sh\n# newer\n")
	a.opt.Progress = func(m flint.Milestone) {
		if strings.Contains(m.Step, "tool") && !m.Done {
			a.opt.Progress = nil
			if _, err := a.useRunner(t.Context(), a.cfg.Runner.Dir); err != nil {
				t.Error(err)
			}
		}
	}
	if err := a.preparePool(t.Context(), a.cfg.Pools[0]); err != nil {
		t.Fatal(err)
	}
	if s := a.Supplies()["a"]; a.runnerDrive == old || s.Runner != a.runnerDrive || s.Tools == "" {
		t.Errorf("VMs have %+v; the runner software was %s and is %s", s, old, a.runnerDrive)
	}
}

// TestToolsThatCannotBeHadAreNotAStaleImage: the pool's VMs stay as they are, and the image is not blamed.
func TestToolsThatCannotBeHadAreNotAStaleImage(t *testing.T) {
	a, dir, _ := dockerfileRig(t)
	if err := a.preparePool(t.Context(), a.cfg.Pools[0]); err != nil {
		t.Fatal(err)
	}
	first := a.Supplies()["a"]
	a.cfg.Pools[0].Tools = filepath.Join(t.TempDir(), "none")
	put(t, dir, "Dockerfile", "FROM scratch\nRUN x\n")
	renew(t, a, hourly)
	if now, why := a.Supplies()["a"], a.stale["a"]; now.Base != first.Base || !why.IsZero() {
		t.Errorf("VMs have %+v, said %+v", now, why)
	}
}

// TestReloadBuildsOnce: a changed pool that has its image anew at every reload has it once, in the file system it wants now.
func TestReloadBuildsOnce(t *testing.T) {
	a, _, bin := dockerfileRig(t)
	a.cfg.Pools[0].Pull = config.PullAlways
	if err := a.preparePool(t.Context(), a.cfg.Pools[0]); err != nil {
		t.Fatal(err)
	}
	cfg := a.cfg
	cfg.Pools = slices.Clone(cfg.Pools)
	cfg.Pools[0].Format = string(image.Erofs)
	a.reloading.cfg.Store(&cfg)
	renew(t, a, told)
	if base := a.Supplies()["a"].Base; filepath.Ext(base) != ".erofs" {
		t.Errorf("VMs have %s", base)
	}
	if b, err := os.ReadFile(filepath.Join(bin, "builds")); err != nil || strings.Count(string(b), "\n") != 2 {
		t.Errorf("built %q, %v; want once at the start and once for the reload", b, err)
	}
}

// TestImageBuildServesPools: what flint image build makes is what pools with that image find.
func TestImageBuildServesPools(t *testing.T) {
	a, dir, bin := dockerfileRig(t)
	a.cfg.Pools[0].Format, a.cfg.Pools[0].Args = string(image.Erofs), map[string]string{"K": "v"}
	other := config.NewPool("b", dir)
	a.cfg.Pools = append(a.cfg.Pools, other, other, config.NewPool("c", "elsewhere"))
	made, err := MakeImage(t.Context(), a.cfg, a.opt, dir, nil)
	if err != nil || len(made) != 2 {
		t.Fatalf("made %+v, %v", made, err)
	}
	for _, p := range a.cfg.Pools[:2] {
		if err := a.preparePool(t.Context(), p); err != nil {
			t.Fatal(err)
		}
	}
	if s := a.Supplies(); s["a"].Base != made[0].Path || s["b"].Base != made[1].Path {
		t.Errorf("pools have %+v, made was %+v", s, made)
	}
	if b, err := os.ReadFile(filepath.Join(bin, "builds")); err != nil || strings.Count(string(b), "\n") != 2 {
		t.Errorf("built %q, %v; want twice", b, err)
	}
	for pull, fresh := range map[string]bool{config.PullMissing: false, config.PullDaily: true} {
		_ = os.Remove(filepath.Join(bin, "pulled"))
		cfg := a.cfg
		cfg.Pools = []config.Pool{{Name: "d", Image: dir, Pull: pull, Args: map[string]string{"K": pull}}}
		if _, err := MakeImage(t.Context(), cfg, a.opt, dir, nil); err != nil {
			t.Fatal(err)
		}
		if _, err := os.Stat(filepath.Join(bin, "pulled")); (err == nil) != fresh {
			t.Errorf("pull: %s: on a fresh base: %t", pull, err == nil)
		}
	}
	given := map[string]string{"K": "w"}
	if got := makings(a.cfg, dir, given); len(got) != 2 || got[0].Args["K"] != "w" || got[1].Args["K"] != "w" {
		t.Errorf("with arguments: %+v", got)
	}
	if got := makings(a.cfg, "nobody's", given); len(got) != 1 || got[0].Args["K"] != "w" || got[0].Format != "" {
		t.Errorf("of no pool: %+v", got)
	}
}

// TestPoolsOnOneDockerfileWantTheirOwn: the images of pools with other arguments are all wanted, and no older one.
func TestPoolsOnOneDockerfileWantTheirOwn(t *testing.T) {
	a, dir, _ := dockerfileRig(t)
	for n, args := range []map[string]string{nil, {"K": "v"}, {"K": "w"}} {
		put(t, dir, "Dockerfile", fmt.Sprintf("FROM scratch\nRUN %d\n", n))
		if _, err := a.store.Base(t.Context(), image.Want{Ref: dir, BuildArgs: args}); err != nil {
			t.Fatal(err)
		}
	}
	a.cfg.Pools[0].Args = map[string]string{"K": "v"}
	other := config.NewPool("b", dir)
	other.Args = map[string]string{"K": "w"}
	a.cfg.Pools = append(a.cfg.Pools, other)
	list, err := StoredImages(t.Context(), a.cfg, a.opt)
	if err != nil || len(list) != 3 {
		t.Fatalf("%+v, %v", list, err)
	}
	for i, want := range []bool{false, true, true} {
		if (list[i].Wanted != "") != want {
			t.Errorf("image %d of 3 is wanted by %q", i, list[i].Wanted)
		}
	}
}

func TestSecondFlintNamesTheFirst(t *testing.T) {
	dir := t.TempDir()
	one, two := &App{dir: dir, log: slog.New(slog.DiscardHandler)}, &App{dir: dir, log: slog.New(slog.DiscardHandler)}
	if err := one.lock(); err != nil {
		t.Fatal(err)
	}
	err := two.lock()
	var fault *flint.Fault
	if !errors.As(err, &fault) || fault.Code != "state.locked" || !errors.Is(err, flint.ErrConflict) || !strings.Contains(err.Error(), fmt.Sprintf("process %d", os.Getpid())) {
		t.Errorf("error %v", err)
	}
	if err := errors.Join(two.Close(t.Context()), one.Close(t.Context())); err != nil {
		t.Fatal(err)
	}
	if err := two.lock(); err != nil {
		t.Error(err)
	}
	if err := two.Close(t.Context()); err != nil {
		t.Error(err)
	}
}

func TestImageGitHubsRunnerCannotRunIn(t *testing.T) {
	a := &App{cfg: config.Default(), log: slog.New(slog.DiscardHandler), github: &github.Client{}}
	dir := t.TempDir()
	store, err := image.Open(dir, slog.New(slog.DiscardHandler))
	if err != nil {
		t.Fatal(err)
	}
	empty := filepath.Join(dir, "scratch.ext4")
	if err := store.Scratch(empty, 64*flint.MiB); err != nil {
		t.Fatal(err)
	}
	var fault *flint.Fault
	if err := a.fits(t.Context(), config.Pool{}, image.Base{Path: empty}); !errors.As(err, &fault) || fault.Code != "image.shell" {
		t.Errorf("an empty image: %v", err)
	}
	assets := os.Getenv("FLINT_TEST_ASSETS")
	if assets == "" {
		t.Skip("needs the demo's image: FLINT_TEST_ASSETS is not set")
	}
	real := filepath.Join(assets, "base.ext4")
	if err := a.fits(t.Context(), config.Pool{}, image.Base{Path: real}); err != nil {
		t.Errorf("the demo's image: %v", err)
	}
}

// TestPoolsWithoutAnImageAreHeldAtTheStart: the others are served, and those without one as soon as it can be made.
func TestPoolsWithoutAnImageAreHeldAtTheStart(t *testing.T) {
	a, dir, _ := dockerfileRig(t)
	bad := config.NewPool("bad", t.TempDir())
	put(t, bad.Image, "Dockerfile", "FROM scratch\nBROKEN\n")
	a.cfg.Pools = []config.Pool{bad, config.NewPool("a", dir)}
	a.reloading.open(a.cfg)
	if err := a.preparePools(t.Context(), nil); err != nil {
		t.Fatal(err)
	}
	held := func() string { return a.reloading.pools(a.cfg)[0].Held.Code + a.reloading.pools(a.cfg)[1].Held.Code }
	if s := a.Supplies(); len(s) != 1 || s["a"].Base == "" || held() != "pool.image" {
		t.Errorf("pools have %+v, held: %s", s, held())
	}
	renew(t, a, untried)
	if held() != "pool.image" {
		t.Errorf("held after one more try: %s", held())
	}
	put(t, bad.Image, "Dockerfile", "FROM scratch\n")
	renew(t, a, untried)
	if s := a.Supplies(); len(s) != 2 || held() != "" {
		t.Errorf("pools have %+v, held: %s", s, held())
	}
	// It is not for other faults, which no image mends.
	a.cfg.Pools[0].Tools = filepath.Join(dir, "none")
	if err := a.preparePools(t.Context(), nil); err == nil {
		t.Error("a tool cache that is not there is no error")
	}
}

// TestImagesLeaveMinFree: an image that would take what host.min_free keeps is not made, until that is lowered.
func TestImagesLeaveMinFree(t *testing.T) {
	a, dir, _ := dockerfileRig(t)
	a.cfg.Host.MinFree = config.Free{Bytes: 1 << 60} // no disk has that
	a.reloading.open(a.cfg)
	if err := a.preparePools(t.Context(), nil); err != nil {
		t.Fatal(err)
	}
	held := func() flint.Reason { return a.reloading.pools(a.cfg)[0].Held }
	if why := held(); why.Code != "pool.image" || !strings.Contains(why.Text, "are for VMs") {
		t.Errorf("the pool is held: %+v", why)
	}
	if f := a.store.Failed(dir); f == nil || !strings.Contains(f.Why, "are for VMs") {
		t.Errorf("remembered %+v", f)
	}
	lower := a.cfg
	lower.Host.MinFree = config.Free{}
	a.reloading.cfg.Store(&lower)
	renew(t, a, untried)
	if s := a.Supplies(); s["a"].Base == "" || !held().IsZero() {
		t.Errorf("pools have %+v, held: %+v", s, held())
	}
}

// TestKernelIsNoImage: flint image rm tells whoever names a kernel which command is for it.
func TestKernelIsNoImage(t *testing.T) {
	a, _, _ := dockerfileRig(t)
	const id = "0123456789abcdef"
	put(t, a.cfg.StateDir, "kernels/"+id+"/vmlinux", "x")
	put(t, a.cfg.StateDir, "kernels/"+id+"/pack.json", `{"version": "6.1", "from": "/boot/vmlinuz-6.1", "monolithic": true, "sizes": {"vmlinux": 2, "boot/order": 2}}`)
	put(t, a.cfg.StateDir, "kernels/"+id+"/boot/order", "x")
	for _, name := range []string{id, id[:6], "/boot/vmlinuz-6.1"} {
		_, err := RemoveImage(t.Context(), a.cfg, a.opt, name)
		var f *flint.Fault
		if !errors.As(err, &f) || f.Code != "image.unknown" || !strings.Contains(f.Error(), "it is a kernel") || !strings.Contains(f.Fix, "flint kernel rm") {
			t.Errorf("%s: %v", name, err)
		}
	}
}
