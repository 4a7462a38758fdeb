package guest

import (
	"context"
	"io"
	"log/slog"
)

// System is what an Agent acts on: the guest's machine, or a script in tests. Its methods may be called from several
// goroutines, but Configure, Start and Reboot of one Agent never overlap.
type System interface {
	Configure(ctx context.Context, c Config) (Configured, error)
	Start(c Command) (Process, error)
	Stats() (Stats, error)
	// Reboot is called after its request was acknowledged to the host. It may return, or not.
	Reboot() error
}

// Process is a running process of a System.
type Process interface {
	// Stdio returns the process's ends; stderr is nil with a TTY. The agent reads the outputs to their end and closes
	// all three (the readers where they are io.Closers).
	Stdio() (stdin io.WriteCloser, stdout, stderr io.Reader)
	// Signal sends a signal, named "SIGTERM" and so on, to the process group.
	Signal(sig string) error
	Resize(Size) error
	// Wait blocks until the process ended. It is called once.
	Wait() (Exit, error)
}

// Agent is the guest's half of the protocol. It outlives its connections.
type Agent struct{}

// NewAgent returns an agent that acts on sys and presents itself with hello, whose Uptime is as of this call.
func NewAgent(sys System, hello Hello, log *slog.Logger) *Agent { return &Agent{} }

// Serve talks to one host on conn, which it owns, until conn or ctx ends, or the host says goodbye (nil). Processes go
// on; the next Serve delivers what they wrote meanwhile.
func (a *Agent) Serve(ctx context.Context, conn io.ReadWriteCloser) error { return errNotYet }

// Close kills every process and returns when nothing of the agent runs any more.
func (a *Agent) Close() error { return nil }
