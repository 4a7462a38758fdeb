package flint_test

import (
	"go/ast"
	"go/parser"
	"go/token"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
)

// mayImport says which rooms each room may know. A room that is not listed may know only the root package. The picture
// is in docs/architecture.md.
var mayImport = map[string][]string{
	"flint":                         {},
	"flint/cmd/flint":               {"flint", "flint/internal/app", "flint/internal/api", "flint/internal/config", "flint/internal/doctor", "flint/internal/githubsim", "flint/internal/regular"},
	"flint/internal/doctor":         {"flint", "flint/internal/vm"},
	"flint/cmd/flint-agent":         {"flint/internal/guest"},
	"flint/internal/app":            {"*"},
	"flint/internal/host":           {"flint", "flint/internal/vm", "flint/internal/guest", "flint/internal/undo", "flint/internal/durable"},
	"flint/internal/github":         {"flint", "flint/internal/github/webhook", "flint/internal/durable"},
	"flint/internal/github/webhook": {"flint", "flint/internal/durable"},
	"flint/internal/image":          {"flint", "flint/internal/rootfs", "flint/internal/tool", "flint/internal/inuse", "flint/internal/digest", "flint/internal/regular"},
	"flint/internal/rootfs":         {"flint", "flint/internal/ext4"},
	"flint/internal/config":         {"flint", "flint/internal/regular"},
	"flint/internal/runnersoft":     {"flint", "flint/internal/regular"},
	"flint/internal/digest":         {"flint/internal/regular"},
	"flint/images/kernel":           {},
	"flint/internal/kernel":         {"flint", "flint/images/kernel", "flint/internal/tool", "flint/internal/ext4", "flint/internal/inuse", "flint/internal/digest", "flint/internal/regular"},
	"flint/test/bench":              {"flint", "flint/internal/app", "flint/internal/config", "flint/internal/githubsim", "flint/internal/image"},
	"flint/test/assets":             {"flint", "flint/internal/app", "flint/internal/config"},
	"flint/internal/network":        {"flint", "flint/internal/undo"},
	"flint/internal/vm/qemu":        {"flint", "flint/internal/vm"},
	"flint/internal/vm/firecracker": {"flint", "flint/internal/vm", "flint/internal/undo"},
	"flint/internal/vm/vmtest":      {"flint", "flint/internal/vm", "flint/internal/guest"},
	// The doubles of Firecracker and its jailer: programs for tests.
	"flint/internal/vm/firecracker/fctest":        {"flint/internal/vm/firecracker/fctest/double"},
	"flint/internal/vm/firecracker/fctest/jailer": {"flint/internal/vm/firecracker/fctest/double"},
	"flint/internal/vm/firecracker/fctest/firecracker": {
		"flint", "flint/internal/vm", "flint/internal/guest", "flint/internal/vm/vmtest", "flint/internal/vm/firecracker/fctest/double",
	},
}

// testsMayAlsoImport lists what _test files may know beside that: the suites and doubles made for them.
var testsMayAlsoImport = map[string][]string{
	"flint/internal/host":    {"flint/internal/vm/vmtest"},
	"flint/internal/image":   {"flint/internal/rootfs/rootfstest"},
	"flint/internal/rootfs":  {"flint/internal/rootfs/rootfstest"},
	"flint/internal/vm/qemu": {"flint/internal/vm/vmtest", "flint/internal/guest"},
	"flint/internal/vm/firecracker": {
		"flint/internal/vm/vmtest", "flint/internal/guest", "flint/internal/vm/firecracker/fctest",
		"flint/internal/vm/firecracker/fctest/double",
	},
	"flint/internal/host/crashtest": {
		"flint/internal/host", "flint/internal/vm", "flint/internal/vm/firecracker", "flint/internal/vm/firecracker/fctest",
		"flint/internal/vm/qemu",
	},
	"flint/test/e2e":           {"flint/internal/githubsim", "flint/internal/vm"},
	"flint/cmd/flint":          {"flint/internal/vm"},
	"flint/internal/githubsim": {"flint/internal/githubsim/simrunner"},
}

// thirdPartyStopsAt says which rooms may import a third-party module; its types go no further. What is not listed may be imported
// nowhere.
var thirdPartyStopsAt = map[string][]string{
	"github.com/actions/scaleset":            {"flint/internal/github", "flint/internal/githubsim"}, // the simulator only in tests
	"github.com/google/go-containerregistry": {"flint/internal/image", "flint/test/e2e"},            // there its registry
	"github.com/google/go-github":            {"flint/internal/github", "flint/internal/githubsim"}, // the simulator only in tests
	"go.etcd.io/bbolt":                       {"flint/internal/github/webhook"},
	"golang.org/x/time":                      {"flint/internal/github/webhook"},
	"github.com/Microsoft/hcsshim":           {"flint/internal/rootfs", "flint/internal/kernel"},
	"github.com/google/nftables":             {"flint/internal/network"},
	"github.com/miekg/dns":                   {"flint/internal/network"},
	"github.com/moby/patternmatcher":         {"flint/internal/image"},
	"github.com/vishvananda/netlink":         {"flint/internal/network", "flint/cmd/flint-agent"},
	"github.com/rhysd/actionlint":            {"flint/internal/githubsim"},
	"gopkg.in/yaml.v3":                       {"flint/internal/config"},
	"github.com/spf13/cobra":                 {"flint/cmd/flint"},
	"github.com/spf13/pflag":                 {"flint/cmd/flint"},
	"golang.org/x/term":                      {"flint/cmd/flint"},
	"github.com/coreos/go-systemd":           {"flint/internal/app"},
	"github.com/cavaliergopher/cpio":         {"flint/internal/kernel"},
	"github.com/pierrec/lz4":                 {"flint/internal/kernel"},
	"github.com/ulikunitz/xz":                {"flint/internal/kernel"},
	"github.com/klauspost/compress":          {"flint/internal/image", "flint/internal/kernel"},
	"github.com/creack/pty":                  {"flint/cmd/flint-agent", "flint/test/e2e"},
	"github.com/hashicorp/go-retryablehttp":  {"flint/internal/github"},
	"github.com/google/uuid":                 {"flint/internal/github"},
	"github.com/golang-jwt/jwt":              {"flint/internal/github", "flint/internal/githubsim", "flint/internal/githubsim/simrunner"},
	"github.com/coder/websocket":             {"flint/internal/githubsim", "flint/internal/githubsim/simrunner"},
	"go.yaml.in/yaml":                        {"flint/internal/githubsim"},                                  // what actionlint hands out
	"github.com/google/go-cmp":               {"flint/internal/github/webhook", "flint/internal/githubsim"}, // in tests
	"golang.org/x/sync":                      {"*"},
	"golang.org/x/sys":                       {"*"},

	"github.com/docker/docker-credential-helpers": {"flint/internal/image"},
}

// mayStartGoroutines has the functions that may use a bare go, and why. Everything else has an errgroup, or a task of internal/app. The
// doubles and suites that tests are made of are not looked at.
var mayStartGoroutines = map[string]string{
	"internal/sched Loop.start":             "the dispatch: its loop waits for every one",
	"internal/app App.adopt":                "one for all adopted VMs; the undo stack waits for it",
	"internal/app App.Command":              "a copy loop; ends with the call",
	"cmd/flint runFlags.terminal":           "a copy loop; ends with the terminal's restore",
	"internal/guest pump":                   "a copy loop; ends with its reader",
	"internal/image tarOf":                  "one end of a pipe whose other end waits for it",
	"internal/rootfs plan.writeExt4":        "one end of a pipe whose other end waits for it",
	"internal/rootfs readAhead":             "one end of a pipe whose other end waits for it",
	"internal/network onThread":             "a thread of its own, which the caller waits for",
	"internal/vm Apart":                     "a thread of its own, which the caller waits for",
	"internal/vm probe.watch":               "a thread that only the kernel can hold; the caller waits, with a bound",
	"internal/vm/qemu machine.watch":        "lives as long as the VMM; everybody waits for what it says",
	"internal/vm/firecracker machine.watch": "lives as long as the VMM; everybody waits for what it says",
	"cmd/flint-agent acceptNewest":          "one session at a time; the next waits for its end",
	"cmd/flint-agent probeDNS":              "asks a few servers at once, and waits for all",
}

// mayKeepContext has the types that keep a context, and why: io.Reader takes none.
var mayKeepContext = map[string]string{
	"internal/rootfs contextReader": "an io.Reader within one call",
	"internal/rootfs glance":        "an io.ReaderAt within one call",
	"internal/rootfs stream":        "an io.Reader within one call",
	"internal/runnersoft reader":    "an io.Reader within one call",
}

type sourceFile struct {
	path, pkg string // pkg is the import path
	test      bool
	ast       *ast.File
	fset      *token.FileSet
}

func sources(t *testing.T) []sourceFile {
	t.Helper()
	var files []sourceFile
	err := filepath.WalkDir(".", func(path string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		if d.IsDir() {
			if name := d.Name(); path != "." && (strings.HasPrefix(name, ".") || name == "build" || name == "testdata") {
				return filepath.SkipDir
			}
			// A directory with a go.mod of its own is another module.
			if _, err := os.Stat(filepath.Join(path, "go.mod")); err == nil && path != "." {
				return filepath.SkipDir
			}
			return nil
		}
		if filepath.Ext(path) != ".go" {
			return nil
		}
		fset := token.NewFileSet()
		f, err := parser.ParseFile(fset, path, nil, parser.ParseComments)
		if err != nil {
			return err
		}
		pkg := "flint"
		if dir := filepath.Dir(path); dir != "." {
			pkg += "/" + filepath.ToSlash(dir)
		}
		files = append(files, sourceFile{path, pkg, strings.HasSuffix(path, "_test.go"), f, fset})
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	if len(files) < 10 {
		t.Fatalf("only %d Go files found: the rules below would check nothing", len(files))
	}
	return files
}

func TestRoomsKnowOnlyWhomTheyMay(t *testing.T) {
	for _, f := range sources(t) {
		allowed, ok := mayImport[f.pkg]
		if !ok {
			allowed = []string{"flint"}
		}
		if f.test {
			allowed = append(slices.Clone(allowed), testsMayAlsoImport[f.pkg]...)
			allowed = append(allowed, f.pkg) // an external test package
		}
		for _, imp := range f.ast.Imports {
			path, err := strconv.Unquote(imp.Path.Value)
			if err != nil {
				t.Fatal(err)
			}
			if path == "flint" || strings.HasPrefix(path, "flint/") {
				if !slices.Contains(allowed, path) && !slices.Contains(allowed, "*") {
					t.Errorf("%s imports %s; %s may know only %v", f.path, path, f.pkg, allowed)
				}
				continue
			}
			host, _, _ := strings.Cut(path, "/")
			if !strings.Contains(host, ".") {
				continue // the standard library
			}
			known := false
			for module, rooms := range thirdPartyStopsAt {
				if path != module && !strings.HasPrefix(path, module+"/") {
					continue
				}
				known = true
				if !slices.Contains(rooms, f.pkg) && !slices.Contains(rooms, "*") {
					t.Errorf("%s imports %s, which stops at %v", f.path, path, rooms)
				}
			}
			if !known {
				t.Errorf("%s imports %s, which no room is said to need", f.path, path)
			}
			if f.pkg == "flint" {
				t.Errorf("%s imports %s; the root package uses the standard library only", f.path, path)
			}
		}
	}
}

// TestNoPermissionIsLeftOver: what a room may know and does not has no place in the picture.
func TestNoPermissionIsLeftOver(t *testing.T) {
	imported := map[string]bool{}
	for _, f := range sources(t) {
		for _, imp := range f.ast.Imports {
			path, _ := strconv.Unquote(imp.Path.Value)
			imported[f.pkg+" "+path] = true
		}
	}
	for _, table := range []map[string][]string{mayImport, testsMayAlsoImport} {
		for room, others := range table {
			for _, other := range others {
				if other != "*" && !imported[room+" "+other] {
					t.Errorf("%s may import %s and does not", room, other)
				}
			}
		}
	}
}

// TestWhoStartsGoroutinesAndKeepsContexts holds the source against mayStartGoroutines and mayKeepContext, both ways.
func TestWhoStartsGoroutinesAndKeepsContexts(t *testing.T) {
	starts, keeps := map[string]bool{}, map[string]bool{}
	for _, f := range sources(t) {
		dir := strings.TrimPrefix(f.pkg, "flint/")
		if f.test || strings.HasPrefix(dir, "test/") || strings.Contains(dir, "vmtest") || strings.Contains(dir, "fctest") {
			continue
		}
		for _, decl := range f.ast.Decls {
			name := dir + " " + declared(decl)
			ast.Inspect(decl, func(n ast.Node) bool {
				switch n := n.(type) {
				case *ast.GoStmt:
					starts[name] = true
				case *ast.StructType:
					for _, field := range n.Fields.List {
						if sel, ok := field.Type.(*ast.SelectorExpr); ok && nameOf(sel.X) == "context" && sel.Sel.Name == "Context" {
							keeps[name] = true
						}
					}
				}
				return true
			})
		}
	}
	same := func(what string, found map[string]bool, allowed map[string]string) {
		for name := range found {
			if allowed[name] == "" {
				t.Errorf("%s %s; see house_test.go for who may", name, what)
			}
		}
		for name := range allowed {
			if !found[name] {
				t.Errorf("%s need not be listed: it no longer %s", name, what)
			}
		}
	}
	same("has a bare go", starts, mayStartGoroutines)
	same("keeps a context", keeps, mayKeepContext)
}

// declared is the name of a function, a method with its type, or the first type of a declaration.
func declared(decl ast.Decl) string {
	switch d := decl.(type) {
	case *ast.FuncDecl:
		if d.Recv == nil {
			return d.Name.Name
		}
		typ := d.Recv.List[0].Type
		if star, ok := typ.(*ast.StarExpr); ok {
			typ = star.X
		}
		return nameOf(typ) + "." + d.Name.Name
	case *ast.GenDecl:
		for _, spec := range d.Specs {
			if s, ok := spec.(*ast.TypeSpec); ok {
				return s.Name.Name
			}
		}
	}
	return ""
}

func TestEveryPackageSaysWhatItIsFor(t *testing.T) {
	docs := map[string]string{}
	for _, f := range sources(t) {
		if f.test {
			continue
		}
		if _, seen := docs[f.pkg]; !seen {
			docs[f.pkg] = ""
		}
		if f.ast.Doc != nil {
			docs[f.pkg] += f.ast.Doc.Text()
		}
	}
	for pkg, doc := range docs {
		if len(strings.Fields(doc)) < 20 || !strings.Contains(doc, "not") {
			t.Errorf("%s: the package comment must say in a paragraph what it is for and what it must not do; it is %q", pkg, doc)
		}
	}
}

func TestBudgets(t *testing.T) {
	const maxFunc, maxMethods = 80, 4
	for _, f := range sources(t) {
		if f.test {
			continue
		}
		ast.Inspect(f.ast, func(n ast.Node) bool {
			switch n := n.(type) {
			case *ast.FuncDecl:
				lines := f.fset.Position(n.End()).Line - f.fset.Position(n.Pos()).Line + 1
				// A longer one says so, and why, in its doc comment: "Longer than a screen because …".
				if lines > maxFunc && !strings.Contains(n.Doc.Text(), "Longer than a screen") {
					t.Errorf("%s: %s has %d lines; the budget is %d", f.path, n.Name.Name, lines, maxFunc)
				}
				if n.Recv == nil && n.Name.Name == "init" {
					t.Errorf("%s: init function", f.path)
				}
			case *ast.InterfaceType:
				if len(n.Methods.List) > maxMethods {
					t.Errorf("%s: an interface with %d methods; the budget is %d", f.fset.Position(n.Pos()), len(n.Methods.List), maxMethods)
				}
			case *ast.CallExpr:
				if sel, ok := n.Fun.(*ast.SelectorExpr); ok {
					if x, ok := sel.X.(*ast.Ident); ok && x.Name == "time" && sel.Sel.Name == "Sleep" {
						t.Errorf("%s: time.Sleep", f.fset.Position(n.Pos()))
					}
				}
			}
			return true
		})
	}
}
