package qemu

import (
	"bufio"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"sync"
	"syscall"
	"time"
)

// qmpLine bounds a message of QEMU's monitor, in bytes. A QEMU a guest has broken into is as hostile as the guest.
const qmpLine = 64 << 10

// qmp is the one client of a QEMU's monitor. It sends two commands and listens to events.
type qmp struct {
	conn  net.Conn
	ready chan struct{} // closed when QEMU has answered: its machine is set up and its main loop runs
	// ending is called when QEMU says that it is about to end; nil: nothing is.
	ending func()

	mu       sync.Mutex
	reason   string // of the last SHUTDOWN event; empty: none came
	panicked bool   // GUEST_PANICKED came
}

type qmpMessage struct {
	QMP    json.RawMessage `json:"QMP"`
	Return json.RawMessage `json:"return"`
	Error  *struct {
		Desc string `json:"desc"`
	} `json:"error"`
	Event string `json:"event"`
	Data  struct {
		Reason string `json:"reason"`
	} `json:"data"`
}

func newQMP(conn net.Conn) *qmp { return &qmp{conn: conn, ready: make(chan struct{})} }

// listen reads messages until QEMU ends, and returns why it stopped; nil when QEMU closed the connection.
func (q *qmp) listen() error {
	lines := bufio.NewScanner(q.conn)
	lines.Buffer(make([]byte, 0, 4096), qmpLine)
	for lines.Scan() {
		var m qmpMessage
		if err := json.Unmarshal(lines.Bytes(), &m); err != nil {
			return fmt.Errorf("read monitor message: %w", err)
		}
		switch {
		case m.QMP != nil:
			if err := q.send("qmp_capabilities"); err != nil {
				return err
			}
		case m.Error != nil:
			return fmt.Errorf("talk to monitor: %q", m.Error.Desc)
		case m.Return != nil && !q.answered():
			close(q.ready)
		case m.Event != "":
			q.note(m)
			if m.Event == "SHUTDOWN" && q.ending != nil {
				q.ending()
			}
		}
	}
	// Reset is what a QEMU leaves that dies before it has taken the connection.
	if err := lines.Err(); err != nil && !errors.Is(err, syscall.ECONNRESET) {
		return fmt.Errorf("read monitor message: %w", err)
	}
	return nil
}

func (q *qmp) note(m qmpMessage) {
	q.mu.Lock()
	defer q.mu.Unlock()
	switch m.Event {
	case "SHUTDOWN":
		q.reason = m.Data.Reason
	case "GUEST_PANICKED":
		q.panicked = true
	}
}

// ended tells what QEMU said of its end.
func (q *qmp) ended() (reason string, panicked bool) {
	q.mu.Lock()
	defer q.mu.Unlock()
	return q.reason, q.panicked
}

// answered tells whether QEMU has.
func (q *qmp) answered() bool {
	select {
	case <-q.ready:
		return true
	default:
		return false
	}
}

// send writes a command without arguments. It does not wait for the answer.
func (q *qmp) send(command string) error {
	if err := q.conn.SetWriteDeadline(time.Now().Add(time.Second)); err != nil {
		return fmt.Errorf("send %s to monitor: %w", command, err)
	}
	if _, err := fmt.Fprintf(q.conn, "{\"execute\":%q}\n", command); err != nil {
		return fmt.Errorf("send %s to monitor: %w", command, err)
	}
	return nil
}
