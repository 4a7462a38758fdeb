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

// TestEveryCodeIsDocumented collects the codes of faults and reasons from the source.
func TestEveryCodeIsDocumented(t *testing.T) {
	page := read(t, "docs/errors.md")
	code := regexp.MustCompile(`^[a-z]+\.[a-z_-]+$`)
	seen := map[string]bool{}
	note := func(e ast.Expr) {
		lit, ok := e.(*ast.BasicLit)
		if !ok || lit.Kind != token.STRING {
			return
		}
		if s, err := strconv.Unquote(lit.Value); err == nil && code.MatchString(s) {
			seen[s] = true
		}
	}
	for _, f := range sources(t) {
		if f.test {
			continue
		}
		ast.Inspect(f.ast, func(n ast.Node) bool {
			switch n := n.(type) {
			case *ast.KeyValueExpr:
				if key, ok := n.Key.(*ast.Ident); ok && key.Name == "Code" {
					note(n.Value)
				}
			case *ast.CallExpr: // a helper that makes faults or reasons takes the code first
				if len(n.Args) > 0 && makesFaults(n.Fun) {
					note(n.Args[0])
				}
			}
			return true
		})
	}
	if len(seen) < 40 {
		t.Fatalf("only %d codes found: the check would be worth little", len(seen))
	}
	for c := range seen {
		if !strings.Contains(page, "`"+c+"`") {
			t.Errorf("docs/errors.md lacks %s", c)
		}
	}
}

func makesFaults(fun ast.Expr) bool {
	name := ""
	switch f := fun.(type) {
	case *ast.Ident:
		name = f.Name
	case *ast.SelectorExpr:
		name = f.Sel.Name
	}
	lower := strings.ToLower(name)
	return name == "Because" || strings.Contains(lower, "fault")
}

func TestEveryDependencyIsDocumented(t *testing.T) {
	page := read(t, "docs/dependencies.md")
	for line := range strings.Lines(read(t, "go.mod")) {
		fields := strings.Fields(line)
		if len(fields) != 2 || !strings.Contains(fields[0], ".") {
			continue // indirect, or not a requirement
		}
		module := strings.TrimPrefix(fields[0], "golang.org/")
		if !strings.Contains(page, module) {
			t.Errorf("docs/dependencies.md lacks %s", fields[0])
		}
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
