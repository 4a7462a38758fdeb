package githubsim

import (
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"flint"
)

const minimal = "on: push\njobs:\n  a:\n    runs-on: flint\n    steps:\n      - run: echo hello\n"

func TestParseWorkflowRefusesByName(t *testing.T) {
	for name, tc := range map[string]struct {
		src  string
		code string
		want []string // "line:col: words"
	}{
		"remote action": {
			"on: push\njobs:\n  a:\n    runs-on: flint\n    steps:\n      - uses: actions/checkout@v4\n      - uses: ./local\n",
			"workflow.unsupported",
			[]string{"6:15: uses: actions/checkout@v4 is not supported", "7:15: uses: ./local is not supported"},
		},
		"reusable workflow": {
			"on: push\njobs:\n  a:\n    uses: o/r/.github/workflows/x.yml@v1\n",
			"workflow.unsupported",
			[]string{"4:11: calling the reusable workflow o/r/.github/workflows/x.yml@v1 is not"},
		},
		"job sections": {
			"on: push\nconcurrency: x\njobs:\n  a:\n    runs-on: { group: g, labels: flint }\n    container: debian\n    services: { db: { image: pg } }\n    environment: { name: prod, url: x }\n    concurrency: y\n    steps: [{run: x}]\n",
			"workflow.unsupported",
			[]string{"2:1: concurrency: is", "5:23: runs-on.group: is", "6:5: container: is", "7:17: services: is", "8:5: more of an environment: than its name is", "9:5: concurrency: is"},
		},
		"contexts and functions": {
			"on: push\njobs:\n  a:\n    runs-on: flint\n    if: hashFiles('x') == vars.y\n    env: { K: \"${{ secrets.KEY }}\", T: \"${{ secrets.GITHUB_TOKEN }}\" }\n    steps:\n      - run: echo ${{ vars.x }}\n",
			"workflow.unsupported",
			[]string{"5:9: the function hashFiles() at this place", "5:9: the context vars at this place", "6:15: a secret is", "8:14: the context vars"},
		},
		"matrix": {
			"on: push\njobs:\n  a:\n    runs-on: flint\n    strategy: { matrix: { x: [[1, 2]], y: \"${{ fromJSON('[1]') }}\" } }\n    steps: [{run: x}]\n",
			"workflow.unsupported",
			[]string{"5:31: a matrix value that is a list or a mapping", "5:43: a matrix row made by an expression"},
		},
		"unknown key": {
			"on: push\njobs:\n  a:\n    runs-on: flint\n    stepz: []\n    steps: [{run: x, shel: bash}]\n",
			"workflow.syntax",
			[]string{"5:5: unexpected key \"stepz\"", "6:22: unexpected key \"shel\""},
		},
		"expression": {
			"on: push\njobs:\n  a:\n    runs-on: flint\n    steps:\n      - run: echo ${{ github. }}\n      - run: x\n        if: always(\n",
			"workflow.syntax",
			[]string{"6:14: read expression", "8:13: read expression"},
		},
		"needs": {
			"on: push\njobs:\n  a:\n    needs: [b, ghost]\n    runs-on: flint\n    steps: [{run: x}]\n  b:\n    needs: a\n    runs-on: flint\n    steps: [{run: x}]\n",
			"workflow.syntax",
			[]string{"4:16: job \"a\" needs \"ghost\", which does not exist", "8:12: jobs \"b\" and \"a\" need each other"},
		},
		"same step id": {
			"on: push\njobs:\n  a:\n    runs-on: flint\n    steps: [{run: x, id: s}, {run: y, id: S}]\n",
			"workflow.syntax",
			[]string{"5:43: two steps of the job have the id \"S\""},
		},
		"not yaml":    {"on: [push\n", "workflow.syntax", []string{"could not parse as YAML"}},
		"empty":       {"", "workflow.syntax", []string{"workflow is empty"}},
		"anchor bomb": {bomb(), "workflow.syntax", []string{"anchors expand to too much"}},
	} {
		t.Run(name, func(t *testing.T) {
			_, err := ParseWorkflow("ci.yml", []byte(tc.src))
			f := asFault[*flint.Fault](t, err)
			if f.Code != tc.code || !errors.Is(err, flint.ErrUsage) || f.Fix == "" {
				t.Errorf("got code %s, kind %v, fix %q; want code %s", f.Code, f.Kind, f.Fix, tc.code)
			}
			problems := asFault[Problems](t, err)
			for _, want := range tc.want {
				if !strings.Contains(problems.Error(), want) {
					t.Errorf("the problems lack %q:\n%s", want, problems)
				}
			}
			for _, p := range problems {
				if !strings.HasPrefix(p.String(), "ci.yml:") {
					t.Errorf("problem without its place: %s", p)
				}
			}
		})
	}
}

// bomb is a workflow whose anchors expand to 10^9 nodes.
func bomb() string {
	var b strings.Builder
	b.WriteString("on: push\nenv:\n  a0: &a0 [x,x,x,x,x,x,x,x,x,x]\n")
	for i := 1; i < 9; i++ {
		prev := "*a" + string(rune('0'+i-1))
		b.WriteString("  a" + string(rune('0'+i)) + ": &a" + string(rune('0'+i)) + " [" + strings.Repeat(prev+",", 9) + prev + "]\n")
	}
	return b.String()
}

func TestParseWorkflowAcceptsWhatItIgnores(t *testing.T) {
	w := mustParse(t, `
name: ok
run-name: r ${{ github.actor }}
on: { push: { branches: [main] }, schedule: [{ cron: "0 0 * * *" }] }
permissions: read-all
jobs:
  B: { runs-on: [flint], permissions: { contents: read }, steps: [{ run: "true" }] }
  a: { runs-on: flint, needs: b, steps: [{ run: "true", continue-on-error: true, timeout-minutes: 5 }] }
`)
	if got := strings.Join(w.Jobs(), " "); w.Name != "ok" || got != "B a" {
		t.Errorf("name %q, jobs %q", w.Name, got)
	}
}

func TestMatrix(t *testing.T) {
	w := mustParse(t, `
on: push
jobs:
  a:
    runs-on: flint
    strategy:
      matrix:
        os: [linux, mac]
        v: [1, '1.10', true]
        exclude: [{ os: mac, v: 1 }, { os: mac, v: true }]
        include:
          - { os: linux, extra: yes }
          - { v: 1, color: red }
          - { os: bsd, v: 9 }
    steps: [{ run: x }]
`)
	var got []string
	for _, c := range w.jobs[0].matrix {
		b, err := c.MarshalJSON()
		if err != nil {
			t.Fatal(err)
		}
		got = append(got, string(b))
	}
	want := `{"os":"linux","v":1,"extra":"yes","color":"red"}
{"os":"linux","v":"1.10","extra":"yes"}
{"os":"linux","v":true,"extra":"yes"}
{"os":"mac","v":"1.10"}
{"os":"bsd","v":9}`
	if strings.Join(got, "\n") != want {
		t.Errorf("got\n%s\nwant\n%s", strings.Join(got, "\n"), want)
	}
}

func TestExpressions(t *testing.T) {
	sc := &scope{succeeded: true, contexts: newObject(
		"github", newObject("ref", "refs/heads/main", "event", newObject("n", float64(3))),
		"list", []any{"a", float64(2)}, "no", false,
	)}
	for expr, want := range map[string]string{
		"github.ref":                              "refs/heads/main",
		"GITHUB['REF']":                           "refs/heads/main",
		"github.event.n == '3'":                   "true",
		"github.event.n < 10 && 'yes' || 'no'":    "yes",
		"github.missing.deeper":                   "",
		"!github.missing":                         "true",
		"'ABC' == 'abc'":                          "true",
		"null == 0":                               "true",
		"'x' == 0":                                "false",
		"'x' != 0":                                "true",
		"contains(github.ref, 'HEADS')":           "true",
		"contains(list, 2)":                       "true",
		"list[1]":                                 "2",
		"startsWith(github.ref, 'refs/')":         "true",
		"endsWith(github.ref, 'x')":               "false",
		"format('{0}-{1} {{}}', 'a', 1.5)":        "a-1.5 {}",
		"toJSON(github.event)":                    "{\n  \"n\": 3\n}",
		"success() && !cancelled() && !failure()": "true",
		"(no || always()) && github.event.n >= 3": "true",
	} {
		node, err := parseExpr(expr)
		if err != nil {
			t.Errorf("%s: %v", expr, err)
			continue
		}
		if v, err := sc.eval(node); err != nil || text(v) != want {
			t.Errorf("%s = %q, %v; want %q", expr, text(v), err, want)
		}
	}
	for _, expr := range []string{"format('{0}')", "format('{')", "contains('a')", "fromJSON('1')"} {
		node, err := parseExpr(expr)
		if err != nil {
			t.Fatal(err)
		}
		if v, err := sc.eval(node); err == nil {
			t.Errorf("%s = %v, want an error", expr, v)
		}
	}
}

func TestTemplateToken(t *testing.T) {
	for in, want := range map[string]string{
		"plain }} text":                     "",
		"${{ github.ref }}":                 "github.ref",
		"a ${{ github.ref }} {b} it's":      "format('a {0} {{b}} it''s', github.ref)",
		"${{ a.x }}${{ '}}' }}":             "format('{0}{1}', a.x, '}}')",
		"${{ format('{0}', github.run) }} ": "format('{0} ', format('{0}', github.run))",
	} {
		got, err := templateToken(in)
		if err != nil || got.Expr != want || (want == "") != (got.Lit != nil && *got.Lit == in) {
			t.Errorf("%q: got %+v, %v; want %q", in, got, err, want)
		}
	}
}

func TestExampleHelloParses(t *testing.T) {
	path := filepath.Join("..", "..", "examples", "hello", ".github", "workflows", "ci.yml")
	src, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	w, err := ParseWorkflow(path, src)
	if err != nil {
		t.Fatal(err)
	}
	if got := strings.Join(w.Jobs(), " "); got != "build check" {
		t.Errorf("jobs are %q", got)
	}
}

func FuzzParseWorkflow(f *testing.F) {
	f.Add([]byte(minimal))
	f.Add([]byte(bomb()))
	f.Add([]byte("on: push\njobs:\n  a:\n    runs-on: ${{ matrix.x }}\n    name: n ${{ matrix.x }}\n    strategy: { matrix: { x: [1, a], exclude: [{x: 1}], include: [{y: '2'}] } }\n    if: always() && github.ref == 'x'\n    steps:\n      - run: |\n          echo ${{ 'a}}b' }}\n        if: ${{ failure() }}\n"))
	f.Add([]byte("a: &a [*a]\n"))
	f.Add([]byte("on: {workflow_dispatch: {inputs: {x: {type: boolean, default: maybe}}}}\njobs: {a: {needs: a}}\n"))
	if src, err := os.ReadFile(filepath.Join("..", "..", "examples", "hello", ".github", "workflows", "ci.yml")); err == nil {
		f.Add(src)
	}
	h := newHub(Config{URL: "http://x", Owner: "o", Repo: "r", Repos: []Repository{{Name: "r"}}})
	f.Fuzz(func(t *testing.T, src []byte) {
		w, err := ParseWorkflow("f.yml", src)
		if err != nil {
			var fault *flint.Fault
			if !errors.As(err, &fault) {
				t.Fatalf("not a Fault: %v", err)
			}
			return
		}
		// What was accepted can be planned and rendered, or is refused with an error.
		r := &Run{wf: w, event: "push", hub: h, inputs: newObject(), done: make(chan struct{}), repo: h.repository("r")}
		if h.planJobs(r) != nil {
			return
		}
		for _, j := range r.jobs {
			if _, err := h.jobRequest(j, "t"); err != nil {
				t.Fatalf("accepted, but cannot be rendered: %v", err)
			}
			if _, err := h.scope(j).holds(j.spec.condition); err != nil && !strings.Contains(err.Error(), "call ") {
				t.Fatalf("accepted, but its if: cannot be evaluated: %v", err)
			}
		}
	})
}
