package githubsim

import (
	"crypto/rand"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"strings"
	"time"
)

// Bounds on what a client may send. Real clients stay far below them.
const (
	maxJSON     = 1 << 20  // one JSON body
	maxForm     = 64 << 10 // the OAuth form
	bodyTimeout = 30 * time.Second
)

// apiError is an error as the services put it on the wire. Clients match on the type name.
type apiError struct {
	status   int
	typeName string
	message  string
}

func (e *apiError) Error() string { return e.typeName + ": " + e.message }

func errNotFound(msg string) error { return &apiError{http.StatusNotFound, "NotFoundException", msg} }

func errBadRequest(msg string) error {
	return &apiError{http.StatusBadRequest, "ArgumentException", msg}
}

func errForbidden(msg string) error {
	return &apiError{http.StatusForbidden, "AccessDeniedException", msg}
}

func errClosed() error {
	return &apiError{http.StatusServiceUnavailable, "ServiceUnavailableException", "the simulated GitHub is closed"}
}

func errUnauthorized() error {
	return &apiError{http.StatusUnauthorized, "UnauthorizedException", "Bad credentials"}
}

func writeJSON(w http.ResponseWriter, status int, v any) {
	b, err := json.Marshal(v)
	if err != nil {
		status, b = http.StatusInternalServerError, []byte(`{"message":"encode answer"}`)
	}
	w.Header().Set("Content-Type", "application/json")
	w.WriteHeader(status)
	_, _ = w.Write(b) // a client that has gone away is not our error
}

// writeError answers with err in the shape all services share: REST clients read message, the others typeName too, and
// runners errorMessage.
func writeError(w http.ResponseWriter, err error) {
	var e *apiError
	if !errors.As(err, &e) {
		e = &apiError{http.StatusInternalServerError, "InternalException", err.Error()}
	}
	writeJSON(w, e.status, map[string]any{
		"typeName": e.typeName, "message": e.message, "errorMessage": e.message, "statusCode": e.status, "source": "githubsim",
	})
}

// readJSON decodes a bounded body that must hold exactly one JSON value. Unknown fields are ignored, as the services do.
func readJSON(w http.ResponseWriter, r *http.Request, v any) error {
	// Not every ResponseWriter has deadlines (those of tests); the bound on the size stands without.
	rc := http.NewResponseController(w)
	if rc.SetReadDeadline(time.Now().Add(bodyTimeout)) == nil {
		defer func() { _ = rc.SetReadDeadline(time.Time{}) }()
	}
	dec := json.NewDecoder(http.MaxBytesReader(w, r.Body, maxJSON))
	if err := dec.Decode(v); err != nil {
		var tooBig *http.MaxBytesError
		if errors.As(err, &tooBig) {
			return &apiError{http.StatusRequestEntityTooLarge, "ArgumentException", "the body is too large"}
		}
		return errBadRequest("decode body: " + err.Error())
	}
	if _, err := dec.Token(); !errors.Is(err, io.EOF) {
		return errBadRequest("decode body: more than one JSON value")
	}
	return nil
}

// bearer returns the token of an Authorization header with any of the schemes; "" when there is none.
func bearer(r *http.Request, schemes ...string) string {
	scheme, token, ok := strings.Cut(r.Header.Get("Authorization"), " ")
	if !ok {
		return ""
	}
	for _, s := range schemes {
		if strings.EqualFold(scheme, s) {
			return strings.TrimSpace(token)
		}
	}
	return ""
}

func randomBytes(n int) []byte {
	b := make([]byte, n)
	_, _ = rand.Read(b) // never fails: crypto/rand aborts the program instead
	return b
}

// newUUID returns a random (version 4) UUID.
func newUUID() string {
	b := randomBytes(16)
	b[6] = b[6]&0x0f | 0x40
	b[8] = b[8]&0x3f | 0x80
	h := hex.EncodeToString(b)
	return fmt.Sprintf("%s-%s-%s-%s-%s", h[:8], h[8:12], h[12:16], h[16:20], h[20:])
}

func timestamp(t time.Time) string { return t.UTC().Format("2006-01-02T15:04:05.0000000Z07:00") }
