package rootfs

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"
)

// Bounds on what a set of layers may ask of us, beside MaxEntries. Real images stay far below.
const (
	maxText    = 256 << 20   // bytes of names, link targets and extended attributes, all layers together
	maxSteps   = 256_000_000 // path components walked, all layers together
	maxImplied = 250_000     // directories that are only in the names of others, all layers together
	maxPath    = 4096        // bytes of a path, Linux's PATH_MAX
	maxName    = 255         // bytes of a path component, ext4's limit
	maxHops    = 40          // symbolic links followed in one path, as Linux does
	maxLink    = 4095        // bytes of a symbolic link's target
)

// kind is the type of a file, as far as a file system tells them apart.
type kind byte

const (
	regular kind = iota + 1
	directory
	symlink
	charDevice
	blockDevice
	fifo
	hardLink // only in entries: a second name, never an inode
	whiteout // only in entries: hides the name in the layers below
	opaque   // only in entries: hides all children of the name in the layers below
)

// inode is what one or more names refer to. An image may have a million: it is kept small.
type inode struct {
	kind     kind
	shared   bool   // had more than one name at some time
	mode     uint16 // permission bits, set-id and sticky included
	major    uint16
	minor    uint32
	uid, gid uint32
	nsec     uint32            // of the modification time,
	sec      int64             // in seconds since 1970
	size     int64             // of a regular file,
	at       int64             // and where in the spool its content is
	target   string            // of a symbolic link
	xattrs   map[string]string // by full name
}

// node is a name in the merged tree. Only a directory has kids; a directory's inode is never shared.
type node struct {
	*inode
	name   string
	parent *node
	kids   map[string]*node
}

// path is the node's path from the root, which itself is ".".
func (n *node) path() string {
	if n.parent == n {
		return "."
	}
	parts := make([]string, 0, 16)
	for ; n.parent != n; n = n.parent {
		parts = append(parts, n.name)
	}
	slices.Reverse(parts)
	return strings.Join(parts, "/")
}

// entry is one tar entry of a layer after its name was cleaned: relative, without "." and "..", "" for the root.
type entry struct {
	name string
	inode
}

// clone copies the inode out of the layer's list of entries, so that the list can be freed.
func (e *entry) clone() *inode {
	ino := e.inode
	return &ino
}

// tree is the merged view of the layers applied so far. It is built bottom layer first, the way an extractor works on a
// disk, but only names and metadata are held. Nothing in it can refer to anything outside: the root is its own parent.
type tree struct {
	root    *node
	steps   int
	implied int // directories made that no layer describes
}

func newTree() *tree {
	root := implicitDir("", nil)
	root.parent = root
	return &tree{root: root}
}

// implicitDir is a directory that a layer uses but never describes.
func implicitDir(name string, parent *node) *node {
	return &node{
		inode:  &inode{kind: directory, mode: 0o755},
		name:   name,
		parent: parent,
		kids:   map[string]*node{},
	}
}

var (
	errLoop   = errors.New("too many symbolic links")
	errNotDir = errors.New("not a directory")
	errSteps  = errors.New("paths are too costly to resolve")
	errAbsent = errors.New("no such file")
)

// apply puts a layer on top. Whiteouts hide what the layers below have and never what this layer brings, wherever they
// stand in it, so they go first. A hard link may stand before its target; such links are tried again at the end.
func (t *tree) apply(ctx context.Context, entries []entry) error {
	for i := range entries {
		if ctx.Err() != nil {
			return context.Cause(ctx)
		}
		if e := &entries[i]; e.kind == whiteout || e.kind == opaque {
			t.hide(e)
		}
	}
	var late []int
	placed := map[*node]int{} // by which entry, kept only once a link is late
	for i := range entries {
		if ctx.Err() != nil {
			return context.Cause(ctx)
		}
		e := &entries[i]
		if e.kind == whiteout || e.kind == opaque {
			continue
		}
		n, err := t.add(e)
		if errors.Is(err, errAbsent) && e.kind == hardLink {
			late = append(late, i)
			continue
		}
		if err != nil {
			return fmt.Errorf("entry %q: %w", e.name, err)
		}
		if len(late) > 0 {
			placed[n] = i
		}
	}
	return t.applyLate(ctx, entries, late, placed)
}

// applyLate places hard links whose targets came after them. A chain of such links needs a round for each of its
// members; no tool writes chains, so the rounds are few.
func (t *tree) applyLate(ctx context.Context, entries []entry, late []int, placed map[*node]int) error {
	for round := 0; len(late) > 0; round++ {
		var again []int
		for _, i := range late {
			if ctx.Err() != nil {
				return context.Cause(ctx)
			}
			e := &entries[i]
			if n := t.lookup(e.name); n != nil && placed[n] > i {
				continue // a later entry of the same layer took the name
			}
			n, err := t.add(e)
			if errors.Is(err, errAbsent) && round < 8 {
				again = append(again, i)
				continue
			}
			if err != nil {
				return fmt.Errorf("hard link %q to %q: %w", e.name, e.target, err)
			}
			placed[n] = i
		}
		if len(again) == len(late) {
			e := &entries[again[0]]
			return fmt.Errorf("hard link %q to %q: %w", e.name, e.target, errAbsent)
		}
		late = again
	}
	return nil
}

// hide applies a whiteout. A path that is not there, or that leads through a symbolic link, hides nothing: layers name
// what they hide literally.
func (t *tree) hide(e *entry) {
	dir, base := splitPath(e.name)
	if e.kind == opaque {
		dir, base = e.name, ""
	}
	n := t.root
	for c := range components(dir) {
		t.steps++
		if n = n.kids[c]; n == nil {
			return
		}
	}
	switch {
	case base != "":
		delete(n.kids, base)
	case n.kind == directory:
		n.kids = map[string]*node{}
	}
}

// add places one entry and returns its node. A hard link whose target is absent gives errAbsent and changes nothing.
func (t *tree) add(e *entry) (*node, error) {
	if e.name == "" {
		if e.kind != directory {
			return nil, errors.New("the root is not a directory")
		}
		t.root.inode = e.clone()
		return t.root, nil
	}
	var linked *inode
	if e.kind == hardLink {
		target, err := t.linkTarget(e.target)
		if err != nil {
			return nil, err
		}
		linked = target.inode
	}
	dir, base := splitPath(e.name)
	parent, err := t.directory(dir, true)
	if err != nil {
		return nil, err
	}
	old := parent.kids[base]
	switch {
	case linked != nil && old != nil && old.inode == linked:
		return old, nil
	case linked != nil:
		linked.shared = true
		n := &node{inode: linked, name: strings.Clone(base), parent: parent}
		parent.kids[n.name] = n
		return n, nil
	case e.kind == directory && old != nil && old.kind == directory:
		old.inode = e.clone()
		return old, nil
	}
	// A copy of the name, so that the path it is the end of can be freed.
	n := &node{inode: e.clone(), name: strings.Clone(base), parent: parent}
	if e.kind == directory {
		n.kids = map[string]*node{}
	}
	parent.kids[n.name] = n
	return n, nil
}

func (t *tree) linkTarget(name string) (*node, error) {
	dir, base := splitPath(name)
	parent, err := t.directory(dir, false)
	if err != nil {
		return nil, err
	}
	n := parent.kids[base]
	if n == nil {
		return nil, errAbsent
	}
	if n.kind == directory {
		return nil, fmt.Errorf("hard link to the directory %q", name)
	}
	return n, nil
}

// lookup finds a name without following its last component; nil when there is none.
func (t *tree) lookup(name string) *node {
	dir, base := splitPath(name)
	parent, err := t.directory(dir, false)
	if err != nil {
		return nil
	}
	return parent.kids[base]
}

// directory resolves a path to a directory as a process rooted in the tree would: symbolic links are followed, absolute
// ones from the tree's root, and ".." stops there. With create, what is missing is made.
func (t *tree) directory(name string, create bool) (*node, error) {
	n := t.root
	hops := 0
	rest := []string{name} // paths still to walk, the next one last
	for len(rest) > 0 {
		path := strings.TrimLeft(rest[len(rest)-1], "/")
		c, tail, more := strings.Cut(path, "/")
		rest[len(rest)-1] = tail
		if !more {
			rest = rest[:len(rest)-1]
		}
		if t.steps++; t.steps > maxSteps {
			return nil, errSteps
		}
		switch c {
		case "", ".":
			continue
		case "..":
			n = n.parent
			continue
		}
		next := n.kids[c]
		switch {
		case next == nil && !create:
			return nil, errAbsent
		case next == nil:
			if len(c) > maxName {
				return nil, fmt.Errorf("name of %d bytes", len(c))
			}
			if t.implied++; t.implied > maxImplied {
				return nil, fmt.Errorf("%w: %d directories that no layer describes", ErrBudget, maxImplied)
			}
			next = implicitDir(strings.Clone(c), n)
			n.kids[next.name] = next
		case next.kind == symlink:
			if hops++; hops > maxHops {
				return nil, errLoop
			}
			if strings.HasPrefix(next.target, "/") {
				n = t.root
			}
			rest = append(rest, next.target)
			continue
		case next.kind != directory:
			return nil, fmt.Errorf("%q: %w", c, errNotDir)
		}
		n = next
	}
	return n, nil
}

// walk calls visit for every node but the root, parents first, names of a directory in byte order.
func (t *tree) walk(visit func(path string, n *node) error) error {
	type frame struct {
		dir   *node
		path  string
		names []string
	}
	stack := []frame{{t.root, "", slices.Sorted(maps.Keys(t.root.kids))}}
	for len(stack) > 0 {
		f := &stack[len(stack)-1]
		if len(f.names) == 0 {
			stack = stack[:len(stack)-1]
			continue
		}
		name := f.names[0]
		f.names = f.names[1:]
		n, path := f.dir.kids[name], f.path+name
		if len(path) > maxPath {
			return fmt.Errorf("path of %d bytes below %.64q", len(path), path)
		}
		if err := visit(path, n); err != nil {
			return err
		}
		if n.kind == directory {
			stack = append(stack, frame{n, path + "/", slices.Sorted(maps.Keys(n.kids))})
		}
	}
	return nil
}

// forget lets go of all names below a directory. Who has one of their nodes still has its path.
func (n *node) forget() {
	for _, kid := range n.kids {
		kid.forget()
	}
	n.kids = nil
}

// splitPath splits a clean path into its directory and its last component.
func splitPath(name string) (dir, base string) {
	if i := strings.LastIndexByte(name, '/'); i >= 0 {
		return name[:i], name[i+1:]
	}
	return "", name
}

// components yields the components of a clean path; none for the root.
func components(name string) func(yield func(string) bool) {
	return func(yield func(string) bool) {
		for name != "" {
			c, rest, _ := strings.Cut(name, "/")
			if !yield(c) {
				return
			}
			name = rest
		}
	}
}
