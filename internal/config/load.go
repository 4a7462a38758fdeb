package config

import (
	"bytes"
	"encoding"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"reflect"
	"strings"

	"golang.org/x/sys/unix"
	"gopkg.in/yaml.v3"

	"flint"
)

// maxFile bounds the configuration file, and separately the key file.
const maxFile = 1 << 20

// Load reads, completes and validates the file. The environment (as of os.Environ: KEY=value) overrides the file's
// scalars: FLINT_GITHUB_APP_ID sets github.app_id. Relative paths are relative to the file. Every error is a
// *flint.Fault of kind flint.ErrConfig, or flint.ErrNotFound where there is no such file.
func Load(path string, environ []string) (Config, error) {
	src, err := os.ReadFile(path)
	if errors.Is(err, unix.EISDIR) {
		return Config{}, Invalid(path, errors.New("it is a directory"))
	}
	if errors.Is(err, fs.ErrNotExist) {
		return Config{}, &flint.Fault{
			Code: "config.missing", What: "read configuration " + path, Kind: flint.ErrNotFound, Err: fs.ErrNotExist,
			Fix: "name the file with --config, or write one: `flint config example` prints a start",
		}
	}
	if err != nil {
		return Config{}, &flint.Fault{
			Code: "config.unreadable", What: "read configuration", Kind: flint.ErrPermission, Err: err,
			Fix: "let the user flint runs as read it",
		}
	}
	return Parse(path, src, environ)
}

// Parse is Load for bytes already read; path names them in messages and anchors relative paths.
func Parse(path string, src []byte, environ []string) (Config, error) {
	c := Default()
	if err := c.decode(src); err != nil {
		return Config{}, Invalid(path, err)
	}
	if err := c.override(environ); err != nil {
		return Config{}, Invalid("of the environment", err)
	}
	dir, err := filepath.Abs(filepath.Dir(path))
	if err != nil {
		return Config{}, Invalid(path, err)
	}
	c.complete(dir)
	c.findCredentials(lookup(environ, "CREDENTIALS_DIRECTORY"))
	if err := c.Validate(); err != nil {
		return Config{}, Invalid(path, err)
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
	if err := c.override(environ); err != nil {
		return Config{}, Invalid("of the environment", err)
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
		Fix: "mend the lines named above; docs/reference.md lists every key",
	}
}

func (c *Config) decode(src []byte) error {
	if len(src) > maxFile {
		return fmt.Errorf("it has %d bytes; the limit is %d", len(src), maxFile)
	}
	var doc yaml.Node
	if err := yaml.Unmarshal(src, &doc); err != nil {
		return err
	}
	if len(doc.Content) == 0 {
		return errors.New("it is empty")
	}
	if errs := problems(doc.Content[0], reflect.TypeFor[Config](), ""); len(errs) > 0 {
		return errors.Join(errs...)
	}
	dec := yaml.NewDecoder(bytes.NewReader(src))
	dec.KnownFields(true)
	if err := dec.Decode(c); err != nil {
		return err
	}
	var more yaml.Node
	if err := dec.Decode(&more); err == nil {
		return errors.New("it holds more than one YAML document")
	}
	return nil
}

// problems walks the document beside the type it is decoded into, and says of each key or value that does not fit where it
// stands. yaml.v3 by itself knows only the line, and of some values not even that.
func problems(n *yaml.Node, t reflect.Type, path string) (errs []error) {
	if n.Kind == yaml.AliasNode {
		n = n.Alias
	}
	text := reflect.PointerTo(t).Implements(reflect.TypeFor[encoding.TextUnmarshaler]())
	switch {
	case t.Kind() == reflect.Slice && n.Kind == yaml.SequenceNode:
		for i, item := range n.Content {
			errs = append(errs, problems(item, t.Elem(), fmt.Sprintf("%s[%d]", path, i))...)
		}
	case t.Kind() == reflect.Struct && n.Kind == yaml.MappingNode && !text:
		known := fields(t)
		for i := 0; i+1 < len(n.Content); i += 2 {
			key, value := n.Content[i], n.Content[i+1]
			if ft, ok := known[key.Value]; ok {
				errs = append(errs, problems(value, ft, strings.TrimPrefix(path+"."+key.Value, "."))...)
				continue
			}
			errs = append(errs, fmt.Errorf("line %d, column %d: unknown key %q%s", key.Line, key.Column, key.Value, suggest(key.Value, path, known)))
		}
	case n.Kind == yaml.ScalarNode || t.Kind() != reflect.Map:
		if err := n.Decode(reflect.New(t).Interface()); err != nil {
			errs = append(errs, fmt.Errorf("line %d, column %d: %s: %w", n.Line, n.Column, path, plainly(err)))
		}
	}
	return errs
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

func suggest(key, path string, known map[string]reflect.Type) string {
	in := ""
	if path != "" {
		in = " in " + path
	}
	best, bestDist := "", len(key)/2+2
	for k := range known {
		if d := distance(key, k); d < bestDist || d == bestDist && k < best {
			best, bestDist = k, d
		}
	}
	if best == "" {
		return in
	}
	return fmt.Sprintf("%s; did you mean %q?", in, best)
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
func (c *Config) override(environ []string) error {
	known := map[string]reflect.Value{}
	collect(reflect.ValueOf(c).Elem(), "FLINT", known)
	var errs []error
	for _, kv := range environ {
		name, value, _ := strings.Cut(kv, "=")
		// Whoever exports the variable of `make test-kvm` can still run all else.
		if !strings.HasPrefix(name, "FLINT_") || strings.HasPrefix(name, "FLINT_TEST_") || name == "FLINT_CONFIG" || name == "FLINT_FIRECRACKER_DIR" {
			continue
		}
		field, ok := known[name]
		if !ok {
			names := map[string]reflect.Type{}
			for k := range known {
				names[k] = nil
			}
			errs = append(errs, fmt.Errorf("unknown variable %s%s", name, suggest(name, "", names)))
			continue
		}
		if err := yaml.Unmarshal([]byte(value), field.Addr().Interface()); err != nil {
			errs = append(errs, fmt.Errorf("%s: %w", name, err))
		}
	}
	return errors.Join(errs...)
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
