package webhook

import (
	"encoding/binary"
	"errors"
	"fmt"
	"hash/fnv"
	"io"
	"os"
)

// What follows is the layout of a bbolt file, version 2: pages with a header, two of them with the metadata, and a tree of
// branch and leaf pages for each bucket. All numbers are in the machine's own byte order.
const (
	boltMagic      = 0xED0CDAED
	boltVersion    = 2
	pageHeader     = 16 // id 8, flags 2, count 2, overflow 4
	metaSize       = 64 // magic, version, page size, flags: 4 each; root, sequence, freelist, pages, transaction, checksum: 8 each
	elementSize    = 16 // leaf: flags, position, key size, value size: 4 each; branch: position, key size: 4 each, page 8
	bucketHeader   = 16 // root page, sequence: 8 each; a bucket without a root page has a leaf behind them
	flagBranch     = 1
	flagLeaf       = 2
	flagBucket     = 1 // of a leaf's element
	maxKey         = 32 << 10
	maxPageSize    = 64 << 10
	maxTree        = 64 // levels
	maxStoredBytes = 4 << 30
)

// checker follows the tree of a database through plain reads. The library maps the file and follows whatever pointers it
// finds, which on a damaged file ends the whole process; after this look it finds only sound ones.
type checker struct {
	file  io.ReaderAt
	size  int64 // of the file
	page  int64 // bytes
	pages uint64
	seen  map[uint64]bool
}

// checkFile returns why the library must not see the file; nil for a sound one.
func checkFile(path string) error {
	f, err := os.Open(path)
	if err != nil {
		return err
	}
	defer f.Close()
	info, err := f.Stat()
	if err != nil {
		return err
	}
	if !info.Mode().IsRegular() || info.Size() == 0 || info.Size() > maxStoredBytes {
		return fmt.Errorf("%s has %d bytes, mode %s", path, info.Size(), info.Mode())
	}
	c := &checker{file: f, size: info.Size(), seen: map[uint64]bool{}}
	root, err := c.meta()
	if err != nil {
		return err
	}
	return c.walk(root, true, 0)
}

// meta finds the newer of the two metadata pages and returns the page of the root bucket.
func (c *checker) meta() (root uint64, err error) {
	first, errFirst := c.metaAt(0)
	c.page = int64(os.Getpagesize())
	if errFirst == nil {
		c.page = int64(binary.NativeEndian.Uint32(first[8:]))
	}
	second, errSecond := c.metaAt(c.page)
	m := first
	if errFirst != nil || errSecond == nil && binary.NativeEndian.Uint64(second[48:]) > binary.NativeEndian.Uint64(first[48:]) {
		m = second
	}
	if errFirst != nil && errSecond != nil {
		return 0, errors.Join(errFirst, errSecond)
	}
	c.pages = binary.NativeEndian.Uint64(m[40:])
	if c.page != int64(binary.NativeEndian.Uint32(m[8:])) || c.pages > uint64(c.size/c.page) {
		return 0, fmt.Errorf("%d pages of %d bytes are more than the file has", c.pages, c.page)
	}
	return binary.NativeEndian.Uint64(m[16:]), nil
}

func (c *checker) metaAt(offset int64) ([]byte, error) {
	b := make([]byte, pageHeader+metaSize)
	if _, err := c.file.ReadAt(b, offset); err != nil {
		return nil, fmt.Errorf("read metadata: %w", err)
	}
	b = b[pageHeader:]
	sum := fnv.New64a()
	sum.Write(b[:metaSize-8])
	size := binary.NativeEndian.Uint32(b[8:])
	if binary.NativeEndian.Uint32(b) != boltMagic || binary.NativeEndian.Uint32(b[4:]) != boltVersion ||
		binary.NativeEndian.Uint64(b[metaSize-8:]) != sum.Sum64() || size < 1024 || size > maxPageSize || size&(size-1) != 0 {
		return nil, errors.New("read metadata: it is none, or its checksum is wrong")
	}
	return b, nil
}

// walk checks the page and all below it.
func (c *checker) walk(id uint64, root bool, depth int) error {
	if id < 2 || id >= c.pages || c.seen[id] || depth > maxTree {
		return fmt.Errorf("page %d is not where a page can be", id)
	}
	c.seen[id] = true
	header := make([]byte, pageHeader)
	if _, err := c.file.ReadAt(header, int64(id)*c.page); err != nil {
		return fmt.Errorf("read page %d: %w", id, err)
	}
	overflow := uint64(binary.NativeEndian.Uint32(header[12:]))
	if binary.NativeEndian.Uint64(header) != id || id+overflow >= c.pages {
		return fmt.Errorf("page %d is not that page, or too long", id)
	}
	b := make([]byte, int64(overflow+1)*c.page)
	if _, err := c.file.ReadAt(b, int64(id)*c.page); err != nil {
		return fmt.Errorf("read page %d: %w", id, err)
	}
	switch flags := binary.NativeEndian.Uint16(b[8:]); flags {
	case flagBranch:
		return c.branch(b, root, depth)
	case flagLeaf:
		return c.leaf(b, root, depth)
	default:
		return fmt.Errorf("page %d is of no known kind (%#x)", id, flags)
	}
}

func (c *checker) branch(b []byte, root bool, depth int) error {
	count := int(binary.NativeEndian.Uint16(b[10:]))
	if count == 0 || pageHeader+count*elementSize > len(b) {
		return fmt.Errorf("a branch has %d elements", count)
	}
	for i := range count {
		at := pageHeader + i*elementSize
		key := binary.NativeEndian.Uint32(b[at+4:])
		if !inside(b, at, binary.NativeEndian.Uint32(b[at:]), key, 0) {
			return errors.New("an element lies outside its branch")
		}
		if err := c.walk(binary.NativeEndian.Uint64(b[at+8:]), root, depth+1); err != nil {
			return err
		}
	}
	return nil
}

// leaf checks a leaf page, or the leaf in a bucket that has no page. Only the root holds buckets.
func (c *checker) leaf(b []byte, root bool, depth int) error {
	count := int(binary.NativeEndian.Uint16(b[10:]))
	if pageHeader+count*elementSize > len(b) {
		return fmt.Errorf("a leaf has %d elements", count)
	}
	for i := range count {
		at := pageHeader + i*elementSize
		flags, pos := binary.NativeEndian.Uint32(b[at:]), binary.NativeEndian.Uint32(b[at+4:])
		key, value := binary.NativeEndian.Uint32(b[at+8:]), binary.NativeEndian.Uint32(b[at+12:])
		if !inside(b, at, pos, key, value) || flags > flagBucket || root != (flags == flagBucket) {
			return errors.New("an element of a leaf makes no sense")
		}
		if !root {
			continue
		}
		start := at + int(pos) + int(key)
		if err := c.bucket(b[start:start+int(value)], depth); err != nil {
			return err
		}
	}
	return nil
}

func (c *checker) bucket(v []byte, depth int) error {
	if len(v) < bucketHeader {
		return errors.New("a bucket is too short")
	}
	if page := binary.NativeEndian.Uint64(v); page != 0 {
		return c.walk(page, false, depth+1)
	}
	v = v[bucketHeader:]
	if len(v) < pageHeader || binary.NativeEndian.Uint16(v[8:]) != flagLeaf {
		return errors.New("a small bucket is no leaf")
	}
	return c.leaf(v, false, depth+1)
}

// inside reports whether an element's key and value lie in its page, behind the elements.
func inside(b []byte, at int, pos, key, value uint32) bool {
	return key <= maxKey && pos >= elementSize && int64(at)+int64(pos)+int64(key)+int64(value) <= int64(len(b))
}
