package githubsim

import (
	"fmt"
	"os"
	"os/exec"
	"strconv"
	"strings"
	"testing"
)

func TestRealRunnerRunsWorkflow(t *testing.T) {
	start := actRunner(t)
	r := newRig(t, Config{})
	f := r.runFleet("flint", 2, start)
	run, err := r.Submit(mustParse(t, `
name: real
on: push
env: { LEVEL: workflow, WHO: "${{ github.repository_owner }}" }
defaults: { run: { shell: sh } }
jobs:
  build:
    runs-on: flint
    env: { LEVEL: job }
    strategy: { matrix: { os: [debian, alpine], n: [1] } }
    name: build ${{ matrix.os }}-${{ matrix.n }}
    outputs: { made: "${{ steps.make.outputs.what }}" }
    steps:
      - run: echo "level=$LEVEL who=$WHO"
      - name: in ${{ matrix.os }}
        env: { LEVEL: step }
        run: |
          echo "level=$LEVEL matrix=${{ matrix.os }}"
          echo "shell=$0" | sed 's/\/.*\///'
      - shell: bash
        run: echo "bash ${BASH_VERSION%%.*}"
      - run: mkdir -p sub && echo here > sub/file
      - working-directory: sub
        run: cat file && basename "$PWD"
      - id: make
        run: echo "what=${{ matrix.os }}" >> "$GITHUB_OUTPUT"
      - run: echo "{{ braces }} }} ${HOME:+home}"
  check:
    needs: build
    runs-on: [flint]
    steps:
      - run: echo "needs ${{ needs.build.result }} ${{ needs.build.outputs.made }} $ADDED"
      - if: failure()
        run: echo never
      - if: github.event_name == 'push'
        run: echo pushed
`), Trigger{Event: "push", Env: map[string]string{"ADDED": "by-submit"}})
	if err != nil {
		t.Fatal(err)
	}
	r.waitRun(run, Success)
	debian := r.lines("build debian-1")
	for _, want := range []string{"level=job who=acme", "level=step matrix=debian", "bash 5", "here", "sub", "{{ braces }} }} home"} {
		if !strings.Contains(debian, want) {
			t.Errorf("log of build debian-1 lacks %q:\n%s", want, debian)
		}
	}
	check := r.lines("check")
	for _, want := range []string{"needs success alpine by-submit", "pushed"} {
		if !strings.Contains(check, want) {
			t.Errorf("log of check lacks %q:\n%s", want, check)
		}
	}
	if strings.Contains(check, "never") {
		t.Errorf("a step with if: failure() ran:\n%s", check)
	}
	for _, j := range run.Jobs() {
		if j.Log == "" || !strings.Contains(j.Log, "Runner Name: "+j.Runner) {
			t.Errorf("job %s: uploaded log is %q", j.Name, j.Log)
		}
		t.Logf("%s: %+v", j.Name, j.Steps)
	}
	f.wg.Wait()
	if left := r.Runners(); len(left) != 0 {
		t.Errorf("registrations left: %+v", left)
	}
}

func TestRealRunnerFails(t *testing.T) {
	start := actRunner(t)
	r := newRig(t, Config{})
	r.runFleet("flint", 1, start)
	run := submit(t, r, `
on: push
jobs:
  bad:
    runs-on: flint
    steps:
      - run: echo before
      - run: exit 3
      - run: echo skipped
      - if: always()
        run: echo always
      - if: "!cancelled()"
        run: echo uncancelled
      - if: failure()
        run: echo onfailure
      - { run: exit 1, if: failure(), continue-on-error: true }
      - { run: 'echo "::add-mask::hush"; echo "say hush"', if: failure() }
  after: { runs-on: flint, needs: bad, if: always(), steps: [{ run: 'echo "it was ${{ needs.bad.result }}"' }] }
`)
	r.waitRun(run, Failure)
	log := r.lines("bad")
	for want, in := range map[string]bool{"\nbefore\n": true, "\nskipped\n": false, "\nalways\n": true, "\nuncancelled\n": true, "\nonfailure\n": true, "say hush": false} {
		if strings.Contains(log, want) != in {
			t.Errorf("log has %q: %v, want %v\n%s", want, !in, in, log)
		}
	}
	if !strings.Contains(r.lines("after"), "it was failure") {
		t.Errorf("log of after:\n%s", r.lines("after"))
	}
	var got []string
	for _, st := range run.Jobs()[0].Steps {
		got = append(got, string(st.Conclusion))
	}
	if g := strings.Join(got, " "); !strings.HasPrefix(g, "success success failure skipped success success success ") {
		t.Errorf("steps ended %s", g)
	}
}

// The runner kills the step's shell only, and then waits for whoever else holds its output: hence the exec.
func TestRealRunnerIsCancelled(t *testing.T) {
	start := actRunner(t)
	r := newRig(t, Config{})
	r.runFleet("flint", 1, start)
	run := submit(t, r, "on: push\njobs:\n  long:\n    runs-on: flint\n    steps: [{run: 'echo sleeping; exec sleep 300'}, {run: echo never}, {run: echo cleaning, if: cancelled()}]\n")
	r.until(func(e Event) bool { return e.Kind == LogLine && e.Line == "sleeping" })
	run.Cancel()
	r.waitRun(run, Cancelled)
	if log := r.lines("long"); strings.Contains(log, "\nnever\n") || !strings.Contains(log, "\ncleaning\n") {
		t.Errorf("log:\n%s", log)
	}
}

// Every line of a chatty job arrives before the job is completed, and in order.
func TestRealRunnerLogIsWhole(t *testing.T) {
	start := actRunner(t)
	r := newRig(t, Config{})
	r.runFleet("flint", 1, start)
	run := submit(t, r, "on: push\njobs:\n  a: { runs-on: flint, steps: [{run: seq 1 5000}] }\n")
	r.waitRun(run, Success)
	var want, got strings.Builder
	for i := 1; i <= 5000; i++ {
		fmt.Fprintln(&want, i)
	}
	for l := range strings.Lines(r.lines("a")) {
		if _, err := strconv.Atoi(strings.TrimSpace(l)); err == nil {
			got.WriteString(l)
		}
	}
	if got.String() != want.String() {
		t.Errorf("got %d bytes of numbers, want %d", got.Len(), want.Len())
	}
}

func TestRealRunnerRunsExample(t *testing.T) {
	if _, err := exec.LookPath("gcc"); err != nil {
		t.Skip("needs gcc: the example compiles a program")
	}
	start := actRunner(t)
	src, err := os.ReadFile("../../examples/hello/.github/workflows/ci.yml")
	if err != nil {
		t.Fatal(err)
	}
	for _, fail := range []bool{false, true} {
		t.Run(fmt.Sprintf("fail=%v", fail), func(t *testing.T) {
			r := newRig(t, Config{})
			r.runFleet("flint", 2, start)
			run, err := r.Submit(mustParse(t, string(src)), Trigger{Inputs: map[string]string{"fail": strconv.FormatBool(fail)}})
			if err != nil {
				t.Fatal(err)
			}
			want := Success
			if fail {
				want = Failure
			}
			r.waitRun(run, want)
			if log := r.lines("build"); !strings.Contains(log, "Hello from ") || !strings.Contains(log, "cpus ") {
				t.Errorf("log of build:\n%s", log)
			}
			if log := r.lines("check"); !strings.Contains(log, "104729") || strings.Contains(log, "failure that was asked for") != fail {
				t.Errorf("log of check:\n%s", log)
			}
			if testing.Verbose() {
				t.Log(r.lines("build"))
			}
		})
	}
}
