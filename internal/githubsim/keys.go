package githubsim

import (
	"crypto/rand"
	"crypto/rsa"
	"fmt"
	"sync"
)

// Bits of a key. What is shared guards nothing, so it may be short.
const (
	keyBits    = 2048
	sharedBits = 1024
)

// keys makes the runners' RSA keys. Making one takes a tenth of a second and more, and using it a millisecond, so tests with
// thousands of runners have them use a few short ones in turn.
type keys struct {
	reuse int // how many; 0 makes one for each runner

	mu   sync.Mutex
	made []*rsa.PrivateKey
	next int
}

func (k *keys) key() (*rsa.PrivateKey, error) {
	if k.reuse <= 0 {
		return newKey(keyBits)
	}
	k.mu.Lock()
	defer k.mu.Unlock()
	if len(k.made) < k.reuse {
		key, err := newKey(sharedBits)
		if err != nil {
			return nil, err
		}
		k.made = append(k.made, key)
		return key, nil
	}
	k.next = (k.next + 1) % len(k.made)
	return k.made[k.next], nil
}

func newKey(bits int) (*rsa.PrivateKey, error) {
	key, err := rsa.GenerateKey(rand.Reader, bits)
	if err != nil {
		return nil, fmt.Errorf("make the runner's key: %w", err)
	}
	return key, nil
}
