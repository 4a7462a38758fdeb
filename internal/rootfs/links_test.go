package rootfs

import (
	"errors"
	"fmt"
	"io"
	"strings"
	"testing"
)

// TestLinksOfExt4 has as many names and directories as an ext4 can count, and one more. (That tar2ext4 can count so many was tried once:
// writing them takes it a minute.)
func TestLinksOfExt4(t *testing.T) {
	names := []entry{{name: "f", inode: inode{kind: regular}}}
	for i := range ext4Links - 1 {
		names = append(names, entry{name: fmt.Sprintf("d/%d", i), inode: inode{kind: hardLink, target: "f"}})
	}
	directories := func(in string, n int) (list []entry) {
		for i := range n {
			list = append(list, entry{name: fmt.Sprintf("%s%d", in, i), inode: inode{kind: directory}})
		}
		return list
	}
	for what, c := range map[string]struct {
		most    []entry
		further entry
		named   string
	}{
		"names":                   {names, entry{name: "more", inode: inode{kind: hardLink, target: "f"}}, `"d/0"`},
		"directories":             {directories("d/", ext4Links-2), entry{name: "d/more", inode: inode{kind: directory}}, `"d"`},
		"directories in the root": {directories("", ext4Links-3), entry{name: "more", inode: inode{kind: directory}}, `"/"`},
	} {
		t.Run(what, func(t *testing.T) {
			planned := func(entries []entry) *plan {
				tree := newTree()
				if err := tree.apply(t.Context(), entries); err != nil {
					t.Fatal(err)
				}
				p, err := tree.plan()
				if err != nil {
					t.Fatal(err)
				}
				return p
			}
			if err := planned(c.most).fitLinks(); err != nil {
				t.Errorf("as many as may be: %v", err)
			}
			err := planned(append(c.most, c.further)).emit(t.Context(), nil, io.Discard)
			if !errors.Is(err, ErrLinks) || !strings.Contains(err.Error(), c.named) {
				t.Errorf("one more: %v", err)
			}
		})
	}
}
