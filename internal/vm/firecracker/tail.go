package firecracker

import (
	"fmt"
	"io"
	"os"
	"sync"

	"golang.org/x/sys/unix"
)

// tail is a writer that keeps the last bytes written to it. It is safe for concurrent use.
type tail struct {
	mu    sync.Mutex
	limit int
	buf   []byte // a ring once it is full
	next  int    // where the ring's oldest byte is
}

func newTail(limit int) *tail { return &tail{limit: limit} }

// Write implements io.Writer. It never fails.
func (t *tail) Write(p []byte) (int, error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	written := len(p)
	p = p[max(0, written-t.limit):]
	fill := min(len(p), t.limit-len(t.buf))
	t.buf, p = append(t.buf, p[:fill]...), p[fill:]
	for len(p) > 0 {
		n := copy(t.buf[t.next:], p)
		t.next, p = (t.next+n)%t.limit, p[n:]
	}
	return written, nil
}

// Bytes returns a copy of what is kept, oldest first.
func (t *tail) Bytes() []byte {
	t.mu.Lock()
	defer t.mu.Unlock()
	return append(append(make([]byte, 0, len(t.buf)), t.buf[t.next:]...), t.buf[:t.next]...)
}

// pipe is the reading end of a named pipe that others write to. It does not end while nobody does, until finish.
type pipe struct {
	read *os.File
	keep *os.File // a writing end of our own
}

// openPipe opens the named pipe name in dir.
func openPipe(dir *place, name string) (*pipe, error) {
	read, err := openFIFO(dir, name, unix.O_RDONLY)
	if err != nil {
		return nil, err
	}
	keep, err := openFIFO(dir, name, unix.O_WRONLY)
	if err != nil {
		read.Close()
		return nil, err
	}
	return &pipe{read, keep}, nil
}

func openFIFO(dir *place, name string, mode int) (*os.File, error) {
	fd, err := dir.openat(name, mode|unix.O_NONBLOCK)
	if err != nil {
		return nil, err
	}
	f := os.NewFile(uintptr(fd), name)
	st, err := f.Stat()
	if err == nil && st.Mode()&os.ModeNamedPipe == 0 {
		err = fmt.Errorf("open pipe %s: it is none", name)
	}
	if err != nil {
		f.Close()
		return nil, err
	}
	return f, nil
}

// drain copies everything to w until finish.
func (p *pipe) drain(w io.Writer) {
	_, _ = io.Copy(w, p.read)
}

// finish makes drain end when it has read what is there. Whoever else wrote must have ended.
func (p *pipe) finish() { p.keep.Close() }

func (p *pipe) close() {
	p.keep.Close()
	p.read.Close()
}
