package rootfs

import "fmt"

// ext4Links bounds an ext4's counts of links, EXT4_LINK_MAX of fs/ext4/ext4.h. Linux goes on with directories that have more; tar2ext4 does not.
const ext4Links = 65000

// fitLinks checks that tar2ext4 can count the names of all files: what it cannot it would refuse, too, but not say so in a way that can
// be told from other failures.
func (p *plan) fitLinks() error {
	further := map[*node]int{}
	for _, l := range p.links {
		if further[l.first]++; further[l.first] >= ext4Links {
			return fmt.Errorf("%q: %w: %d names", l.first.path(), ErrLinks, ext4Links)
		}
	}
	check := func(path string, n *node) error {
		if n.kind == directory && directoryLinks(n) > ext4Links {
			return fmt.Errorf("%q: %w: some %d subdirectories", path, ErrLinks, ext4Links)
		}
		return nil
	}
	if err := check("/", p.tree.root); err != nil {
		return err
	}
	return p.tree.walk(check)
}

// directoryLinks counts a directory's name, itself, and what leads back to it from the directories in it.
func directoryLinks(n *node) int {
	links := 2
	for _, k := range n.kids {
		if k.kind == directory {
			links++
		}
	}
	const always = "lost+found" // tar2ext4 makes it
	if n.parent == n && n.kids[always] == nil {
		links++
	}
	return links
}
