package rootfs

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"testing"

	"flint"
)

// TestImpliedDirectories has few names that imply many directories, which nothing in the layer pays for.
func TestImpliedDirectories(t *testing.T) {
	const deep = 2000
	var layers [][]byte
	for l := range 2 {
		var items []item
		for i := range maxImplied / deep * 3 / 4 {
			items = append(items, file(fmt.Sprintf("%d-%d/%sf", l, i, strings.Repeat("a/", deep-1)), ""))
		}
		layers = append(layers, pack(t, items...))
	}
	contents := testSpool(t)
	b := budget{entries: MaxEntries, text: maxText, stream: 1 << 30, content: 1 << 30}
	tree := newTree()
	for i, bytes := range layers {
		entries, err := layerOf(bytes).entries(t.Context(), &b, contents)
		if err != nil {
			t.Fatal(err)
		}
		if err := tree.apply(t.Context(), entries); errors.Is(err, ErrBudget) != (i == 1) {
			t.Errorf("layer %d: %v", i, err)
		}
	}
	made := 0
	for todo := []*node{tree.root}; len(todo) > 0; made++ {
		n := todo[len(todo)-1]
		todo = todo[:len(todo)-1]
		for _, k := range n.kids {
			if k.kind == directory {
				todo = append(todo, k)
			}
		}
	}
	if made-1 != maxImplied { // without the root
		t.Errorf("%d directories were made, at most %d may be", made-1, maxImplied)
	}
}

// TestCancelledTree has nothing built or written of layers without contents for who does not wait any more.
func TestCancelledTree(t *testing.T) {
	contents := testSpool(t)
	tree, err := merge(t.Context(), []Layer{layerOf(pack(t, dir("d"), sym("d/l", "f"), link("z", "d/l")))}, flint.GiB, contents)
	if err != nil {
		t.Fatal(err)
	}
	p, err := tree.plan()
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	for what, entries := range map[string][]entry{
		"whiteout":  {{name: "d", inode: inode{kind: whiteout}}},
		"directory": {{name: "e", inode: inode{kind: directory}}},
	} {
		if err := tree.apply(ctx, entries); !errors.Is(err, context.Canceled) || tree.lookup("d") == nil || tree.lookup("e") != nil {
			t.Errorf("%s: %v", what, err)
		}
	}
	out := newFile(t, "image")
	if err := p.writeErofs(ctx, contents, flint.GiB, out); !errors.Is(err, context.Canceled) {
		t.Errorf("writing an erofs: %v", err)
	}
	if err := p.writeExt4(ctx, contents, flint.GiB, out); !errors.Is(err, context.Canceled) {
		t.Errorf("writing an ext4: %v", err)
	}
}
