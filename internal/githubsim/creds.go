package githubsim

import (
	"crypto/sha256"
	"encoding/base64"
	"sync"
	"time"
)

// credentialKind says what a token is good for. A token of one kind is worthless elsewhere.
type credentialKind int

const (
	credInstallation credentialKind = iota + 1 // REST, subject unused
	credRegistration                           // runner-registration, subject unused
	credQueue                                  // one scale set session; subject is its id
	credRunner                                 // one registered runner; subject is its client id
	credJob                                    // one job's run service, results and live log; subject is the job's id
	credUpload                                 // one blob of one job; subject is the blob's id
)

// credentials is the table of every opaque token handed out. It keeps digests only and looks a token up by its digest:
// how long a look-up takes says nothing about how much of a guessed token was right.
type credentials struct {
	mu    sync.Mutex
	now   func() time.Time
	known map[[sha256.Size]byte]credential
}

type credential struct {
	kind    credentialKind
	subject string
	expires time.Time
}

func newCredentials() *credentials {
	return &credentials{now: time.Now, known: map[[sha256.Size]byte]credential{}}
}

// issue makes a token that lives for ttl.
func (c *credentials) issue(kind credentialKind, subject string, ttl time.Duration) string {
	token := base64.RawURLEncoding.EncodeToString(randomBytes(32))
	c.mu.Lock()
	defer c.mu.Unlock()
	now := c.now()
	if len(c.known)%256 == 255 {
		for k, v := range c.known {
			if now.After(v.expires) {
				delete(c.known, k)
			}
		}
	}
	c.known[sha256.Sum256([]byte(token))] = credential{kind, subject, now.Add(ttl)}
	return token
}

// check returns the subject of a live token of that kind.
func (c *credentials) check(kind credentialKind, token string) (subject string, ok bool) {
	if token == "" {
		return "", false
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	got, ok := c.known[sha256.Sum256([]byte(token))]
	if !ok || got.kind != kind || c.now().After(got.expires) {
		return "", false
	}
	return got.subject, true
}
