package github

import (
	"errors"
	"net/http"
	"os"
	"path/filepath"
	"reflect"
	"slices"
	"strings"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"flint"
)

// bubble runs a test with a far end and a started client inside a synctest bubble.
func bubble(t *testing.T, change func(*Config), f func(t *testing.T, d *desk, stop func())) {
	t.Helper()
	testKey() // outside of the bubble's clock
	synctest.Test(t, func(t *testing.T) {
		d := newDesk(t, newFar(t), change)
		f(t, d, d.start(t))
	})
}

func TestHandlesPersistsThenAcknowledges(t *testing.T) {
	bubble(t, nil, func(t *testing.T, d *desk, stop func()) {
		d.far.with(func() { d.far.stats = map[string]int{"totalAssignedJobs": 1} })
		settle(time.Second)
		d.far.with(func() { d.far.stats = map[string]int{"totalAssignedJobs": 3, "totalAvailableJobs": 8} })
		d.far.send(job("JobAssigned", "", nil), job("JobStarted", "flint-1", nil), job("JobCompleted", "flint-1", map[string]any{"result": "succeeded"}),
			job("JobCompleted", "", map[string]any{"result": "canceled"}), job("JobNewKind", "flint-1", nil))
		settle(time.Second)

		want := []flint.Demand{{Pool: "flint", Assigned: 3, Available: 8}}
		got := d.Demand()
		if len(got) == 1 {
			want[0].At = got[0].At
		}
		if !reflect.DeepEqual(got, want) || time.Since(got[0].At) > 2*time.Second {
			t.Errorf("demand %+v, want %+v", got, want)
		}
		select {
		case <-d.Changed():
		default:
			t.Error("Changed is not signalled")
		}
		j := flint.Job{ID: "j1", RequestID: 5, Name: "build", Repository: "acme/app", RunID: 42}
		at := time.Date(2026, 11, 21, 12, 0, 0, 0, time.UTC)
		events := []flint.JobEvent{
			{Kind: flint.JobStarted, Pool: "flint", Runner: "flint-1", Job: j, At: at},
			{Kind: flint.JobCompleted, Pool: "flint", Runner: "flint-1", Job: j, Conclusion: "succeeded", At: at.Add(time.Minute)},
		}
		if !reflect.DeepEqual(d.events, events) {
			t.Errorf("events %+v, want %+v", d.events, events)
		}
		order := d.far.since("GET poll")
		if !reflect.DeepEqual(order, []string{"GET poll", "event 1 of flint-1", "event 2 of flint-1", "DELETE ack", "GET poll"}) {
			t.Errorf("order of things: %v", order)
		}
		if d.far.owner != "test-host" {
			t.Errorf("owner %q", d.far.owner)
		}
		stop()
		if d.far.session != "" {
			t.Error("the session is left over")
		}
	})
}

func TestEventThatIsNotPersistedComesAgain(t *testing.T) {
	bubble(t, nil, func(t *testing.T, d *desk, _ func()) {
		d.fail = 2
		d.far.send(job("JobStarted", "flint-1", nil))
		settle(500 * time.Millisecond)
		if n := d.far.count("DELETE ack"); n != 0 {
			t.Fatalf("acknowledged %d times although nothing was persisted", n)
		}
		if r := d.Waiting(); len(r) != 1 || r["flint"].Code != "github.events" {
			t.Errorf("waiting: %v", r)
		}
		settle(10 * time.Second)
		if len(d.events) != 1 || d.far.count("DELETE ack") != 1 || d.far.count("POST sessions") != 1 {
			t.Errorf("%d events, %d acknowledgements, %d sessions; want 1 of each", len(d.events), d.far.count("DELETE ack"), d.far.count("POST sessions"))
		}
		settle(time.Minute)
		if r := d.Waiting(); len(r) != 0 {
			t.Errorf("still waiting: %v", r)
		}
	})
}

func TestLostAcknowledgementTellsNothingTwice(t *testing.T) {
	f := func(t *testing.T, d *desk) {
		d.far.with(func() {
			d.far.refuse = func(route string, n int) *answer {
				if route == "DELETE ack" && n <= 2 {
					return refusal(503, "", "")
				}
				return nil
			}
		})
		d.far.send(job("JobStarted", "flint-1", nil))
	}
	t.Run("same session", func(t *testing.T) {
		bubble(t, nil, func(t *testing.T, d *desk, _ func()) {
			f(t, d)
			settle(time.Minute)
			if len(d.events) != 1 || d.far.count("DELETE ack") != 3 {
				t.Errorf("%d events, %d acknowledgements; want 1, 3", len(d.events), d.far.count("DELETE ack"))
			}
		})
	})
	t.Run("after a restart", func(t *testing.T) {
		dir := t.TempDir()
		bubble(t, func(c *Config) { c.StateDir = dir }, func(t *testing.T, d *desk, stop func()) {
			f(t, d)
			settle(500 * time.Millisecond)
			stop()
			second := newDesk(t, d.far, func(c *Config) { c.StateDir = dir })
			second.start(t)
			settle(time.Minute)
			if len(d.events) != 1 || len(second.events) != 0 || len(d.far.queue) != 0 {
				t.Errorf("%d and %d events, %d messages left; want 1, 0, 0", len(d.events), len(second.events), len(d.far.queue))
			}
			d.far.send(job("JobStarted", "flint-2", nil))
			settle(time.Second)
			if len(second.events) != 1 || second.events[0].Runner != "flint-2" {
				t.Errorf("the next message brought %v", second.events)
			}
		})
	})
}

func TestSessionHeldByAnother(t *testing.T) {
	bubble(t, func(*Config) {}, func(t *testing.T, d *desk, _ func()) {
		d.far.with(func() { d.far.session = another })
		settle(10 * time.Minute)
		r := d.Waiting()
		if len(r) != 1 || r["flint"].Code != "github.session" || !strings.Contains(r["flint"].Text, "pool flint") {
			t.Errorf("waiting: %v", r)
		}
		n := d.far.count("POST sessions")
		if n < 10 || n > 20 {
			t.Errorf("%d attempts in ten minutes", n)
		}
		if d.far.count("GET sets") != 1 || d.far.count("POST access_token") != 1 {
			t.Errorf("waiting for the session costs other calls: %v", d.far.calls)
		}
		d.far.with(func() { d.far.session = "" })
		settle(time.Minute + time.Second)
		if r := d.Waiting(); len(r) != 0 || d.far.owner != "test-host" {
			t.Errorf("waiting: %v, owner %q", r, d.far.owner)
		}
	})
}

// TestNumbersAreNotBelievedForEver: another coordinator takes the session and with it the jobs.
func TestNumbersAreNotBelievedForEver(t *testing.T) {
	bubble(t, nil, func(t *testing.T, d *desk, _ func()) {
		d.far.with(func() { d.far.stats = map[string]int{"totalAssignedJobs": 4} })
		settle(time.Minute)
		d.far.with(func() { d.far.session = another })
		settle(2 * time.Minute)
		if got := d.Demand(); len(got) != 1 || got[0].Assigned != 4 {
			t.Errorf("after two minutes without the session: %+v, want the last number", got)
		}
		settle(3 * time.Minute)
		if got := d.Demand(); len(got) != 0 {
			t.Errorf("after five minutes without the session: %+v", got)
		}
		const says = "no runner is started for the 4 jobs"
		if r := d.Waiting(); len(r) != 1 || r["flint"].Code != "github.session" || !strings.Contains(r["flint"].Text, says) {
			t.Errorf("waiting: %v", r)
		}
		settle(time.Minute)
		if n := strings.Count(d.log.String(), says); n != 1 {
			t.Errorf("it is logged %d times", n)
		}
		d.far.with(func() { d.far.session = "" })
		settle(time.Minute + time.Second)
		got := d.Demand()
		if len(got) != 1 || got[0].Assigned != 4 || time.Since(got[0].At) > time.Minute+time.Second {
			t.Errorf("with a session again: %+v, want a number of now", got)
		}
		if r := d.Waiting(); len(r) != 0 {
			t.Errorf("waiting: %v", r)
		}
	})
}

// TestSilenceIsBelieved: that GitHub has nothing to say for hours is no loss of anything.
func TestSilenceIsBelieved(t *testing.T) {
	bubble(t, nil, func(t *testing.T, d *desk, _ func()) {
		d.far.with(func() { d.far.stats = map[string]int{"totalAssignedJobs": 2} })
		settle(time.Hour)
		if got := d.Demand(); len(got) != 1 || got[0].Assigned != 2 {
			t.Errorf("demand %+v", got)
		}
	})
}

// TestRisingCapacityDoesNotHideSilence: the server takes every poll and answers none.
func TestRisingCapacityDoesNotHideSilence(t *testing.T) {
	bubble(t, nil, func(t *testing.T, d *desk, _ func()) {
		d.far.with(func() { d.far.stats = map[string]int{"totalAssignedJobs": 2} })
		settle(time.Second)
		d.far.with(func() { d.far.mute = true })
		for n := range 60 {
			d.Capacity("flint", n)
			settle(10 * time.Second)
		}
		if r := d.Waiting(); len(r) != 1 || r["flint"].Code != "github.unreachable" {
			t.Errorf("waiting: %v", r)
		}
		if got := d.Demand(); len(got) != 0 {
			t.Errorf("after ten minutes without an answer: %+v", got)
		}
	})
}

// TestSameNumberKeepsItsTime: the scheduler stops a runner when a number has stood for a while. Messages that repeat it must
// not put that off.
func TestSameNumberKeepsItsTime(t *testing.T) {
	bubble(t, nil, func(t *testing.T, d *desk, _ func()) {
		d.far.with(func() { d.far.stats = map[string]int{"totalAssignedJobs": 3} })
		settle(time.Second)
		at := d.Demand()[0].At
		for range 4 {
			d.far.with(func() { d.far.stats = map[string]int{"totalAssignedJobs": 3, "totalAvailableJobs": 5} })
			d.far.send(job("JobStarted", "flint-1", nil))
			settle(5 * time.Second)
		}
		if got := d.Demand()[0]; !got.At.Equal(at) || got.Available != 5 {
			t.Errorf("after the same number again: %+v, want the time %s", got, at)
		}
		d.far.with(func() { d.far.stats = map[string]int{"totalAssignedJobs": 2} })
		d.far.send(job("JobCompleted", "flint-1", nil))
		settle(time.Second)
		if got := d.Demand()[0]; got.Assigned != 2 || time.Since(got.At) > 2*time.Second {
			t.Errorf("after another number: %+v, want a time of now", got)
		}
	})
}

func TestExpiredQueueTokenIsRefreshed(t *testing.T) {
	bubble(t, nil, func(t *testing.T, d *desk, _ func()) {
		settle(time.Second)
		d.far.with(func() { d.far.token = "new" })
		settle(time.Second)
		d.far.send(job("JobStarted", "flint-1", nil))
		settle(time.Second)
		if n := d.far.count("PATCH sessions"); n != 1 || d.far.count("POST sessions") != 1 || len(d.events) != 1 {
			t.Errorf("%d refreshes, %d sessions, %d events; want 1 of each", n, d.far.count("POST sessions"), len(d.events))
		}
		if r := d.Waiting(); len(r) != 0 {
			t.Errorf("waiting: %v", r)
		}
	})
}

func TestDeletedScaleSetIsMadeAgain(t *testing.T) {
	bubble(t, nil, func(t *testing.T, d *desk, _ func()) {
		settle(time.Second)
		d.far.with(func() { clear(d.far.sets); d.far.session = "" })
		settle(10 * time.Second)
		if n := d.far.count("POST sets"); n != 2 || d.far.count("POST sessions") != 2 {
			t.Errorf("%d scale sets and %d sessions made; want 2, 2", n, d.far.count("POST sessions"))
		}
		if r := d.Waiting(); len(r) != 0 {
			t.Errorf("waiting: %v", r)
		}
		if _, err := d.Register(t.Context(), flint.Runner{ID: "flint-1", Pool: "flint"}); err != nil {
			t.Errorf("register in the new set: %v", err)
		}
	})
}

func TestGitHubDown(t *testing.T) {
	for name, no := range map[string]*answer{
		"5xx":   {status: 502, body: "<html>bad gateway"},
		"reset": {err: &os.SyscallError{Syscall: "read", Err: syscall.ECONNRESET}},
	} {
		t.Run(name, func(t *testing.T) {
			bubble(t, nil, func(t *testing.T, d *desk, _ func()) {
				d.far.with(func() { d.far.stats = map[string]int{"totalAssignedJobs": 2} })
				settle(time.Second)
				down := true
				d.far.with(func() {
					d.far.token = "expired" // so that the poll under way ends, and everything after it fails
					d.far.refuse = func(string, int) *answer {
						if down {
							return no
						}
						return nil
					}
				})
				settle(10 * time.Minute)
				r := d.Waiting()
				if len(r) != 1 || r["flint"].Code != "github.unreachable" || !strings.Contains(r["flint"].Text, "unreachable since 00:00:01") {
					t.Errorf("waiting: %v", r)
				}
				if n := d.far.count("GET poll"); n < 10 || n > 20 {
					t.Errorf("%d polls in ten minutes", n)
				}
				if n := strings.Count(d.log.String(), "no demand from GitHub"); n > 3 {
					t.Errorf("the outage is logged %d times", n)
				}
				d.far.with(func() { down = false })
				settle(time.Minute + time.Second) // an empty poll says that the number still stands
				if got := d.Demand(); len(got) != 1 || got[0].Assigned != 2 || time.Since(got[0].At) > time.Minute+time.Second {
					t.Errorf("after the outage: %+v", got)
				}
				d.far.send(job("JobStarted", "flint-1", nil))
				settle(2 * time.Minute)
				if r := d.Waiting(); len(r) != 0 || len(d.events) != 1 {
					t.Errorf("after the outage: waiting %v, events %v", r, d.events)
				}
				if n := d.far.count("POST sessions"); n != 1 {
					t.Errorf("%d sessions: the old one was to be kept", n)
				}
			})
		})
	}
}

func TestRetryAfterIsHonoured(t *testing.T) {
	bubble(t, nil, func(t *testing.T, d *desk, _ func()) {
		d.far.with(func() {
			d.far.refuse = func(route string, n int) *answer {
				if route == "POST registration-token" && n == 1 {
					return &answer{status: 403, header: http.Header{"Retry-After": {"300"}}}
				}
				return nil
			}
		})
		settle(299 * time.Second)
		if n := d.far.count("POST registration-token"); n != 1 {
			t.Errorf("%d requests before GitHub wanted one", n)
		}
		if r := d.Waiting(); len(r) != 1 || r["flint"].Code != "github.rate" {
			t.Errorf("waiting: %v", r)
		}
		settle(2 * time.Second)
		if r := d.Waiting(); len(r) != 0 {
			t.Errorf("waiting: %v", r)
		}
	})
}

func TestCapacityRisesCancelThePoll(t *testing.T) {
	bubble(t, nil, func(t *testing.T, d *desk, _ func()) {
		settle(time.Second)
		d.Capacity("flint", 2)
		settle(time.Second)
		d.Capacity("flint", 1) // a fall waits for the next poll
		settle(time.Second)
		d.Capacity("flint", 2) // no more than the poll under way was told
		settle(time.Second)
		d.Capacity("unknown", 9)
		d.Capacity("flint", -1)
		settle(50 * time.Second)
		if want := []int{0, 2, 0}; !slices.Equal(d.far.polls(), want) {
			t.Errorf("capacity headers %v, want %v", d.far.polls(), want)
		}
		for n := range 100 {
			d.Capacity("flint", n)
			settle(10 * time.Millisecond)
		}
		if n := len(d.far.polls()); n > 3+6 {
			t.Errorf("%d polls for one second of rising capacity", n-3)
		}
		settle(time.Second)
		if got := d.far.polls()[len(d.far.polls())-1]; got != 99 {
			t.Errorf("the last poll was told %d, want 99", got)
		}
	})
}

func TestAcquiresUpToFreeCapacity(t *testing.T) {
	dir := t.TempDir()
	bubble(t, func(c *Config) { c.StateDir = dir }, func(t *testing.T, d *desk, stop func()) {
		d.Capacity("flint", 3)
		d.far.with(func() { d.far.stats = map[string]int{"totalAssignedJobs": 1} })
		d.far.send(job("JobAvailable", "", map[string]any{"runnerRequestId": 11}), job("JobAvailable", "", map[string]any{"runnerRequestId": 12}),
			job("JobAvailable", "", map[string]any{"runnerRequestId": 13}), job("JobAvailable", "", map[string]any{"runnerRequestId": 14}))
		settle(time.Second)
		if !slices.Equal(d.far.acquired, []int64{11, 12}) {
			t.Errorf("acquired %v, want the first two", d.far.acquired)
		}
		stop() // what is left survives a restart
		second := newDesk(t, d.far, func(c *Config) { c.StateDir = dir })
		d.far.with(func() { d.far.stats = map[string]int{"totalAssignedJobs": 3} })
		second.start(t)
		second.Capacity("flint", 4)
		settle(time.Second)
		if !slices.Equal(d.far.acquired, []int64{11, 12, 13}) {
			t.Errorf("acquired %v, want one more", d.far.acquired)
		}
		d.far.with(func() {
			d.far.refuse = func(route string, _ int) *answer {
				if route == "POST acquirejobs" {
					return refusal(404, "", "not here")
				}
				return nil
			}
		})
		second.Capacity("flint", 9)
		settle(time.Minute)
		if n := d.far.count("POST acquirejobs"); n != 3 {
			t.Errorf("%d requests to acquire; a GitHub that assigns by itself is asked once", n)
		}
	})
}

func TestAnswersThatMakeNoSense(t *testing.T) {
	for name, tc := range map[string]struct{ route, body string }{
		"no registration token":   {"POST registration-token", `{}`},
		"no admin connection":     {"POST register", `{"url":"http://127.0.0.1:8080/tenant/"}`},
		"token without expiry":    {"POST register", `{"url":"http://127.0.0.1:8080/tenant/","token":"e30.e30.e30"}`},
		"count without sets":      {"GET sets", `{"count":1,"value":[]}`},
		"set without id":          {"GET sets", `{"count":1,"value":[{}]}`},
		"null session":            {"POST sessions", `null`},
		"message of another kind": {"GET poll", `{"messageId":1,"messageType":"Else"}`},
		"message that is no list": {"GET poll", `{"messageId":1,"messageType":"RunnerScaleSetJobMessages","body":"{"}`},
		"endless answer":          {"GET sets", `{"count":0,"value":[],"x":"` + strings.Repeat("a", maxAnswer) + `"}`},
	} {
		t.Run(name, func(t *testing.T) {
			bubble(t, nil, func(t *testing.T, d *desk, stop func()) {
				status := map[string]int{"POST registration-token": 201}[tc.route]
				broken := true
				d.far.with(func() {
					d.far.refuse = func(route string, _ int) *answer {
						if broken && route == tc.route {
							return &answer{status: max(200, status), body: tc.body}
						}
						return nil
					}
				})
				settle(2 * time.Minute)
				if r := d.Waiting(); len(r) != 1 {
					t.Errorf("waiting: %v", r)
				}
				if n := d.far.count(tc.route); n > 12 {
					t.Errorf("%d requests in two minutes", n)
				}
				d.far.with(func() { broken = false })
				settle(2 * time.Minute)
				if r := d.Waiting(); len(r) != 0 {
					t.Errorf("still waiting: %v", r)
				}
				stop()
				settle(2 * pollTimeout) // the library leaves a timer behind when an answer breaks off
			})
		})
	}
}

func TestSeveralPoolsAreIndependent(t *testing.T) {
	pools := func(c *Config) {
		c.Pools = []flint.Pool{{Name: "flint", Max: 1}, {Name: "big", Max: 1, Group: "big & fast"}, {Name: "lost", Max: 1, Group: "nobody"}}
	}
	bubble(t, pools, func(t *testing.T, d *desk, _ func()) {
		settle(time.Minute)
		codes := []string{}
		for _, r := range d.Waiting() {
			codes = append(codes, r.Code)
		}
		// The far end has one session for all: whichever of the two came first has it.
		if !slices.Contains(codes, "github.group") || !slices.Contains(codes, "github.session") || len(codes) != 2 {
			t.Errorf("waiting: %v", d.Waiting())
		}
	})
}

func TestJournalThatIsDamagedIsSetAside(t *testing.T) {
	for name, content := range map[string]string{"truncated": `{"scale_set":7,"mess`, "empty": "", "huge": strings.Repeat(" ", maxJournal+1)} {
		t.Run(name, func(t *testing.T) {
			dir := t.TempDir()
			path := filepath.Join(dir, "flint.json")
			if err := os.WriteFile(path, []byte(content), 0o600); err != nil {
				t.Fatal(err)
			}
			d := newDesk(t, newFar(t), func(c *Config) { c.StateDir = dir })
			if !strings.Contains(d.log.String(), "damaged") {
				t.Errorf("not logged: %s", d.log.String())
			}
			if _, err := os.Stat(path + ".damaged"); err != nil {
				t.Error(err)
			}
			if err := d.pollers()[0].journal.save(position{Set: 7, Message: 3, Pending: []int64{1}}); err != nil {
				t.Fatal(err)
			}
			again := newDesk(t, newFar(t), func(c *Config) { c.StateDir = dir })
			if got := again.pollers()[0].journal.at; got.Set != 7 || got.Message != 3 || len(got.Pending) != 1 {
				t.Errorf("read back %+v", got)
			}
			if left, _ := filepath.Glob(filepath.Join(dir, ".journal-*")); len(left) > 0 {
				t.Errorf("left over: %v", left)
			}
		})
	}
}

func TestJournalThatCannotBeWrittenIsNoAcknowledgement(t *testing.T) {
	bubble(t, nil, func(t *testing.T, d *desk, _ func()) {
		settle(time.Second)
		if err := os.Rename(d.cfg.StateDir, d.cfg.StateDir+".away"); err != nil {
			t.Fatal(err)
		}
		d.far.send(job("JobStarted", "flint-1", nil))
		settle(time.Second)
		if d.far.count("DELETE ack") != 0 {
			t.Error("acknowledged without a journal")
		}
		if err := os.Rename(d.cfg.StateDir+".away", d.cfg.StateDir); err != nil {
			t.Fatal(err)
		}
		settle(10 * time.Second)
		if d.far.count("DELETE ack") != 1 {
			t.Error("not acknowledged when the journal could be written again")
		}
	})
}

func TestReasonOfAnError(t *testing.T) {
	at := time.Date(2026, 11, 21, 12, 0, 0, 0, time.UTC)
	if r := reason("p", errors.New("disk full"), at); r.Code != "github.events" || !strings.Contains(r.Text, "since 12:00:00: disk full") {
		t.Errorf("got %+v", r)
	}
	if r := reason("p", &callError{verb: "poll", exchange: exchange{status: 418}}, at); r.Code != "github.answer" {
		t.Errorf("got %+v", r)
	}
}
