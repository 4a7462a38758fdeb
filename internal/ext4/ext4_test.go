package ext4_test

import (
	"bytes"
	"encoding/binary"
	"io"
	"strings"
	"testing"

	"flint/internal/ext4"
)

const block = 4096

// disk is a file system in memory that counts what is written.
type disk struct {
	*bytes.Reader
	data    []byte
	written int
}

func newDisk(data []byte) *disk { return &disk{Reader: bytes.NewReader(data), data: data} }

func (d *disk) WriteAt(p []byte, at int64) (int, error) {
	d.written += len(p)
	if at < 0 || at+int64(len(p)) > int64(len(d.data)) {
		return 0, io.ErrShortWrite
	}
	return copy(d.data[at:], p), nil
}

// system is the part of a file system the package reads: a superblock, and the descriptors behind it. It has two groups, whose bitmaps are
// in blocks 5 and 6.
func system() []byte {
	b := make([]byte, 8*block)
	le := binary.LittleEndian
	le.PutUint32(b[1024+0x04:], 32768+100) // blocks
	le.PutUint32(b[1024+0x18:], 2)         // 4 KiB
	le.PutUint32(b[1024+0x20:], 32768)     // blocks per group
	le.PutUint32(b[1024+0x28:], 160)       // inodes per group
	le.PutUint16(b[1024+0x38:], 0xEF53)
	le.PutUint16(b[1024+0x58:], 256) // bytes of an inode
	le.PutUint32(b[block+4:], 5)
	le.PutUint32(b[block+8:], 4)
	le.PutUint32(b[block+32+4:], 6)
	le.PutUint32(b[block+32+8:], 4)
	return b
}

func TestPads(t *testing.T) {
	d := newDisk(system())
	d.data[5*block], d.data[6*block+19] = 0x1f, 0x80
	want := bytes.Clone(d.data)
	for i := 20; i < block; i++ { // 160 inodes are 20 bytes
		want[5*block+i], want[6*block+i] = 0xff, 0xff
	}
	if err := ext4.PadInodeBitmaps(d); err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(d.data, want) {
		t.Error("not what it should be")
	}
}

func TestRefusesOtherShapes(t *testing.T) {
	set := func(at int, v uint32) func(b []byte) []byte {
		return func(b []byte) []byte {
			binary.LittleEndian.PutUint32(b[at:], v)
			return b
		}
	}
	for name, tc := range map[string]struct {
		spoil func(b []byte) []byte
		want  string
	}{
		"empty":                    {func([]byte) []byte { return nil }, "superblock"},
		"cut in the superblock":    {func(b []byte) []byte { return b[:1500] }, "superblock"},
		"cut in the descriptors":   {func(b []byte) []byte { return b[:block+40] }, "descriptors"},
		"no magic":                 {set(1024+0x38, 0), "not an ext4"},
		"small blocks":             {set(1024+0x18, 0), "another size"},
		"wide descriptors":         {set(1024+0x60, 0x80), "another size"},
		"no blocks":                {set(1024+0x04, 0), "0 blocks"},
		"no blocks in a group":     {set(1024+0x20, 0), "groups of 0 blocks"},
		"no inodes":                {set(1024+0x28, 0), "0 inodes"},
		"an odd number of inodes":  {set(1024+0x28, 161), "161 inodes"},
		"more inodes than bits":    {set(1024+0x28, 32768+8), "32776 inodes"},
		"most inodes there can be": {set(1024+0x28, 1<<32-8), "inodes"},
		"more groups than fit":     {set(1024+0x04, 1<<32-1), "descriptors"},
		"bitmap in the superblock": {set(block+4, 0), "group 0 in blocks 0 and 4"},
		"bitmap in a descriptor":   {set(block+32+4, 1), "group 1 in blocks 1 and 4"},
		"table in the superblock":  {set(block+8, 0), "group 0 in blocks 5 and 0"},
		"bitmap beyond the end":    {set(block+32+4, 32768+100), "group 1 in blocks 32868 and 4"},
	} {
		t.Run(name, func(t *testing.T) {
			d := newDisk(tc.spoil(system()))
			if err := ext4.PadInodeBitmaps(d); err == nil || !strings.Contains(err.Error(), tc.want) {
				t.Errorf("got %v, want %q", err, tc.want)
			}
			if d.written != 0 {
				t.Errorf("%d bytes were written", d.written)
			}
		})
	}
}

// entry is an attribute in a block: name space, name, and where its value is.
func entry(space byte, name string, value uint16) []byte {
	b := make([]byte, 16+(len(name)+3)&^3)
	b[0], b[1] = byte(len(name)), space
	binary.LittleEndian.PutUint16(b[2:], value)
	copy(b[16:], name)
	return b
}

// withAttributes is a file system whose second inode has its attributes, which begin so, in block 7.
func withAttributes(begin ...[]byte) []byte {
	b := append(system(), make([]byte, 10*block)...) // the inodes take that
	binary.LittleEndian.PutUint32(b[4*block+256+0x68:], 16)
	binary.LittleEndian.PutUint32(b[16*block:], 0xEA020000)
	copy(b[16*block+32:], bytes.Join(begin, nil))
	return b
}

func TestSortsAttributes(t *testing.T) {
	sorted := [][]byte{entry(1, "b", 4000), entry(1, "aa", 4004), entry(1, "ab", 4008), entry(6, "a", 4012)}
	for _, order := range [][]int{{3, 2, 1, 0}, {1, 0, 3, 2}, {2, 3, 0, 1}} {
		var list [][]byte
		for _, i := range order {
			list = append(list, sorted[i])
		}
		d := newDisk(withAttributes(list...))
		if err := ext4.SortAttributes(d); err != nil {
			t.Fatal(err)
		}
		if !bytes.Equal(d.data, withAttributes(sorted...)) {
			t.Errorf("%v is not in order", order)
		}
	}
	d := newDisk(withAttributes(sorted...))
	if err := ext4.SortAttributes(d); err != nil || d.written > 0 {
		t.Errorf("%d bytes were written to what was sorted; error %v", d.written, err)
	}
}

func TestAttributesThatAreNone(t *testing.T) {
	for name, tc := range map[string]struct {
		spoil func(b []byte)
		want  string
	}{
		"not at all":        {func(b []byte) { b[16*block] = 1 }, "begins with"},
		"in the superblock": {func(b []byte) { b[4*block+256+0x68] = 0; b[4*block+256+0x68+3] = 0xff }, "of 32868"},
		"in a descriptor":   {func(b []byte) { b[4*block+256+0x68] = 1 }, "block 1"},
		"beyond the end":    {func(b []byte) { b[4*block+256+0x68] = 200 }, "block 200"},
		"without an end": {func(b []byte) {
			for i := 16*block + 32; i < 17*block; i++ {
				b[i] = 0xff
			}
		}, "an entry of"},
	} {
		t.Run(name, func(t *testing.T) {
			d := newDisk(withAttributes(entry(1, "b", 0)))
			tc.spoil(d.data)
			if err := ext4.SortAttributes(d); err == nil || !strings.Contains(err.Error(), tc.want) {
				t.Errorf("got %v, want %q", err, tc.want)
			}
		})
	}
}

func FuzzPadInodeBitmaps(f *testing.F) {
	f.Add(system()[1024 : 2*block])
	f.Fuzz(func(t *testing.T, head []byte) {
		b := make([]byte, 8*block)
		copy(b[1024:2*block], head)
		d := newDisk(bytes.Clone(b))
		_ = ext4.PadInodeBitmaps(d) // an error is as good
		_ = ext4.SortAttributes(d)
		if !bytes.Equal(d.data[:2*block], b[:2*block]) {
			t.Error("the superblock or the descriptors were written to")
		}
	})
}
