package app

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
)

// hookServer is the HTTP side of the webhooks. GitHub gives up after 10 s.
func (a *App) hookServer() *http.Server {
	hooks := a.hooks.Handler()
	return &http.Server{
		// Not a ServeMux: to that, the path would be a pattern.
		Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			if r.URL.Path != a.cfg.Webhook.Path {
				w.Header().Set("Connection", "close")
				http.NotFound(w, r)
				return
			}
			hooks.ServeHTTP(w, r)
		}),
		ReadHeaderTimeout: 5 * time.Second, ReadTimeout: 10 * time.Second, WriteTimeout: 10 * time.Second,
		IdleTimeout: hookIdle, MaxHeaderBytes: 32 << 10, ErrorLog: slog.NewLogLogger(a.log.Handler(), slog.LevelWarn),
	}
}

// serveHooks answers GitHub's deliveries until ctx ends.
func (a *App) serveHooks(ctx context.Context) error {
	s := a.hookServer()
	ended := make(chan struct{})
	stop := context.AfterFunc(ctx, func() {
		defer close(ended)
		end, cancel := context.WithTimeout(context.WithoutCancel(ctx), webhookGrace)
		defer cancel()
		if s.Shutdown(end) != nil {
			_ = s.Close()
		}
	})
	a.log.Info("listening for webhooks", "address", a.listener.Addr().String(), "path", a.cfg.Webhook.Path)
	err := s.Serve(limitConns(a.listener, maxHookConns))
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
