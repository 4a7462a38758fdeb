package githubsim

import (
	"context"
	"encoding/json"
	"net/http"
	"sync"

	"github.com/coder/websocket"
)

// The live log: a runner sends its lines over a WebSocket, one JSON message per batch. The server only listens.

const (
	maxFeedMessage = 4 << 20 // bytes
	maxFeeds       = 4       // of one job at a time; a runner opens one, and another when it has lost that
)

// feeds are the open live logs, so that Close can end them: a hijacked connection is nobody else's.
type feeds struct {
	mu     sync.Mutex
	closed bool
	nextID int
	cancel map[int]context.CancelFunc
	jobs   map[string]int // how many are open, by job
	open   sync.WaitGroup
}

// begin returns a context that ends with the feed's request or with close, and what to call at the end. It refuses when it is
// too late, and when the job has enough.
func (f *feeds) begin(ctx context.Context, jobID string) (_ context.Context, end func(), err error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	switch {
	case f.closed:
		return nil, nil, errClosed()
	case f.jobs[jobID] >= maxFeeds:
		return nil, nil, &apiError{http.StatusTooManyRequests, "TooManyRequestsException", "the job has too many live logs"}
	}
	ctx, cancel := context.WithCancel(ctx)
	if f.cancel == nil {
		f.cancel, f.jobs = map[int]context.CancelFunc{}, map[string]int{}
	}
	f.nextID++
	id := f.nextID
	f.cancel[id] = cancel
	f.jobs[jobID]++
	f.open.Add(1)
	return ctx, func() {
		f.mu.Lock()
		delete(f.cancel, id)
		if f.jobs[jobID]--; f.jobs[jobID] == 0 {
			delete(f.jobs, jobID)
		}
		f.mu.Unlock()
		cancel()
		f.open.Done()
	}, nil
}

// close ends all feeds and waits for them.
func (f *feeds) close() {
	f.mu.Lock()
	f.closed = true
	for _, cancel := range f.cancel {
		cancel()
	}
	f.mu.Unlock()
	f.open.Wait()
}

// feedMessage is a batch of lines of one step.
type feedMessage struct {
	StepID    string   `json:"stepId"`
	Value     []string `json:"value"`
	StartLine *int     `json:"startLine"`
}

func (s *Server) serveFeed(w http.ResponseWriter, r *http.Request) {
	jobID, ok := s.creds.check(credJob, bearer(r, "Bearer"))
	if !ok {
		writeError(w, errUnauthorized())
		return
	}
	ctx, end, err := s.feeds.begin(r.Context(), jobID)
	if err != nil {
		writeError(w, err)
		return
	}
	defer end()
	s.hub.openFeed(jobID)
	conn, err := websocket.Accept(w, r, nil)
	if err != nil {
		return // Accept has answered
	}
	defer func() { _ = conn.CloseNow() }()
	conn.SetReadLimit(maxFeedMessage)
	for {
		_, b, err := conn.Read(ctx)
		if err != nil {
			return // the runner is done, gone, or sent too much
		}
		m, ok := parseFeed(b)
		if !ok {
			_ = conn.Close(websocket.StatusInvalidFramePayloadData, "not a batch of log lines")
			return
		}
		first := 0
		if m.StartLine != nil {
			first = max(*m.StartLine, 0)
		}
		s.hub.addLines(jobID, m.StepID, first, m.Value)
	}
}

// parseFeed decodes one batch. Runners differ in the case of the names, which encoding/json does not mind.
func parseFeed(b []byte) (feedMessage, bool) {
	var m feedMessage
	if err := json.Unmarshal(b, &m); err != nil || m.StepID == "" || len(m.StepID) > 64 {
		return feedMessage{}, false
	}
	if len(m.Value) > maxFeedLines {
		m.Value = m.Value[:maxFeedLines]
	}
	return m, true
}
