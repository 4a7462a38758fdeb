package qemu

import (
	"slices"
	"time"
)

// rdtsc reads the processor's time stamp counter.
func rdtsc() uint64

// hostTSC measures the rate of the time stamp counter in kHz, which under TCG is also the guest's: the median of five
// spans of 10 ms, good to some 5 kHz. It takes 50 ms.
func hostTSC() uint64 {
	var rates []uint64
	span := time.NewTicker(10 * time.Millisecond)
	defer span.Stop()
	for range 5 {
		t0, c0 := time.Now(), rdtsc()
		<-span.C
		took, c1 := time.Since(t0), rdtsc()
		rates = append(rates, (c1-c0)*1_000_000/uint64(max(took.Nanoseconds(), 1)))
	}
	slices.Sort(rates)
	return rates[len(rates)/2]
}
