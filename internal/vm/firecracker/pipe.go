package firecracker

import (
	"fmt"
	"io"
	"os"

	"golang.org/x/sys/unix"
)

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
