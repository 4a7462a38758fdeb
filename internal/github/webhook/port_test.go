package webhook

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"net"
	"net/http"
	"strings"
	"testing"
	"time"
)

// TestStrangersAtTheWebhookPort: whoever sends no good webhook is told so and cannot keep the connection.
func TestStrangersAtTheWebhookPort(t *testing.T) {
	r := open(t, t.TempDir(), &host{}, Account{Secret: secret})
	l, err := new(net.ListenConfig).Listen(t.Context(), "tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	ctx, stop := context.WithCancel(t.Context())
	served := make(chan error, 1)
	go func() { served <- r.Serve(ctx, l, "/hook/{x") }() // as a pattern, it would end the program
	for request, want := range map[string]int{
		"GET /hook/{x HTTP/1.1\r\n":   http.StatusMethodNotAllowed,
		"POST /hook/{x HTTP/1.1\r\n":  http.StatusUnauthorized,
		"POST /hook/y HTTP/1.1\r\n":   http.StatusNotFound,
		"POST //hook/{x HTTP/1.1\r\n": http.StatusNotFound,
		"POST /hook/{x HTTP/1.1\r\nX-Large: " + strings.Repeat("x", 64<<10) + "\r\n": http.StatusRequestHeaderFieldsTooLarge,
	} {
		c, err := net.Dial("tcp", l.Addr().String())
		if err != nil {
			t.Fatal(err)
		}
		_ = c.SetDeadline(time.Now().Add(time.Minute))
		name := request[:min(30, len(request))]
		if _, err := fmt.Fprintf(c, "%sHost: flint\r\nContent-Length: 0\r\n\r\n", request); err != nil {
			t.Errorf("%q: %v", name, err)
		}
		resp, err := http.ReadResponse(bufio.NewReader(c), nil)
		if err != nil {
			t.Fatalf("%q: %v", name, err)
		}
		if resp.StatusCode != want || !resp.Close {
			t.Errorf("%q: %s, connection closed: %v; want %d", name, resp.Status, resp.Close, want)
		}
		_ = resp.Body.Close()
		_ = c.Close()
	}
	stop()
	if err := <-served; err != nil {
		t.Error(err)
	}
}

func TestConnectionsAreLimited(t *testing.T) {
	inner, err := new(net.ListenConfig).Listen(t.Context(), "tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	l := limitConns(inner, 2)
	accepted := make(chan net.Conn)
	ended := make(chan error, 1)
	go func() {
		for {
			c, err := l.Accept()
			if err != nil {
				ended <- err
				return
			}
			accepted <- c
		}
	}()
	var conns []net.Conn
	for n := range 3 {
		c, err := net.Dial("tcp", inner.Addr().String())
		if err != nil {
			t.Fatal(err)
		}
		defer c.Close()
		if _, err := c.Write([]byte{byte(n)}); err != nil {
			t.Fatal(err)
		}
		if n < 2 {
			conns = append(conns, <-accepted)
		}
	}
	select {
	case <-accepted:
		t.Fatal("a third connection is accepted")
	case <-time.After(50 * time.Millisecond): // it can only be too short to see the fault
	}
	for range 2 { // closed twice, it gives one slot back
		_ = conns[0].Close()
	}
	third := <-accepted
	b := make([]byte, 1)
	if _, err := third.Read(b); err != nil || !bytes.Equal(b, []byte{2}) {
		t.Errorf("the third connection brings %v, %v", b, err)
	}
	if err := l.Close(); err != nil {
		t.Error(err)
	}
	if err := <-ended; !errors.Is(err, net.ErrClosed) {
		t.Errorf("accept after close: %v", err)
	}
}
