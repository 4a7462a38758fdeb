package githubsim

import (
	"fmt"
	"strings"
	"sync"
	"time"
	"unicode"
	"unicode/utf8"
)

// Conclusion is how a job, a step or a run ended, in the words of GitHub's REST API.
type Conclusion string

// The conclusions. A run is never skipped.
const (
	Success   Conclusion = "success"
	Failure   Conclusion = "failure"
	Cancelled Conclusion = "cancelled"
	Skipped   Conclusion = "skipped"
)

// Kind tells events apart.
type Kind int

// The kinds of event.
const (
	JobQueued        Kind = iota + 1 // its needs are met; it waits for a scale set
	JobAssigned                      // a scale set has it
	JobStarted                       // a runner has it
	StepStarted                      //
	StepCompleted                    // lines of the step may still follow: they come by another connection
	LogLine                          //
	JobCompleted                     // every log line of the job came before
	JobSkipped                       // its `if:` said no
	RunCompleted                     //
	RunnerRegistered                 //
	RunnerOnline                     // it has a session
	RunnerRemoved                    //
	JobUnserved                      // it waits, and will for ever: no scale set and no runner has all its labels
	JobHeld                          // it waits for a reviewer of its environment
)

// String returns the kind in lower case.
func (k Kind) String() string {
	names := [...]string{
		"", "job queued", "job assigned", "job started", "step started", "step completed", "log line", "job completed", "job skipped",
		"run completed", "runner registered", "runner online", "runner removed", "job unserved", "job held",
	}
	if k < 1 || int(k) >= len(names) {
		return fmt.Sprintf("kind(%d)", int(k))
	}
	return names[k]
}

// Event is one thing that happened. Fields that do not apply are empty. What came from a guest (Step, Line) is bounded
// and free of control characters other than tabs and colours.
type Event struct {
	At         time.Time
	Kind       Kind
	RunID      int64
	Run        string // name of the workflow
	JobID      string // as the coordinator and the runner know it
	Job        string // display name
	Step       string // display name
	Runner     string // name
	Line       string // of the log, without its newline
	Conclusion Conclusion
	Labels     []string // with JobUnserved: what its runs-on: asks for
}

// Bounds on what an observer may fall behind; beyond them, log lines are dropped and counted.
const (
	maxQueuedEvents = 1 << 17
	maxQueuedBytes  = 16 << 20
)

// eventQueue hands events to the observer in order and outside the hub's lock. Whoever finds the queue unattended
// attends it, so it needs no goroutine of its own.
type eventQueue struct {
	mu         sync.Mutex
	observe    func(Event)
	pending    []queuedEvent
	size       int // bytes of the lines pending
	delivering bool
	dropped    int
}

type queuedEvent struct {
	Event
	after func() // called once the event was observed; may be nil
}

func (q *eventQueue) add(e Event, after func()) {
	q.mu.Lock()
	defer q.mu.Unlock()
	if e.Kind == LogLine {
		if len(q.pending) >= maxQueuedEvents || q.size >= maxQueuedBytes {
			q.dropped++
			return
		}
		if q.dropped > 0 {
			gap := e
			gap.Line = fmt.Sprintf("(%d log lines dropped: the reader was too slow)", q.dropped)
			q.pending, q.dropped = append(q.pending, queuedEvent{Event: gap}), 0
		}
	}
	q.pending = append(q.pending, queuedEvent{e, after})
	q.size += len(e.Line)
}

func (q *eventQueue) deliver() {
	q.mu.Lock()
	defer q.mu.Unlock()
	if q.delivering {
		return
	}
	q.delivering = true
	for len(q.pending) > 0 {
		batch := q.pending
		q.pending, q.size = nil, 0
		q.mu.Unlock()
		for _, e := range batch {
			if q.observe != nil {
				q.observe(e.Event)
			}
			if e.after != nil {
				e.after()
			}
		}
		q.mu.Lock()
	}
	q.delivering = false
}

const (
	maxLine = 8 << 10 // bytes of one log line kept
	maxName = 256     // bytes of a name that came from a client
)

// clip bounds s and takes out what could play tricks on a terminal: every control character except tabs, and every
// escape sequence except those that set colours (CSI … m).
func clip(s string, limit int) string {
	var b strings.Builder
	for i := 0; i < len(s) && b.Len() < limit; {
		if n, colour := escape(s[i:]); n > 0 {
			if colour {
				b.WriteString(s[i : i+n])
			}
			i += n
			continue
		}
		r, n := utf8.DecodeRuneInString(s[i:])
		i += n
		if r == '\t' || (r != utf8.RuneError && !unicode.IsControl(r) && !unicode.Is(unicode.Cf, r)) {
			b.WriteRune(r)
		}
	}
	return b.String()
}

// escape returns the length of the control sequence s begins with, 0 when it begins with none, and whether all the
// sequence does is set a colour.
func escape(s string) (n int, colour bool) {
	if !strings.HasPrefix(s, "\x1b[") {
		return 0, false
	}
	colour = true
	for i := 2; i < len(s) && i < 32; i++ {
		c := s[i]
		if c >= 0x40 && c <= 0x7e { // the final byte
			return i + 1, colour && c == 'm'
		}
		colour = colour && (c == ';' || c == ':' || (c >= '0' && c <= '9'))
	}
	return 0, false
}
