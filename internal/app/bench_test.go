package app

import (
	"bufio"
	"context"
	"fmt"
	"io"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"flint"
	"flint/internal/config"
	"flint/internal/githubsim"
	"flint/internal/githubsim/simrunner"
	"flint/internal/guest"
)

// BenchmarkDecision is the time from the moment GitHub queues a job to the decision to start a VM for it, GitHub's own part
// included: the message or the webhook on its way, its persistence, the plan. One job at a time.
func BenchmarkDecision(b *testing.B) {
	for name, mode := range map[string]func(*config.Config){"scale_sets": func(*config.Config) {}, "webhooks": byWebhooks} {
		b.Run(name, func(b *testing.B) {
			c := newRig(b, 4, mode)
			client := simrunner.NewClient()
			c.fake.Exec = func(ctx context.Context, _ guest.Command, stdin io.Reader, _, _ io.Writer) guest.Exit {
				credential, err := bufio.NewReader(stdin).ReadString('\n')
				if err != nil {
					return guest.Exit{Code: 1, Err: err.Error()}
				}
				code, err := simrunner.Run(ctx, strings.TrimSpace(credential), simrunner.Options{Client: client, Quiet: true})
				if err != nil && ctx.Err() == nil { // the last runner may be stopped with the coordinator
					b.Error(err)
				}
				return guest.Exit{Code: code}
			}
			var mu sync.Mutex
			queued := map[string]time.Time{}
			c.observe = func(e githubsim.Event) {
				if e.Kind == githubsim.JobQueued {
					mu.Lock()
					defer mu.Unlock()
					queued[e.Job] = e.At
				}
			}
			c.serve(b, func() {
				for n := 0; b.Loop(); n++ {
					run := c.submit(b, fmt.Sprintf("on: push\njobs:\n  job%d:\n    runs-on: flint\n    steps:\n      - run: exit 0\n", n))
					if _, err := run.Wait(b.Context()); err != nil {
						b.Fatal(err)
					}
				}
			})
			c.mu.Lock()
			defer c.mu.Unlock()
			mu.Lock()
			defer mu.Unlock()
			var took []time.Duration
			for _, r := range c.results {
				if r.Runner.Job != nil {
					took = append(took, r.Timeline[flint.Planned].Sub(queued[r.Runner.Job.Name]))
				}
			}
			slices.Sort(took)
			if len(took) > 0 {
				b.ReportMetric(float64(took[len(took)/2].Microseconds())/1000, "ms/decision")
				b.ReportMetric(float64(took[len(took)*95/100].Microseconds())/1000, "ms/p95")
			}
		})
	}
}
