package app

import (
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"flint"
	"flint/internal/config"
	"flint/internal/github"
	"flint/internal/host"
	"flint/internal/image"
)

// TestImageOfAChangedDockerfile has a running flint look again at a Dockerfile that is changed, then broken, then mended.
func TestImageOfAChangedDockerfile(t *testing.T) {
	bin := t.TempDir()
	// It builds an image whose only file is the Dockerfile: as an archive, as docker saves one.
	builder := "#!/bin/sh\nPATH=/usr/bin:/bin\ncase \"$1\" in\nbuild) for last; do :; done; grep -q BROKEN \"$last/Dockerfile\" && { echo 'unknown instruction: BROKEN' >&2; exit 1; }; cp \"$last/Dockerfile\" " + bin + "/made ;;\n" +
		"save) cd " + bin + " && rm -rf i && mkdir i && tar -cf i/layer.tar made && printf '{\"rootfs\":{\"type\":\"layers\",\"diff_ids\":[\"sha256:%s\"]}}' \"$(sha256sum i/layer.tar | cut -d' ' -f1)\" >i/config.json && " +
		"echo '[{\"Config\":\"config.json\",\"Layers\":[\"layer.tar\"]}]' >i/manifest.json && tar -C i --format=ustar -cf \"$3\" manifest.json config.json layer.tar ;;\nesac\n"
	dir := t.TempDir()
	put(t, bin, "docker", builder)
	if err := os.Chmod(filepath.Join(bin, "docker"), 0o755); err != nil {
		t.Fatal(err)
	}
	t.Setenv("PATH", bin)
	put(t, dir, "Dockerfile", "FROM scratch\n")
	store, err := image.Open(t.TempDir(), slog.New(slog.DiscardHandler))
	if err != nil {
		t.Fatal(err)
	}
	cfg := config.Default()
	cfg.Pools = []config.Pool{config.NewPool("a", dir)}
	cfg.Runner.Dir = t.TempDir() // GitHub's runner could not run in these images
	put(t, cfg.Runner.Dir, "start", "#!/bin/sh\n")
	if err := os.Chmod(filepath.Join(cfg.Runner.Dir, "start"), 0o755); err != nil {
		t.Fatal(err)
	}
	a := &App{cfg: cfg, log: slog.New(slog.DiscardHandler), store: store, supply: map[string]host.Supply{}, github: &github.Client{}}
	if err := a.preparePool(t.Context(), cfg.Pools[0]); err != nil {
		t.Fatal(err)
	}
	first := a.Supplies()["a"].Base
	look := func() string { a.refreshImages(t.Context(), false); return a.Supplies()["a"].Base }
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
	if f := store.Failed(dir); f == nil || !strings.Contains(f.Why, "BROKEN") {
		t.Errorf("remembered %+v", f)
	}
	put(t, dir, "Dockerfile", "FROM scratch\nENV x=1\n")
	if look() == first {
		t.Error("the mended Dockerfile was not built")
	}
	if why := a.stale["a"]; !why.IsZero() {
		t.Errorf("still said: %+v", why)
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
	if err := a.fits(config.Pool{}, image.Base{Path: empty}); !errors.As(err, &fault) || fault.Code != "image.shell" {
		t.Errorf("an empty image: %v", err)
	}
	assets := os.Getenv("FLINT_TEST_ASSETS")
	if assets == "" {
		t.Skip("needs the demo's image: FLINT_TEST_ASSETS is not set")
	}
	real := filepath.Join(assets, "base.ext4")
	if err := a.fits(config.Pool{}, image.Base{Path: real}); err != nil {
		t.Errorf("the demo's image: %v", err)
	}
}
