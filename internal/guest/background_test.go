package guest

import (
	"bytes"
	"context"
	"errors"
	"io"
	"testing"
	"testing/synctest"
	"time"
)

// Something in the background that holds the output open must not hold up the exit, nor lose what was written before.
func TestBackgroundHolderOfOutput(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s, _ := pair(t, newScript(func(Command) (Process, error) {
			p := &proc{exit: make(chan Exit, 1)}
			p.in, p.stdin = io.Pipe()
			p.stdout, p.out = io.Pipe()
			p.stderr, p.err = io.Pipe()
			go func() {
				io.WriteString(p.out, "last words")
				p.err.Close()
				p.exit <- Exit{Code: 3} // stdout stays open
			}()
			return p, nil
		}))
		var out bytes.Buffer
		begin := time.Now()
		e, err := s.Exec(t.Context(), Command{Args: []string{"x"}}, IO{Stdout: &out})
		if err != nil || e.Code != 3 || out.String() != "last words" {
			t.Errorf("exit %+v, error %v, output %q", e, err, &out)
		}
		if took := time.Since(begin); took < outputGrace || took > 3*outputGrace {
			t.Errorf("took %v", took)
		}
	})
}

// ended is a process that ended before anybody looked, and left its output to others.
type ended struct {
	stdout  io.Reader
	signals chan string
	cut     chan struct{} // closed when stdout is
}

func newEnded(stdout io.Reader) *ended {
	return &ended{stdout: stdout, signals: make(chan string, 16), cut: make(chan struct{})}
}

func (p *ended) Stdio() (io.WriteCloser, io.Reader, io.Reader) {
	_, in := io.Pipe()
	return in, p, nil
}
func (p *ended) Read(b []byte) (int, error) { return p.stdout.Read(b) }
func (p *ended) Close() error               { close(p.cut); return nil }
func (p *ended) Signal(sig string) error    { p.signals <- sig; return nil }
func (p *ended) Resize(Size) error          { return nil }
func (p *ended) Wait() (Exit, error)        { return Exit{Code: 3}, nil }

// reading is an io.Reader in one function.
type reading func(b []byte) (int, error)

func (r reading) Read(b []byte) (int, error) { return r(b) }

// Something in the background that goes on to write must not hold up the exit for ever: its group is killed, and what
// left the group is not listened to for longer.
func TestBackgroundWriter(t *testing.T) {
	for name, every := range map[string]time.Duration{"now and then": 400 * time.Millisecond, "without a pause": time.Millisecond} {
		for _, leaves := range []bool{false, true} { // the process group
			synctest.Test(t, func(t *testing.T) {
				var p *ended
				p = newEnded(reading(func(b []byte) (int, error) {
					time.Sleep(every)
					if !leaves && len(p.signals) > 0 {
						return 0, io.EOF
					}
					if every == time.Millisecond {
						return len(b), nil
					}
					return copy(b, "x\n"), nil
				}))
				s, _ := pair(t, newScript(func(Command) (Process, error) { return p, nil }))
				begin := time.Now()
				e, err := s.Exec(t.Context(), Command{Args: []string{"x"}}, IO{Stdout: io.Discard})
				if err != nil || e.Code != 3 {
					t.Errorf("%s: exit %+v, error %v", name, e, err)
				}
				if took := time.Since(begin); took < outputLimit || took > outputLimit+outputGrace {
					t.Errorf("%s: took %v", name, took)
				}
				<-p.cut
				if len(p.signals) != 1 || <-p.signals != "SIGKILL" {
					t.Errorf("%s: the group was not killed", name)
				}
			})
		}
	}
}

// What a process itself wrote comes whole, however long the host takes for it after the process ended, and though
// something in the background holds the output.
func TestOutputLeftBehindIsNotCut(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		size := window + pipeSize
		left := size
		block := make(chan struct{})
		p := newEnded(reading(func(b []byte) (int, error) {
			if left == 0 {
				<-block
				return 0, io.EOF
			}
			n := min(left, len(b))
			left -= n
			return n, nil
		}))
		s, _ := pair(t, newScript(func(Command) (Process, error) { return p, nil }))
		go func() {
			<-p.cut
			close(block)
		}()
		g := newGate()
		time.AfterFunc(time.Minute, func() { close(g.open) })
		if _, err := s.Exec(t.Context(), Command{Args: []string{"x"}}, IO{Stdout: g}); err != nil || g.n.Load() != int64(size) {
			t.Errorf("%d bytes of %d came, error %v", g.n.Load(), size, err)
		}
	})
}

// A signal reaches what a process left behind.
func TestCancelReachesTheBackground(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var p *ended
		p = newEnded(reading(func(b []byte) (int, error) {
			time.Sleep(10 * time.Millisecond)
			if len(p.signals) > 0 {
				return 0, io.EOF
			}
			return copy(b, "x\n"), nil
		}))
		s, _ := pair(t, newScript(func(Command) (Process, error) { return p, nil }))
		ctx, cancel := context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		begin := time.Now()
		if _, err := s.Exec(ctx, Command{Args: []string{"x"}}, IO{}); !errors.Is(err, context.DeadlineExceeded) {
			t.Error(err)
		}
		if took := time.Since(begin); took > 2*time.Second || <-p.signals != "SIGTERM" {
			t.Errorf("took %v", took)
		}
	})
}
