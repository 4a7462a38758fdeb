package githubsim

import (
	"encoding/json"
	"errors"
	"fmt"
	"math"
	"strconv"
	"strings"

	"github.com/rhysd/actionlint"
)

// object is a mapping of an expression context. Keys keep their order and are looked up without regard to case.
type object struct {
	keys   []string
	values map[string]any
}

func newObject(kv ...any) *object {
	o := &object{values: map[string]any{}}
	for i := 0; i+1 < len(kv); i += 2 {
		o.set(kv[i].(string), kv[i+1])
	}
	return o
}

func (o *object) set(key string, value any) {
	if _, ok := o.values[key]; !ok {
		o.keys = append(o.keys, key)
	}
	o.values[key] = value
}

func (o *object) get(key string) any {
	if v, ok := o.values[key]; ok {
		return v
	}
	for _, k := range o.keys {
		if strings.EqualFold(k, key) {
			return o.values[k]
		}
	}
	return nil
}

// MarshalJSON encodes o with its keys in order.
func (o *object) MarshalJSON() ([]byte, error) {
	var b strings.Builder
	b.WriteByte('{')
	for i, k := range o.keys {
		if i > 0 {
			b.WriteByte(',')
		}
		key, err := json.Marshal(k)
		if err != nil {
			return nil, err
		}
		val, err := json.Marshal(o.values[k])
		if err != nil {
			return nil, err
		}
		b.Write(key)
		b.WriteByte(':')
		b.Write(val)
	}
	b.WriteByte('}')
	return []byte(b.String()), nil
}

// scope is what the server-side expressions of a job may look at. Values are nil, bool, float64, string, []any, *object.
type scope struct {
	contexts  *object
	succeeded bool // success()
	failed    bool // failure()
	cancelled bool // cancelled()
}

var errNotEvaluable = errors.New("not something the server evaluates")

// eval evaluates an expression by GitHub's rules.
func (s *scope) eval(node actionlint.ExprNode) (any, error) {
	switch n := node.(type) {
	case *actionlint.NullNode:
		return nil, nil
	case *actionlint.BoolNode:
		return n.Value, nil
	case *actionlint.IntNode:
		return float64(n.Value), nil
	case *actionlint.FloatNode:
		return n.Value, nil
	case *actionlint.StringNode:
		return n.Value, nil
	case *actionlint.VariableNode:
		return s.contexts.get(n.Name), nil
	case *actionlint.ObjectDerefNode:
		v, err := s.eval(n.Receiver)
		if err != nil {
			return nil, err
		}
		return index(v, n.Property), nil
	case *actionlint.IndexAccessNode:
		v, err := s.eval(n.Operand)
		if err != nil {
			return nil, err
		}
		i, err := s.eval(n.Index)
		if err != nil {
			return nil, err
		}
		return index(v, i), nil
	case *actionlint.NotOpNode:
		v, err := s.eval(n.Operand)
		return !truthy(v), err
	case *actionlint.LogicalOpNode:
		v, err := s.eval(n.Left)
		if err != nil || truthy(v) == (n.Kind == actionlint.LogicalOpNodeKindOr) {
			return v, err
		}
		return s.eval(n.Right)
	case *actionlint.CompareOpNode:
		l, err := s.eval(n.Left)
		if err != nil {
			return nil, err
		}
		r, err := s.eval(n.Right)
		if err != nil {
			return nil, err
		}
		return compare(n.Kind, l, r), nil
	case *actionlint.FuncCallNode:
		return s.call(n)
	}
	return nil, fmt.Errorf("evaluate %T: %w", node, errNotEvaluable)
}

func (s *scope) call(n *actionlint.FuncCallNode) (any, error) {
	args := make([]any, len(n.Args))
	for i, a := range n.Args {
		v, err := s.eval(a)
		if err != nil {
			return nil, err
		}
		args[i] = v
	}
	name := strings.ToLower(n.Callee)
	if want, ok := map[string]int{
		"success": 0, "failure": 0, "cancelled": 0, "always": 0, "contains": 2, "startswith": 2, "endswith": 2, "tojson": 1,
	}[name]; ok && len(args) != want {
		return nil, fmt.Errorf("call %s: want %d arguments, got %d", n.Callee, want, len(args))
	}
	switch name {
	case "success":
		return s.succeeded && !s.cancelled, nil
	case "failure":
		return s.failed && !s.cancelled, nil
	case "cancelled":
		return s.cancelled, nil
	case "always":
		return true, nil
	case "contains":
		return contains(args[0], args[1]), nil
	case "startswith":
		return strings.HasPrefix(strings.ToLower(text(args[0])), strings.ToLower(text(args[1]))), nil
	case "endswith":
		return strings.HasSuffix(strings.ToLower(text(args[0])), strings.ToLower(text(args[1]))), nil
	case "tojson":
		b, err := json.MarshalIndent(args[0], "", "  ")
		return string(b), err
	case "format":
		return format(args)
	}
	return nil, fmt.Errorf("call %s: %w", n.Callee, errNotEvaluable)
}

func index(v, key any) any {
	switch v := v.(type) {
	case *object:
		return v.get(text(key))
	case []any:
		if f := number(key); f >= 0 && f < float64(len(v)) {
			return v[int(f)]
		}
	}
	return nil
}

func truthy(v any) bool {
	switch v := v.(type) {
	case nil:
		return false
	case bool:
		return v
	case float64:
		return v != 0 && !math.IsNaN(v)
	case string:
		return v != ""
	}
	return true
}

// text is the string a value becomes inside other text.
func text(v any) string {
	switch v := v.(type) {
	case nil:
		return ""
	case bool:
		return strconv.FormatBool(v)
	case float64:
		return strconv.FormatFloat(v, 'f', -1, 64)
	case string:
		return v
	case []any:
		return "Array"
	}
	return "Object"
}

func number(v any) float64 {
	switch v := v.(type) {
	case nil:
		return 0
	case bool:
		if v {
			return 1
		}
		return 0
	case float64:
		return v
	case string:
		if strings.TrimSpace(v) == "" {
			return 0
		}
		if f, err := strconv.ParseFloat(strings.TrimSpace(v), 64); err == nil {
			return f
		}
	}
	return math.NaN()
}

// compare is loose: values of different types are compared as numbers, strings without regard to case.
func compare(kind actionlint.CompareOpNodeKind, l, r any) bool {
	ls, lIsString := l.(string)
	rs, rIsString := r.(string)
	if lIsString && rIsString {
		ls, rs = strings.ToUpper(ls), strings.ToUpper(rs)
		return ordered(kind, strings.Compare(ls, rs))
	}
	lo, lIsObject := l.(*object)
	ro, rIsObject := r.(*object)
	if lIsObject && rIsObject {
		return (lo == ro) == (kind == actionlint.CompareOpNodeKindEq)
	}
	a, b := number(l), number(r)
	switch {
	case math.IsNaN(a) || math.IsNaN(b):
		return kind == actionlint.CompareOpNodeKindNotEq
	case a < b:
		return ordered(kind, -1)
	case a > b:
		return ordered(kind, 1)
	}
	return ordered(kind, 0)
}

func ordered(kind actionlint.CompareOpNodeKind, c int) bool {
	switch kind {
	case actionlint.CompareOpNodeKindLess:
		return c < 0
	case actionlint.CompareOpNodeKindLessEq:
		return c <= 0
	case actionlint.CompareOpNodeKindGreater:
		return c > 0
	case actionlint.CompareOpNodeKindGreaterEq:
		return c >= 0
	case actionlint.CompareOpNodeKindEq:
		return c == 0
	}
	return c != 0
}

func contains(haystack, needle any) bool {
	if list, ok := haystack.([]any); ok {
		for _, e := range list {
			if compare(actionlint.CompareOpNodeKindEq, e, needle) {
				return true
			}
		}
		return false
	}
	return strings.Contains(strings.ToLower(text(haystack)), strings.ToLower(text(needle)))
}

// format replaces {0}, {1}, … ; {{ and }} stand for braces.
func format(args []any) (any, error) {
	if len(args) == 0 {
		return nil, errors.New("call format: want a layout")
	}
	layout := text(args[0])
	var b strings.Builder
	for i := 0; i < len(layout); i++ {
		c := layout[i]
		if c != '{' && c != '}' {
			b.WriteByte(c)
			continue
		}
		if i+1 < len(layout) && layout[i+1] == c {
			b.WriteByte(c)
			i++
			continue
		}
		end := strings.IndexByte(layout[i:], '}')
		if c == '}' || end < 0 {
			return nil, fmt.Errorf("call format: stray brace in %q", clip(layout, 80))
		}
		n, err := strconv.Atoi(layout[i+1 : i+end])
		if err != nil || n < 0 || n+1 >= len(args) {
			return nil, fmt.Errorf("call format: no argument for %q", clip(layout[i:i+end+1], 80))
		}
		b.WriteString(text(args[n+1]))
		i += end
	}
	return b.String(), nil
}

// expand evaluates all expressions of a template into one string.
func (s *scope) expand(template string) (string, error) {
	parts, err := splitTemplate(template)
	if err != nil {
		return "", err
	}
	var b strings.Builder
	for _, p := range parts {
		if p.node == nil {
			b.WriteString(p.text)
			continue
		}
		v, err := s.eval(p.node)
		if err != nil {
			return "", err
		}
		b.WriteString(text(v))
	}
	return b.String(), nil
}

// holds evaluates an `if:`.
func (s *scope) holds(condition string) (bool, error) {
	if condition == "" {
		return s.succeeded && !s.cancelled, nil
	}
	_, node, err := parseCondition(condition)
	if err != nil {
		return false, err
	}
	v, err := s.eval(node)
	if err != nil {
		return false, err
	}
	if !callsStatusFunction(node) && (!s.succeeded || s.cancelled) {
		return false, nil
	}
	return truthy(v), nil
}
