package image

import (
	"archive/tar"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
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
			items = append(items, item{name: name, content: strings.Repeat("c", size), h: h})
			if size == 0 || size > maxLink {
				continue
			}
			l := sym(name+"-link", strings.Repeat("/l", size/2)+strings.Repeat("/", size%2))
			l.h.PAXRecords = nil
			if attribute > 0 {
				l.h.PAXRecords = map[string]string{xattrPrefix + "trusted.a": h.PAXRecords[xattrPrefix+"user.a"]}
			}
			items = append(items, l)
		}
	}
	// An entry of these takes 12 bytes and a name of 8: with "." and "..", 203 of them leave 9 bytes of a block.
	for _, kids := range []int{0, 1, 100, 197, 198, 199, 200, 201, 202, 203, 204, 500} {
		for kid := range kids {
			items = append(items, item{name: fmt.Sprintf("d%d/kid-%04d", kids, kid), h: tar.Header{Typeflag: tar.TypeFifo}})
		}
		items = append(items, dir(fmt.Sprint("d", kids)))
	}
	b := pack(t, items...)
	list, err := emitted(t, b)
	if err != nil {
		t.Fatal(err)
	}
	checkErofs(t, []layer{layerOf(b)}, list)
	_, path, _, err := testStore(t).writeImage(t.Context(), baseDir, []layer{layerOf(b)}, DefaultLimit, Erofs)
	if err != nil {
		t.Fatal(err)
	}
	fsck(t, path)
	root, _ := mount(t, path, "ro")
	for _, i := range items {
		file := filepath.Join(root, i.name)
		switch i.h.Typeflag {
		case 0:
			if got, err := os.ReadFile(file); err != nil || string(got) != i.content {
				t.Errorf("%s: %d bytes, %v", i.name, len(got), err)
			}
		case tar.TypeSymlink:
			if got, err := os.Readlink(file); err != nil || got != i.h.Linkname {
				t.Errorf("%s: %d bytes, %v", i.name, len(got), err)
			}
		case tar.TypeDir:
			var want int
			fmt.Sscanf(i.name, "d%d", &want)
			if got, err := os.ReadDir(file); err != nil || len(got) != want {
				t.Errorf("%s: %d entries, %v", i.name, len(got), err)
			}
			continue
		}
		for pax, value := range i.h.PAXRecords {
			if got := attributes(t, file); got != fmt.Sprintf(" %s=%x", strings.TrimPrefix(pax, xattrPrefix), value) {
				t.Errorf("%s has the attributes %.99s…", i.name, got)
			}
		}
	}
}
