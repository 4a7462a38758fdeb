package webhook

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"sync"
	"time"
)

const (
	// maxHookConns bounds the connections of webhooks: whoever reaches the port must not use up the descriptors VMs need. GitHub's
	// wait meanwhile, and what it gives up is asked for again.
	maxHookConns = 512
	// hookIdle is how long a connection may be kept without a request. GitHub's come in bursts.
	hookIdle = 30 * time.Second
	// hookGrace is what webhooks under way get when the program ends.
	hookGrace = 2 * time.Second
)

// server is the HTTP side of the webhooks, which come to a path. GitHub gives up after 10 s.
func (r *Receiver) server(path string) *http.Server {
	return &http.Server{
		// Not a ServeMux: to that, the path would be a pattern.
		Handler: http.HandlerFunc(func(w http.ResponseWriter, req *http.Request) {
			if req.URL.Path != path {
				w.Header().Set("Connection", "close")
				http.NotFound(w, req)
				return
			}
			r.answer(w, req)
		}),
		ReadHeaderTimeout: 5 * time.Second, ReadTimeout: 10 * time.Second, WriteTimeout: 10 * time.Second,
		IdleTimeout: hookIdle, MaxHeaderBytes: 32 << 10, ErrorLog: slog.NewLogLogger(r.log.Handler(), slog.LevelWarn),
	}
}

// Serve answers GitHub's deliveries, which come to a path, until ctx ends; then it closes the listener.
func (r *Receiver) Serve(ctx context.Context, l net.Listener, path string) error {
	s := r.server(path)
	ended := make(chan struct{})
	stop := context.AfterFunc(ctx, func() {
		defer close(ended)
		end, cancel := context.WithTimeout(context.WithoutCancel(ctx), hookGrace)
		defer cancel()
		if s.Shutdown(end) != nil {
			_ = s.Close()
		}
	})
	r.log.Info("listening for webhooks", "address", l.Addr().String(), "path", path)
	err := s.Serve(limitConns(l, maxHookConns))
	if stop() {
		return fmt.Errorf("serve webhooks: %w", err)
	}
	<-ended
	if !errors.Is(err, http.ErrServerClosed) {
		return err
	}
	return nil
}

// limited is a listener that accepts a connection only while fewer than cap(slots) of its own are open.
type limited struct {
	net.Listener
	slots  chan struct{}
	closed chan struct{}
	once   sync.Once
}

func limitConns(l net.Listener, n int) net.Listener {
	return &limited{Listener: l, slots: make(chan struct{}, n), closed: make(chan struct{})}
}

// Accept implements net.Listener.
func (l *limited) Accept() (net.Conn, error) {
	select {
	case l.slots <- struct{}{}:
	case <-l.closed:
		return nil, net.ErrClosed
	}
	c, err := l.Listener.Accept()
	if err != nil {
		<-l.slots
		return nil, err
	}
	return &limitedConn{Conn: c, release: sync.OnceFunc(func() { <-l.slots })}, nil
}

// Close implements net.Listener. It ends an Accept that waits for a connection to close.
func (l *limited) Close() error {
	l.once.Do(func() { close(l.closed) })
	return l.Listener.Close()
}

// limitedConn gives its slot back when it is closed.
type limitedConn struct {
	net.Conn
	release func()
}

// Close implements net.Conn.
func (c *limitedConn) Close() error {
	defer c.release()
	return c.Conn.Close()
}
