package vm

import (
	"bytes"
	"testing"
)

func TestRing(t *testing.T) {
	for limit := 1; limit < 9; limit++ {
		r := NewRing(limit)
		var all []byte
		for i := range 40 {
			p := bytes.Repeat([]byte{byte('a' + i%26)}, i%11)
			if n, err := r.Write(p); n != len(p) || err != nil {
				t.Fatalf("wrote %d of %d, %v", n, len(p), err)
			}
			all = append(all, p...)
			if want := all[max(0, len(all)-limit):]; !bytes.Equal(r.Bytes(), want) {
				t.Fatalf("limit %d keeps %q, want %q", limit, r.Bytes(), want)
			}
		}
	}
}
