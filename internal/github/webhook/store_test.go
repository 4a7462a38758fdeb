package webhook

import (
	"bytes"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"testing"

	"flint"
)

func TestDamagedLedgerIsSetAside(t *testing.T) {
	account := Account{Secret: secret, Pools: []flint.Pool{linux()}}
	whole := t.TempDir()
	r := open(t, whole, &host{}, account)
	for i := range int64(300) {
		mustTake(t, r, jobHook("queued", i+1, linuxLabels))
	}
	r.Close()
	good, err := os.ReadFile(filepath.Join(whole, fileName))
	if err != nil {
		t.Fatal(err)
	}
	seed := rand.Uint64()
	t.Logf("seed %d", seed)
	rnd := rand.New(rand.NewPCG(seed, 0))
	overwrite := func(n int) []byte {
		b := bytes.Clone(good)
		for range n {
			b[rnd.IntN(len(b))] = byte(rnd.IntN(256))
		}
		return b
	}
	zero := bytes.Clone(good)
	clear(zero[8192:])
	cases := map[string][]byte{
		"empty": {}, "text": []byte("not a database"), "one page": good[:4096], "two pages": good[:8192], "half": good[:len(good)/2],
		"noise": bytes.Repeat([]byte{0xa5}, len(good)), "zeroed": zero, "cut": good[:len(good)-5000],
	}
	for i := range 40 {
		cases[fmt.Sprint("overwritten ", i)] = overwrite(5 * i * i)
	}
	for name, b := range cases {
		t.Run(name, func(t *testing.T) {
			dir := t.TempDir()
			path := filepath.Join(dir, fileName)
			if err := os.WriteFile(path, b, 0o600); err != nil {
				t.Fatal(err)
			}
			r := open(t, dir, &host{}, account)
			aside, err := os.ReadFile(path + ".damaged")
			if n := assigned(r)["linux"]; n < 300 && len(b) > 0 && (err != nil || !bytes.Equal(aside, b)) {
				t.Errorf("%d jobs, and the damaged file is not kept: %v", n, err)
			}
			mustTake(t, r, jobHook("completed", 1000, linuxLabels))
		})
	}
}

func TestLedgerInUseIsRefused(t *testing.T) {
	dir := t.TempDir()
	open(t, dir, &host{}, Account{Secret: secret})
	h := &host{}
	_, err := Open(Config{Accounts: []Account{{Secret: secret}}, Dir: dir, Log: quiet(), Events: h.note, Runner: h.runner})
	if fault(err) != "webhook.state" {
		t.Errorf("error %v", err)
	}
}
