package githubsim

import (
	"fmt"
	"strings"

	"github.com/rhysd/actionlint"
)

// part is a stretch of a template: either literal text, or one ${{ }} expression.
type part struct {
	text string
	expr string              // source of the expression, trimmed
	node actionlint.ExprNode // nil for literal text
}

// splitTemplate cuts "a ${{ b }} c" into its parts.
func splitTemplate(s string) ([]part, error) {
	var parts []part
	for s != "" {
		before, rest, found := strings.Cut(s, "${{")
		if before != "" {
			parts = append(parts, part{text: before})
		}
		if !found {
			break
		}
		_, end, lexErr := actionlint.LexExpression(rest)
		if lexErr != nil {
			return nil, fmt.Errorf("read expression: %s", lexErr.Message)
		}
		if end < 2 || end > len(rest) {
			return nil, fmt.Errorf("read expression: no end in %q", clip(rest, 40))
		}
		src := strings.TrimSpace(rest[:end-2])
		node, err := parseExpr(src)
		if err != nil {
			return nil, err
		}
		parts = append(parts, part{expr: src, node: node})
		s = rest[end:]
	}
	return parts, nil
}

// parseExpr parses an expression without its ${{ }}.
func parseExpr(src string) (actionlint.ExprNode, error) {
	node, err := actionlint.NewExprParser().Parse(actionlint.NewExprLexer(src + "}}"))
	if err != nil {
		return nil, fmt.Errorf("read expression %q: %s", clip(src, 80), err.Message)
	}
	return node, nil
}

// parseCondition parses the value of an `if:`, where the ${{ }} may be left out, and returns its source.
func parseCondition(s string) (string, actionlint.ExprNode, error) {
	s = strings.TrimSpace(s)
	if inner, ok := strings.CutPrefix(s, "${{"); ok && strings.HasSuffix(inner, "}}") {
		if _, end, err := actionlint.LexExpression(inner); err == nil && end == len(inner) {
			s = strings.TrimSpace(inner[:end-2])
		}
	}
	node, err := parseExpr(s)
	return s, node, err
}

// callsStatusFunction reports whether an expression looks at how things went so far. A condition that does not means
// success() as well.
func callsStatusFunction(node actionlint.ExprNode) bool {
	found := false
	actionlint.VisitExprNode(node, func(n, _ actionlint.ExprNode, entering bool) {
		if f, ok := n.(*actionlint.FuncCallNode); ok && entering {
			switch strings.ToLower(f.Callee) {
			case "success", "failure", "cancelled", "always":
				found = true
			}
		}
	})
	return found
}

// Template tokens are how the run service hands a job's values to the runner: literals as they are, expressions for
// the runner to evaluate, mappings as lists of pairs. The numbers are the protocol's.
const (
	tokenString     = 0
	tokenMapping    = 2
	tokenExpression = 3
)

type token struct {
	Type int         `json:"type"`
	Lit  *string     `json:"lit,omitempty"`
	Expr string      `json:"expr,omitempty"`
	Map  []tokenPair `json:"map,omitempty"`
}

type tokenPair struct {
	Key   token `json:"Key"`
	Value token `json:"Value"`
}

func literalToken(s string) token { return token{Type: tokenString, Lit: &s} }

func expressionToken(expr string) token { return token{Type: tokenExpression, Expr: expr} }

// templateToken turns a string that may hold expressions into one token. Text around expressions becomes a call of
// format, since a token is either a literal or one expression.
func templateToken(s string) (token, error) {
	parts, err := splitTemplate(s)
	if err != nil {
		return token{}, err
	}
	exprs := 0
	for _, p := range parts {
		if p.node != nil {
			exprs++
		}
	}
	if exprs == 0 {
		return literalToken(s), nil
	}
	if len(parts) == 1 {
		return expressionToken(parts[0].expr), nil
	}
	var layout, args strings.Builder
	escape := strings.NewReplacer("'", "''", "{", "{{", "}", "}}")
	n := 0
	for _, p := range parts {
		if p.node == nil {
			layout.WriteString(escape.Replace(p.text))
			continue
		}
		fmt.Fprintf(&layout, "{%d}", n)
		args.WriteString(", " + p.expr)
		n++
	}
	return expressionToken("format('" + layout.String() + "'" + args.String() + ")"), nil
}

// mappingToken turns name-value pairs into a mapping token.
func mappingToken(pairs []pair) (token, error) {
	t := token{Type: tokenMapping, Map: []tokenPair{}}
	for _, p := range pairs {
		v, err := templateToken(p.value)
		if err != nil {
			return token{}, err
		}
		t.Map = append(t.Map, tokenPair{literalToken(p.name), v})
	}
	return t, nil
}

// contextData encodes a value of an expression context for the runner: mappings as {"t":2,"d":[{"k":…,"v":…}]}, lists
// as {"t":1,"a":[…]}, anything else as plain JSON.
func contextData(v any) any {
	switch v := v.(type) {
	case *object:
		d := []any{}
		for _, k := range v.keys {
			d = append(d, map[string]any{"k": k, "v": contextData(v.values[k])})
		}
		return map[string]any{"t": 2, "d": d}
	case []any:
		a := []any{}
		for _, e := range v {
			a = append(a, contextData(e))
		}
		return map[string]any{"t": 1, "a": a}
	}
	return v
}
