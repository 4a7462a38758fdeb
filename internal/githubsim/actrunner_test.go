package githubsim

import (
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
