package app

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	"flint/internal/config"
	"flint/internal/githubsim"
)

const (
	// chaosAfter is how long it goes on when the last job is submitted.
	chaosAfter = 5 * time.Minute
	// settleTime is how long everything may take to end once nobody misbehaves: a lost job is declared so after a lease, run
	// again, and a webhook that GitHub forgot is noticed by the second poll.
	settleTime = 2 * time.Hour
	// takeoverTime is how long the last instance may need to get its sessions: GitHub keeps a dead one's for a while, and flint
	// asks again with a growing pause.
	takeoverTime = 5 * time.Minute
)

// run is the soak.
func (s *soak) run() {
	ctx, stop := context.WithCancel(context.Background())
	defer stop()
	var tasks sync.WaitGroup
	chaos, calm := context.WithCancel(ctx)
	tasks.Go(func() { s.vex(chaos) })
	tasks.Go(func() {
		defer calm()
		s.submit(ctx)
		linger(ctx, chaosAfter)
	})
	for chaos.Err() == nil && !s.t.Failed() {
		i := s.start()
		linger(chaos, s.life())
		if s.dice.chance(0.5) {
			s.kill(i)
		} else {
			s.finish(i)
		}
		linger(chaos, s.dice.between(0, 4*time.Second))
	}
	stop()
	tasks.Wait()
	if s.t.Failed() {
		return
	}
	s.sim.Misbehave(githubsim.Faults{})
	s.settle()
	s.check()
}

// life is how long the next instance lives: seconds as a rule, sometimes long enough for everything that is done every few
// minutes.
func (s *soak) life() time.Duration {
	switch f := s.dice.float(); {
	case f < 0.15:
		return s.dice.between(0, 500*time.Millisecond)
	case f < 0.75:
		return s.dice.between(2*time.Second, 15*time.Second)
	case f < 0.95:
		return s.dice.between(15*time.Second, time.Minute)
	}
	return s.dice.between(2*time.Minute, 8*time.Minute)
}

// linger waits for d or the end of ctx, and reports whether d is over.
func linger(ctx context.Context, d time.Duration) bool {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-t.C:
		return true
	case <-ctx.Done():
		return false
	}
}

// vex draws GitHub's misbehaviour anew every little while, and lets VMs die.
func (s *soak) vex(ctx context.Context) {
	for ctx.Err() == nil {
		f := s.misbehaviour()
		s.sim.Misbehave(f)
		s.log.Info("GitHub misbehaves", "faults", fmt.Sprintf("%+v", f))
		for range s.dice.n(1, 4) {
			if !linger(ctx, s.dice.between(time.Second, 15*time.Second)) {
				return
			}
			if s.dice.chance(0.3) {
				s.crash()
			}
		}
	}
}

// crash ends one VM.
func (s *soak) crash() {
	s.mu.Lock()
	app := s.app
	s.mu.Unlock()
	if app == nil {
		return
	}
	if all := app.host.State().Runners; len(all) > 0 && s.fake.Crash(all[s.dice.n(0, len(all)-1)].ID) {
		s.add("VMs that crashed", 1)
	}
}

// submit queues the jobs, a few at a time, and cancels some runs.
func (s *soak) submit(ctx context.Context) {
	var cancels sync.WaitGroup
	defer cancels.Wait()
	for left := s.jobs; left > 0; {
		n := min(left, s.dice.n(1, 7))
		left -= n
		run := s.submitRun(n)
		if s.dice.chance(0.05) {
			cancel, after := run.Cancel, s.dice.between(0, 20*time.Second)
			if s.dice.chance(0.2) {
				cancel = run.ForceCancel
			}
			cancels.Go(func() {
				if linger(ctx, after) {
					s.add("runs cancelled", 1)
					cancel()
				}
			})
		}
		if !linger(ctx, time.Duration(s.dice.float()*s.dice.float()*float64(30*time.Second))) {
			return
		}
	}
}

func (s *soak) submitRun(n int) *githubsim.Run {
	p := s.cfg.Pools[s.dice.n(0, len(s.cfg.Pools)-1)]
	repo, labels := "", p.Name
	switch p.Account {
	case "widget", "depot":
		repo = p.Account
	default:
		repo = [...]string{"hello", "widget"}[s.dice.n(0, 1)]
	}
	if p.Account == "hooks" || p.Account == "depot" {
		switch f := s.dice.float(); {
		case f < 0.1:
			labels = "self-hosted" // whoever is first
		case f < 0.3:
			labels = "self-hosted, linux, " + p.Name
		}
	}
	numbers := make([]string, n)
	for i := range numbers {
		numbers[i] = strconv.Itoa(i + 1)
	}
	src := fmt.Sprintf("on: push\njobs:\n  j:\n    runs-on: [%s]\n    strategy: { fail-fast: %t, matrix: { n: [%s] } }\n    steps:\n      - run: sleep %d\n",
		labels, s.dice.chance(0.1), strings.Join(numbers, ", "), [...]int{0, 0, 1, 2, 3, 5, 10, 40}[s.dice.n(0, 7)])
	if s.dice.chance(0.05) {
		src += "      - run: exit 1\n"
	}
	wf := s.workflows[src]
	if wf == nil {
		var err error
		if wf, err = githubsim.ParseWorkflow("soak.yml", []byte(src)); err != nil {
			panic(err) // the source is ours
		}
		s.workflows[src] = wf
	}
	run, err := s.sim.Submit(wf, githubsim.Trigger{Event: "push", Repo: repo})
	if err != nil {
		panic(err)
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.runs = append(s.runs, run)
	return run
}

// settle lets one last instance come to rest, and ends it.
func (s *soak) settle() {
	s.t.Helper()
	i := s.start()
	began := time.Now()
	left := s.left(i)
	// Not before it had time to take over the sessions of an instance that was killed: nothing may seem to be left only because
	// it was not heard of yet.
	for time.Since(began) < takeoverTime || len(left) > 0 && time.Since(began) < settleTime {
		linger(context.Background(), 10*time.Second)
		left = s.left(i)
		s.log.Info("settling", "left", left)
	}
	for _, l := range left {
		s.t.Errorf("left after %s of calm: %s", settleTime, l)
	}
	s.add("settled after, seconds", int(time.Since(began).Seconds()))
	s.finish(i)
}

// left says what is not over yet.
func (s *soak) left(i *instance) (left []string) {
	say := func(format string, args ...any) { left = append(left, fmt.Sprintf(format, args...)) }
	at := s.sim.Inventory()
	if at.OpenJobs > 0 {
		say("%d jobs are not over", at.OpenJobs)
		for _, r := range s.runs {
			for _, j := range r.Jobs() {
				if j.Status != "completed" {
					say("job %s %s of run %d on %v, %s, runner %q", j.ID, j.Name, r.ID(), j.Labels, j.Status, j.Runner)
				}
			}
		}
	}
	for _, r := range at.Runners {
		say("registration %+v", r)
	}
	if n := s.fake.Running(); n > 0 {
		say("%d VMs", n)
	}
	entries, err := os.ReadDir(filepath.Join(i.dir, "runners"))
	if err != nil {
		say("records: %v", err)
	}
	for _, e := range entries {
		say("record %s", e.Name())
	}
	for _, r := range i.host.State().Runners {
		say("runner %s, %s", r.ID, r.Phase)
	}
	for _, d := range i.demand.Demand() {
		if d.Assigned+d.Available > 0 {
			say("demand %+v", d)
		}
	}
	if why, err := i.Explain(s.t.Context(), ""); err != nil || len(why) > 0 {
		say("waits: %+v, %v", why, err)
	}
	if n := i.hooks.OpenJobs(); n > 0 {
		say("%d jobs open in the ledger", n)
	}
	if p := i.reruns.Pending(); len(p) > 0 {
		say("jobs to run again: %+v", p)
	}
	return left
}

// check is the proof, once everything has stopped.
func (s *soak) check() {
	s.t.Helper()
	for _, set := range s.sim.Inventory().ScaleSets {
		if set.Owner != "" {
			s.t.Errorf("session of scale set %s is left", set.Name)
		}
	}
	journals, err := filepath.Glob(filepath.Join(s.cfg.StateDir, "serve", "github", "*.json"))
	if err != nil || len(journals) == 0 {
		s.t.Errorf("journals: %v, %v", journals, err)
	}
	for _, name := range journals {
		var j struct{ Pending []int64 }
		b, err := os.ReadFile(name)
		if err == nil {
			err = json.Unmarshal(b, &j)
		}
		if err != nil || len(j.Pending) > 0 {
			s.t.Errorf("journal %s: pending %v, %v", filepath.Base(name), j.Pending, err)
		}
	}
	if _, err := os.Stat(filepath.Join(s.cfg.StateDir, "serve", "damaged")); err == nil {
		s.t.Error("there are damaged records")
	}
	if len(s.queued) < s.jobs {
		s.t.Errorf("%d jobs were queued, want %d at least", len(s.queued), s.jobs)
	}
	for id, name := range s.queued {
		if n := len(s.ended[id]); n != 1 {
			s.t.Errorf("job %s (%s) ended %d times: %v", id, name, n, s.ended[id])
		}
	}
	for id, n := range s.worked {
		if n != 1 {
			s.t.Errorf("step %s was done %d times", id, n)
		}
	}
	for id, c := range s.told {
		if len(c) != 1 {
			s.t.Errorf("the ends of job %s were told %d times: %v", id, len(c), c)
		}
	}
	if s.t.Failed() {
		return
	}
	succeeded := 0
	for _, c := range s.ended {
		if c[0] == githubsim.Success {
			succeeded++
		}
	}
	if succeeded < s.jobs/3 {
		s.t.Errorf("only %d of %d jobs succeeded: whatever this shows, it is not that jobs run", succeeded, s.jobs)
	}
}

// report prints the counts in columns.
func (s *soak) report(w io.Writer) {
	s.mu.Lock()
	defer s.mu.Unlock()
	var rows [][2]string
	row := func(name string, v any) { rows = append(rows, [2]string{name, fmt.Sprint(v)}) }
	mode := "assigned by GitHub"
	if s.seed%2 == 0 {
		mode = "acquired by flint"
	}
	row("seed", s.seed)
	row("jobs are", mode)
	webhooks := 0
	for _, p := range s.cfg.Pools {
		if p.Account == "hooks" || p.Account == "depot" {
			webhooks++
		}
	}
	row("pools by "+config.ScaleSets, len(s.cfg.Pools)-webhooks)
	row("pools by "+config.Webhooks, webhooks)
	row("time in the bubble", time.Since(s.began).Round(time.Second))
	conclusions := map[string]int{}
	for _, list := range s.ended {
		for _, c := range list {
			conclusions["jobs: "+string(c)]++
		}
	}
	row("runs", len(s.runs))
	row("jobs", len(s.queued))
	counted := func(m map[string]int) {
		for _, k := range slices.Sorted(maps.Keys(m)) {
			row(k, m[k])
		}
	}
	counted(conclusions)
	var waits []time.Duration
	for _, r := range s.runs {
		for _, j := range r.Jobs() {
			if !j.Started.IsZero() {
				waits = append(waits, j.Started.Sub(j.Queued))
			}
		}
	}
	if len(waits) > 0 {
		slices.Sort(waits)
		row("wait for a runner, median", waits[len(waits)/2].Round(time.Millisecond))
		row("wait for a runner, longest", waits[len(waits)-1].Round(time.Millisecond))
	}
	counted(s.counts)
	faults, struck := map[string]int{}, 0
	for k, n := range s.sim.Misbehaved() {
		faults["GitHub: "+k] = n
		struck += n
	}
	row("misbehaviours", struck)
	counted(faults)
	wide := 0
	for _, r := range rows {
		wide = max(wide, len(r[0]))
	}
	for _, r := range rows {
		fmt.Fprintf(w, "%-*s  %10s\n", wide, r[0], r[1])
	}
}
