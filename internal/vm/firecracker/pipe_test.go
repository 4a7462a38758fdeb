package firecracker

import (
	"bytes"
	"strings"
	"testing"
	"testing/iotest"
	"testing/synctest"
	"time"
)

// TestDrainBreathes has a guest that writes byte by byte, as a serial console does.
func TestDrainBreathes(t *testing.T) {
	const text = "a byte at a time"
	synctest.Test(t, func(t *testing.T) {
		over := make(chan struct{})
		for _, want := range []time.Duration{time.Duration(len(text)) * breath, 0} {
			var to bytes.Buffer
			start := time.Now()
			drain(&to, iotest.OneByteReader(strings.NewReader(text)), over)
			if to.String() != text || time.Since(start) != want {
				t.Errorf("%q after %s; want %s", to.String(), time.Since(start), want)
			}
			if want > 0 {
				close(over) // the rest is read without a pause
			}
		}
	})
}
