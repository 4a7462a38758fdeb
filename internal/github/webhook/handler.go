package webhook

import (
	"crypto/hmac"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"mime"
	"net/http"
	"strings"
	"time"

	"golang.org/x/time/rate"
)

const (
	// maxBody is far more than a workflow_job has, which is some 20 KiB.
	maxBody = 2 << 20
	// maxBodies bounds the bodies that are in memory at one time.
	maxBodies = 64 << 20
	// maxRate and maxBurst bound the requests of everybody together. GitHub sends bursts: a matrix of 256 jobs is one push.
	maxRate  rate.Limit = 500
	maxBurst int        = 1000
	// bodyTime is how long a sender may take for the body; GitHub itself gives up after 10 s.
	bodyTime = 10 * time.Second
	// maxGUID bounds a delivery id; GitHub's have 36 bytes.
	maxGUID = 128
)

// refusal is an answer other than 2xx.
type refusal struct {
	status int
	text   string
}

func (e *refusal) Error() string { return e.text }

// answer takes a delivery. It answers 202 when what it says is persisted, or when it is none of our business; 200 a
// ping; 400, 401, 405, 413 what is wrong; and 429 or 503 what GitHub is to send again.
func (r *Receiver) answer(w http.ResponseWriter, req *http.Request) {
	status, err := r.receive(w, req)
	var no *refusal
	switch {
	case err == nil:
		w.WriteHeader(status)
		return
	case !errors.As(err, &no):
		r.counts.refused.Add(1)
		if r.sometimes("refused") {
			r.log.Error("a webhook cannot be taken; GitHub is asked to send it again", "error", err)
		}
		no = &refusal{http.StatusServiceUnavailable, "the delivery cannot be stored"}
	}
	h := w.Header()
	h.Set("Connection", "close") // of a stranger, as a rule, who could keep it
	switch no.status {
	case http.StatusTooManyRequests, http.StatusServiceUnavailable:
		h.Set("Retry-After", "2")
	case http.StatusMethodNotAllowed:
		h.Set("Allow", http.MethodPost)
	}
	http.Error(w, no.text, no.status)
}

// receive deals with one request. An error that is no *refusal is ours.
func (r *Receiver) receive(w http.ResponseWriter, req *http.Request) (int, error) {
	if req.Method != http.MethodPost {
		return 0, &refusal{http.StatusMethodNotAllowed, "webhooks are sent with POST"}
	}
	if !r.limiter.Allow() {
		r.counts.limited.Add(1)
		return 0, &refusal{http.StatusTooManyRequests, "too many requests"}
	}
	claimed, ok := parseSignature(req.Header.Get("X-Hub-Signature-256"))
	if !ok {
		return 0, r.badSignature()
	}
	body, err := r.body(w, req)
	if err != nil {
		return 0, err
	}
	defer r.bodies.Add(-int64(cap(body)))
	accounts := r.signers(body, claimed)
	if len(accounts) == 0 {
		return 0, r.badSignature()
	}
	return r.dispatch(req.Header, body, accounts)
}

// body reads the body within all bounds. The caller gives its capacity back to r.bodies.
func (r *Receiver) body(w http.ResponseWriter, req *http.Request) ([]byte, error) {
	if req.ContentLength > maxBody {
		return nil, r.tooLarge()
	}
	// Not every ResponseWriter has deadlines; a server's own time-outs hold besides.
	_ = http.NewResponseController(w).SetReadDeadline(time.Now().Add(bodyTime))
	body := make([]byte, 0, max(512, min(req.ContentLength+1, 64<<10)))
	if r.bodies.Add(int64(cap(body))) > maxBodies {
		r.bodies.Add(-int64(cap(body)))
		return nil, errors.New("read webhook: too many are being read")
	}
	src := http.MaxBytesReader(w, req.Body, maxBody)
	for {
		n, err := src.Read(body[len(body):cap(body)])
		body = body[:len(body)+n]
		switch tooLarge := (*http.MaxBytesError)(nil); {
		case errors.Is(err, io.EOF):
			return body, nil
		case err != nil:
			r.bodies.Add(-int64(cap(body)))
			if errors.As(err, &tooLarge) {
				return nil, r.tooLarge()
			}
			return nil, r.malformed(errors.New("the body breaks off"))
		}
		if len(body) < cap(body) {
			continue
		}
		have := cap(body)
		body = append(make([]byte, 0, 2*have), body...)
		if r.bodies.Add(int64(cap(body)-have)) > maxBodies {
			r.bodies.Add(-int64(cap(body)))
			return nil, errors.New("read webhook: too many are being read")
		}
	}
}

// parseSignature reads "sha256=" and 64 hexadecimal digits.
func parseSignature(s string) ([]byte, bool) {
	digits, ok := strings.CutPrefix(s, "sha256=")
	if !ok || len(digits) != 2*sha256.Size {
		return nil, false
	}
	sum, err := hex.DecodeString(digits)
	return sum, err == nil
}

// signers returns the accounts whose secret signed the body. All are tried, each in constant time.
func (r *Receiver) signers(body, claimed []byte) []*account {
	var out []*account
	for i, a := range r.accounts {
		if i > 0 && a.cfg.Secret == r.accounts[i-1].cfg.Secret { // one App of several organisations
			if n := len(out); n > 0 && out[n-1] == r.accounts[i-1] {
				out = append(out, a)
			}
			continue
		}
		mac := hmac.New(sha256.New, []byte(a.cfg.Secret))
		mac.Write(body)
		if hmac.Equal(mac.Sum(nil), claimed) {
			out = append(out, a)
		}
	}
	return out
}

// dispatch deals with a delivery that one of the accounts has signed.
func (r *Receiver) dispatch(h http.Header, body []byte, accounts []*account) (int, error) {
	guid, event := h.Get("X-GitHub-Delivery"), h.Get("X-GitHub-Event")
	if guid == "" || len(guid) > maxGUID || clean(guid) != guid {
		return 0, r.malformed(errors.New("the header X-GitHub-Delivery is missing or no delivery id"))
	}
	switch event {
	case "workflow_job":
	case "ping":
		return http.StatusOK, nil
	case "":
		return 0, r.malformed(errors.New("the header X-GitHub-Event is missing"))
	default:
		return r.foreign()
	}
	if t, _, err := mime.ParseMediaType(h.Get("Content-Type")); err == nil && t == "application/x-www-form-urlencoded" {
		return 0, r.malformed(errors.New("the webhook's content type on GitHub must be application/json"))
	}
	if r.ledger.known(guid) {
		r.counts.duplicates.Add(1)
		return http.StatusAccepted, nil
	}
	now := time.Now()
	j, enterprise, err := decode(body, now)
	switch {
	case errors.Is(err, errForeign):
		return r.foreign()
	case err != nil:
		return 0, r.malformed(err)
	}
	teller := place(j, enterprise, accounts)
	if teller == nil {
		return r.foreign()
	}
	teller.hear(now)
	if !r.concerns(j) {
		return r.foreign()
	}
	if !r.ledger.room(j) {
		return 0, fmt.Errorf("the ledger is full: %d jobs are open, of which no more are kept", maxOpen)
	}
	if err := r.write([]change{r.learn(j)}, &arrival{at: now, guid: guid}); err != nil {
		return 0, err
	}
	r.counts.accepted.Add(1)
	return http.StatusAccepted, nil
}

// place fills in where the job is and who told us: the first of the accounts that has the repository. It returns nil when none
// has: an App may be installed elsewhere, too.
func place(j *job, enterprise string, accounts []*account) *account {
	for _, a := range accounts {
		if s, ok := a.scope(j.Repository, enterprise); ok {
			j.Place, j.Account = s.place(j.Repository), a.cfg.Name
			return a
		}
	}
	return nil
}

// concerns reports whether a job is to be remembered: all but those for GitHub's own machines, and for pools that hear of their
// jobs another way.
func (r *Receiver) concerns(j *job) bool {
	return r.ledger.matcher.concerns(j) || r.ledger.has(j.key())
}

func (r *Receiver) foreign() (int, error) {
	r.counts.foreign.Add(1)
	return http.StatusAccepted, nil
}

func (r *Receiver) badSignature() error {
	r.counts.badSignature.Add(1)
	if r.sometimes("signature") {
		r.log.Warn("a webhook has no valid signature: the secret on GitHub differs from the one configured here, or somebody else sent it",
			"so_far", r.counts.badSignature.Load())
	}
	return &refusal{http.StatusUnauthorized, "the signature X-Hub-Signature-256 is missing or not made with the secret configured here"}
}

func (r *Receiver) malformed(err error) error {
	r.counts.malformed.Add(1)
	if r.sometimes("malformed") {
		r.log.Warn("a webhook makes no sense", "error", err)
	}
	return &refusal{http.StatusBadRequest, clean(err.Error())}
}

func (r *Receiver) tooLarge() error {
	r.counts.tooLarge.Add(1)
	return &refusal{http.StatusRequestEntityTooLarge, fmt.Sprintf("the body has more than %d bytes", maxBody)}
}
