package rootfs

import (
	"bufio"
	"bytes"
	"errors"
	"fmt"
	"io"

	"golang.org/x/sys/unix"
)

// spool holds the contents of the layers' files one after the other, so that a layer need not be decompressed again once it is known
// what is left of it.
type spool struct {
	f       File
	file    *holes
	w       *bufio.Writer
	buf     []byte
	at      int64
	dropped int64
}

func newSpool(f File) *spool {
	file := &holes{f: f}
	return &spool{f: f, file: file, w: bufio.NewWriterSize(file, chunk), buf: make([]byte, chunk)}
}

// put appends a content of that size and says where it begins.
func (s *spool) put(r io.Reader, size int64) (at int64, err error) {
	at = s.at
	n, err := io.CopyBuffer(struct{ io.Writer }{s.w}, r, s.buf)
	s.at += n
	if err == nil && n != size {
		err = fmt.Errorf("%d bytes instead of %d", n, size)
	}
	return at, err
}

// flush makes what was put readable.
func (s *spool) flush() error {
	if err := s.w.Flush(); err != nil {
		return fmt.Errorf("write contents: %w", err)
	}
	return s.file.finish()
}

func (s *spool) section(at, size int64) io.Reader { return io.NewSectionReader(s.f, at, size) }

// dropStep is how much is given back to the disk and the page cache at once.
const dropStep = 64 << 20

// drop gives back what stands before at. Where the file system cannot do that, the end of the file does it.
func (s *spool) drop(at int64) {
	if at-s.dropped >= dropStep {
		_ = unix.Fallocate(int(s.f.Fd()), unix.FALLOC_FL_PUNCH_HOLE|unix.FALLOC_FL_KEEP_SIZE, s.dropped, at-s.dropped)
		s.dropped = at
	}
}

// holes writes an empty file and leaves a hole wherever a whole block is zero.
type holes struct {
	f   File
	pos int64
	end int64 // nothing was written from here on
}

// holeBlock is the smallest hole: the block of most file systems.
const holeBlock = 4096

func (h *holes) Write(p []byte) (int, error) {
	done := 0
	for done < len(p) {
		n, zero := run(p[done:], h.pos, h.end)
		if !zero {
			if _, err := h.f.WriteAt(p[done:done+n], h.pos); err != nil {
				return done, err
			}
		}
		done += n
		h.pos += int64(n)
		h.end = max(h.end, h.pos)
	}
	return len(p), nil
}

// run says how many bytes at the start of p, which goes to pos, are treated alike: left out as zeros of a place never written
// to, or written.
func run(p []byte, pos, end int64) (n int, zero bool) {
	blank := func(at int) (int, bool) {
		size := min(len(p)-at, holeBlock-int((pos+int64(at))%holeBlock))
		return size, size == holeBlock && pos+int64(at) >= end && bytes.Equal(p[at:at+size], zeroBlock[:])
	}
	n, zero = blank(0)
	for n < len(p) {
		size, z := blank(n)
		if z != zero {
			break
		}
		n += size
	}
	return n, zero
}

var zeroBlock [holeBlock]byte

func (h *holes) Read(p []byte) (int, error) {
	n, err := h.f.ReadAt(p, h.pos)
	h.pos += int64(n)
	return n, err
}

func (h *holes) Seek(offset int64, whence int) (int64, error) {
	switch whence {
	case io.SeekStart:
	case io.SeekCurrent:
		offset += h.pos
	case io.SeekEnd:
		offset += h.end
	default:
		return 0, errors.New("seek from nowhere")
	}
	h.pos = offset
	return offset, nil
}

// finish gives the file its length: it may end with a hole.
func (h *holes) finish() error {
	if err := h.f.Truncate(h.end); err != nil {
		return fmt.Errorf("end file: %w", err)
	}
	return nil
}
