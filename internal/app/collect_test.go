package app

import (
	"context"
	"log/slog"
	"os"
	"path/filepath"
	"testing"

	"flint/internal/config"
	"flint/internal/image"
)

// onMessage is a log that calls itself for each message.
type onMessage func(message string)

func (onMessage) Enabled(context.Context, slog.Level) bool { return true }

func (f onMessage) Handle(_ context.Context, r slog.Record) error { f(r.Message); return nil }

func (f onMessage) WithAttrs([]slog.Attr) slog.Handler { return f }

func (f onMessage) WithGroup(string) slog.Handler { return f }

// TestImageSuppliedWhileOthersAreCollected has a pool get another image when a collection already has the list of what is needed, on which
// that image is not. The collection is held up, where it first logs something, until the image is supplied, if that is possible then.
func TestImageSuppliedWhileOthersAreCollected(t *testing.T) {
	a, _, _ := dockerfileRig(t)
	a.cfg.Runner = config.Runner{InImage: "auto"}
	pool := a.cfg.Pools[0]
	images := filepath.Join(a.cfg.StateDir, "images")
	supplied := make(chan error, 1)
	var next image.Base
	interrupted := func(message string) {
		if message != "removing what an interrupted build left" {
			return
		}
		supply := func() { supplied <- a.supplyPool(t.Context(), pool, next) }
		if a.collecting.TryLock() {
			a.collecting.Unlock()
			supply() // nobody makes it wait
			return
		}
		go supply()
	}
	var err error
	if a.store, err = image.Open(images, slog.New(onMessage(interrupted))); err != nil {
		t.Fatal(err)
	}
	base := func(content string) image.Base {
		b, err := a.store.Base(t.Context(), image.Want{Ref: imageOf(t, "", map[string]string{"f": content})})
		if err != nil {
			t.Fatal(err)
		}
		return b
	}
	first := base("1")
	if err := a.supplyPool(t.Context(), pool, first); err != nil {
		t.Fatal(err)
	}
	next = base("2")
	if err := os.Mkdir(filepath.Join(images, "tmp", "interrupted"), 0o700); err != nil {
		t.Fatal(err)
	}

	a.makeRoom(t.Context(), 1<<50)
	if err := <-supplied; err != nil {
		t.Fatal(err)
	}
	if s := a.Supplies()["a"]; s.Base != next.Path {
		t.Errorf("VMs are made of %s, not of %s", s.Base, next.Path)
	}
	for range 2 { // now, and after one more collection
		if _, err := os.Stat(next.Path); err != nil {
			t.Errorf("what VMs are made of is removed: %v", err)
		}
		a.makeRoom(t.Context(), 1<<50)
	}
	if _, err := os.Stat(first.Path); err == nil {
		t.Error("what no VM is made of any more stays")
	}
}
