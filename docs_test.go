package flint_test

import (
	"go/ast"
	"go/token"
	"os"
	"regexp"
	"strconv"
	"strings"
	"testing"
)

// codeForm is what codes of faults and reasons look like.
var codeForm = regexp.MustCompile(`^[a-z]+\.[a-z_-]+$`)

// TestEveryCodeIsDocumented compares the codes in the source with docs/errors.md, both ways: those of faults with its first table, and
// those of reasons with its second.
func TestEveryCodeIsDocumented(t *testing.T) {
	errorsTable, reasonsTable, _ := strings.Cut(read(t, "docs/errors.md"), "\n## Reasons\n")
	faults, reasons, all := map[string]bool{}, map[string]bool{}, map[string]bool{}
	for _, f := range sources(t) {
		if f.test {
			continue
		}
		ast.Inspect(f.ast, func(n ast.Node) bool {
			switch n := n.(type) {
			case *ast.CompositeLit:
				for _, e := range n.Elts {
					if field, ok := e.(*ast.KeyValueExpr); ok && nameOf(field.Key) == "Code" {
						noteCode(field.Value, pick(nameOf(n.Type) == "Reason", reasons, faults))
					}
				}
			case *ast.AssignStmt:
				for i, to := range n.Lhs {
					if field, ok := to.(*ast.SelectorExpr); ok && field.Sel.Name == "Code" && len(n.Rhs) == len(n.Lhs) {
						noteCode(n.Rhs[i], faults)
					}
				}
			case *ast.CallExpr: // a helper that makes faults or reasons takes the code first
				name := nameOf(n.Fun)
				if len(n.Args) > 0 && (name == "Because" || strings.Contains(strings.ToLower(name), "fault")) {
					noteCode(n.Args[0], pick(name == "Because", reasons, faults))
				}
			case *ast.BasicLit:
				noteCode(n, all)
			}
			return true
		})
	}
	if len(faults) < 100 || len(reasons) < 30 {
		t.Fatalf("only %d codes of faults and %d of reasons found: the check would be worth little", len(faults), len(reasons))
	}
	for table, codes := range map[string]map[string]bool{errorsTable: faults, reasonsTable: reasons} {
		title, _, _ := strings.Cut(table[strings.Index(table, "| code"):], "|---")
		for c := range codes {
			if !strings.Contains(table, "`"+c+"`") {
				t.Errorf("docs/errors.md lacks %s in the table %s", c, strings.TrimSpace(title))
			}
		}
		for row := range strings.Lines(table) {
			first, _, _ := strings.Cut(strings.TrimPrefix(row, "|"), "|")
			for i, c := range strings.Split(first, "`") {
				if i%2 == 1 && codeForm.MatchString(c) && !all[c] {
					t.Errorf("docs/errors.md has %s, which no source has", c)
				}
			}
		}
	}
}

// noteCode enters a literal that is a code.
func noteCode(e ast.Expr, into map[string]bool) {
	if lit, ok := e.(*ast.BasicLit); ok && lit.Kind == token.STRING {
		if s, err := strconv.Unquote(lit.Value); err == nil && codeForm.MatchString(s) {
			into[s] = true
		}
	}
}

func pick[T any](first bool, a, b T) T {
	if first {
		return a
	}
	return b
}

// nameOf is the last name of an identifier or a selector.
func nameOf(e ast.Expr) string {
	switch e := e.(type) {
	case *ast.Ident:
		return e.Name
	case *ast.SelectorExpr:
		return e.Sel.Name
	}
	return ""
}

func TestEveryDependencyIsDocumented(t *testing.T) {
	page := read(t, "docs/dependencies.md")
	direct := map[string]bool{}
	for line := range strings.Lines(read(t, "go.mod")) {
		fields := strings.Fields(line)
		if len(fields) != 2 || !strings.Contains(fields[0], ".") {
			continue // indirect, or not a requirement
		}
		module := strings.TrimPrefix(fields[0], "golang.org/")
		if !strings.Contains(page, module) {
			t.Errorf("docs/dependencies.md lacks %s", fields[0])
		}
		direct[module] = true
	}
	listed := 0
	for line := range strings.Lines(page) {
		cells := strings.Split(line, " | ")
		if len(cells) != 3 || !strings.ContainsAny(cells[0], "./") {
			continue // not of the table
		}
		for name := range strings.SplitSeq(strings.TrimPrefix(cells[0], "| "), ", ") {
			listed++
			if !direct[strings.TrimPrefix(name, "golang.org/")] {
				t.Errorf("docs/dependencies.md lists %s, which go.mod does not require directly", name)
			}
		}
	}
	if listed < len(direct) {
		t.Errorf("only %d of %d modules are listed", listed, len(direct))
	}
}

func read(t *testing.T, path string) string {
	t.Helper()
	b, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	return string(b)
}
