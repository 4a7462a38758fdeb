package firecracker

import (
	"fmt"
	"io"
	"os"
	"sync"
	"time"

	"golang.org/x/sys/unix"
)

// pipe is the reading end of a named pipe that others write to. It does not end while nobody does, until finish.
type pipe struct {
	read *os.File
	keep *os.File // a writing end of our own

	finished sync.Once
	over     chan struct{} // closed by finish
}

// breath is the time between two reads of a pipe that is never empty. A guest that writes its console byte by byte costs
// the host one read for many of them, and what the pipe cannot hold meanwhile, 64 KiB, is lost.
const breath = 5 * time.Millisecond

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
	return &pipe{read: read, keep: keep, over: make(chan struct{})}, nil
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
func (p *pipe) drain(w io.Writer) { drain(w, p.read, p.over) }

func drain(w io.Writer, r io.Reader, over <-chan struct{}) {
	buf := make([]byte, 64<<10)
	pause := time.NewTimer(0)
	defer pause.Stop()
	for {
		n, err := r.Read(buf)
		_, _ = w.Write(buf[:n]) // rings and meters never fail
		if err != nil {
			return
		}
		pause.Reset(breath)
		select {
		case <-pause.C:
		case <-over:
		}
	}
}

// finish makes drain end when it has read what is there. Whoever else wrote must have ended.
func (p *pipe) finish() {
	p.finished.Do(func() {
		close(p.over)
		p.keep.Close()
	})
}

func (p *pipe) close() {
	p.finish()
	p.read.Close()
}
