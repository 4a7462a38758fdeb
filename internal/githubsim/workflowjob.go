package githubsim

import (
	"fmt"
	"slices"
	"strconv"
	"strings"

	"github.com/rhysd/actionlint"
)

// Which contexts may be used where. The first group is evaluated by the server, the second by the runner.
var (
	planContexts   = []string{"github", "needs", "inputs", "matrix", "strategy"}
	runnerContexts = []string{"github", "needs", "inputs", "matrix", "strategy", "env", "job", "steps", "runner", "secrets"}
	planFunctions  = []string{"success", "failure", "cancelled", "always", "contains", "startswith", "endswith", "format", "tojson"}
	stepFunctions  = append(slices.Clone(planFunctions), "join", "fromjson", "hashfiles")
)

func (r *reader) job(j *actionlint.Job, defaults *actionlint.Defaults) jobSpec {
	spec := jobSpec{id: j.ID.Value, env: r.env(j.Env), failFast: true, timeoutMinutes: defaultTimeout, matrix: []*object{nil}}
	r.refuseJobSections(j)
	for _, n := range j.Needs {
		spec.needs = append(spec.needs, n.Value)
	}
	if j.Name != nil {
		spec.name = j.Name.Value
		r.template(j.Name, planContexts, planFunctions)
	}
	if j.If != nil {
		spec.condition = j.If.Value
		r.condition(j.If, planContexts, planFunctions)
	}
	r.runsOn(j, &spec)
	if j.TimeoutMinutes != nil {
		spec.timeoutMinutes = min(j.TimeoutMinutes.Value, maxTimeout)
		if e := j.TimeoutMinutes.Expression; e != nil {
			r.unsupported(e.Pos, "an expression in a job's timeout-minutes:", "write a number")
		} else if j.TimeoutMinutes.Value <= 0 {
			r.syntax(j.TimeoutMinutes.Pos, "timeout-minutes: must be more than 0")
		}
	}
	if c := j.ContinueOnError; c != nil {
		spec.continueOnError = c.String()
		if c.Expression != nil {
			r.template(c.Expression, planContexts, planFunctions)
		}
	}
	for _, o := range sortedBy(j.Outputs, func(o *actionlint.Output) *actionlint.Pos { return o.Name.Pos }) {
		r.template(o.Value, runnerContexts, stepFunctions)
		spec.outputs = append(spec.outputs, pair{o.Name.Value, o.Value.Value})
	}
	if j.Environment != nil && j.Environment.Name != nil {
		spec.environment = j.Environment.Name.Value
		r.template(j.Environment.Name, planContexts, planFunctions)
	}
	r.strategy(j.Strategy, &spec)
	if len(j.Steps) > maxStepsPerJob {
		r.syntax(j.Pos, fmt.Sprintf("job %q has more than %d steps", j.ID.Value, maxStepsPerJob))
		return spec
	}
	shell, dir := defaultRun(j.Defaults, defaults)
	for _, d := range []*actionlint.String{shell, dir} {
		if d != nil {
			r.template(d, runnerContexts, stepFunctions)
		}
	}
	names := map[string]bool{}
	for _, st := range j.Steps {
		spec.steps = append(spec.steps, r.step(st, shell, dir, names))
	}
	return spec
}

// defaultRun returns shell and working directory of the job's defaults, or else of the workflow's.
func defaultRun(levels ...*actionlint.Defaults) (shell, dir *actionlint.String) {
	for _, d := range levels {
		if d == nil || d.Run == nil {
			continue
		}
		if shell == nil {
			shell = d.Run.Shell
		}
		if dir == nil {
			dir = d.Run.WorkingDirectory
		}
	}
	return shell, dir
}

func (r *reader) refuseJobSections(j *actionlint.Job) {
	if j.WorkflowCall != nil && j.WorkflowCall.Uses != nil {
		r.unsupported(j.WorkflowCall.Uses.Pos, "calling the reusable workflow "+quoteName(j.WorkflowCall.Uses.Value), "copy its jobs into this file")
	}
	if j.Container != nil {
		r.unsupported(j.Container.Pos, "container:", "put what the job needs into the runner's image")
	}
	if j.Services != nil {
		pos := j.Pos
		for _, s := range j.Services.Value {
			if s.Name != nil && (pos == j.Pos || comparePos(s.Name.Pos, pos) < 0) {
				pos = s.Name.Pos
			}
		}
		r.unsupported(pos, "services:", "start the service in a step")
	}
	if j.Concurrency != nil {
		r.unsupported(j.Concurrency.Pos, "concurrency:", "take it out")
	}
	if j.Environment != nil && (j.Environment.URL != nil || j.Environment.Deployment != nil) {
		r.unsupported(j.Environment.Pos, "more of an environment: than its name", "write environment: and the name")
	}
	if j.Snapshot != nil {
		pos := j.Pos
		if j.Snapshot.ImageName != nil {
			pos = j.Snapshot.ImageName.Pos
		}
		r.unsupported(pos, "snapshot:", "take it out")
	}
}

func (r *reader) runsOn(j *actionlint.Job, spec *jobSpec) {
	if j.RunsOn == nil {
		return
	}
	if e := j.RunsOn.LabelsExpr; e != nil {
		r.template(e, planContexts, planFunctions)
		spec.labels = append(spec.labels, e.Value)
	}
	if g := j.RunsOn.Group; g != nil {
		r.unsupported(g.Pos, "runs-on.group:", "name the scale set by its label")
	}
	for _, l := range j.RunsOn.Labels {
		r.template(l, planContexts, planFunctions)
		spec.labels = append(spec.labels, l.Value)
	}
}

func (r *reader) step(st *actionlint.Step, shell, dir *actionlint.String, names map[string]bool) stepSpec {
	spec := stepSpec{condition: "success()", env: r.env(st.Env)}
	if st.ID != nil {
		spec.contextName = st.ID.Value
	} else {
		spec.contextName = "__run"
		for n := 2; names[spec.contextName]; n++ {
			spec.contextName = "__run_" + strconv.Itoa(n)
		}
	}
	if names[strings.ToLower(spec.contextName)] {
		r.syntax(st.ID.Pos, fmt.Sprintf("two steps of the job have the id %q", spec.contextName))
	}
	names[strings.ToLower(spec.contextName)] = true
	if st.Name != nil {
		spec.name = st.Name.Value
		r.template(st.Name, runnerContexts, stepFunctions)
	}
	if st.If != nil {
		if src, hasStatus, ok := r.condition(st.If, runnerContexts, stepFunctions); ok {
			spec.condition = src
			if !hasStatus {
				spec.condition = "success() && (" + src + ")"
			}
		}
	}
	if c := st.ContinueOnError; c != nil {
		spec.continueOnError = c.String()
		if c.Expression != nil {
			r.template(c.Expression, runnerContexts, stepFunctions)
		}
	}
	if t := st.TimeoutMinutes; t != nil {
		spec.timeoutMinutes = strconv.FormatFloat(t.Value, 'f', -1, 64)
		if t.Expression != nil {
			spec.timeoutMinutes = t.Expression.Value
			r.template(t.Expression, runnerContexts, stepFunctions)
		}
	}
	r.exec(st, shell, dir, &spec)
	return spec
}

func (r *reader) exec(st *actionlint.Step, shell, dir *actionlint.String, spec *stepSpec) {
	switch e := st.Exec.(type) {
	case *actionlint.ExecAction:
		pos, uses := st.Pos, ""
		if e.Uses != nil {
			pos, uses = e.Uses.Pos, e.Uses.Value
		}
		r.unsupported(pos, "uses: "+quoteName(uses), "do the same in a run: step; actions have to be downloaded from GitHub")
	case *actionlint.ExecRun:
		if e.Run == nil {
			r.syntax(st.Pos, "the step has an empty run:")
			return
		}
		spec.script = e.Run.Value
		r.template(e.Run, runnerContexts, stepFunctions)
		if e.Shell != nil {
			shell = e.Shell
			r.template(shell, runnerContexts, stepFunctions)
		}
		if e.WorkingDirectory != nil {
			dir = e.WorkingDirectory
			r.template(dir, runnerContexts, stepFunctions)
		}
		if shell != nil {
			spec.shell = shell.Value
		}
		if dir != nil {
			spec.workingDirectory = dir.Value
		}
		if st.Name == nil {
			first, _, _ := strings.Cut(strings.TrimSpace(e.Run.Value), "\n")
			spec.name = "Run " + first
			if _, err := splitTemplate(first); err != nil {
				spec.name = "Run a script" // the line holds half an expression
			}
		}
	default:
		r.syntax(st.Pos, "the step has neither run: nor uses:")
	}
}

func quoteName(s string) string {
	if s == "" {
		return "an action"
	}
	return clip(s, 100)
}

func (r *reader) env(e *actionlint.Env) []pair {
	if e == nil {
		return nil
	}
	if e.Expression != nil {
		r.unsupported(e.Expression.Pos, "an expression in place of the env: mapping", "write the variables one by one")
	}
	var pairs []pair
	for _, v := range sortedBy(e.Vars, func(v *actionlint.EnvVar) *actionlint.Pos { return v.Name.Pos }) {
		r.template(v.Value, runnerContexts, stepFunctions)
		pairs = append(pairs, pair{v.Name.Value, v.Value.Value})
	}
	return pairs
}

// sortedBy returns the values of m in the order of the file.
func sortedBy[V any](m map[string]V, pos func(V) *actionlint.Pos) []V {
	vs := make([]V, 0, len(m))
	for _, v := range m {
		vs = append(vs, v)
	}
	slices.SortFunc(vs, func(a, b V) int { return comparePos(pos(a), pos(b)) })
	return vs
}

// template checks every expression of a string.
func (r *reader) template(s *actionlint.String, contexts, functions []string) {
	if s == nil {
		return
	}
	parts, err := splitTemplate(s.Value)
	if err != nil {
		r.syntax(s.Pos, err.Error())
		return
	}
	for _, p := range parts {
		if p.node != nil {
			r.expression(s.Pos, p.node, contexts, functions)
		}
	}
}

// condition checks an `if:` and returns its source without ${{ }}.
func (r *reader) condition(s *actionlint.String, contexts, functions []string) (src string, hasStatus, ok bool) {
	src, node, err := parseCondition(s.Value)
	if err != nil {
		r.syntax(s.Pos, err.Error())
		return "", false, false
	}
	r.expression(s.Pos, node, contexts, functions)
	return src, callsStatusFunction(node), true
}

func (r *reader) expression(pos *actionlint.Pos, node actionlint.ExprNode, contexts, functions []string) {
	actionlint.VisitExprNode(node, func(n, parent actionlint.ExprNode, entering bool) {
		if !entering {
			return
		}
		switch n := n.(type) {
		case *actionlint.FuncCallNode:
			if !slices.Contains(functions, strings.ToLower(n.Callee)) {
				r.unsupported(pos, "the function "+n.Callee+"() at this place", "write the value itself")
			}
		case *actionlint.ArrayDerefNode:
			if !slices.Contains(contexts, "runner") {
				r.unsupported(pos, "the filter .* at this place", "write the value itself")
			}
		case *actionlint.VariableNode:
			if !slices.Contains(contexts, n.Name) {
				r.unsupported(pos, "the context "+n.Name+" at this place", "write the value itself")
			}
			if n.Name != "secrets" {
				return
			}
			if d, ok := parent.(*actionlint.ObjectDerefNode); !ok || !strings.EqualFold(d.Property, "github_token") {
				r.unsupported(pos, "a secret", "there is none but secrets.GITHUB_TOKEN; pass a harmless value by env:")
			}
		}
	})
}
