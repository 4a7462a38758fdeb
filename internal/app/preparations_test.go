package app

import (
	"context"
	"errors"
	"path/filepath"
	"slices"
	"testing"
	"time"

	"flint"
	"flint/internal/config"
)

// TestImagesAreLookedForFirst: nothing else is there for an App that is to prepare an image which is not.
func TestImagesAreLookedForFirst(t *testing.T) {
	a := &App{cfg: config.Config{Pools: []config.Pool{config.NewPool("a", filepath.Join(t.TempDir(), "nowhere"))}}}
	var f *flint.Fault
	if err := a.Prepare(t.Context()); !errors.As(err, &f) || f.Code != "image.missing" {
		t.Errorf("%v, want image.missing", err)
	}
}

// hangingRig is dockerfileRig's with a pool before a whose image never comes, b.
func hangingRig(t *testing.T) (a *App, dir string, hangs chan struct{}) {
	t.Helper()
	a, dir, _ = dockerfileRig(t)
	b := config.NewPool("b", t.TempDir())
	put(t, b.Image, "Dockerfile", "FROM scratch\nHANGS\n")
	a.cfg.Pools = append([]config.Pool{b}, a.cfg.Pools...)
	a.reloading.open(a.cfg)
	hangs = make(chan struct{}, 100)
	a.opt.Progress = func(m flint.Milestone) {
		if m.Line == "hanging" {
			hangs <- struct{}{}
		}
	}
	t.Cleanup(a.preparations.stop)
	return a, dir, hangs
}

// TestPoolThatHangsHoldsUpNoOther: neither at the start, nor when images are had anew, nor at a reload; and a reload that gives it
// another image ends what hangs.
func TestPoolThatHangsHoldsUpNoOther(t *testing.T) {
	a, dir, hangs := hangingRig(t)
	enough, prepared := make(chan time.Time), make(chan error, 1)
	go func() { prepared <- a.preparePools(t.Context(), enough) }()
	<-hangs
	made := func(pool string) string { return a.Supplies()[pool].Base }
	eventually(t, "the other pool is ready", func() bool { return made("a") != "" })
	enough <- time.Now()
	if err := <-prepared; err != nil {
		t.Fatal(err)
	}
	held := func() (codes []string) {
		for _, p := range a.reloading.pools(a.current()) {
			codes = append(codes, p.Held.Code)
		}
		return codes
	}
	if !eventually(t, "the other pool is not held", func() bool { return slices.Equal(held(), []string{"pool.preparing", ""}) }) {
		t.Errorf("held: %q", held())
	}

	ctx, cancel := context.WithCancel(t.Context())
	served := make(chan error, 1)
	go func() { served <- a.supplyPools(ctx) }()
	defer func() {
		cancel()
		if err := <-served; err != nil {
			t.Error(err)
		}
	}()
	reload := func(change func(*config.Config)) {
		cfg := a.current()
		cfg.Pools = slices.Clone(cfg.Pools)
		change(&cfg)
		a.reloading.cfg.Store(&cfg)
		a.reloading.signal()
	}
	first := made("a")
	put(t, dir, "Dockerfile", "FROM scratch\nRUN x\n")
	reload(func(*config.Config) {})
	eventually(t, "it has a newer image", func() bool { return made("a") != first })
	fresh := t.TempDir()
	put(t, fresh, "Dockerfile", "FROM scratch\nRUN y\n")
	reload(func(c *config.Config) { c.Pools = append(c.Pools, config.NewPool("c", fresh)) })
	eventually(t, "a new pool has its image", func() bool { return made("c") != "" })
	if made("b") != "" || len(hangs) > 0 {
		t.Errorf("the pool that hangs has %q; it was tried %d times more", made("b"), len(hangs))
	}
	reload(func(c *config.Config) { c.Pools[0].Image = fresh })
	eventually(t, "the pool that hung has another image", func() bool { return made("b") != "" && slices.Equal(held(), []string{"", "", ""}) })
}

// TestStopWhileAPoolHangs: the preparation ends with flint.
func TestStopWhileAPoolHangs(t *testing.T) {
	a, _, hangs := hangingRig(t)
	ctx, cancel := context.WithCancel(t.Context())
	go func() { <-hangs; cancel() }()
	if err := a.preparePools(ctx, nil); !errors.Is(err, context.Canceled) {
		t.Errorf("error %v", err)
	}
	if len(a.preparations.of) > 0 {
		t.Errorf("still at it: %v", a.preparations.of)
	}
}
