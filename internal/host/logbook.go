package host

import (
	"bufio"
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"sync"

	"flint/internal/vm"
)

const (
	// logFile, in a runner's directory, has what its program printed; logBefore what was in it before it was full.
	logFile   = "output.log"
	logBefore = "output.log.1"
	// logFull is how much of it a file takes. Of a longer output the newest of that size, at least, are kept.
	logFull = 8 << 20
	// logMark begins each file, with the version of its form.
	logMark = "flint output 1\n"
	// logHead is the size of what precedes each piece: its stream (one byte), its position in that (8), its length (4).
	logHead = 13
	// maxPiece bounds a piece that is read back.
	maxPiece = 1 << 20
)

// The streams of a logbook.
const (
	outStream = iota
	errStream
	streams
)

// logbook keeps the output of a runner's program over restarts: no byte is lost, and none is there twice. A piece is written
// before the agent hears that it arrived, with its position in its stream; so whoever opens the logbook next knows what is new
// of what the agent sends again. It is not synced: a crash of the machine takes the VM as well.
type logbook struct {
	dir  string
	log  *slog.Logger
	tail *vm.Ring // the end of both streams

	mu     sync.Mutex
	f      *os.File
	size   int64          // of f up to the last whole piece
	at     [streams]int64 // position behind what is kept of each stream
	failed bool           // it was said that the file cannot be written
}

// openLogbook opens the logbook in dir, with what an earlier process wrote into it. One that cannot be opened or written is
// no reason to end a job: it keeps the end of the output in memory then, and says so once.
func openLogbook(dir string, log *slog.Logger) *logbook {
	b := &logbook{dir: dir, log: log, tail: vm.NewRing(tailKept)}
	b.mu.Lock()
	defer b.mu.Unlock()
	if _, err := b.read(logBefore); err != nil {
		b.complain(err)
	}
	size, err := b.read(logFile)
	if err == nil {
		err = b.open(size)
	}
	if err != nil {
		b.complain(err)
	}
	return b
}

// tailKept is how much of the output is in a Result.
const tailKept = 32 << 10

// read takes in what a file has and returns how much of it is whole. What follows, if anything, was being written when the
// process died, and the agent still has it.
func (b *logbook) read(name string) (whole int64, err error) {
	f, err := os.Open(filepath.Join(b.dir, name))
	if errors.Is(err, fs.ErrNotExist) {
		return 0, nil
	}
	if err != nil {
		return 0, fmt.Errorf("read output: %w", err)
	}
	defer f.Close()
	r := bufio.NewReaderSize(f, 64<<10)
	mark := make([]byte, len(logMark))
	if _, err := io.ReadFull(r, mark); err != nil || string(mark) != logMark {
		return 0, nil
	}
	whole = int64(len(logMark))
	var head [logHead]byte
	var piece bytes.Buffer
	for {
		if _, err := io.ReadFull(r, head[:]); err != nil {
			return whole, nil
		}
		stream, at, n := int(head[0]), int64(binary.BigEndian.Uint64(head[1:])), int64(binary.BigEndian.Uint32(head[9:]))
		piece.Reset()
		if stream >= streams || at < 0 || n > maxPiece {
			return whole, nil
		}
		if m, err := io.CopyN(&piece, r, n); err != nil || m != n {
			return whole, nil
		}
		_, _ = b.tail.Write(piece.Bytes()) // never fails
		b.at[stream] = at + n
		whole += logHead + n
	}
}

// open begins, or goes on with, the file; size is what of it is whole. The caller holds b.mu.
func (b *logbook) open(size int64) error {
	f, err := os.OpenFile(filepath.Join(b.dir, logFile), os.O_CREATE|os.O_RDWR, 0o600)
	if err != nil {
		return fmt.Errorf("open output: %w", err)
	}
	if err := f.Truncate(size); err != nil {
		return errors.Join(fmt.Errorf("cut output: %w", err), f.Close())
	}
	b.f, b.size = f, size
	if size > 0 {
		return nil
	}
	start := []byte(logMark)
	for stream, at := range b.at { // where each stream is, even if the file before goes
		start = appendPiece(start, stream, at, nil)
	}
	if err := b.append(start); err != nil {
		b.f = nil
		return errors.Join(err, f.Close())
	}
	return nil
}

func appendPiece(to []byte, stream int, at int64, p []byte) []byte {
	to = append(to, byte(stream))
	to = binary.BigEndian.AppendUint64(to, uint64(at))
	to = binary.BigEndian.AppendUint32(to, uint32(len(p)))
	return append(to, p...)
}

// append writes at the end. What was written in part is cut off.
func (b *logbook) append(p []byte) error {
	if _, err := b.f.WriteAt(p, b.size); err != nil {
		return errors.Join(fmt.Errorf("write output: %w", err), b.f.Truncate(b.size))
	}
	b.size += int64(len(p))
	return nil
}

// stream returns a writer of one stream that begins at a position of it.
func (b *logbook) stream(stream int, at int64) io.Writer { return &logStream{b, stream, at} }

type logStream struct {
	b      *logbook
	stream int
	at     int64
}

// Write implements io.Writer. It never fails.
func (s *logStream) Write(p []byte) (int, error) {
	s.b.write(s.stream, s.at, p)
	s.at += int64(len(p))
	return len(p), nil
}

// write keeps what of p, which begins at a position of the stream, is not kept yet.
func (b *logbook) write(stream int, at int64, p []byte) {
	b.mu.Lock()
	defer b.mu.Unlock()
	if known := b.at[stream] - at; known > 0 {
		n := min(known, int64(len(p)))
		p, at = p[n:], at+n
	}
	if len(p) == 0 {
		return
	}
	if err := b.keep(appendPiece(make([]byte, 0, logHead+len(p)), stream, at, p)); err != nil {
		b.complain(err)
	}
	_, _ = b.tail.Write(p)            // never fails
	b.at[stream] = at + int64(len(p)) // not before: a file that keep begins says what the one before it has
}

// keep appends a piece, to a new file if this one is full. The caller holds b.mu.
func (b *logbook) keep(piece []byte) error {
	if b.f == nil {
		return nil
	}
	if b.size >= logFull {
		path := filepath.Join(b.dir, logFile)
		if err := os.Rename(path, filepath.Join(b.dir, logBefore)); err != nil {
			return fmt.Errorf("begin another file of output: %w", err)
		}
		old := b.f
		b.f = nil
		if err := errors.Join(old.Close(), b.open(0)); err != nil {
			return err
		}
	}
	return b.append(piece)
}

func (b *logbook) complain(err error) {
	if !b.failed {
		b.log.Warn("only the end of the runner's output is kept, and not over a restart", "err", err)
	}
	b.failed = true
}

// Bytes returns the end of the output.
func (b *logbook) Bytes() []byte { return b.tail.Bytes() }

// close lets go of the file. What is written later is kept in memory only.
func (b *logbook) close() error {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.f == nil {
		return nil
	}
	err := b.f.Close()
	b.f = nil
	return err
}
