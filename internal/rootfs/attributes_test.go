package rootfs

import (
	"archive/tar"
	"errors"
	"fmt"
	"maps"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"flint"
	"flint/internal/rootfs/rootfstest"
)

// withAttributes is an empty file with attributes.
func withAttributes(name string, attributes map[string]string) item {
	h := tar.Header{Mode: 0o755, PAXRecords: map[string]string{}}
	for k, v := range attributes {
		h.PAXRecords[xattrPrefix+k] = v
	}
	return item{Name: name, Header: h}
}

// manyAttributes are so many that most of them do not fit an inode, of three name spaces and with names of all lengths, mixed so that
// no order but the right one is right.
func manyAttributes(n, size int) map[string]string {
	all := map[string]string{"security.capability": capability}
	for i := range n {
		space := []string{"user", "trusted", "security"}[i%3]
		all[fmt.Sprintf("%s.%c%s", space, 'a'+i*7%26, strings.Repeat("x", i*5%11))] = fmt.Sprintf("%d", i) + strings.Repeat("v", size)
	}
	return all
}

// foundAttributes reads what the kernel finds of a file's attributes by their names.
func foundAttributes(t *testing.T, path string) map[string]string {
	t.Helper()
	names := make([]byte, 64<<10)
	n, err := unix.Listxattr(path, names)
	if err != nil {
		t.Fatal(err)
	}
	found := map[string]string{}
	for name := range strings.SplitSeq(strings.TrimRight(string(names[:n]), "\x00"), "\x00") {
		value := make([]byte, 64<<10)
		n, err := unix.Getxattr(path, name, value)
		if err != nil {
			t.Errorf("%s is listed and not found: %v", name, err)
			continue
		}
		found[name] = string(value[:n])
	}
	return found
}

// TestManyAttributes has files with as many attributes as there is room for read by the kernel.
func TestManyAttributes(t *testing.T) {
	for format, files := range map[Format]map[string]map[string]string{
		Ext4: {
			"few": manyAttributes(3, 5), "thirteen": manyAttributes(20, 4), "most": manyAttributes(66, 16),
			"large": {"user.large": strings.Repeat("l", 4096-36-16-8), "security.capability": capability},
		},
		Erofs: {
			"few": manyAttributes(3, 5), "most": manyAttributes(200, 200),
			"large": {"user.large": strings.Repeat("l", 60000), "trusted.large": strings.Repeat("k", 60000), "security.capability": capability},
		},
	} {
		t.Run(string(format), func(t *testing.T) {
			var items []item
			for name, all := range files {
				items = append(items, withAttributes(name, all))
			}
			path := wrote(t, format, pack(t, items...))
			rootfstest.Fsck(t, path)
			root, _ := rootfstest.Mount(t, path, "ro")
			for name, want := range files {
				if got := foundAttributes(t, filepath.Join(root, name)); !maps.Equal(got, want) {
					t.Errorf("%s: got  %d attributes: %.1000q\nwant %d: %.1000q", name, len(got), got, len(want), want)
				}
			}
		})
	}
}

// TestTooManyAttributes: what there is no room for is refused, by an error that says which file it is.
func TestTooManyAttributes(t *testing.T) {
	names := map[string]string{}
	for i := range 400 {
		names[fmt.Sprintf("user.%03d%s", i, strings.Repeat("n", 240))] = "v"
	}
	for what, tt := range map[string]struct {
		format Format
		item   item
	}{
		"ext4, too many":              {Ext4, withAttributes("etc/f", manyAttributes(100, 50))},
		"ext4, too large":             {Ext4, withAttributes("etc/f", map[string]string{"user.large": strings.Repeat("l", 4096-36-16-8+1)})},
		"ext4, of a directory":        {Ext4, item{Name: "etc/f", Header: tar.Header{Typeflag: tar.TypeDir, PAXRecords: map[string]string{xattrPrefix + "user.large": strings.Repeat("l", 5000)}}}},
		"erofs, too large":            {Erofs, withAttributes("etc/f", map[string]string{"user.large": strings.Repeat("l", 65536)})},
		"erofs, too large together":   {Erofs, withAttributes("etc/f", map[string]string{"user.1": strings.Repeat("l", 65535), "user.2": strings.Repeat("l", 65535), "user.3": strings.Repeat("l", 65535)})},
		"erofs, more than are listed": {Erofs, withAttributes("etc/f", names)},
	} {
		t.Run(what, func(t *testing.T) {
			_, err := writeLayers(t, tt.format, flint.GiB, pack(t, tt.item))
			if !errors.Is(err, ErrAttributes) || !strings.Contains(err.Error(), `"etc/f"`) {
				t.Errorf("error %v", err)
			}
		})
	}
}
