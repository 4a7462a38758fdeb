package rootfs

import (
	"fmt"
	"maps"
	"slices"
	"strings"
)

// Linux's bounds, include/uapi/linux/limits.h: of a value, and of the names of one file, each with a NUL.
const (
	maxValue = 64 << 10
	maxNames = 64 << 10
)

// attribute is one as both file systems store it: the name without its name space, which is a number.
type attribute struct {
	space byte
	name  string
	value string
}

// spaces are the numbers of the name spaces that setXattrs lets pass. Both file systems have the same.
var spaces = map[string]byte{"user": 1, "trusted": 4, "security": 6}

// attributesOf lists a file's attributes in the order of their full names.
func attributesOf(xattrs map[string]string) ([]attribute, error) {
	if len(xattrs) == 0 {
		return nil, nil
	}
	list := make([]attribute, 0, len(xattrs))
	names := 0
	for _, name := range slices.Sorted(maps.Keys(xattrs)) {
		space, rest, _ := strings.Cut(name, ".")
		list = append(list, attribute{spaces[space], rest, xattrs[name]})
		if names += len(name) + 1; names > maxNames || len(xattrs[name]) > maxValue {
			return nil, fmt.Errorf("%w for Linux", ErrAttributes)
		}
	}
	return list, nil
}

// fitExt4 checks that tar2ext4 has room for a file's attributes: some in the inode, the others in one block. What it has no room for it
// would refuse, too, but not say so in a way that can be told from other failures.
func fitExt4(xattrs map[string]string) error {
	list, err := attributesOf(xattrs)
	if err != nil {
		return err
	}
	// What headers and the ends of the lists leave of the inode's 104 bytes and of the block.
	inode, block := 104-8, 4096-36
	for _, a := range list {
		size := 16 + (len(a.name)+3)&^3 + (len(a.value)+3)&^3
		switch {
		case inode >= size:
			inode -= size
		case block >= size:
			block -= size
		default:
			return fmt.Errorf("%w for ext4, which has some 4 KiB for those of a file", ErrAttributes)
		}
	}
	return nil
}
