package webhook

import (
	"fmt"
	"net/http"
	"net/http/httptest"
	"slices"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"flint"
)

// bulky makes a payload as large as GitHub's.
func bulky(p map[string]any) {
	for i := range 120 {
		p["repository"].(map[string]any)[fmt.Sprintf("some_url_%d", i)] = "https://api.github.com/repos/acme/app/some/thing{/with}{/more}{/parts}/and/then/some/more/of/that"
	}
}

func cpuTime() time.Duration {
	var u syscall.Rusage
	if err := syscall.Getrusage(syscall.RUSAGE_SELF, &u); err != nil {
		panic(err)
	}
	return time.Duration(u.Utime.Nano() + u.Stime.Nano())
}

// BenchmarkWebhook sends the three webhooks of one job after another from 16 senders, with persistence. The metrics are
// webhooks per second, processor time per webhook, and the time to the answer.
func BenchmarkWebhook(b *testing.B) {
	h := &host{runners: map[string]string{"flint-1": "linux"}}
	r := open(b, b.TempDir(), h, Account{Secret: secret, Pools: []flint.Pool{linux()}})
	r.limiter.SetLimit(1e9)
	r.limiter.SetBurst(1 << 30)
	requests := make([]*http.Request, b.N)
	for i := range requests {
		id := int64(i/3 + 1)
		hook := [3]hook{
			jobHook("queued", id, linuxLabels, bulky), jobHook("in_progress", id, linuxLabels, on("flint-1"), bulky),
			jobHook("completed", id, linuxLabels, on("flint-1"), ended("success"), bulky),
		}[i%3]
		requests[i] = hook.request()
	}
	took := make([]time.Duration, b.N)
	var next atomic.Int64
	var senders sync.WaitGroup
	handler := http.HandlerFunc(r.answer)
	b.SetBytes(requests[0].ContentLength)
	b.ResetTimer()
	cpu, start := cpuTime(), time.Now()
	for range 16 {
		senders.Go(func() {
			for i := next.Add(1) - 1; i < int64(b.N); i = next.Add(1) - 1 {
				sent := time.Now()
				w := httptest.NewRecorder()
				handler.ServeHTTP(w, requests[i])
				if took[i] = time.Since(sent); w.Code != http.StatusAccepted {
					b.Errorf("answer %d", w.Code)
				}
			}
		})
	}
	senders.Wait()
	b.StopTimer()
	slices.Sort(took)
	b.ReportMetric(float64(b.N)/time.Since(start).Seconds(), "webhooks/s")
	b.ReportMetric(float64((cpuTime()-cpu).Microseconds())/float64(b.N), "µs-cpu/webhook")
	b.ReportMetric(float64(took[b.N/2].Microseconds())/1000, "ms-p50")
	b.ReportMetric(float64(took[b.N*99/100].Microseconds())/1000, "ms-p99")
}

// BenchmarkWebhookPaced sends 100 webhooks a second, as a busy organisation does; its metrics are those of BenchmarkWebhook.
func BenchmarkWebhookPaced(b *testing.B) {
	h := &host{runners: map[string]string{"flint-1": "linux"}}
	r := open(b, b.TempDir(), h, Account{Secret: secret, Pools: []flint.Pool{linux()}})
	handler := http.HandlerFunc(r.answer)
	took := make([]time.Duration, b.N)
	tick := time.NewTicker(10 * time.Millisecond)
	defer tick.Stop()
	requests := make([]*http.Request, b.N)
	for i := range requests {
		requests[i] = jobHook("queued", int64(i+1), linuxLabels, bulky).request()
	}
	var senders sync.WaitGroup
	b.ResetTimer()
	cpu := cpuTime()
	for i := range b.N {
		<-tick.C
		senders.Go(func() {
			sent := time.Now()
			w := httptest.NewRecorder()
			handler.ServeHTTP(w, requests[i])
			if took[i] = time.Since(sent); w.Code != http.StatusAccepted {
				b.Errorf("answer %d", w.Code)
			}
		})
	}
	senders.Wait()
	b.StopTimer()
	slices.Sort(took)
	b.ReportMetric(float64((cpuTime()-cpu).Microseconds())/float64(b.N), "µs-cpu/webhook")
	b.ReportMetric(float64(took[b.N/2].Microseconds())/1000, "ms-p50")
	b.ReportMetric(float64(took[b.N*99/100].Microseconds())/1000, "ms-p99")
}

// BenchmarkDemand asks for the demand of 10,000 queued jobs in 20 pools.
func BenchmarkDemand(b *testing.B) {
	var pools []flint.Pool
	for i := range 20 {
		pools = append(pools, pool(fmt.Sprint("p", i), "self-hosted", fmt.Sprint("l", i)))
	}
	r := open(b, b.TempDir(), &host{}, Account{Secret: secret, Pools: pools})
	for i := range 10_000 {
		r.ledger.put(&job{Place: "github.com/acme/app", ID: int64(i + 1), Repository: "acme/app", State: queued, Labels: []string{fmt.Sprint("l", i%20)}}, time.Now())
	}
	for b.Loop() {
		if d := r.Demand(); len(d) != 20 || d[3].Assigned != 500 {
			b.Fatal(d)
		}
	}
}
