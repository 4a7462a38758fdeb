package guest

import (
	"context"
	"errors"
	"io"
	"log/slog"
	"net"
	"time"
)

var errNotYet = errors.New("guest protocol is not written yet")

// Options tune a Session.
type Options struct {
	Log       *slog.Logger  // nil: discarded
	Heartbeat time.Duration // a peer silent for this long is dead; 0: 15 s
}

// IO connects a Command to the host.
type IO struct {
	Stdin          io.Reader // nil: closed at once
	Stdout, Stderr io.Writer // nil: discarded
	Resize         <-chan Size
}

// Session is the host's half of the protocol: one conversation with the agent of one guest.
type Session struct{}

// Attach shakes hands with the agent on conn, which it owns from then on, also when it fails.
func Attach(ctx context.Context, conn net.Conn, o Options) (*Session, error) {
	return nil, errors.Join(errNotYet, conn.Close())
}

// Hello returns what the agent said of itself.
func (s *Session) Hello() Hello { return Hello{} }

// Configure makes the guest this runner's guest.
func (s *Session) Configure(ctx context.Context, c Config) (Configured, error) {
	return Configured{}, errNotYet
}

// Exec runs c and blocks until it ended and all its output is written. Cancelling ctx ends the process group (TERM,
// then KILL after 10 s) and returns ctx's error.
func (s *Session) Exec(ctx context.Context, c Command, io IO) (Exit, error) { return Exit{}, errNotYet }

// Stats asks what the guest uses.
func (s *Session) Stats(ctx context.Context) (Stats, error) { return Stats{}, errNotYet }

// Reboot makes the guest write its disks and reboot. It returns when the agent acknowledged.
func (s *Session) Reboot(ctx context.Context) error { return errNotYet }

// Done is closed when the session is over.
func (s *Session) Done() <-chan struct{} { return nil }

// Err says why the session is over, once Done is closed.
func (s *Session) Err() error { return errNotYet }

// Close ends the session. Processes in the guest go on.
func (s *Session) Close() error { return nil }
