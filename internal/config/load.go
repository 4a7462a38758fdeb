package config

import (
	"bytes"
	"encoding"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"reflect"
	"strings"

	"gopkg.in/yaml.v3"

	"flint"
	"flint/internal/regular"
)

// FileVariable is the variable that names the configuration file where no flag does. Whoever calls Load obeys it.
const FileVariable = "FLINT_CONFIG"

// maxFile bounds the configuration file, and separately the key file.
const maxFile = 1 << 20

// Load reads, completes and validates the file. The environment (as of os.Environ: KEY=value) overrides the file's
// scalars: FLINT_GITHUB_APP_ID sets github.app_id. Relative paths are relative to the file. Every error is a
// *flint.Fault of kind flint.ErrConfig, flint.ErrNotFound where there is no such file, or flint.ErrPermission where it may not be read.
func Load(path string, environ []string) (Config, error) {
	src, err := readFile(path)
	if err != nil {
		return Config{}, err
	}
	return Parse(path, src, environ)
}

// LoadServe is Load for the coordinator, which needs more than a single VM does. It reads the secrets and looks at the files
// that are named, too, and says all that is wrong with any of it at once.
func LoadServe(path string, environ []string) (Config, error) {
	src, err := readFile(path)
	if err != nil {
		return Config{}, err
	}
	return parse(path, src, environ, (*Config).validate, (*Config).validateServe, (*Config).checkFiles)
}

func readFile(path string) ([]byte, error) {
	src, err := regular.Read(path, maxFile)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return nil, &flint.Fault{
			Code: "config.missing", What: "read configuration " + path, Kind: flint.ErrNotFound, Err: fs.ErrNotExist,
			Fix: "name the file with --config, or write one: `flint config example` prints a start",
		}
	case errors.Is(err, fs.ErrPermission):
		return nil, &flint.Fault{
			Code: "config.unreadable", What: "read configuration " + path, Kind: flint.ErrPermission, Err: err,
			Fix: "let the user flint runs as read it",
		}
	case err != nil:
		return nil, &flint.Fault{
			Code: "config.unreadable", What: "read configuration " + path, Kind: flint.ErrConfig, Err: err,
			Fix: "name the file with --config; `flint config example` prints a start",
		}
	}
	return src, nil
}

// Parse is Load for bytes already read; path names them in messages and anchors relative paths.
func Parse(path string, src []byte, environ []string) (Config, error) {
	return parse(path, src, environ, (*Config).validate)
}

// parse makes every check on what could be read, whatever else is wrong.
func parse(path string, src []byte, environ []string, checks ...func(*Config) problems) (Config, error) {
	dir, err := filepath.Abs(filepath.Dir(path))
	if err != nil {
		return Config{}, Invalid(path, err)
	}
	c := Default()
	found, err := c.decode(src)
	if err != nil {
		return Config{}, invalid(path, append(found, &problem{"", err}))
	}
	found = append(found, c.override(environ)...)
	c.besideFile(dir)
	c.complete(dir)
	c.findCredentials(lookup(environ, "CREDENTIALS_DIRECTORY"))
	read := found
	for _, check := range checks {
		for _, p := range check(&c) {
			if !read.consequent(p) {
				found = append(found, p)
			}
		}
	}
	if len(found) > 0 {
		return Config{}, invalid(path, found)
	}
	return c, nil
}

// lookup finds a variable in an environment; the last one counts.
func lookup(environ []string, name string) (value string) {
	for _, kv := range environ {
		if v, ok := strings.CutPrefix(kv, name+"="); ok {
			value = v
		}
	}
	return value
}

// FromEnvironment is Load without a file: the defaults, and the environment above them.
func FromEnvironment(environ []string) (Config, error) {
	c := Default()
	if found := c.override(environ); len(found) > 0 {
		return Config{}, invalid("of the environment", found)
	}
	return c, c.Complete()
}

// Complete fills what a Config made by hand leaves out, relative paths from the working directory, and validates it.
func (c *Config) Complete() error {
	dir, err := os.Getwd()
	if err != nil {
		return fmt.Errorf("find working directory: %w", err)
	}
	c.complete(dir)
	if err := c.Validate(); err != nil {
		return Invalid("made of flags and environment", err)
	}
	return nil
}

// Invalid is the fault of a configuration that cannot be used; where names the file.
func Invalid(where string, err error) error {
	return &flint.Fault{
		Code: "config.invalid", What: "use configuration " + where, Kind: flint.ErrConfig, Err: err,
		Fix: "mend what is named above; docs/reference.md lists every key",
	}
}

// invalid is Invalid for what was found. A single fault has a better fix of its own.
func invalid(where string, found problems) error {
	var fault *flint.Fault
	if len(found) == 1 && errors.As(found[0], &fault) {
		return found[0]
	}
	return Invalid(where, found.join())
}

// decode reads what of the document can be read, and returns what cannot. An error is for a document of which nothing can.
func (c *Config) decode(src []byte) (problems, error) {
	if len(src) > maxFile {
		return nil, fmt.Errorf("it has %d bytes; the limit is %d", len(src), maxFile)
	}
	var doc, more yaml.Node
	dec := yaml.NewDecoder(bytes.NewReader(src))
	if err := dec.Decode(&doc); errors.Is(err, io.EOF) {
		return nil, errors.New("it is empty")
	} else if err != nil {
		return nil, err
	}
	if err := dec.Decode(&more); !errors.Is(err, io.EOF) {
		return nil, errors.New("it holds more than one YAML document")
	}
	top := doc.Content[0]
	if top.Kind != yaml.MappingNode {
		return nil, errors.New("it is not made of keys and their values")
	}
	var found problems
	found.prune(top, reflect.TypeFor[Config](), "")
	return found, top.Decode(c)
}

// prune walks the document beside the type it is decoded into, and notes of each key or value that does not fit where it
// stands. yaml.v3 by itself knows only the line, and of some values not even that. What does not fit is taken out, so that
// the rest can be decoded and looked at.
func (p *problems) prune(n *yaml.Node, t reflect.Type, path string) (fits bool) {
	if n.Kind == yaml.AliasNode {
		n = n.Alias
	}
	text := reflect.PointerTo(t).Implements(reflect.TypeFor[encoding.TextUnmarshaler]())
	switch {
	case t.Kind() == reflect.Slice && n.Kind == yaml.SequenceNode:
		var fit []*yaml.Node
		for i, item := range n.Content {
			switch ok := p.prune(item, t.Elem(), fmt.Sprintf("%s[%d]", path, i)); {
			case ok:
				fit = append(fit, item)
			case t.Elem().Kind() == reflect.Struct: // those behind it keep their numbers
				fit = append(fit, &yaml.Node{Kind: yaml.MappingNode, Tag: "!!map"})
			}
		}
		n.Content = fit
	case (t.Kind() == reflect.Struct || t.Kind() == reflect.Map) && n.Kind == yaml.MappingNode && !text:
		p.pruneMapping(n, t, path)
	default:
		if err := n.Decode(reflect.New(t).Interface()); err != nil {
			*p = append(*p, &problem{path, fmt.Errorf("line %d, column %d: %s: %w", n.Line, n.Column, path, plainly(err))})
			return false
		}
	}
	return true
}

func (p *problems) pruneMapping(n *yaml.Node, t reflect.Type, path string) {
	var known map[string]reflect.Type
	if t.Kind() == reflect.Struct {
		known = fields(t)
	}
	var fit []*yaml.Node
	lines := map[string]int{}
	for i := 0; i+1 < len(n.Content); i += 2 {
		key, value := n.Content[i], n.Content[i+1]
		wrong := func(concerns, format string, args ...any) {
			*p = append(*p, &problem{concerns, fmt.Errorf("line %d, column %d: %w", key.Line, key.Column, fmt.Errorf(format, args...))})
		}
		at := strings.TrimPrefix(path+"."+key.Value, ".")
		vt, ok := known[key.Value]
		if known == nil {
			vt, ok = t.Elem(), true
		}
		switch {
		case !ok:
			near := nearest(key.Value, known)
			wrong(strings.TrimPrefix(path+"."+near, "."), "unknown key %q%s", key.Value, suggest(path, near))
		case lines[key.Value] > 0:
			wrong("", "%s is given twice; it is in line %d already", at, lines[key.Value])
		case p.prune(value, vt, at):
			fit = append(fit, key, value)
		}
		lines[key.Value] = key.Line
	}
	n.Content = fit
}

// plainly takes yaml.v3's own heading and line off an error about one value.
func plainly(err error) error {
	var te *yaml.TypeError
	if !errors.As(err, &te) || len(te.Errors) == 0 {
		return err
	}
	_, text, ok := strings.Cut(te.Errors[0], ": ")
	if !ok {
		text = te.Errors[0]
	}
	return errors.New(text)
}

func fields(t reflect.Type) map[string]reflect.Type {
	known := map[string]reflect.Type{}
	for f := range t.Fields() {
		if tag := f.Tag.Get("yaml"); tag != "-" {
			known[tag] = f.Type
		}
	}
	return known
}

// suggest says where a key was looked for, and which one may have been meant.
func suggest(path, near string) (text string) {
	if path != "" {
		text = " in " + path
	}
	if near != "" {
		text += fmt.Sprintf("; did you mean %q?", near)
	}
	return text
}

// nearest returns the known key that is most like another; "" where none is.
func nearest[T any](key string, known map[string]T) string {
	best, bestDist := "", len(key)/2+2
	for k := range known {
		if d := distance(key, k); d < bestDist || d == bestDist && k < best {
			best, bestDist = k, d
		}
	}
	return best
}

// distance is the Levenshtein distance in bytes.
func distance(a, b string) int {
	row := make([]int, len(b)+1)
	for j := range row {
		row[j] = j
	}
	for i := range len(a) {
		diag := row[0]
		row[0] = i + 1
		for j := range len(b) {
			cost := diag
			if a[i] != b[j] {
				cost++
			}
			diag = row[j+1]
			row[j+1] = min(cost, diag+1, row[j]+1)
		}
	}
	return row[len(b)]
}

// override applies FLINT_SECTION_KEY variables to scalars. A variable with our prefix that names nothing is an error,
// as an unknown key in the file is.
func (c *Config) override(environ []string) (found problems) {
	known := map[string]reflect.Value{}
	collect(reflect.ValueOf(c).Elem(), "FLINT", known)
	for _, kv := range environ {
		name, value, _ := strings.Cut(kv, "=")
		// Tests have variables of their own, and one names the file.
		if !strings.HasPrefix(name, "FLINT_") || strings.HasPrefix(name, "FLINT_TEST_") || name == FileVariable {
			continue
		}
		field, ok := known[name]
		if !ok {
			found = append(found, &problem{"", fmt.Errorf("unknown variable %s%s", name, suggest("", nearest(name, known)))})
			continue
		}
		if err := yaml.Unmarshal([]byte(value), field.Addr().Interface()); err != nil {
			found.add(name, "%w", err)
		}
	}
	return found
}

func collect(v reflect.Value, prefix string, known map[string]reflect.Value) {
	for f, value := range v.Fields() {
		tag := f.Tag.Get("yaml")
		if tag == "-" || f.Type.Kind() == reflect.Slice || f.Type.Kind() == reflect.Map {
			continue
		}
		name := prefix + "_" + strings.ToUpper(tag)
		_, text := value.Addr().Interface().(encoding.TextUnmarshaler)
		if f.Type.Kind() == reflect.Struct && !text {
			collect(value, name, known)
			continue
		}
		known[name] = value
	}
}
