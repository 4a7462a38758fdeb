package githubsim

import (
	"fmt"
	"strconv"
	"strings"

	"github.com/rhysd/actionlint"
)

// strategy reads `strategy:`. Matrices are over scalars.
func (r *reader) strategy(st *actionlint.Strategy, spec *jobSpec) {
	if st == nil {
		return
	}
	if f := st.FailFast; f != nil {
		spec.failFast = f.Value
		if f.Expression != nil {
			r.unsupported(f.Expression.Pos, "an expression in fail-fast:", "write true or false")
		}
	}
	if m := st.MaxParallel; m != nil {
		spec.maxParallel = m.Value
		if m.Expression != nil {
			r.unsupported(m.Expression.Pos, "an expression in max-parallel:", "write a number")
		}
	}
	m := st.Matrix
	if m == nil {
		return
	}
	if m.Expression != nil {
		r.unsupported(m.Expression.Pos, "a matrix made by an expression", "write its values")
		return
	}
	combos := r.combinations(m)
	combos = r.exclude(combos, m.Exclude)
	combos = r.include(combos, m.Include)
	if len(combos) == 0 {
		r.syntax(m.Pos, "the matrix has no combination left")
	}
	if len(combos) > 0 {
		spec.matrix = combos
	}
}

func (r *reader) combinations(m *actionlint.Matrix) []*object {
	rows := sortedBy(m.Rows, func(row *actionlint.MatrixRow) *actionlint.Pos {
		if row.Expression != nil {
			return row.Expression.Pos // such a row has no name
		}
		return row.Name.Pos
	})
	if len(rows) == 0 {
		return nil
	}
	combos := []*object{newObject()}
	for _, row := range rows {
		if row.Expression != nil {
			r.unsupported(row.Expression.Pos, "a matrix row made by an expression", "write its values")
			continue
		}
		if len(combos)*len(row.Values) > maxCombinations {
			r.syntax(row.Name.Pos, fmt.Sprintf("the matrix has more than %d combinations", maxCombinations))
			return nil
		}
		var next []*object
		for _, c := range combos {
			for _, v := range row.Values {
				n := newObject()
				for _, k := range c.keys {
					n.set(k, c.values[k])
				}
				n.set(row.Name.Value, r.scalar(v))
				next = append(next, n)
			}
		}
		combos = next
	}
	return combos
}

// scalar gives a matrix value the type YAML gives it. The syntax tree keeps only the text, so the file is asked whether
// the value was quoted.
func (r *reader) scalar(v actionlint.RawYAMLValue) any {
	s, ok := v.(*actionlint.RawYAMLString)
	if !ok {
		r.unsupported(v.Pos(), "a matrix value that is a list or a mapping", "use plain values")
		return nil
	}
	if pos := s.Pos(); pos.Line >= 1 && pos.Line <= len(r.lines) {
		if line := r.lines[pos.Line-1]; pos.Col >= 1 && pos.Col <= len(line) && strings.IndexByte(`'"|>`, line[pos.Col-1]) >= 0 {
			return s.Value
		}
	}
	if actionlint.ContainsExpression(s.Value) {
		r.unsupported(s.Pos(), "an expression in a matrix", "write the value itself")
	}
	switch s.Value {
	case "true", "True", "TRUE":
		return true
	case "false", "False", "FALSE":
		return false
	case "", "~", "null", "Null", "NULL":
		return nil
	}
	if c := s.Value[0]; c == '-' || c == '.' || (c >= '0' && c <= '9') {
		if f, err := strconv.ParseFloat(s.Value, 64); err == nil && !strings.ContainsAny(s.Value, "xXpP_nN") {
			return f
		}
	}
	return s.Value
}

// entries returns the mappings of an include: or exclude: list.
func (r *reader) entries(name string, cs *actionlint.MatrixCombinations) []*object {
	if cs == nil {
		return nil
	}
	if cs.Expression != nil {
		r.unsupported(cs.Expression.Pos, name+": made by an expression", "write its values")
		return nil
	}
	var entries []*object
	for _, c := range cs.Combinations {
		if c.Expression != nil {
			r.unsupported(c.Expression.Pos, name+": made by an expression", "write its values")
			continue
		}
		o := newObject()
		for _, a := range sortedBy(c.Assigns, func(a *actionlint.MatrixAssign) *actionlint.Pos { return a.Key.Pos }) {
			o.set(a.Key.Value, r.scalar(a.Value))
		}
		entries = append(entries, o)
	}
	return entries
}

func (r *reader) exclude(combos []*object, cs *actionlint.MatrixCombinations) []*object {
	for _, e := range r.entries("exclude", cs) {
		var kept []*object
		for _, c := range combos {
			if !agrees(c, e, e.keys) {
				kept = append(kept, c)
			}
		}
		combos = kept
	}
	return combos
}

// agrees reports whether two mappings have the same values for keys.
func agrees(a, b *object, keys []string) bool {
	for _, k := range keys {
		if a.get(k) != b.get(k) {
			return false
		}
	}
	return true
}

// include adds each entry to every combination whose own values it would not overwrite, and makes a new combination of
// it when there is none.
func (r *reader) include(combos []*object, cs *actionlint.MatrixCombinations) []*object {
	original := make([][]string, len(combos))
	for i, c := range combos {
		original[i] = append([]string(nil), c.keys...)
	}
	for _, e := range r.entries("include", cs) {
		added := false
		for i := range original {
			var shared []string
			for _, k := range original[i] {
				if e.get(k) != nil {
					shared = append(shared, k)
				}
			}
			if !agrees(combos[i], e, shared) {
				continue
			}
			for _, k := range e.keys {
				combos[i].set(k, e.values[k])
			}
			added = true
		}
		if !added {
			combos = append(combos, e)
		}
		if len(combos) > maxCombinations {
			r.syntax(nil, fmt.Sprintf("the matrix has more than %d combinations", maxCombinations))
			return nil
		}
	}
	return combos
}
