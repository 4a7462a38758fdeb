// Package regular opens the files that people name, and only ordinary ones.
//
// Opening a pipe waits until somebody writes to it, where no context and no signal reaches, and a device may have no end. Whoever
// takes a path from a person, a configuration or a directory that somebody else wrote opens it here. The package must not know what a
// file holds, and its errors do not say the path: whoever asked says what was to be done with which file.
package regular

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"

	"golang.org/x/sys/unix"

	"flint"
)

// ErrOther is in the error about a path where something else is than an ordinary file.
var ErrOther = errors.New("it is no ordinary file")

// Check reports what keeps a path, or what its links lead to, from being an ordinary file, without opening it. The error of one that is not
// there is fs.ErrNotExist.
func Check(path string) error {
	info, err := os.Stat(path)
	if err != nil {
		return Cause(err)
	}
	return ordinary(info)
}

// Open opens an ordinary file for reading. It waits for nothing but another process's lease on it.
func Open(path string) (*os.File, error) {
	if err := Check(path); err != nil { // first: a device may do something when it is opened, and a socket cannot be
		return nil, err
	}
	f, err := os.OpenFile(path, os.O_RDONLY|unix.O_NONBLOCK, 0)
	if errors.Is(err, unix.EWOULDBLOCK) { // somebody has a lease (fcntl(2)), which the kernel ends within a bound
		f, err = os.Open(path)
	}
	if err != nil {
		return nil, Cause(err)
	}
	info, err := f.Stat() // what is at a path may have changed
	if err == nil {
		err = ordinary(info)
	}
	if err != nil {
		f.Close()
		return nil, Cause(err)
	}
	return f, nil
}

// Read reads an ordinary file that holds at most so much. It refuses a larger one.
func Read(path string, most flint.Bytes) ([]byte, error) {
	f, err := Open(path)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	b, err := io.ReadAll(io.LimitReader(f, int64(most)+1))
	if err != nil {
		return nil, Cause(err)
	}
	if flint.Bytes(len(b)) > most {
		return nil, fmt.Errorf("it has more than %s", most)
	}
	return b, nil
}

func ordinary(info fs.FileInfo) error {
	kind := "a device"
	switch mode := info.Mode(); {
	case mode.IsRegular():
		return nil
	case mode.IsDir():
		kind = "a directory"
	case mode&fs.ModeNamedPipe != 0:
		kind = "a pipe"
	case mode&fs.ModeSocket != 0:
		kind = "a socket"
	}
	return fmt.Errorf("%w but %s", ErrOther, kind)
}

// Cause is an error without the name of the system call and the path, for whoever says these himself.
func Cause(err error) error {
	var path *fs.PathError
	if errors.As(err, &path) {
		return path.Err
	}
	return err
}
