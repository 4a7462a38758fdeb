package githubsim

import (
	"crypto/sha256"
	"encoding/base64"
	"slices"
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

// live is how many tokens of a kind one subject may have; a further one ends the oldest. Whoever may ask for tokens, a guest
// for most of them, may ask without end. An upload's address is signed anew for every upload; the others have a few, for
// answers that are lost on the way. Those without a subject go to the App only, and just expire.
func (k credentialKind) live() int {
	switch k {
	case credUpload:
		return 1
	case credQueue, credRunner, credJob:
		return 4
	}
	return 0
}

// credentials is the table of every opaque token handed out. It keeps digests only and looks a token up by its digest:
// how long a look-up takes says nothing about how much of a guessed token was right.
type credentials struct {
	mu    sync.Mutex
	now   func() time.Time
	known map[digest]credential
	held  map[holder][]digest // by kinds that are limited; the oldest first; none that is not known
}

type digest [sha256.Size]byte

type holder struct {
	kind    credentialKind
	subject string
}

type credential struct {
	holder
	expires time.Time
}

func newCredentials() *credentials {
	return &credentials{now: time.Now, known: map[digest]credential{}, held: map[holder][]digest{}}
}

// issue makes a token that lives for ttl, or until the subject has too many newer ones of its kind.
func (c *credentials) issue(kind credentialKind, subject string, ttl time.Duration) string {
	token := base64.RawURLEncoding.EncodeToString(randomBytes(32))
	c.mu.Lock()
	defer c.mu.Unlock()
	now := c.now()
	if len(c.known)%256 == 255 {
		for k, v := range c.known {
			if now.After(v.expires) {
				c.forget(k)
			}
		}
	}
	h, d := holder{kind, subject}, digest(sha256.Sum256([]byte(token)))
	c.known[d] = credential{h, now.Add(ttl)}
	if limit := kind.live(); limit > 0 {
		c.held[h] = append(c.held[h], d)
		if len(c.held[h]) > limit {
			c.forget(c.held[h][0])
		}
	}
	return token
}

// forget ends a token. The caller holds the lock.
func (c *credentials) forget(d digest) {
	h := c.known[d].holder
	delete(c.known, d)
	rest := slices.DeleteFunc(c.held[h], func(o digest) bool { return o == d })
	if len(rest) == 0 {
		delete(c.held, h)
		return
	}
	c.held[h] = rest
}

// check returns the subject of a live token of that kind.
func (c *credentials) check(kind credentialKind, token string) (subject string, ok bool) {
	if token == "" {
		return "", false
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	got, ok := c.known[digest(sha256.Sum256([]byte(token)))]
	if !ok || got.kind != kind || c.now().After(got.expires) {
		return "", false
	}
	return got.subject, true
}
