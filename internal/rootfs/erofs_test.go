package rootfs

import (
	"archive/tar"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"flint/internal/rootfs/rootfstest"
)

// TestErofsAtTheEndsOfBlocks writes contents of every kind that do, and just do not, fit behind their inodes, which have attributes
// of different lengths, and reads them by way of fsck.erofs, flint's own reader and the kernel.
func TestErofsAtTheEndsOfBlocks(t *testing.T) {
	var items []item
	for attribute := range 5 {
		for _, size := range []int{0, 1, 31, 32, 33, 100, 1000, 2015, 2016, 2017, 2048, 3000, 3900, 4000, 4031, 4032, 4033, 4064, 4095, 4096, 4097, 8191, 8192} {
			h := tar.Header{}
			if attribute > 0 {
				h.PAXRecords = map[string]string{xattrPrefix + "user.a": strings.Repeat("a", attribute*attribute*attribute*60)}
			}
			name := fmt.Sprint("a", attribute, "-", size)
			items = append(items, item{Name: name, Content: strings.Repeat("c", size), Header: h})
			if size == 0 || size > maxLink {
				continue
			}
			l := sym(name+"-link", strings.Repeat("/l", size/2)+strings.Repeat("/", size%2))
			l.Header.PAXRecords = nil
			if attribute > 0 {
				l.Header.PAXRecords = map[string]string{xattrPrefix + "trusted.a": h.PAXRecords[xattrPrefix+"user.a"]}
			}
			items = append(items, l)
		}
	}
	// An entry of these takes 12 bytes and a name of 8: with "." and "..", 203 of them leave 9 bytes of a block.
	for _, kids := range []int{0, 1, 100, 197, 198, 199, 200, 201, 202, 203, 204, 500} {
		for kid := range kids {
			items = append(items, item{Name: fmt.Sprintf("d%d/kid-%04d", kids, kid), Header: tar.Header{Typeflag: tar.TypeFifo}})
		}
		items = append(items, dir(fmt.Sprint("d", kids)))
	}
	b := pack(t, items...)
	list, err := emitted(t, b)
	if err != nil {
		t.Fatal(err)
	}
	checkErofs(t, []Layer{layerOf(b)}, list)
	path := wrote(t, Erofs, b)
	rootfstest.Fsck(t, path)
	root, _ := rootfstest.Mount(t, path, "ro")
	for _, i := range items {
		file := filepath.Join(root, i.Name)
		switch i.Header.Typeflag {
		case 0:
			if got, err := os.ReadFile(file); err != nil || string(got) != i.Content {
				t.Errorf("%s: %d bytes, %v", i.Name, len(got), err)
			}
		case tar.TypeSymlink:
			if got, err := os.Readlink(file); err != nil || got != i.Header.Linkname {
				t.Errorf("%s: %d bytes, %v", i.Name, len(got), err)
			}
		case tar.TypeDir:
			var want int
			fmt.Sscanf(i.Name, "d%d", &want)
			if got, err := os.ReadDir(file); err != nil || len(got) != want {
				t.Errorf("%s: %d entries, %v", i.Name, len(got), err)
			}
			continue
		}
		for pax, value := range i.Header.PAXRecords {
			if got := rootfstest.Attributes(t, file); got != fmt.Sprintf(" %s=%x", strings.TrimPrefix(pax, xattrPrefix), value) {
				t.Errorf("%s has the attributes %.99s…", i.Name, got)
			}
		}
	}
}
