package githubsim

import (
	"bytes"
	"crypto/sha1"
	"encoding/hex"
	"fmt"
	"slices"
	"strconv"
	"strings"

	"github.com/rhysd/actionlint"
	"go.yaml.in/yaml/v4"

	"flint"
)

// Workflow is a workflow file that this GitHub can run in full. It does not change once parsed.
type Workflow struct {
	Name   string // its `name:`, or its path
	Path   string
	env    []pair
	inputs []input // of `on.workflow_dispatch`
	jobs   []jobSpec
	sha    string // of the file; stands for the commit
}

type pair struct{ name, value string }

type input struct {
	name  string
	kind  actionlint.WorkflowDispatchEventInputType
	value string // the default
}

// typed gives an input's text the type it was declared with.
func (in input) typed(s string) (any, error) {
	switch in.kind {
	case actionlint.WorkflowDispatchEventInputTypeBoolean:
		switch s {
		case "true":
			return true, nil
		case "false", "":
			return false, nil
		}
		return nil, fmt.Errorf("input %s: want true or false, got %q", in.name, s)
	case actionlint.WorkflowDispatchEventInputTypeNumber:
		f, err := strconv.ParseFloat(s, 64)
		if err != nil && s != "" {
			return nil, fmt.Errorf("input %s: want a number, got %q", in.name, s)
		}
		return f, nil
	}
	return s, nil
}

// jobSpec is one job of the file; every combination of its matrix becomes a job of a run.
type jobSpec struct {
	id              string
	name            string // template; "" for the default
	needs           []string
	condition       string
	labels          []string // templates
	env             []pair
	outputs         []pair
	steps           []stepSpec
	matrix          []*object // its combinations, in order; one nil when there is no matrix
	failFast        bool
	maxParallel     int // 0: no limit
	continueOnError string
	environment     string // template; "" for none
	timeoutMinutes  float64
}

type stepSpec struct {
	contextName      string // the `id:`, or one like GitHub makes up
	name             string // template
	condition        string // without ${{ }}, with its success() made explicit
	script           string
	shell            string
	workingDirectory string
	env              []pair
	continueOnError  string // "", "true", "false" or an expression
	timeoutMinutes   string // "", a number or an expression
}

const (
	maxWorkflow      = 512 << 10    // bytes of a workflow file, which is GitHub's limit too
	maxYAMLNodes     = 100_000      // after anchors are expanded
	maxCombinations  = 256          // jobs per matrix, GitHub's limit
	defaultTimeout   = 360          // minutes, GitHub's default for a job
	maxTimeout       = 35 * 24 * 60 // minutes, GitHub's limit for a run
	maxStepsPerJob   = 1000         // GitHub's limit
	maxJobsPerSubmit = 1000
)

// Problem is one thing in a workflow file that cannot be run, and where.
type Problem struct {
	Path      string
	Line, Col int // 1-based; 0 when the place is not known
	What      string
	Fix       string
}

// String returns path:line:col: what; fix.
func (p Problem) String() string {
	s := fmt.Sprintf("%s:%d:%d: %s", p.Path, p.Line, p.Col, p.What)
	if p.Fix != "" {
		s += "; " + p.Fix
	}
	return s
}

// Problems is every problem of a file, in the order of their places.
type Problems []Problem

// Error returns the problems, one per line.
func (ps Problems) Error() string {
	lines := make([]string, len(ps))
	for i, p := range ps {
		lines[i] = p.String()
	}
	return strings.Join(lines, "\n")
}

// ParseWorkflow reads a workflow file. Its error is a *flint.Fault with code workflow.syntax when the file is not a
// valid workflow, or workflow.unsupported when it is, but asks for something this GitHub does not have; both wrap
// Problems, which lists all of them.
func ParseWorkflow(path string, src []byte) (*Workflow, error) {
	r := &reader{path: path, lines: bytes.Split(src, []byte("\n"))}
	if len(src) > maxWorkflow {
		r.syntax(nil, fmt.Sprintf("the file is larger than %d bytes", maxWorkflow))
		return nil, r.fault()
	}
	if !r.checkYAML(src) {
		return nil, r.fault()
	}
	ast, errs := actionlint.Parse(src)
	for _, e := range errs {
		r.syntax(&actionlint.Pos{Line: e.Line, Col: e.Column}, e.Message)
	}
	if ast == nil || len(errs) > 0 {
		return nil, r.fault()
	}
	w := r.workflow(ast)
	sum := sha1.Sum(src)
	w.sha = hex.EncodeToString(sum[:])
	if len(r.problems) > 0 {
		return nil, r.fault()
	}
	return w, nil
}

// reader turns the syntax tree into a Workflow and collects what is wrong with it.
type reader struct {
	path     string
	lines    [][]byte
	problems Problems
	invalid  bool // a problem is one of syntax
}

func (r *reader) syntax(pos *actionlint.Pos, what string) {
	r.invalid = true
	r.add(pos, what, "")
}

func (r *reader) unsupported(pos *actionlint.Pos, what, fix string) {
	r.add(pos, what+" is not supported by the simulated GitHub", fix)
}

func (r *reader) add(pos *actionlint.Pos, what, fix string) {
	p := Problem{Path: r.path, What: what, Fix: fix}
	if pos != nil {
		p.Line, p.Col = pos.Line, pos.Col
	}
	if !slices.Contains(r.problems, p) && len(r.problems) < 100 {
		r.problems = append(r.problems, p)
	}
}

func (r *reader) fault() error {
	slices.SortStableFunc(r.problems, func(a, b Problem) int {
		if a.Line != b.Line {
			return a.Line - b.Line
		}
		return a.Col - b.Col
	})
	f := &flint.Fault{
		Code: "workflow.unsupported", Kind: flint.ErrUsage, Err: r.problems,
		What: "run workflow " + r.path,
		Fix:  "change the places named, or run this workflow on github.com",
	}
	if r.invalid {
		f.Code, f.Fix = "workflow.syntax", "mend the places named; see https://docs.github.com/actions/reference/workflow-syntax-for-github-actions"
	}
	return f
}

// checkYAML refuses files whose anchors expand beyond measure, before anything walks the expanded tree.
func (r *reader) checkYAML(src []byte) bool {
	var root yaml.Node
	if yaml.Unmarshal(src, &root) != nil {
		return true // the real parser reports it with its place
	}
	sizes := map[*yaml.Node]int{}
	var size func(n *yaml.Node) int
	size = func(n *yaml.Node) int {
		if s, ok := sizes[n]; ok {
			return s
		}
		sizes[n] = maxYAMLNodes // what a node that contains itself counts as
		total := 1
		if n.Alias != nil {
			total += size(n.Alias)
		}
		for _, c := range n.Content {
			total = min(total+size(c), maxYAMLNodes)
		}
		sizes[n] = total
		return total
	}
	if size(&root) >= maxYAMLNodes {
		r.syntax(nil, "the file's anchors expand to too much, or refer to themselves")
		return false
	}
	return true
}

func (r *reader) workflow(ast *actionlint.Workflow) *Workflow {
	w := &Workflow{Name: r.path, Path: r.path, env: r.env(ast.Env)}
	if ast.Name != nil && ast.Name.Value != "" {
		w.Name = clip(ast.Name.Value, maxName)
	}
	if ast.Concurrency != nil {
		r.unsupported(ast.Concurrency.Pos, "concurrency:", "take it out")
	}
	for _, e := range ast.On {
		d, ok := e.(*actionlint.WorkflowDispatchEvent)
		if !ok {
			continue
		}
		for _, in := range d.Inputs {
			spec := input{name: in.Name.Value, kind: in.Type}
			if in.Default != nil {
				spec.value = in.Default.Value
			}
			if _, err := spec.typed(spec.value); err != nil {
				r.syntax(in.Name.Pos, err.Error())
			}
			w.inputs = append(w.inputs, spec)
		}
		slices.SortFunc(w.inputs, func(a, b input) int { return strings.Compare(a.name, b.name) })
	}
	jobs := make([]*actionlint.Job, 0, len(ast.Jobs))
	for _, j := range ast.Jobs {
		jobs = append(jobs, j)
	}
	slices.SortFunc(jobs, func(a, b *actionlint.Job) int { return comparePos(a.Pos, b.Pos) })
	for _, j := range jobs {
		w.jobs = append(w.jobs, r.job(j, ast.Defaults))
	}
	r.checkNeeds(jobs)
	return w
}

func comparePos(a, b *actionlint.Pos) int {
	if a.Line != b.Line {
		return a.Line - b.Line
	}
	return a.Col - b.Col
}

// checkNeeds finds needs that name no job, and circles.
func (r *reader) checkNeeds(jobs []*actionlint.Job) {
	const visiting, done = 1, 2
	state := map[string]int{}
	byID := map[string]*actionlint.Job{}
	for _, j := range jobs {
		byID[strings.ToLower(j.ID.Value)] = j
	}
	var visit func(j *actionlint.Job)
	visit = func(j *actionlint.Job) {
		id := strings.ToLower(j.ID.Value)
		state[id] = visiting
		for _, n := range j.Needs {
			need := byID[strings.ToLower(n.Value)]
			switch {
			case need == nil:
				r.syntax(n.Pos, fmt.Sprintf("job %q needs %q, which does not exist", j.ID.Value, n.Value))
			case state[strings.ToLower(n.Value)] == visiting:
				r.syntax(n.Pos, fmt.Sprintf("jobs %q and %q need each other", j.ID.Value, n.Value))
			case state[strings.ToLower(n.Value)] != done:
				visit(need)
			}
		}
		state[id] = done
	}
	for _, j := range jobs {
		if state[strings.ToLower(j.ID.Value)] == 0 {
			visit(j)
		}
	}
}

// Jobs returns the ids of the jobs, in the order of the file.
func (w *Workflow) Jobs() []string {
	ids := make([]string, len(w.jobs))
	for i := range w.jobs {
		ids[i] = w.jobs[i].id
	}
	return ids
}
