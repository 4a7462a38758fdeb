package githubsim

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"slices"
	"strconv"
	"strings"
	"time"

	"flint"
)

// Scenario is what happens to the simulated GitHub, line by line: jobs that come, and misbehaviour. ParseScenario reads it.
type Scenario struct {
	// Scale multiplies every time in it; 1 when zero.
	Scale float64
	// Kill ends the machine a runner is on. When nil, the runner is parted from the server instead: nothing it asks is answered
	// any more, and its job fails when its lease is over.
	Kill func(runner string)
	// Did is called after each line of the kind "at …" that was carried out, with what it said. It may be nil.
	Did func(what string)
	// Seed decides when chances strike; zero leaves the server's.
	Seed uint64

	always []setting
	acts   []act
}

// setting is a switch and what it is set to: a chance or a time.
type setting struct {
	name   string
	chance float64
	length time.Duration
}

// act is one line that happens at a time.
type act struct {
	line   int
	text   string // what the line said after its time
	at     time.Duration
	verb   verb
	n      int // jobs, or number of a runner or run
	labels []string
	length time.Duration // of a job or an outage
	fails  bool
	name   string // of a scale set
	set    setting
}

type verb int

const (
	verbSubmit verb = iota + 1
	verbOutage
	verbRecover // the end of an outage
	verbKill
	verbCancel
	verbDelete
	verbStart
	verbStop
)

const (
	maxScenario     = 64 << 10 // bytes
	maxScenarioTime = 24 * time.Hour
	maxSubmit       = 256 // jobs of one line: what a matrix holds
	maxSubmitLabels = 20
)

// ParseScenario reads a scenario. name is what its errors call it; they are a *flint.Fault with code scenario.syntax that
// tells of every bad line by its number.
func ParseScenario(name string, src []byte) (Scenario, error) {
	var sc Scenario
	var errs []error
	if len(src) > maxScenario {
		errs, src = append(errs, fmt.Errorf("it is longer than %d bytes", maxScenario)), nil
	}
	for i, text := range strings.Split(string(src), "\n") {
		text, _, _ = strings.Cut(text, "#")
		words := strings.Fields(text)
		if len(words) == 0 {
			continue
		}
		if err := sc.line(i+1, &words); err != nil {
			errs = append(errs, fmt.Errorf("line %d: %w", i+1, err))
		} else if len(words) > 0 {
			errs = append(errs, fmt.Errorf("line %d: nothing may follow before %q", i+1, clip(words[0], 40)))
		}
	}
	if len(errs) > 0 {
		return Scenario{}, &flint.Fault{
			Code: "scenario.syntax", Kind: flint.ErrUsage, What: "read scenario " + name, Err: errors.Join(errs...),
			Fix: "see docs/reference.md, \"flint dev github\", for what a line may say",
		}
	}
	slices.SortStableFunc(sc.acts, func(a, b act) int { return cmp.Compare(a.at, b.at) })
	return sc, nil
}

// line reads one line and leaves in words what it did not need.
func (sc *Scenario) line(number int, words *[]string) error {
	switch first := take(words); first {
	case "seed":
		n, err := strconv.ParseUint(take(words), 10, 64)
		if err != nil {
			return errors.New("want seed and a number")
		}
		sc.Seed = n
		return nil
	case "always":
		set, err := readSetting(words, true)
		sc.always = append(sc.always, set)
		return err
	case "at":
		at, err := readTime(take(words))
		if err != nil {
			return err
		}
		return sc.act(number, at, words)
	default:
		return fmt.Errorf("a line begins with at, always or seed, not %q", clip(first, 40))
	}
}

// act reads what happens at a time.
func (sc *Scenario) act(number int, at time.Duration, words *[]string) (err error) {
	a := act{line: number, text: strings.Join(*words, " "), at: at}
	switch word := take(words); word {
	case "submit":
		a.verb = verbSubmit
		err = a.readSubmit(words)
	case "outage":
		a.verb = verbOutage
		if a.length, err = readTime(take(words)); err == nil {
			sc.acts = append(sc.acts, act{line: number, text: "end of outage", at: at + a.length, verb: verbRecover})
		}
	case "kill":
		a.verb = verbKill
		if err = expect(words, "runner"); err == nil {
			a.n, err = readNumber(words, maxRunners)
		}
	case "cancel":
		a.verb = verbCancel
		if err = expect(words, "run"); err == nil {
			a.n, err = readNumber(words, maxRunners)
		}
	case "delete":
		a.verb = verbDelete
		if err = expect(words, "scale-set"); err == nil {
			if a.name = take(words); a.name == "" {
				err = errors.New("want the scale set's name")
			}
		}
	case "start":
		a.verb = verbStart
		a.set, err = readSetting(words, true)
	case "stop":
		a.verb = verbStop
		a.set, err = readSetting(words, false)
	default:
		err = fmt.Errorf("want submit, outage, kill, cancel, delete, start or stop, not %q", clip(word, 40))
	}
	sc.acts = append(sc.acts, a)
	return err
}

// readSubmit reads "5 jobs runs-on flint,gpu taking 2s [failing]".
func (a *act) readSubmit(words *[]string) (err error) {
	if a.n, err = readNumber(words, maxSubmit); err != nil {
		return err
	}
	if word := take(words); word != "jobs" && word != "job" {
		return fmt.Errorf("want jobs, not %q", clip(word, 40))
	}
	if err := expect(words, "runs-on"); err != nil {
		return err
	}
	a.labels = strings.Split(take(words), ",")
	if len(a.labels) > maxSubmitLabels || slices.ContainsFunc(a.labels, func(l string) bool { return l == "" || l != clip(l, maxName) || strings.Contains(l, "${{") }) {
		return errors.New("want labels with commas and no spaces between them after runs-on")
	}
	if err := expect(words, "taking"); err != nil {
		return err
	}
	if a.length, err = readTime(take(words)); err != nil {
		return err
	}
	if len(*words) > 0 && (*words)[0] == "failing" {
		take(words)
		a.fails = true
	}
	return nil
}

// take removes the first word; "" when there is none.
func take(words *[]string) string {
	if len(*words) == 0 {
		return ""
	}
	first := (*words)[0]
	*words = (*words)[1:]
	return first
}

func expect(words *[]string, want string) error {
	if got := take(words); got != want {
		return fmt.Errorf("want %s, not %q", want, clip(got, 40))
	}
	return nil
}

func readNumber(words *[]string, most int) (int, error) {
	s := take(words)
	n, err := strconv.Atoi(s)
	if err != nil || n < 1 || n > most {
		return 0, fmt.Errorf("want a number from 1 to %d, not %q", most, clip(s, 40))
	}
	return n, nil
}

func readTime(s string) (time.Duration, error) {
	d, err := time.ParseDuration(s)
	if err != nil || d < 0 || d > maxScenarioTime {
		return 0, fmt.Errorf("want a time of at most 24h, as 2s or 500ms, not %q", clip(s, 40))
	}
	return d, nil
}

// readSetting reads the name of a switch and, unless it is to be switched off, its value. Of names that begin alike, the
// longest counts.
func readSetting(words *[]string, valued bool) (set setting, err error) {
	var f Faults
	chances, lengths := f.chances(), f.lengths()
	for n := len(*words); n > 0 && set.name == ""; n-- {
		name := strings.Join((*words)[:n], " ")
		_, isChance := chances[name]
		_, isLength := lengths[name]
		if isChance || isLength {
			set.name, *words = name, (*words)[n:]
		}
	}
	if set.name == "" {
		all, times := faultNames()
		return set, fmt.Errorf("want one of %s; not %q", strings.Join(append(all, times...), ", "), clip(strings.Join(*words, " "), 60))
	}
	if !valued {
		return set, nil
	}
	value := take(words)
	if _, ok := lengths[set.name]; ok {
		set.length, err = readTime(value)
		return set, err
	}
	number, percent := strings.CutSuffix(value, "%")
	p, err := strconv.ParseFloat(number, 64)
	if err != nil || !percent || !(p >= 0 && p <= 100) {
		return set, fmt.Errorf("want a chance, as 20%%, not %q", clip(value, 40))
	}
	set.chance = p / 100
	return set, nil
}

// apply sets the switch in f, its time scaled.
func (set setting) apply(f *Faults, scale float64) {
	if p, ok := f.chances()[set.name]; ok {
		*p = set.chance
		return
	}
	*f.lengths()[set.name] = scaled(set.length, scale)
}

func scaled(d time.Duration, scale float64) time.Duration {
	if scale > 0 {
		return time.Duration(float64(d) * scale)
	}
	return d
}

// Play lets a scenario happen and returns the runs it submitted once every line has been carried out; they may not be over.
// What the scenario switched on stays on, but for outages. When ctx is over it stops, and says so.
func (s *Server) Play(ctx context.Context, sc Scenario) (runs []*Run, err error) {
	s.hub.faults.alter(func(f *Faults) {
		if sc.Seed != 0 {
			f.Seed = sc.Seed
		}
		for _, set := range sc.always {
			set.apply(f, sc.Scale)
		}
	})
	start, down := time.Now(), 0
	defer func() {
		if down > 0 {
			s.hub.faults.alter(func(f *Faults) { f.Outage = false })
		}
	}()
	for _, a := range sc.acts {
		if err := pause(ctx, start.Add(scaled(a.at, sc.Scale))); err != nil {
			return runs, fmt.Errorf("play line %d of the scenario: %w", a.line, err)
		}
		switch a.verb {
		case verbOutage, verbRecover:
			if down--; a.verb == verbOutage {
				down += 2
			}
			s.hub.faults.alter(func(f *Faults) { f.Outage = down > 0 })
		case verbSubmit:
			var run *Run
			if run, err = s.submitJobs(a, sc.Scale); err == nil {
				runs = append(runs, run)
			}
		case verbCancel:
			if a.n > len(runs) {
				err = fmt.Errorf("there are only %d runs so far", len(runs))
			} else {
				runs[a.n-1].Cancel()
			}
		default:
			err = s.carryOut(ctx, a, sc)
		}
		if err != nil {
			return runs, fmt.Errorf("play line %d of the scenario: %w", a.line, err)
		}
		if sc.Did != nil {
			sc.Did(a.text)
		}
	}
	return runs, nil
}

func pause(ctx context.Context, until time.Time) error {
	t := time.NewTimer(time.Until(until))
	defer t.Stop()
	select {
	case <-t.C:
		return ctx.Err()
	case <-ctx.Done():
		return ctx.Err()
	}
}

// carryOut does what needs nothing but the server.
func (s *Server) carryOut(ctx context.Context, a act, sc Scenario) error {
	switch a.verb {
	case verbKill:
		return s.killRunner(ctx, a.n, sc.Kill)
	case verbDelete:
		return s.deleteSetNamed(ctx, a.name)
	case verbStart, verbStop:
		s.hub.faults.alter(func(f *Faults) { a.set.apply(f, sc.Scale) })
	}
	return nil
}

// submitJobs queues one run of jobs that only take time.
func (s *Server) submitJobs(a act, scale float64) (*Run, error) {
	quoted, numbers := make([]string, len(a.labels)), make([]string, a.n)
	for i, l := range a.labels {
		quoted[i] = strconv.Quote(l)
	}
	for i := range numbers {
		numbers[i] = strconv.Itoa(i + 1)
	}
	src := fmt.Sprintf("name: scenario line %d\non: push\njobs:\n  job:\n    runs-on: [%s]\n    strategy: { fail-fast: false, matrix: { n: [%s] } }\n    steps:\n      - run: sleep %s\n",
		a.line, strings.Join(quoted, ", "), strings.Join(numbers, ", "), strconv.FormatFloat(scaled(a.length, scale).Seconds(), 'f', -1, 64))
	if a.fails {
		src += "      - run: exit 1\n"
	}
	wf, err := ParseWorkflow(".github/workflows/scenario.yml", []byte(src))
	if err != nil {
		return nil, err
	}
	return s.Submit(wf, Trigger{Event: "push"})
}

// killRunner ends the nth runner that was ever registered, and waits for it to be registered first. One that is gone already
// is none to kill.
func (s *Server) killRunner(ctx context.Context, nth int, kill func(string)) error {
	var x *runner
	var name string
	if !s.hub.await(ctx, maxScenarioTime, func() bool {
		if x = s.hub.findRunner(func(x *runner) bool { return x.nth == nth }); x != nil {
			name = x.name
		}
		return s.hub.registered >= nth
	}) {
		return fmt.Errorf("wait for runner %d: %w", nth, cmp.Or(ctx.Err(), errClosed()))
	}
	switch {
	case x == nil:
	case kill != nil:
		kill(name)
	default:
		s.hub.change(func() { s.hub.cut(x) })
	}
	return nil
}

// deleteSetNamed takes away every scale set with a name, and waits for one to be there first.
func (s *Server) deleteSetNamed(ctx context.Context, name string) error {
	var ids []int64
	if !s.hub.await(ctx, maxScenarioTime, func() bool {
		for _, set := range s.hub.sets {
			if strings.EqualFold(set.name, name) {
				ids = append(ids, set.id)
			}
		}
		return len(ids) > 0
	}) {
		return fmt.Errorf("wait for scale set %s: %w", clip(name, maxName), cmp.Or(ctx.Err(), errClosed()))
	}
	for _, id := range ids {
		_ = s.hub.deleteSet(id) // one that went meanwhile is gone as well
	}
	return nil
}
