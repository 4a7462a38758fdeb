package rootfs

import (
	"cmp"
	"fmt"
	"slices"

	"flint"
)

// plan is what is written, in this order: files without content, contents in the order of the layers, further names.
type plan struct {
	tree     *tree
	contents []*node       // regular files
	links    []furtherName // hard links
	ext4Size int64         // estimate, from above
}

type furtherName struct{ name, first *node }

// tooBig says that an image needs more than its limit.
func tooBig(limit flint.Bytes) error {
	return fmt.Errorf("%w: it needs more than %s", ErrTooBig, limit)
}

// plan decides what is written when.
func (t *tree) plan() (*plan, error) {
	p := &plan{tree: t, ext4Size: int64(2 * flint.MiB)}
	first := map[*inode]*node{}
	err := t.walk(func(_ string, n *node) error {
		if n.shared {
			if f := first[n.inode]; f != nil {
				p.links = append(p.links, furtherName{n, f})
				return nil
			}
			first[n.inode] = n
		}
		p.ext4Size += ext4Footprint(n)
		if n.kind == regular {
			p.contents = append(p.contents, n)
		}
		return nil
	})
	slices.SortFunc(p.contents, func(a, b *node) int { return cmp.Compare(a.at, b.at) })
	return p, err
}
