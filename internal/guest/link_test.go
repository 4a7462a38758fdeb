package guest

import (
	"net"
	"testing"
)

// A process is registered, its start is queued, and its input comes, all while the writer has seen an empty queue and looks for data:
// the agent must hear of the start first, or it takes the input for that of a process it has forgotten.
func TestStartIsSentBeforeInput(t *testing.T) {
	near, far := net.Pipe()
	var l *link
	begun := false
	l = newLink(near, 0, func(buf []byte) (frame, bool) {
		if begun {
			return frame{}, false
		}
		begun = true
		l.send(frame{kind: kindStart, stream: 7})
		return frame{kind: kindStdin, stream: 7, payload: append(buf[:0], "input"...)}, true
	})
	written := make(chan struct{})
	go func() {
		defer close(written)
		l.write()
	}()
	defer func() {
		l.fail(errClosed)
		far.Close()
		<-written
	}()
	d := newDecoder(far)
	for _, want := range []frame{{kind: kindStart}, {kind: kindStdin, payload: []byte("input")}} {
		f, err := d.next()
		if err != nil || f.kind != want.kind || f.stream != 7 || f.version != Version || string(f.payload) != string(want.payload) {
			t.Fatalf("got %+v, %v; want %+v", f, err, want)
		}
	}
}
